"""The notebooks run in a kernel, in a short form, and are committed executed, small and without errors."""

from __future__ import annotations

import base64
import json

import pytest
from test_readme import ROOT, weights_missing

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORT = {  # what replaces values of the cell tagged `parameters`
    "ask_a_book": {"LENGTH": 6000},
    "calibrate_zerotuning": {"LENGTH": 128, "SAMPLES": 4, "GRID": "2"},
    "flexprefill_blocks": {"LENGTH": 2048},
    "inside_snapkv": {"LENGTH": 1024, "BUDGET": 0.1},
    "own_method": {"LENGTH": 512, "SAMPLES": 2},
    "quickstart": {"LENGTH": 1024},
    "second_question": {"LENGTH": 1024, "TEXTS": 1},
}
CLAIMS = {  # what the text says of a run and must hold in the short one too; over the notebook's variables
    "ask_a_book": "found.answer == '48213'",
    "calibrate_zerotuning": "right[FACTORS.index(1)] == SAMPLES and right[-1] == 0",
    "flexprefill_blocks": "sum(shares[0]) > sum(shares[-1])",
    "own_method": "found['dense'] == SAMPLES > found['random']",
    "quickstart": "all(found[methods.index('pyramidkv')])",
    "second_question": "all(n == TEXTS for name in ('quest', 'tokenselect, decoding') for n in found[name])",
}


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def outputs_of(cells):
    return [output for cell in cells for output in cell["outputs"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path):
    """From top to bottom in a kernel of its own; warnings are errors there too."""
    needed = "is not installed (pip install 'attnpatch[dev]')"
    nbclient, nbformat = (pytest.importorskip(name, reason=f"{name} {needed}") for name in ("nbclient", "nbformat"))
    pytest.importorskip("matplotlib", reason=f"matplotlib {needed}")
    if weights_missing():
        pytest.skip("the embedded model's weights are not in this checkout")
    notebook = nbformat.read(path, as_version=4)
    (tagged,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    names = SHORT[path.stem]
    tagged.source += f"\nassert {set(names)} <= globals().keys()\nglobals().update({names})"
    cells = [nbformat.v4.new_code_cell("import warnings\nwarnings.simplefilter('error')"), *notebook.cells]
    notebook.cells = [*cells, nbformat.v4.new_code_cell(f"assert {CLAIMS.get(path.stem, 'True')}")]
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    kinds = {output.output_type for output in outputs_of(c for c in notebook.cells if c.cell_type == "code")}
    assert kinds == {"stream", "display_data"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    outputs = outputs_of(cells)
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    pictures = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
    assert pictures and sum(len(base64.b64decode(p)) for p in pictures) < 150_000


def test_there_is_one():
    assert "inside_snapkv" in [path.stem for path in NOTEBOOKS]
