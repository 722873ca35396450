"""What README and docs/ tell a user to type works, their tables are those of the code, their links lead somewhere."""

import ast
import importlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from contextlib import redirect_stdout
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import typer
import yaml
from conftest import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, BertConfig, BertModel, TrainingArguments
from trl import ScriptArguments, SFTConfig

import beft_trl
from beft_trl import BeftSFTConfig, BeftTrainingArguments
from beft_trl.cli.launch import launch_config
from beft_trl.cli.main import app, main
from beft_trl.cli.recipe import BeftScriptArguments, parse_recipe
from beft_trl.config import SETTINGS, BeftConfigMixin
from beft_trl.demo import make_demo
from beft_trl.engines import ENGINES, PRECISIONS, condition
from beft_trl.report import PAPER


REPOSITORY = Path(__file__).parents[1]
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(path for path in REPOSITORY.glob("docs/**/*.md") if "upstream" not in path.parts),
    *sorted(REPOSITORY.glob("recipes/*/README.md")),
]
TEXT = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXT["README.md"]
CONTRIBUTING = TEXT["CONTRIBUTING.md"]
COMMANDS = typer.main.get_command(app).commands
# Commands of other programs, which are not looked at.
OTHERS = {"axolotl", "git", "llama-server", "transformers", "twine", "vllm"}
ROWS = {"support_train.jsonl": 24, "support_test.jsonl": 12}  # of the demo's messages: each takes its time


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT[page], flags=re.DOTALL | re.MULTILINE)


def pages_with(language: str) -> list[str]:
    return [page for page in TEXT if blocks(page, language)]


def lines(page: str) -> list[list[str]]:
    """The commands of a page's bash blocks, as words without comments."""
    text = "\n".join(blocks(page, "bash"))
    parts = [part for line in text.splitlines() for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def beft(words: list[str]) -> str:
    """Runs a `beft` command in this process: its imports take seconds in one of its own."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 0, words
    return said.getvalue()


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The demo's folder as the current one, where tiny models stand for those of the hub."""
    folder = tmp_path_factory.mktemp("pages")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64}
    bert = BertModel(BertConfig(**size, num_hidden_layers=2, num_attention_heads=2))
    for name, model in {
        "models/SmolLM2-135M-Instruct": make_llama(max_position_embeddings=1024),
        "HuggingFaceTB/SmolLM2-135M-Instruct": make_llama(max_position_embeddings=1024),
        "google-bert/bert-base-cased": bert,
    }.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    make_demo(folder)
    for name, count in ROWS.items():
        file = folder / "examples" / "data" / name
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("beft_trl.config.ENOUGH_STEPS", 8)
        yield folder


@pytest.fixture(scope="module")
def said(there):
    """What the README's Python prints, and each of its `beft` commands: word for word, each after those before it."""
    said = {"python": run_python("README.md")}
    for words in lines("README.md"):
        if words[0] == "beft":
            short = ["--trials", "2", "--max_steps", "8"] if words[1] == "tune" else []
            said[words[1]] = beft([*words, *short])
    for name in ("billing", "returns", "billing-2"):
        shutil.copytree("outputs/demo", f"outputs/{name}")
    return said


def run_python(page: str) -> str:
    said = io.StringIO()
    with redirect_stdout(said):
        for number, snippet in enumerate(blocks(page, "python")):
            exec(compile(snippet, f"{page}, block {number + 1}", "exec"), {"__name__": "page"})
    return said.getvalue()


def test_the_readme_runs(said, there):
    assert said.keys() == {"python", *COMMANDS}
    ranking, selected = said["python"].splitlines()[-2:]
    assert ast.literal_eval(ranking)[0] == selected
    assert "Ranking: " in said["train"]
    for name in ("quickstart", "demo", "demo-lora", "demo-tuned"):
        assert Path("outputs", name, "adapter_model.safetensors").is_file()
    assert AutoModelForCausalLM.from_pretrained("outputs/demo-merged").config.attention_bias


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != "README.md"])
def test_the_python_of_a_page_runs(page, said):
    run_python(page)


@pytest.mark.parametrize("page", pages_with("bash"))
def test_the_command_lines_of_a_page_are_understood(page, there):
    for words in lines(page):
        while "=" in words[0]:  # what a command has in its environment
            words = words[1:]
        program, *arguments = words
        if program == "beft":
            check_beft([word for word in arguments if word != "--debug"])
        elif program == "pip":
            check_pip(arguments)
        elif words[:2] == ["accelerate", "launch"]:
            for word in words[2:]:
                assert not re.search(r"\.(py|yaml)$", word) or (REPOSITORY / word).is_file(), word
        elif program == "python":
            module = arguments[1].replace(".", "/") + ".py" if arguments[0] == "-m" else arguments[0]
            foreign = arguments[1:2] == ["build"] or module == "convert_lora_to_gguf.py"
            assert foreign or (REPOSITORY / module).is_file(), words
        elif program == "bash":
            assert (REPOSITORY / arguments[0].partition("beft_trl/")[2]).is_file(), words
        else:
            assert program in OTHERS | {"mkdocs", "mypy", "pytest", "ruff", ".ci/run"}, words


def check_beft(words: list[str]) -> None:
    """Parses a command by its own parser, and what it takes of a recipe by the recipe's."""
    name, *arguments = words
    context = COMMANDS[name].make_context(name, list(arguments))
    if context.params.get("launch"):
        launch_config(context.params["launch"])
    recipe = context.params.get("recipe")
    if recipe is not None and Path(recipe).is_file():
        parse_recipe(["--config", recipe, *context.args])
    else:
        assert not context.args, context.args


def check_pip(words: list[str]) -> None:
    known = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= known["optional-dependencies"].keys(), words
    for word in words:
        assert not word.startswith("constraints") or (REPOSITORY / word).is_file(), word


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_the_yaml_of_a_page_is_a_recipe(page, there, tmp_path):
    for text in blocks(page, "yaml"):
        given = yaml.safe_load(text)
        if "plugins" in given:  # of Axolotl
            assert given["plugins"] == ["beft_trl.axolotl.BeftPlugin"] and given["adapter"] == "beft"
            assert {key.removeprefix("beft_") for key in given if key.startswith("beft_")} <= SETTINGS.keys()
            continue
        demo = yaml.safe_load(Path("recipes/demo.yaml").read_text(encoding="utf-8"))
        if "dataset_name" in given:
            demo = {key: value for key, value in demo.items() if key not in ("train_file", "test_file")}
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**demo, **given}), encoding="utf-8")
        parse_recipe(["--config", str(file)])


@pytest.mark.parametrize("page", pages_with("json"))
def test_the_json_of_a_page_is_json(page):
    for text in blocks(page, "json"):
        for line in text.splitlines():
            json.loads(line)


def row(name: str, default, meaning: str) -> str:
    return f"| `{name}` | {'' if default in (None, MISSING) else f'`{default}`'} | {meaning} |"


def settings_table(configuration: type, names) -> str:
    of_name = {each.name: each for each in fields(configuration)}
    return "\n".join(row(name, of_name[name].default, of_name[name].metadata["help"]) for name in names)


def changed(configuration: type, *bases: type) -> list[str]:
    """The fields that have another default or another help than in each of the bases."""

    def told(of: type) -> set:
        return {(each.name, str(each.default), each.metadata.get("help")) for each in fields(of)}

    known = set().union(*map(told, bases))
    return [name for name, *others in sorted(told(configuration) - known)]


# The tables of docs/reference/settings.md, in its order.
TABLES = (
    (BeftSFTConfig, list(SETTINGS)),
    (BeftSFTConfig, [name for name in changed(BeftSFTConfig, SFTConfig) if name not in SETTINGS]),
    (BeftScriptArguments, changed(BeftScriptArguments, ScriptArguments)),
    (BeftTrainingArguments, changed(BeftTrainingArguments, TrainingArguments, BeftConfigMixin)),
)


def test_the_settings_are_those_of_the_configuration():
    for configuration, names in TABLES:
        expected = "| field | default | |\n|---|---|---|\n" + settings_table(configuration, names) + "\n\n"
        assert expected in TEXT["docs/reference/settings.md"] + "\n", f"the page must have:\n{expected}"


def command_section(name: str) -> str:
    command = COMMANDS[name]
    rows = []
    for each in command.params:
        words = each.opts + each.secondary_opts if each.param_type_name == "option" else [each.name]
        if "--help" not in words:
            shown = f"`{each.default}`" if isinstance(each.default, (int, str)) and each.default is not False else ""
            rows.append(f"| {', '.join(f'`{word}`' for word in words)} | {shown} | {each.help} |")
    about = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help)
    table = "\n".join(["| | default | |", "|---|---|---|", *rows])
    return f"## beft {name}\n\n{about}\n\n{table}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_has_every_option_of_a_command(name):
    expected = command_section(name)
    assert expected in TEXT["docs/reference/commands.md"], f"docs/reference/commands.md must have:\n{expected}"


def test_the_reference_has_every_public_name():
    shown = re.findall(r"^::: ([\w.]+)\.(\w+)$", TEXT["docs/reference/python.md"], re.MULTILINE)
    assert set(beft_trl.__all__) <= {name for _, name in shown}
    for module, name in shown:
        assert hasattr(importlib.import_module(module), name), name


def test_the_matrix_is_the_one_that_the_refusals_enforce():
    table = re.search(r"\| base weights \|(.*?)\n\n(.*?)\n\n", TEXT["docs/engines.md"], flags=re.DOTALL)
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[:-3]]
    assert heading[1:] == list(ENGINES.values())
    assert [row[0] for row in rows] == list(PRECISIONS.values())
    notes = dict(re.findall(r"\((\d)\) with (.*?)[;.]", table[2]))
    for row, precision in zip(rows, PRECISIONS, strict=True):
        for cell, engine in zip(row[1:], ENGINES, strict=True):
            note = re.fullmatch(r"yes(?: \((\d)\))?", cell)[1]
            assert notes.get(note) == condition(engine, precision), (precision, engine)


def texts_of(tree: ast.AST) -> list[str]:
    """The texts of a module, an f-string's with a NUL for each value."""
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
    return found


def test_every_message_that_is_explained_is_in_the_code():
    modules = (REPOSITORY / "beft_trl").rglob("*.py")
    said = [text for file in modules for text in texts_of(ast.parse(file.read_text(encoding="utf-8")))]
    messages = re.findall(r"^### `(.*)`$", TEXT["docs/troubleshooting.md"], re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        pattern = ".*".join(re.escape(part) for part in message.split("..."))
        assert any(re.search(pattern, text, re.DOTALL) for text in said), message


def anchors(text: str) -> set[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", TEXT)
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = REPOSITORY / page
        target = Path(os.path.normpath(target.parent / path)) if path else target
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_what_is_named_exists():
    for text in TEXT.values():
        for path in set(re.findall(r"(?<![\w/])(?:recipes|examples)/[\w./-]+\.(?:yaml|py|jsonl|png)", text)):
            assert (REPOSITORY / path).is_file(), path
    for name in re.findall(r"`([a-z0-9.-]+-\d[\d.]*[mb])`", TEXT["docs/command.md"]):
        assert (REPOSITORY / "recipes" / name / "README.md").is_file(), name


def test_every_page_is_in_the_navigation():
    def leaves(part):
        return [part] if isinstance(part, str) else [leaf for each in part for leaf in leaves(list(each.values())[0])]

    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {page.removeprefix("docs/") for page in TEXT if page.startswith("docs/")}
    assert pages <= set(leaves(settings["nav"]))


def test_the_citations_are_that_of_the_model_card():
    assert PAPER["citation"] in README
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert cited["title"] == PAPER["title"] and cited["url"].endswith(PAPER["id"])
    names = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in cited["authors"])
    assert f"author = {{{names}}}" in PAPER["citation"]


def test_every_file_of_the_tree_exists_and_every_module_is_in_it():
    tree = re.search(r"## Files\n\n```text\n(.*?)```", CONTRIBUTING, flags=re.DOTALL)[1]
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
