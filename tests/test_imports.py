"""How the modules of the package depend on each other: one way only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import beft_trl


PACKAGE = Path(beft_trl.__file__).parent
ENDS = {"cli.main", "axolotl"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imported_by(file: Path) -> set[str]:
    """Modules of the package that a module imports anywhere, functions and type checking included."""
    found = set()
    folder = file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*folder[: len(folder) - node.level + 1], part]) for part in parts}
    return found


MODULES = [path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")]
GRAPH = {name_of(path): imported_by(path) for path in MODULES}


def test_arrows_go_one_way():
    """Up, in the picture of CONTRIBUTING.md, which has every module."""
    pages = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    picture = next(block for block in re.findall(r"```text\n(.*?)```", pages, flags=re.DOTALL) if "layout" in block)
    line_of = {module: number for number, line in enumerate(picture.splitlines()) for module in line.split()}
    assert line_of.keys() == GRAPH.keys()
    wrong = [
        (module, used) for module, imports in GRAPH.items() for used in imports if line_of[used] >= line_of[module]
    ]
    assert not wrong


def test_nothing_imports_the_command_line_or_the_plugin():
    assert not [module for module, imports in GRAPH.items() if imports & ENDS]


def test_only_its_own_module_reads_what_is_private_to_a_trainer():
    """But for what is private to one of Transformers or TRL, in `compat`."""
    for path in MODULES:
        if path.parent.name != "compat":
            code = path.read_text(encoding="utf-8")
            read = set(re.findall(r"\btrainer\.(_[a-z]\w*)", code))
            assert read <= set(re.findall(r"\bself\.(_[a-z]\w*)", code)), path


def test_axolotl_is_imported_only_by_its_plugin():
    naming = {name_of(path) for path in MODULES if re.search(r"^\s*(from|import) axolotl", path.read_text(), re.M)}
    assert naming == {"axolotl"}


def test_importing_the_package_imports_nothing_heavy():
    heavy = "import sys, beft_trl; print({'torch', 'transformers', 'trl', 'peft', 'deepspeed'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
