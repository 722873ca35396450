"""The notebook runs from its first cell to its last, with a tiny model in the place of the demo's."""

import base64
from pathlib import Path

import pytest
from conftest import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM


NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return pytest.importorskip("nbformat").read(NOTEBOOK, as_version=4)


def test_no_output_is_committed(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)


def test_every_cell_runs_and_both_pictures_are_shown(notebook, tmp_path):
    client = pytest.importorskip("nbclient").NotebookClient
    pytest.importorskip("ipykernel")
    base = tmp_path / "models" / "SmolLM2-135M-Instruct"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    make_llama(max_position_embeddings=1024).save_pretrained(base)
    tokenizer.save_pretrained(base)
    # All but the installation, which is tagged.
    client(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path}}, skip_cells_with_tag="skip-execution"
    ).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count is None for cell in cells] == [True] + [False] * (len(cells) - 1)
    shown = [
        output.data["image/png"] for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    files = [tmp_path / "outputs" / "quickstart" / f"beft_{name}.png" for name in ("scores", "curve")]
    assert [base64.b64decode(each) for each in shown] == [file.read_bytes() for file in files]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "outputs" / "quickstart-merged").config.attention_bias
    assert "text/plain" in cells[-1].outputs[-1].data  # the answer
