"""A trace as a section of the page: verdict, where along the text layers kept tokens, and the text itself."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from attnpatch.reporting import charts, svg
from attnpatch.reporting.records import Grid
from attnpatch.reporting.trace import Trace, verdict

BINS = 160  # columns of the strip
MOST = 20_000  # tokens whose text is shown; of longer prompts, what lies around the needle and at both ends
AROUND = 2000
WORDS = 40  # tokens of the needle shown one by one


def section(trace: Trace, ids: charts.Ids) -> str:
    """Everything about one trace."""
    title = f"{trace.name} on {trace.model}, {len(trace.tokens)} tokens"
    said = "".join(f"<p>{escape(s)}</p>" for s in verdict(trace))
    settings = "; ".join(
        f"{name}: {', '.join(f'{k}={v}' for k, v in values.items())}" for name, values in trace.patches.items()
    )
    answers = [("dense", trace.dense), (trace.name, trace.patched)]
    if trace.expected:
        answers.insert(0, ("expected", trace.expected))
    parts = [
        f"<h3>{escape(title)}</h3>", f'<p class="fine">{escape(settings)}</p>',
        charts.table(("model", "answer"), answers), f'<div class="verdict">{said}</div>',
    ]  # fmt: skip
    maps = [*charts.grids(list(grids(trace)), ids), *_words(trace, ids)]
    parts += [_strip(trace, ids)] if trace.evicts else []
    parts += [f'<div class="figures">{"".join(maps)}</div>'] if maps else []
    parts += [_layers(trace), *([_text(trace, ids)] if trace.evicts else [])]
    return f'<article class="trace">{"".join(parts)}</article>'


def grids(trace: Trace) -> Iterator[Grid]:
    """Shares by layer and head: pages attended in prefill, tokens kept after it, needle tokens kept."""
    layers, count = tuple(x.index for x in trace.layers), len(trace.tokens)
    if any(x.density for x in trace.layers):
        rows = tuple(tuple(x.density or ()) for x in trace.layers)
        yield Grid(trace.name, "share of causal pages attended in prefill", rows, layers)
    if len({n for x in trace.layers for n in x.heads}) > 1:
        rows = tuple(tuple(n / count for n in x.heads) for x in trace.layers)
        yield Grid(trace.name, "share of the prompt kept, by KV head", rows, layers)
    if trace.needle and any(n < trace.needle_tokens for x in trace.layers for n in x.needle):
        rows = tuple(tuple(n / trace.needle_tokens for n in x.needle) for x in trace.layers)
        yield Grid(trace.name, "share of the needle kept, by KV head", rows, layers)


def _strip(trace: Trace, ids: charts.Ids) -> str:
    """Layers by place in the text."""
    count = len(trace.tokens)
    bins = min(BINS, count)
    edges = [round(i * count / bins) for i in range(bins + 1)]
    values = []
    for layer in trace.layers:
        digits = [int(c) / 9 for c in layer.kept]
        values.append(
            [round(sum(digits[a:b]) / (b - a), 2) if digits else None for a, b in zip(edges, edges[1:], strict=False)]
        )
    marks = [(a * bins / count, b * bins / count) for a, b in trace.needle]
    cell = (720 / bins, max(6.0, min(18.0, 480 / len(trace.layers))))
    heat = svg.Heat(
        values, [str(x.index) for x in trace.layers], [str(e) for e in edges[:-1]], "place in the prompt (tokens)",
        "layer", cell=cell, marks=marks,
    )  # fmt: skip
    caption = "Where each layer kept tokens" + ("; the bar above marks the needle" if marks else "")
    body = heat.draw(caption, "Share of KV heads that hold the tokens of a stretch of the prompt.", ids.new())
    return charts.figure(caption, body + svg.scale("share of heads", "none", "all"))


def _words(trace: Trace, ids: charts.Ids) -> Iterator[str]:
    """Of the needle's first occurrence, the share of heads in each layer that kept each token."""
    if not trace.needle or not trace.evicts:
        return
    start, end = trace.needle[0]
    end = min(end, start + WORDS)
    heat = svg.Heat(
        [[int(c) / 9 for c in x.kept[start:end]] or [None] * (end - start) for x in trace.layers],
        [str(x.index) for x in trace.layers], [_word(t) for t in trace.tokens[start:end]],
        "tokens of the needle", "layer", cell=(54, 18), whole=True,
    )  # fmt: skip
    caption = "The needle, token by token: share of KV heads that keep it"
    body = heat.draw(caption, "".join(trace.tokens[start:end]), ids.new())
    yield charts.figure(caption, body + svg.scale("share of heads", "none", "all"))


def _word(token: str) -> str:
    """A token as the heading of a narrow column."""
    word = token.strip() or "_"
    return word if len(word) <= 8 else f"{word[:7]}…"


def _layers(trace: Trace) -> str:
    """The table of layers."""
    needle = bool(trace.needle)
    heads = ["layer", "tokens held, by KV head"]
    heads += ["needle tokens held", "attention on the needle", "ranks of its tokens"] if needle else []
    rows = []
    for x in trace.layers:
        row = [str(x.index), ", ".join(map(str, x.heads)) or x.reason]
        if needle:
            ranks = "-" if x.best is None else f"{x.best} to {x.worst}"
            row += [", ".join(map(str, x.needle)) or "-", "-" if x.look is None else f"{x.look:.2%}", ranks]
        rows.append([*row, x.note])
    note = (
        f"<p class='fine'>Attention and ranks are of the last {trace.window} prompt tokens in the dense model: the "
        "query head that looks most, the KV head that ranks the needle's weakest token highest.</p>"
        if needle
        else ""
    )
    return f"<details><summary>Layer by layer</summary>{note}{charts.table([*heads, 'note'], rows)}</details>"


# ---- the text ----------------------------------------------------------------------------------------------------
def _text(trace: Trace, ids: charts.Ids) -> str:
    """The prompt, its tokens shaded by how many heads kept them; a menu picks the layer."""
    layers = [x for x in trace.layers if x.kept]
    inside = {i for a, b in trace.needle for i in range(a, b)}
    shown = _shown(trace)
    mean = _mean([x.kept for x in layers])
    runs: list[list[int]] = []  # tokens that every layer treats alike
    for i in shown:
        last = runs[-1][-1] if runs else -2
        same = last == i - 1 and (last in inside) == (i in inside) and all(x.kept[last] == x.kept[i] for x in layers)
        if same:
            runs[-1].append(i)
        else:
            runs.append([i])
    name = ids.new()
    options = [("all layers", mean), *((f"layer {x.index}", x.kept) for x in layers)]
    menu = "".join(
        f'<option data-kept="{"".join(kept[run[0]] for run in runs)}">{label}</option>' for label, kept in options
    )
    spans, before = [], -1
    for run in runs:
        if run[0] != before + 1:
            spans.append(f'<span class="gap"> [{run[0] - before - 1} tokens not shown] </span>')
        before = run[-1]
        kind = f"k{mean[run[0]]}" + (" n" if run[0] in inside else "")
        spans.append(f'<span class="{kind}">{escape("".join(trace.tokens[i] for i in run))}</span>')
    if before < len(trace.tokens) - 1:
        spans.append(f'<span class="gap"> [{len(trace.tokens) - 1 - before} tokens not shown]</span>')
    return (
        f'<p><label for="{name}-m">Tokens kept by </label><select id="{name}-m" class="pick" data-text="{name}">{menu}'
        f'</select> <span class="keys"><span class="k0">evicted</span> <span class="k4">kept by some heads</span> '
        f'<span class="k9">kept by all</span>{" <span class=n>needle</span>" if inside else ""}</span></p>'
        f'<div class="text" id="{name}" tabindex="0" role="region" aria-label="the prompt">{"".join(spans)}</div>'
    )


def _mean(kept: list[str]) -> str:
    """Digits of all layers as one: 0 only where no layer keeps the token, 9 only where all do."""
    made = []
    for column in zip(*kept, strict=True):
        total = sum(map(int, column))
        full = 9 * len(column)
        made.append("0" if total == 0 else "9" if total == full else str(min(8, max(1, round(9 * total / full)))))
    return "".join(made)


def _shown(trace: Trace) -> list[int]:
    """Tokens whose text is shown."""
    count = len(trace.tokens)
    if count <= MOST:
        return list(range(count))
    places = [0, count, *(i for span in trace.needle[:2] for i in span)]
    return sorted({i for p in places for i in range(max(0, p - AROUND), min(count, p + AROUND))})
