"""The notebooks run, in a short form, and are committed executed, small and without errors."""

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
    "ask_a_book": lambda v: v["found"].answer == "48213",
    "calibrate_zerotuning": lambda v: v["right"][v["FACTORS"].index(1)] == v["SAMPLES"] and v["right"][-1] == 0,
    "flexprefill_blocks": lambda v: sum(v["shares"][0]) > sum(v["shares"][-1]),
    "own_method": lambda v: v["found"]["dense"] == v["SAMPLES"] > v["found"]["random"],
    "quickstart": lambda v: all(v["found"][v["methods"].index("pyramidkv")]),
    "second_question": lambda v: all(
        count == v["TEXTS"] for name in ("quest", "tokenselect, decoding") for count in v["found"][name]
    ),
}


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path, monkeypatch, capsys):
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install 'attnpatch[dev]')")
    if weights_missing():
        pytest.skip("the embedded model's weights are not in this checkout")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from attnpatch import patch

    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()) or pyplot.close("all"))
    before, scope = dict(patch.list_patches()), {"__name__": "__main__"}
    try:
        with matplotlib.rc_context():
            for number, cell in enumerate(code_cells(path)):
                exec(compile("".join(cell["source"]), f"{path.name} code cell {number}", "exec"), scope)
                if "parameters" in cell["metadata"].get("tags", ()):
                    assert SHORT[path.stem].keys() <= scope.keys()
                    scope.update(SHORT[path.stem])
    finally:  # a notebook that registers a method must not leak it into other tests
        patch._REGISTRY.clear()
        patch._REGISTRY.update(before)
    assert shown and capsys.readouterr().out
    assert CLAIMS.get(path.stem, lambda values: True)(scope)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run it from top to bottom"
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    pictures = [output["data"]["image/png"] for output in outputs if output["output_type"] == "display_data"]
    assert pictures and sum(len(base64.b64decode(p)) for p in pictures) < 150_000


def test_there_is_one():
    assert "inside_snapkv" in [path.stem for path in NOTEBOOKS]
