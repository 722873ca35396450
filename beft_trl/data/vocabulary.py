"""Whether a run uses only tokens that its base model has learnt: a bias does not teach it another one."""

import os
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from ..compat.models import local_file, revision_of


TEMPLATE_FILES = (".jinja", ".j2")
WHY = "Their embeddings are random, and a run that trains a bias neither trains nor saves them."


def known_tokens_only(given: dict[str, Any], config: Any) -> None:
    """Refuses tokens whose embeddings would be neither trained nor saved, and takes a chat template without them.

    TRL copies the template of another model together with its tokens, and then resizes the embeddings. If there is no
    new token among them, the template is put into the tokenizer here, and the embeddings stay as they are.

    Args:
        given (`dict`): the arguments of a trainer by name. `processing_class` and `args` are changed.
        config (`PreTrainedConfig`): of the model.

    Raises:
        ValueError: for tokens that the base does not have, from a template or a tokenizer.
    """
    model, args = given["model"], given["args"]
    name = model if isinstance(model, str) else model.name_or_path
    processor = given.get("processing_class")
    source = getattr(args, "chat_template_path", None)
    if source is not None and not (os.path.isfile(source) and source.endswith(TEMPLATE_FILES)):
        trust = getattr(args, "trust_remote_code", False)
        processor = processor or AutoProcessor.from_pretrained(name, trust_remote_code=trust)
        tokenizer, template = _tokenizer(processor), AutoTokenizer.from_pretrained(source)
        if tokenizer is None:
            return
        added = [each.content for each in template.added_tokens_decoder.values()]
        new = [token for token in added if token not in tokenizer.get_vocab()]
        if new:
            raise ValueError(
                f"chat_template_path={source} brings {_told(new)} that {name} does not have. {WHY} Give the template "
                "as a .jinja file that is written with tokens of this model, or a base that knows these."
            )
        processor.chat_template = template.get_chat_template()
        tokenizer.eos_token = template.eos_token
        args.chat_template_path = None
        given["processing_class"] = processor
    elif processor is not None:
        _refuse_new(config, name, _tokenizer(processor))


def _refuse_new(config: Any, name: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if not name or tokenizer is None:
        return  # a model that was made, not loaded: there is nothing to compare with
    vocabulary = tokenizer.get_vocab()
    new: list[str] = []
    try:
        where: Any = {"revision": revision_of(config), "local_files_only": True}
        # Transformers makes up a tokenizer for a folder that has none.
        if local_file(name, "tokenizer_config.json", where["revision"]):
            known = AutoTokenizer.from_pretrained(name, **where).get_vocab()
            new = [token for token in vocabulary if token not in known]
        else:
            size = AutoConfig.from_pretrained(name, **where).get_text_config().vocab_size
            new = [token for token, index in vocabulary.items() if index >= size]
    except (OSError, ValueError, AttributeError):
        pass  # the base is not at hand any more, or has no tokenizer
    # Padding is masked, so that its embedding does not matter.
    new = sorted((token for token in new if token != tokenizer.pad_token), key=vocabulary.__getitem__)
    if new:
        raise ValueError(
            f"The tokenizer has {_told(new)} that {name} does not have. {WHY} Train them first, for example with LoRA "
            "and trainable_token_indices, save model and tokenizer, and give that folder as base; or use tokens that "
            "the base has."
        )


def _tokenizer(processor: Any) -> PreTrainedTokenizerBase | None:
    tokenizer = getattr(processor, "tokenizer", processor)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def _told(tokens: list[str]) -> str:
    shown = ", ".join(map(repr, tokens[:3])) + (", ..." if tokens[3:] else "")
    return f"{len(tokens)} token{'s' * (len(tokens) > 1)} ({shown})"
