"""How the modules of the package depend on each other: one way only."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import beft_trl


PACKAGE = Path(beft_trl.__file__).parent
# What nothing but the command line may need, and what nothing may.
ENDS = {"cli", "axolotl"}


def imported_by(module: Path) -> set[str]:
    """Modules of the package that a module imports anywhere, functions and type checking included."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {alias.name for alias in node.names}
    return found


GRAPH = {path.stem: imported_by(path) for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def test_arrows_go_one_way():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises on a cycle
    assert order.index("layout") < order.index("tuner") < order.index("trainer") < order.index("cli")


def test_nothing_imports_the_command_line_or_the_plugin():
    assert not [module for module, imports in GRAPH.items() if imports & ENDS]


def test_axolotl_is_imported_by_its_plugin_alone():
    for path in PACKAGE.glob("*.py"):
        names = [
            name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
        ]
        assert path.stem == "axolotl" or not any(name.split(".")[0] == "axolotl" for name in names), path


def test_importing_the_package_imports_nothing_heavy():
    heavy = (
        "import sys, beft_trl; print([name for name in ('torch', 'trl', 'peft', 'deepspeed') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
