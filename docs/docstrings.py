"""A Griffe extension: docstrings in the form of Hugging Face's, as mkdocstrings reads Google's."""

import re

from griffe import Extension


class HuggingFaceDocstrings(Extension):
    """Takes the backticks off types, and the brackets off links, which lead nowhere here."""

    def on_object(self, *, obj, **others):
        if obj.docstring is not None:
            text = re.sub(r"\[`([\w.]+)`\]", r"`\1`", obj.docstring.value)
            text = re.sub(r"^(\s+`?\w+`? \()(.+)(\):)", _plain, text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^(\s+)`([\w.\[\], |]+)`: ", r"\1\2: ", text, flags=re.MULTILINE)


def _plain(match: re.Match) -> str:
    return match[1] + match[2].replace("`", "").replace("*optional*", "optional") + match[3]
