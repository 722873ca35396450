"""What the README tells a user to type is what works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

from beft_trl.config import SETTINGS
from beft_trl.demo import make_demo
from beft_trl.engines import ENGINES, PRECISIONS, condition


REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the demo's files are, and a tiny model takes the place of the demo's."""
    folder = tmp_path_factory.mktemp("readme")
    base = folder / "models" / "SmolLM2-135M-Instruct"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    make_llama(max_position_embeddings=1024).save_pretrained(base)
    tokenizer.save_pretrained(base)
    make_demo(folder)
    return folder


def run(command: list[str], folder: Path) -> str:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_the_python_snippet_runs(folder):
    snippet = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    assert run([sys.executable, "-c", snippet], folder).splitlines()[-1] in ("query", "key", "value")
    assert (folder / "outputs" / "readme" / "adapter_model.safetensors").is_file()


def test_every_beft_command_runs(folder):
    """In the README's order, word for word: each needs what those before it have written."""
    commands = re.findall(r"^beft [^#\n]*", README, flags=re.MULTILINE)
    known = {"check", "score", "train", "info", "merge", "export", "eval", "tune"}
    assert {command.split()[1] for command in commands} == known
    for command in commands:
        short = ["--trials", "2", "--max_steps", "8"] if command.split()[1] == "tune" else []
        said = run([str(Path(sys.executable).with_name("beft")), *command.split()[1:], *short], folder)
        assert said.count("Ranking: ") == (command.split()[1] == "train")  # by one process of all
    assert AutoModelForCausalLM.from_pretrained(folder / "outputs" / "demo-merged").config.attention_bias


@pytest.mark.parametrize(
    ("page", "prefix"), [("README.md", ""), ("recipes/axolotl/README.md", "beft_")], ids=["TRL", "Axolotl"]
)
def test_the_settings_of_a_page_are_those_of_the_configuration(page, prefix):
    defaults = {name: "" if each.default is None else f"`{each.default}`" for name, each in SETTINGS.items()}
    rows = [f"| `{prefix}{name}` | {defaults[name]} | {each.metadata['help']} |" for name, each in SETTINGS.items()]
    expected = "\n".join([f"| {'key' if prefix else 'field'} | default | |", "|---|---|---|", *rows])
    assert expected in (REPOSITORY / page).read_text(encoding="utf-8"), f"{page} must have:\n{expected}"


def test_every_file_of_the_tree_exists_and_every_module_is_in_it():
    tree = re.search(r"## Files\n\n```text\n(.*?)```", README, flags=re.DOTALL)[1]
    folder, named = None, set()
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name
        else:
            named.add(folder + name)
        assert (REPOSITORY / (folder if not line.startswith(" ") else folder + name)).exists(), line
    package = REPOSITORY / "beft_trl"
    files = [path for path in package.rglob("*.py") if not path.stem.startswith("__")]
    modules = {f"beft_trl/{path.relative_to(package).as_posix()}" for path in files}
    assert modules <= named


def test_the_matrix_is_the_one_that_the_refusals_enforce():
    table = re.search(r"\| base weights \|(.*?)\n\n(.*?)\n\n", README, flags=re.DOTALL)
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[:-3]]
    assert heading[1:] == list(ENGINES.values())
    assert [row[0] for row in rows] == list(PRECISIONS.values())
    notes = dict(re.findall(r"\((\d)\) with (.*?)[;.]", table[2]))
    for row, precision in zip(rows, PRECISIONS, strict=True):
        for cell, engine in zip(row[1:], ENGINES, strict=True):
            note = re.fullmatch(r"yes(?: \((\d)\))?", cell)[1]
            assert notes.get(note) == condition(engine, precision), (precision, engine)


def test_every_recipe_that_is_named_exists():
    for path in set(re.findall(r"(?:recipes|examples)/[\w./-]+\.(?:yaml|py|jsonl|png)", README)):
        assert (REPOSITORY / path).is_file(), path
    for name in re.findall(r"`([a-z0-9.-]+-\d[\d.]*[mb])`", README):
        assert (REPOSITORY / "recipes" / name / "README.md").is_file(), name
