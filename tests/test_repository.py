"""What the repository holds twice is the same, and a checkout needs no symbolic links, which Windows does not make."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "beft_trl"
# The package's own files, for a wheel, and those that a clone shows.
COPIES = [(PACKAGE / "cli" / "accelerate_configs", REPOSITORY / "recipes" / "accelerate_configs")] + [
    (PACKAGE / "demo_files" / path, REPOSITORY / path)
    for path in ("recipes/demo.yaml", "examples/data/support_train.jsonl", "examples/data/support_test.jsonl")
]


@pytest.mark.parametrize(("shipped", "shown"), COPIES, ids=[path.name for path, _ in COPIES])
def test_what_a_wheel_ships_is_what_a_clone_shows(shipped, shown):
    contents = [
        {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        if folder.is_dir()
        else folder.read_bytes()
        for folder in (shipped, shown)
    ]
    assert contents[0] == contents[1]


def test_nothing_in_it_is_a_symbolic_link():
    files = subprocess.run(["git", "ls-files", "-s"], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if files.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in files.stdout.splitlines() if line.startswith("120000")]


def test_ci_runs_the_commands_of_readme_and_contributing():
    pages = "".join((REPOSITORY / page).read_text(encoding="utf-8") for page in ("README.md", "CONTRIBUTING.md"))
    lines = re.findall(r"^pip install -c .*", pages, re.MULTILINE)
    told = {part.strip() for line in lines for part in line.split("&&")}
    install, run = ((REPOSITORY / ".ci" / file).read_text(encoding="utf-8") for file in ("install", "run"))
    commands = {line.strip() for line in install.splitlines() if line.strip().startswith("pip install")}
    commands |= set(re.findall(r"^(?: *|.*=\w+ )((?:accelerate launch|pytest) .*)", run, re.MULTILINE))
    assert commands == told


def test_the_classifiers_are_the_pythons_that_contributing_says_were_tested():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    claimed = re.findall(r"Programming Language :: Python :: (3\.\d+)", " ".join(project["classifiers"]))
    [tested] = re.findall(
        r"^The tests have run on (Python .*)$",
        (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert claimed == re.findall(r"3\.\d+", tested)
    assert project["requires-python"] == f">={claimed[0]}"
