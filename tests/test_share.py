"""The share of the pages that a whole prompt's terms name, and what the engine makes of it for MInference."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import tiny
from typer.testing import CliRunner

from attnpatch import PatchCache, breakeven, patched, status
from attnpatch.breakeven import Limits
from attnpatch.cli.main import app
from attnpatch.decisions import Selection
from attnpatch.engine import terms
from attnpatch.engine.compat import cache_name
from attnpatch.executors import lists

CPU, LATER = torch.device("cpu"), "dense: a later turn of a padded batch"
FEW, MANY = {"vertical": 30, "slash": 100}, {"vertical": 30, "slash": 340}


# ---- lists.share ---------------------------------------------------------------------------------------------------


def test_pages_and_columns():
    index = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    first = Selection(index=index[:, :, :1], page=4, bq=4, rows=slice(0, 4))
    both = [first, Selection(index=index[:, :, :1], page=4, bq=4, rows=slice(4, 8))]
    assert lists.share(both, 8, 8) == pytest.approx(2 / 3)  # page 0 of one, then of two
    columns = torch.tensor([[[6, 1, -1]]], dtype=torch.int32)
    late = Selection(index=index[:, :, :1], page=4, bq=4, rows=slice(4, 8), columns=columns)
    # of 4 rows x 8 keys the page has half; column 6 is seen by two rows, column 1 by four
    assert lists.share([late], 4, 8) is not None
    assert lists.share([first, late], 8, 8) == pytest.approx((16 + 16 + 6 / 2) / 48)
    assert lists.share(iter([Selection(rows=slice(0, 4)), both[1]]), 8, 8) == pytest.approx((10 + 16) / 42)
    assert lists.share([Selection()], 8, 8) == 1 and lists.share([], 8, 8) is None
    assert lists.share([Selection(columns=columns)], 8, 8) == pytest.approx(9 / 36)
    for other in ({"sink": 3}, {"window": 3}, {"groups": index[:, :, :1]}):
        assert lists.share([first, Selection(index=index, **other)], 8, 8) is None


@pytest.mark.parametrize("prefix", [0, 37])
@pytest.mark.parametrize("lengths", [None, [300, 170, 40], [300, 300, 0]], ids=["whole", "padded", "empty"])
@pytest.mark.parametrize("heads", [(1, 4), (4, 4), (2, 4), (4, 1)], ids=str)
def test_against_loops(heads, lengths, prefix):
    total, page, bq = 300, 32, 64
    g = torch.Generator().manual_seed(0)
    q_pos = torch.arange(prefix, total).expand(3, -1)
    q_pos = torch.where(q_pos < torch.tensor(lengths or [total] * 3)[:, None], q_pos, -1)
    columns = torch.randint(-1, total, (3, heads[1], 11), generator=g, dtype=torch.int32)
    rows = total - prefix
    blocks, pages = math.ceil(rows / bq), math.ceil(total / page)
    index, count = lists.pack(torch.rand(3, heads[0], blocks, pages, generator=g) < 0.3)
    term = Selection(index=index, count=count, page=page, bq=bq, columns=columns)
    chosen = causal = 0.0
    for b in range(3):
        n = lengths[b] if lengths else total
        for h in range(4):
            own, of = 0.0, 0.0
            for r in range(blocks):
                first, last = prefix + r * bq, min(total, prefix + r * bq + bq)
                if first < n:
                    wide = math.ceil(last / page) * page
                    of += wide * (last - first)
                    own += min(int(count[b, h * heads[0] // 4, r]) * page, wide) * (last - first)
            c = [c for c in columns[b, h * heads[1] // 4].tolist() if c >= 0]
            seen = sum(max(0, min(n, total) - max(x, prefix)) for x in c)
            chosen, causal = chosen + own + seen * (1 - own / max(of, 1)), causal + of
    share = lists.share([term], rows, total, None if lengths is None else q_pos)
    assert share == pytest.approx(chosen / causal, rel=1e-6)


# ---- what the engine makes of it -----------------------------------------------------------------------------------


def run(limits, sizes, ids, mask=None, chunk=None):
    """(Notes of the layers, logits of the last token) of a prompt in one piece or in chunks."""
    if limits is not None:
        breakeven.save(breakeven.machine(CPU, torch.float32), {"minference": limits})
    with patched(tiny("llama"), "minference", **sizes) as model, torch.no_grad():
        cache, notes, step = PatchCache(model), [], chunk or ids.shape[1]
        cache.prompt_end = ids.shape[1]
        for at in range(0, ids.shape[1], step):
            seen = None if mask is None else mask[:, : at + step]
            out = model(input_ids=ids[:, at : at + step], attention_mask=seen, **{cache_name(): cache})
            notes.append({layer.note for layer in status(model).layers})
        return notes, out.logits[:, -1]


def prompt(batch):
    return torch.randint(1, 97, (batch, 700), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk", [None, 350], ids=["whole", "chunked"])
@pytest.mark.parametrize("pads", [0, 200], ids=["alone", "padded"])
def test_minference_runs_dense_where_its_slashes_cross_everything(pads, chunk, monkeypatch):
    ids, mask = prompt(2), torch.ones(2, 700, dtype=torch.long)
    mask[1, :pads] = 0
    notes, logits = run(Limits(1, 0.7), MANY, ids, mask if pads else None, chunk)
    (note,) = notes[0]
    assert all(n == {LATER} if pads and chunk else "of the pages chosen" in str(n) for n in notes[1:])
    share = int(note.removeprefix("dense: ").split("%")[0])
    assert note.endswith("% of the pages chosen, more than the 70% that pay here") and 90 < share <= 100
    with torch.no_grad():
        dense = tiny("llama")(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    torch.testing.assert_close(logits, dense.logits[:, -1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("held", [2**30, 0], ids=["held", "twice"])
@pytest.mark.parametrize("chunk", [None, 350], ids=["whole", "chunked"])
@pytest.mark.parametrize("pads", [0, 200], ids=["alone", "padded"])
def test_minference_runs_sparse_with_few_slashes(pads, chunk, held, monkeypatch):
    monkeypatch.setattr(terms, "HELD", held)
    ids, mask = prompt(2), torch.ones(2, 700, dtype=torch.long)
    mask[1, :pads] = 0
    notes, logits = run(Limits(1, 0.9), FEW, ids, mask if pads else None, chunk)
    assert notes[0] == {""} and notes[-1] == ({LATER} if pads and chunk else {""})
    assert torch.equal(logits, run(None, FEW, ids, mask if pads else None, chunk)[1])
    monkeypatch.setenv("ATTNPATCH_AUTO_DENSE", "0")
    assert torch.equal(logits, run(None, FEW, ids, mask if pads else None, chunk)[1])


def test_the_share_that_pays_grows_with_the_length():
    notes = [run(Limits(1, 0.95, True, besides), FEW, prompt(1))[0][0] for besides in (70, 500)]
    assert notes[0] == {""} and all(note.endswith("more than the 24% that pay here") for note in notes[1])


def test_nothing_is_asked_where_the_length_says_it_all(monkeypatch):
    monkeypatch.setattr(lists, "share", lambda *args: pytest.fail("asked"))
    assert run(Limits(1, 1.0), FEW, prompt(1))[0] == [{""}]


def test_explain_tells_why_nothing_is_drawn(tmp_path):
    breakeven.save(breakeven.machine(CPU, torch.float32), {"minference": Limits(1, 0.1)})
    command = ["explain", "minference", "--trace", str(tmp_path / "x.svg"), "--length", "512", "--set", "slash=100"]
    said = CliRunner().invoke(app, [*command, "--set", "vertical=30"]).exception
    assert "of the pages chosen, more than the 10% that pay here" in str(said)


def test_rows_of_several_terms_count_once():
    one = Selection(index=torch.zeros(1, 2, 4, 1, dtype=torch.int32), page=16, bq=16)
    other = Selection(index=torch.ones(1, 2, 4, 1, dtype=torch.int32), page=16, bq=16)
    alone = [lists.share([x], 64, 64) for x in (one, other)]
    assert lists.share([one, other], 64, 64) == pytest.approx(sum(alone))
