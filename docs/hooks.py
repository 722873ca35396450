"""Hooks of MkDocs: pages of the repository that are not in docs/, and links that hold both there and on the site."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


REPOSITORY = Path(__file__).parents[1]
# Files outside docs/ that the site shows, and their place in it.
SHOWN = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "examples/benchmarks/README.md": "benchmarks.md",
    **{f"examples/images/{path.name}": f"images/{path.name}" for path in REPOSITORY.glob("examples/images/*.png")},
}
PATH_OF = {place: path for path, place in SHOWN.items()}
LINK = re.compile(r"(\]\()([^)#\s]+)")


def on_files(files, config):
    for path, place in SHOWN.items():
        files.append(File.generated(config, place, abs_src_path=str(REPOSITORY / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """A link of a file is relative to that file, so that it holds in the repository. Here it leads to the page that
    shows its target, or else to the repository."""
    place = page.file.src_uri
    home = posixpath.dirname(PATH_OF.get(place, f"docs/{place}"))

    def moved(match):
        if re.match(r"\w+:", match[2]):
            return match[0]
        target = posixpath.normpath(posixpath.join(home, match[2]))
        shown = SHOWN.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if shown is not None:
            return match[1] + posixpath.relpath(shown, posixpath.dirname(place) or ".")
        kind = "tree" if (REPOSITORY / target).is_dir() else "blob"
        return f"{match[1]}{config.repo_url}/{kind}/main/{target}"

    return LINK.sub(moved, markdown)
