"""What the README tells a user to type is what works."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import make_llama, make_tokenizer

from beft_trl.engines import matrix


REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_python_snippet_runs(tmp_path):
    """In a folder where the model of the snippet is a tiny one."""
    snippet = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)[1]
    base = tmp_path / "models" / "SmolLM2-135M-Instruct"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    make_llama(max_position_embeddings=1024).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    run = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] in ("query", "key", "value")
    assert (tmp_path / "outputs" / "readme" / "adapter_model.safetensors").is_file()


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
    modules = {f"beft_trl/{path.name}" for path in (REPOSITORY / "beft_trl").glob("*.py")} - {"beft_trl/__init__.py"}
    assert modules <= named


def test_the_matrix_is_the_one_that_the_refusals_enforce():
    assert matrix() in README


def test_every_recipe_that_is_named_exists():
    for path in set(re.findall(r"(?:recipes|examples)/[\w./-]+\.(?:yaml|py|jsonl|png)", README)):
        assert (REPOSITORY / path).is_file(), path
    for name in re.findall(r"`([a-z0-9.-]+-\d[\d.]*[mb])`", README):
        assert (REPOSITORY / "recipes" / name / "README.md").is_file(), name
