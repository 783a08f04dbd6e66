"""What decode steps read, counted by host and device together, against sums made step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnpatch.decisions import Selection
from attnpatch.engine.tally import Tally

COUNT = torch.tensor([[[3], [1]], [[4], [4]]], dtype=torch.int32)  # [B, H, 1]
OTHER = torch.tensor([[[2], [2]], [[1], [0]]], dtype=torch.int32)
INDEX = torch.zeros(2, 2, 1, 4, dtype=torch.int32)
LIKE = torch.tensor([True, False])


def listed(count: torch.Tensor | None, window: int = 0, page: int = 2) -> Selection:
    return Selection(INDEX, count, page, sink=1, window=window)


STEPS = {  # slots held and the terms of each step
    "kept": [(40 + i, [listed(COUNT, window=3 + i)]) for i in range(5)],
    "renewed": [(40 + i, [listed(COUNT if i % 3 else OTHER, page=1 + i % 2)]) for i in range(6)],
    "short": [(6 + i, [listed(COUNT, window=2)]) for i in range(5)],
    "host": [(20, [listed(None, window=2)]), (5, [listed(None)]), (30, [Selection()])],
    "only": [(30 + i, [Selection(columns=INDEX[:, :, 0], only=LIKE if i % 2 else None)]) for i in range(4)],
    "only lists": [(30, [Selection(INDEX, COUNT, 2, window=3, only=LIKE)])] * 2,
    "terms": [(50, [listed(COUNT), listed(OTHER)]), (50, [listed(COUNT), Selection(sink=4)]), (50, [listed(COUNT)])],
}


def by_hand(steps: list, last: list[int] | None) -> list[float]:
    """Tokens attended by each row, summed over the steps."""
    total = [0.0, 0.0]
    for slots, terms in steps:
        for row in range(2):
            held = slots if last is None else last[row] + 1
            now = 0.0
            for t in terms:
                named = t.sink + t.window + (0 if t.columns is None else t.columns.shape[-1])
                if t.index is not None:
                    named += (4.0 if t.count is None else t.count[row].float().mean().item()) * t.page
                whole = not t.named or (t.only is not None and not t.only[row])
                now += slots if whole else named
            total[row] += min(now, held)
    return total


def count(steps: list, last: list[int] | None, change=lambda tally: tally) -> Tally:
    tally = Tally()
    for slots, terms in steps:
        q_pos = None if last is None else torch.tensor(last)[:, None]
        kv, ctx = SimpleNamespace(S=slots), SimpleNamespace(ragged=last is not None, q_pos=q_pos)
        for term in terms:
            tally.term(term, kv)
        tally.close(kv, ctx)
        tally = change(tally)
    return tally


@pytest.mark.parametrize("last", [None, [8, 3]], ids=["alike", "ragged"])
@pytest.mark.parametrize("name", STEPS)
def test_attended(name, last):
    steps = STEPS[name]
    expected = by_hand(steps, last)
    figures = count(steps, last).figures(2, 1, 1)
    assert figures["steps"] == len(steps)
    assert figures["attended"] == pytest.approx(sum(expected) / 2 / len(steps))
    swapped = count(steps[:1], last).pick(lambda x: x.flip(0)).figures(2, 1, 1)
    assert swapped["attended"] == pytest.approx(sum(by_hand(steps[:1], last)) / 2)


@pytest.mark.parametrize("name", STEPS)
def test_a_row_operation_between_steps_loses_nothing(name):
    steps = STEPS[name]
    tally = count(steps, None, change=lambda t: t.pick(lambda x: x.index_select(0, torch.tensor([0, 1]))))
    assert tally.figures(2, 1, 1) == pytest.approx(count(steps, None).figures(2, 1, 1))


def test_what_serves_several_steps_is_looked_at_once():
    tally = count(STEPS["kept"], None)
    assert isinstance(tally.attended, int) and tally._times == 5  # nothing was summed on the device yet
