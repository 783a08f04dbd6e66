"""Records -> sections of the page: figures, each with a table of the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import count

from attnpatch.reporting import svg
from attnpatch.reporting.records import Cell, Grid, Records, Score, Time

MAX_SERIES = 24  # of one chart; more cannot be told apart


class Ids:
    """Ids of one page's figures: c1, c2 ..."""

    def __init__(self) -> None:
        self._next = count(1)

    def new(self) -> str:
        return f"c{next(self._next)}"


def figure(caption: str, body: str, table: str = "") -> str:
    """A figure with its caption and, folded away, its numbers."""
    more = f"<details><summary>Numbers</summary>{table}</details>" if table else ""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{scrolling(body, caption)}{more}</figure>"


def scrolling(body: str, label: str) -> str:
    """What may be wider than the window, reachable by keyboard."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with column and row headings."""
    top = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    lines = "".join(
        f'<tr><th scope="row">{escape(r[0])}</th>{"".join(f"<td>{escape(c)}</td>" for c in r[1:])}</tr>' for r in rows
    )
    whole = f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"
    return scrolling(whole, f"table of {', '.join(heads)}")


def grouped(items: Sequence, key: str) -> dict[str, list]:
    """By an attribute, in the order of appearance."""
    made: dict[str, list] = {}
    for item in items:
        made.setdefault(getattr(item, key), []).append(item)
    return made


def tokens_text(value: float) -> str:
    """4096 -> '4k', 1000 -> '1000'."""
    whole = round(value)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def share_text(value: float) -> str:
    return f"{100 * value:.3g} %"


def ms_text(value: float) -> str:
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


# ---- needles -----------------------------------------------------------------------------------------------------
def needles(records: Records, ids: Ids) -> Iterator[str]:
    """A heat map of length and depth for each task and run."""
    for group, cells in grouped(records.cells, "group").items():
        for run, mine in grouped(cells, "run").items():
            yield _needle(group, run, mine, ids)


def _needle(group: str, run: str, cells: list[Cell], ids: Ids) -> str:
    lengths, depths = sorted({c.tokens for c in cells}), sorted({c.depth for c in cells})
    found: dict[tuple[float, int], list[Cell]] = {}
    for c in cells:
        found.setdefault((c.depth, c.tokens), []).append(c)
    mean = {at: (sum(c.score * c.n for c in each) / sum(c.n for c in each), sum(c.n for c in each))
            for at, each in found.items()}  # fmt: skip
    values = [[mean[d, n][0] / 100 if (d, n) in mean else None for n in lengths] for d in depths]
    heat = svg.Heat(
        values, [f"{100 * d:.0f} %" for d in depths], [tokens_text(n) for n in lengths], "prompt tokens", "depth",
        labels=True, cell=(52, 24),
    )  # fmt: skip
    total, asked = sum(s * n for s, n in mean.values()), sum(n for _, n in mean.values())
    desc = f"Mean score {total / asked:.1f} of 100 over {asked} needles; depth 0 % is the start of the context."
    caption = f"{group}: {run}"
    rows = [(f"{100 * d:.0f} %", str(n), f"{s:.1f}", str(k)) for (d, n), (s, k) in sorted(mean.items())]
    body = heat.draw(caption, desc, ids.new()) + svg.scale("score", "0", "100")
    return figure(caption, body, table(("depth", "tokens", "score", "needles"), rows))


# ---- answers against KV ------------------------------------------------------------------------------------------
AXES = {
    "kept": "KV bytes kept, share of dense",
    "asked": "KV kept, share of dense (the budget)",
    "attended": "pages attended in prefill, share of causal",
}


def pareto(records: Records, ids: Ids) -> Iterator[str]:
    """Score against KV kept, or pages attended; rings mark what no other run beats in both."""
    for axis, label in AXES.items():
        mine = [s for s in records.scores if s.axis == axis and s.share is not None]
        for group, scores in grouped(mine, "group").items():
            if any((s.share or 0) < 1 for s in scores):
                yield _pareto(group, label, scores, ids)


def frontier(scores: Sequence[Score]) -> list[Score]:
    """Those that no other beats: no one has a score as high with a smaller share, or a higher one with as small."""
    return [
        s
        for s in scores
        if not any(
            o.share <= s.share and o.score >= s.score and (o.share < s.share or o.score > s.score)  # type: ignore[operator]
            for o in scores
        )
    ]


def _pareto(group: str, label: str, scores: list[Score], ids: Ids) -> str:
    best = frontier(scores)
    series = {
        run: [(max(s.share or 0.0, 1e-6), s.score, s.low, s.high) for s in each]
        for run, each in list(grouped(scores, "run").items())[:MAX_SERIES]
    }
    lines = svg.Lines(
        series, label, "score", share_text, lambda v: f"{v:.3g}", y_range=(0.0, 100.0),
        ring=frozenset((s.run, max(s.share or 0.0, 1e-6)) for s in best),
    )  # fmt: skip
    order = sorted(best, key=lambda s: s.share or 0.0)
    desc = "Not beaten in both: " + "; ".join(f"{s.run} {s.score:.1f} at {share_text(s.share or 0)}" for s in order)
    rows = [
        (s.run, share_text(s.share or 0), f"{s.score:.1f}", f"{s.low:.1f} to {s.high:.1f}", str(s.n),
         "yes" if s in best else "")
        for s in scores
    ]  # fmt: skip
    return figure(
        group, lines.draw(group, desc, ids.new()) + svg.legend(list(series)),
        table(("run", "share", "score", "95 %", "samples", "not beaten"), rows),
    )  # fmt: skip


# ---- times -------------------------------------------------------------------------------------------------------
def times(records: Records, ids: Ids) -> Iterator[str]:
    """Time against length."""
    for group, each in grouped([t for t in records.times if t.ms > 0], "group").items():
        yield _times(group, each, ids)


def _times(group: str, each: list[Time], ids: Ids) -> str:
    by = dict(list(grouped(each, "label").items())[:MAX_SERIES])
    series = {k: [(float(t.tokens), t.ms, max(t.low, t.ms / 1e3), t.high) for t in v] for k, v in by.items()}
    values = [t.ms for v in by.values() for t in v]
    log = max(values) > 20 * min(values)
    lines = svg.Lines(series, "tokens", "time", tokens_text, ms_text, log_y=log)
    longest = max(t.tokens for t in each)
    last = sorted((t for t in each if t.tokens == longest), key=lambda t: t.ms)
    desc = f"At {tokens_text(longest)} tokens: " + "; ".join(f"{t.label} {ms_text(t.ms)}" for t in last)
    rows = [(t.label, str(t.tokens), ms_text(t.ms), f"{ms_text(t.low)} to {ms_text(t.high)}") for t in each]
    return figure(
        group, lines.draw(group, desc, ids.new()) + svg.legend(list(series)),
        table(("what", "tokens", "median", "spread"), rows),
    )  # fmt: skip


# ---- layers and heads --------------------------------------------------------------------------------------------
def grids(found: Sequence[Grid], ids: Ids) -> Iterator[str]:
    """Heat maps of layers and heads."""
    for grid in found:
        width = max(map(len, grid.rows))
        values = [_spread(row, width) for row in grid.rows]
        heat = svg.Heat(
            values, [str(i) for i in grid.layers], [str(i) for i in range(width)], "head", "layer", cell=(22, 18)
        )
        given = [v for row in values for v in row if v is not None]
        desc = f"{grid.what}: mean {sum(given) / len(given):.1%}, from {min(given):.1%} to {max(given):.1%}."
        rows = [
            (str(i), *("-" if v is None else f"{v:.1%}" for v in row))
            for i, row in zip(grid.layers, values, strict=True)
        ]
        body = heat.draw(f"{grid.title}: {grid.what}", desc, ids.new()) + svg.scale(grid.what, "0 %", "100 %")
        yield figure(f"{grid.title}: {grid.what}", body, table(("layer", *(f"head {i}" for i in range(width))), rows))


def _spread(row: Sequence[float | None], width: int) -> list[float | None]:
    """Lists shared by several heads stand for each of them; an empty row is blank."""
    if not row:
        return [None] * width
    return [v for v in row for _ in range(max(1, width // len(row)))][:width]
