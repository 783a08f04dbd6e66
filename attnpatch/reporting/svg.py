"""Charts as inline SVG: heat maps and lines. All text is escaped here; colours of text and axes come from the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

# dark purple to yellow (viridis): told apart without colour vision, and on light and dark pages
_STOPS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
SHAPES = ("circle", "square", "triangle", "diamond")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
COLOURS = 8  # --s0 ... --s7 of the page


def colour(value: float) -> tuple[str, str]:
    """(fill, ink on it) for 0..1."""
    at = min(max(value, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(at), len(_STOPS) - 2)
    rgb = [round(a + (b - a) * (at - low)) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True)]
    light = (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]) > 140
    return "#" + "".join(f"{c:02x}" for c in rgb), "#000" if light else "#fff"


def text(x: float, y: float, content: str, anchor: str = "middle", kind: str = "", turn: bool = False) -> str:
    """A label; turn: reads upwards."""
    more = f' class="{kind}"' if kind else ""
    more += f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(content)}</text>'


def frame(width: float, height: float, title: str, desc: str, parts: Sequence[str], name: str) -> str:
    """An SVG with a title and description that screen readers say. name: an id of the page, plain letters."""
    return (
        f'<svg class="chart" role="img" aria-labelledby="{name}-t {name}-d" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}"><title id="{name}-t">{escape(title)}</title>'
        f'<desc id="{name}-d">{escape(desc)}</desc>{"".join(parts)}</svg>'
    )


# ---- heat maps ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Heat:
    """values [rows][columns] of 0..1, None = blank. labels: texts inside the cells; tips: what hovering says."""

    values: Sequence[Sequence[float | None]]
    rows: Sequence[str]
    columns: Sequence[str]
    x: str
    y: str
    labels: bool = False
    cell: tuple[float, float] = (30, 22)
    marks: Sequence[tuple[float, float]] = ()  # [start, end) in columns, drawn above
    whole: bool = False  # every cell is its own and every column is named

    def draw(self, title: str, desc: str, name: str) -> str:
        """The whole SVG; cells of equal value side by side become one rectangle."""
        w, h = self.cell
        left = 46 + 6.5 * max(map(len, self.rows), default=0)
        top = 22 if self.marks else 8
        right, bottom = left + w * len(self.columns), top + h * len(self.rows)
        bars = [(left + a * w, max(2.0, (b - a) * w)) for a, b in self.marks]
        parts = [f'<path class="mark" d="M{x:.1f} 6h{wide:.1f}v10h-{wide:.1f}z"/>' for x, wide in bars]
        for i, row in enumerate(self.values):
            parts += self._row(i, row, left, top)
        every = max(1, math.ceil(len(self.rows) * 13 / max(1.0, bottom - top)))
        parts += [text(left - 6, top + h * (i + 0.5) + 4, r, "end") for i, r in enumerate(self.rows) if i % every == 0]
        gap = 1 if self.whole else max(1, math.ceil(max((7 * len(c) + 8 for c in self.columns), default=1) / w))
        parts += [text(left + w * (j + 0.5), bottom + 15, c) for j, c in enumerate(self.columns) if j % gap == 0]
        parts += [text((left + right) / 2, bottom + 33, self.x, kind="axis"),
                  text(13, (top + bottom) / 2, self.y, kind="axis", turn=True)]  # fmt: skip
        return frame(max(right + 14, 180), max(bottom + 42, top + 100), title, desc, parts, name)

    def _row(self, i: int, row: Sequence[float | None], left: float, top: float) -> list[str]:
        w, h = self.cell
        parts, j = [], 0
        while j < len(row):
            value, end = row[j], j + 1
            while not (self.labels or self.whole) and end < len(row) and row[end] == value:
                end += 1
            box = f'x="{left + j * w:.1f}" y="{top + i * h:.1f}" width="{(end - j) * w:.1f}" height="{h:.1f}"'
            where = self.columns[j] if end == j + 1 else f"{self.columns[j]} to {self.columns[end - 1]}"
            tip = f"{self.y} {self.rows[i]}, {self.x} {where}: {'none' if value is None else f'{value:.1%}'}"
            look = 'class="blank"' if value is None else f'fill="{colour(value)[0]}"'
            parts.append(f"<rect {box} {look}><title>{escape(tip)}</title></rect>")
            if self.labels and value is not None:
                parts.append(
                    f'<text x="{left + (j + 0.5) * w:.1f}" y="{top + (i + 0.5) * h + 4:.1f}" text-anchor="middle" '
                    f'style="fill:{colour(value)[1]}">{100 * value:.0f}</text>'
                )
            j = end
        return parts


def scale(name: str, low: str, high: str) -> str:
    """The colours from 0 to 1, with what they mean."""
    steps = "".join(f'<rect x="{i * 6}" width="6" height="10" fill="{colour(i / 19)[0]}"/>' for i in range(20))
    return (
        f'<p class="scale"><span>{escape(low)}</span><svg width="120" height="10" aria-hidden="true">{steps}</svg>'
        f"<span>{escape(high)}</span></p>"
    )


# ---- lines -------------------------------------------------------------------------------------------------------
Point = tuple[float, float, float, float]  # x, y, least, most


@dataclass(frozen=True)
class Lines:
    """Series of points, joined in the order of x. log_x, log_y: logarithmic axes. ring: points to be ringed."""

    series: Mapping[str, Sequence[Point]]
    x: str
    y: str
    x_text: Callable[[float], str]
    y_text: Callable[[float], str]
    log_x: bool = True
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    ring: frozenset[tuple[str, float]] = frozenset()

    def draw(self, title: str, desc: str, name: str) -> str:
        """The whole SVG, 520 x 320."""
        points = [p for each in self.series.values() for p in each]
        xs = axis([p[0] for p in points], self.log_x, None)
        ys = axis([v for p in points for v in p[1:]], self.log_y, self.y_range)
        # the axis' name reads upwards left of its longest label
        box = (max(66.0, 29 + 6.5 * max(len(self.y_text(t)) for t in ys[2])), 12.0, 504.0, 264.0)
        at_x = _mapping(xs[0], xs[1], box[0], box[2], self.log_x)
        at_y = _mapping(ys[0], ys[1], box[3], box[1], self.log_y)
        ticks = sorted({p[0] for p in points}) if len({p[0] for p in points}) <= 6 else xs[2]
        parts = [f'<path class="rule" d="M{box[0]} {at_y(t):.1f}H{box[2]}"/>' for t in ys[2]]
        parts += [text(box[0] - 7, at_y(t) + 4, self.y_text(t), "end") for t in ys[2]]
        parts += self._x_ticks(ticks, at_x, box)
        parts += [text((box[0] + box[2]) / 2, 308, self.x, kind="axis"),
                  text(14, (box[1] + box[3]) / 2, self.y, kind="axis", turn=True)]  # fmt: skip
        for number, (label, each) in enumerate(self.series.items()):
            parts.append(self._one(number, label, sorted(each), at_x, at_y))
        return frame(520, 320, title, desc, parts, name)

    def _x_ticks(self, ticks: Sequence[float], at: Callable[[float], float], box: Sequence[float]) -> list[str]:
        parts, last = [], -1e9
        for tick in ticks:
            parts.append(f'<path class="rule" d="M{at(tick):.1f} {box[3]}v5"/>')
            if at(tick) - last > 7 * len(self.x_text(tick)) + 4:
                parts.append(text(at(tick), box[3] + 19, self.x_text(tick)))
                last = at(tick)
        return parts

    def _one(
        self, number: int, label: str, points: Sequence[Point], at_x: Callable[[float], float],
        at_y: Callable[[float], float],
    ) -> str:  # fmt: skip
        line = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y, _, _ in points)
        parts = [f'<polyline points="{line}" stroke-dasharray="{DASHES[number // COLOURS % len(DASHES)]}"/>']
        for x, y, low, high in points:
            px, py = at_x(x), at_y(y)
            if high > low:
                parts.append(f'<path class="whisker" d="M{px:.1f} {at_y(low):.1f}V{at_y(high):.1f}"/>')
            tip = f"{label}: {self.x_text(x)}, {self.y_text(y)} ({self.y_text(low)} to {self.y_text(high)})"
            ring = f'<circle class="ring" cx="{px:.1f}" cy="{py:.1f}" r="8"/>' if (label, x) in self.ring else ""
            parts.append(f"{ring}<g><title>{escape(tip)}</title>{shape(number, px, py)}</g>")
        return f'<g class="series s{number % COLOURS}">{"".join(parts)}</g>'


def shape(number: int, x: float, y: float) -> str:
    """The marker of a series."""
    kind = SHAPES[number % len(SHAPES)]
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
    if kind == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    if kind == "triangle":
        return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.2 9.5h-10.4z"/>'
    return f'<path d="M{x:.1f} {y - 6:.1f}l5.5 6l-5.5 6l-5.5 -6z"/>'


def legend(labels: Sequence[str]) -> str:
    """An HTML list of the series with their markers."""
    items = "".join(
        f'<li><svg class="key" width="34" height="14" aria-hidden="true"><g class="series s{i % COLOURS}">'
        f'<polyline points="1,7 33,7" stroke-dasharray="{DASHES[i // COLOURS % len(DASHES)]}"/>'
        f"{shape(i, 17, 7)}</g></svg>{escape(label)}</li>"
        for i, label in enumerate(labels)
    )
    return f'<ul class="legend">{items}</ul>'


def axis(values: Sequence[float], log: bool, fixed: tuple[float, float] | None) -> tuple[float, float, list[float]]:
    """(low, high, ticks) that hold all values; a logarithmic axis needs values above 0."""
    low, high = fixed or (min(values), max(values))
    if log:
        low, high = (low / 1.15, high * 1.15) if low < high else (low / 2, high * 2)
        tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if high / low < 2000 else (1,)
        ticks = [m * 10.0**e for e in tens for m in steps if low <= m * 10.0**e <= high]
        return low, high, ticks or [low, high]
    low = min(0.0, low)
    high = high if high > low else low + 1
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    high = high if fixed else step * math.ceil(high / step - 1e-9)
    return low, high, [low + step * i for i in range(int((high - low) / step + 1e-6) + 1)]


def _mapping(low: float, high: float, start: float, end: float, log: bool) -> Callable[[float], float]:
    a, b = (math.log(low), math.log(high)) if log else (low, high)

    def at(value: float) -> float:
        share = ((math.log(value) if log else value) - a) / (b - a)
        return start + min(max(share, -0.02), 1.02) * (end - start)

    return at
