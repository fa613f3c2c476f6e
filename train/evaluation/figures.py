"""Figures of a report as inline SVG: drawn by hand, because they hold only lines and boxes.

All text is escaped here. Sizes are in SVG units; a figure scales to the width it is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

WIDTH = 420
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#7f3c8d", "#5f6368")
_INK, _FAINT, _GRID = "#1f2328", "#656d76", "#d8dee4"
_GAP = "#eceff2"


@dataclasses.dataclass(frozen=True)
class Point:
    """A value at ``x`` with its interval, if it has one, and what to say about it; maybe ringed."""

    x: float
    y: float
    low: float | None
    high: float | None
    note: str = ""
    ringed: bool = False


@dataclasses.dataclass(frozen=True)
class Line:
    """Points of one method; ``number`` chooses its colour and mark."""

    name: str
    number: int
    points: tuple[Point, ...]


def colour(number: int) -> str:
    """Of the ``number``-th method; they repeat, marks do not at the same time."""
    return COLOURS[number % len(COLOURS)]


def mark(x: float, y: float, number: int) -> str:
    """A small sign in the method's colour: circle, square, triangle, diamond."""
    fill = f'fill="{colour(number)}"'
    shape = (number + number // len(COLOURS)) % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {fill}/>'
    corners = {
        1: ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)),
        2: ((0, -4.6), (4.4, 3.4), (-4.4, 3.4)),
        3: ((0, -5), (5, 0), (0, 5), (-5, 0)),
    }[shape]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}" {fill}/>'


def text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, **more: str
) -> str:
    """One line of text, escaped."""
    style = "".join(f' {name}="{value}"' for name, value in {"fill": _FAINT, **more}.items())
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{style}>'
        f"{escape(words)}</text>"
    )


def svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    """A figure that fills its container's width, up to its own, which is ``--own`` in styles."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}" '
        f'style="--own:{width:.0f}px;max-width:{width:.0f}px">' + "".join(parts) + "</svg>"
    )


def sign(number: int) -> str:
    """The mark of a method for a legend."""
    return f'<svg viewBox="0 0 12 12" class="sign" aria-hidden="true">{mark(6, 6, number)}</svg>'


def curves(title: str, lines: Sequence[Line], level: Point | None, x_name: str, y_name: str) -> str:
    """Quality against cost on a logarithmic x axis, ``level`` a dashed line across with its band.

    Points without a positive x, or without a finite y, are left out.
    """
    kept = [
        dataclasses.replace(
            line,
            points=tuple(
                sorted(
                    (p for p in line.points if p.x > 0 and math.isfinite(p.y)),
                    key=lambda point: point.x,
                )
            ),
        )
        for line in lines
    ]
    every = [point for line in kept for point in line.points]
    frame = _Frame.around(every, level)
    parts = [frame.axes(x_name, y_name), *([] if level is None else [frame.level(level)])]
    for line in kept:
        parts += frame.line(line)
    return svg(WIDTH, frame.height, parts, title)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """Where data lie in the figure: x from 10^first to 10^last, y from bottom to top."""

    first: float
    last: float
    bottom: float
    top: float
    left: float = 46
    height: float = 250

    @classmethod
    def around(cls, points: Sequence[Point], level: Point | None) -> _Frame:
        xs = [math.log10(point.x) for point in points] + [0.0]
        shown = [*points, *([] if level is None else [level])]
        ys = [
            value
            for point in shown
            for value in (point.y, point.low, point.high)
            if value is not None and math.isfinite(value)
        ] or [0.0, 1.0]
        low, high = min(ys), max(ys)
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        else:
            spread = (high - low) or abs(high) or 1.0
            low, high = low - 0.08 * spread, high + 0.08 * spread
        return cls(min(*xs, -1.0) - 0.06, max(xs) + 0.06, low, high)

    def x(self, value: float) -> float:
        share = (math.log10(value) - self.first) / (self.last - self.first)
        return self.left + share * (WIDTH - self.left - 8)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return self.height - 40 - share * (self.height - 52)

    def axes(self, x_name: str, y_name: str) -> str:
        parts = []
        for value in _ticks(self.bottom, self.top):
            y = self.y(value)
            parts.append(f'<path d="M{self.left} {y:.1f}H{WIDTH - 8}" stroke="{_GRID}"/>')
            parts.append(text(self.left - 6, y + 4, f"{value:g}", anchor="end"))
        for value, name in _shares(self.first, self.last):
            x = self.x(value)
            end = self.y(self.bottom)
            parts.append(f'<path d="M{x:.1f} {self.y(self.top):.1f}V{end:.1f}" stroke="{_GRID}"/>')
            parts.append(text(x, end + 15, name, anchor="middle"))
        parts.append(text((WIDTH + self.left) / 2, self.height - 6, x_name, anchor="middle"))
        turned = f"rotate(-90 11 {self.height / 2 - 14:.0f})"
        parts.append(text(11, self.height / 2 - 14, y_name, anchor="middle", transform=turned))
        return "".join(parts)

    def level(self, level: Point) -> str:
        left, right, y = self.left, WIDTH - 8, self.y(level.y)
        band = ""
        if level.low is not None and level.high is not None:
            top, height = self.y(level.high), self.y(level.low) - self.y(level.high)
            band = (
                f'<rect x="{left}" y="{top:.1f}" width="{right - left}" height="{height:.1f}" '
                f'fill="{_INK}" opacity="0.07"/>'
            )
        return (
            f"<g><title>{escape(level.note)}</title>{band}"
            f'<path d="M{left} {y:.1f}H{right}" stroke="{_INK}" stroke-dasharray="5 4"/></g>'
        )

    def line(self, line: Line) -> list[str]:
        stroke = colour(line.number)
        places = [(self.x(p.x), self.y(p.y)) for p in line.points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts = [f'<path d="M{path}" fill="none" stroke="{stroke}" stroke-width="1.6"/>'] * bool(
            path
        )
        for point, (x, y) in zip(line.points, places, strict=True):
            bar = ""
            if point.low is not None and point.high is not None:
                bar = (
                    f'<path d="M{x:.1f} {self.y(point.low):.1f}V{self.y(point.high):.1f}" '
                    f'stroke="{stroke}" stroke-width="1.2" opacity="0.55"/>'
                )
            if point.ringed:
                bar += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8.5" fill="none" stroke="{_INK}"/>'
            note = escape(f"{line.name} {point.note}")
            parts.append(f"<g><title>{note}</title>{bar}{mark(x, y, line.number)}</g>")
        return parts


def _ticks(bottom: float, top: float) -> list[float]:
    """Four to eight round numbers within a range."""
    raw = (top - bottom) / 6
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    first = math.ceil(bottom / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(top / step + 1e-9) + 1)]


def _shares(first: float, last: float) -> list[tuple[float, str]]:
    """Powers of two, every one or every other: 1, 1/2, 1/4 and so on."""
    every = [n for n in range(0, 40) if first <= -n * math.log10(2) <= last]
    kept = every if len(every) <= 7 else every[::2]
    return [(2.0**-n, "1" if n == 0 else f"1/{2**n}") for n in kept]


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    numbers: bool = True,
    row_name: str = "",
    column_name: str = "",
    cell: tuple[float, float] = (44, 26),
) -> str:
    """Boxes from white to dark blue for 0 to 1, with their numbers in percent; grey is unknown."""
    left = 14 + 6.6 * max(map(len, [row_name, *rows]))
    wide, high = cell
    parts = [text(left - 6, 14, row_name, anchor="end")] * bool(row_name)
    for number, name in enumerate(columns):
        parts.append(text(left + (number + 0.5) * wide, 14, name, anchor="middle", size=11))
    for place, (name, line) in enumerate(zip(rows, values, strict=True)):
        y = 20 + place * high
        parts.append(text(left - 6, y + high / 2 + 4, name, anchor="end"))
        for number, value in enumerate(line):
            x = left + number * wide
            shown = "not measured" if value is None else f"{value:.1%}"
            where = f"{row_name} {name}, {column_name} {columns[number]}: {shown}"
            parts.append(
                f"<g><title>{escape(where)}</title>"
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 1}" height="{high - 1}" '
                f'fill="{_shade(value)}"/>'
            )
            if numbers and value is not None:
                ink = "#ffffff" if value > 0.55 else _INK
                percent = f"{100 * value:.0f}"
                middle = x + wide / 2 - 0.5
                parts.append(text(middle, y + high / 2 + 3.5, percent, anchor="middle", fill=ink))
            parts.append("</g>")
    height = 24 + len(rows) * high
    if column_name:
        height += 14
        parts.append(text(left, height - 4, column_name, size=11))
    width = max(len(columns) * wide, 6.2 * len(column_name))
    return svg(left + width + 4, height, parts, title)


def _shade(value: float | None) -> str:
    if value is None:
        return _GAP
    share = min(max(value, 0.0), 1.0)
    low, high = (246, 249, 252), (8, 69, 148)
    mixed = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def selection(
    title: str,
    chosen: Sequence[Sequence[Sequence[int]]],
    query: int,
    evidence: Sequence[int],
) -> str:
    """Keys from left to right, layers from top to bottom, a thin line for each list of a layer.

    A layer without lists is dense: one pale line. Bands from top to bottom mark the evidence.
    """
    left, width, line, gap = 34.0, 760.0, 3.0, 2.0
    scale = (width - left - 6) / (query + 1)
    parts, y = [], 22.0
    drawn = []
    for number, lists in enumerate(chosen):
        height = line * max(len(lists), 1)
        if number % max(1, len(chosen) // 12) == 0:
            parts.append(text(left - 6, y + 8, str(number), anchor="end", size=11))
        wide = (query + 1) * scale
        parts.append(
            f'<rect x="{left}" y="{y:.1f}" width="{wide:.1f}" height="{height:.1f}" '
            + (f'fill="{_GAP}"/>' if lists else f'fill="{COLOURS[0]}" opacity="0.35"/>')
        )
        for one, keys in enumerate(lists):
            for start, stop in _runs(keys):
                long = max((stop - start) * scale, 0.7)
                top = y + one * line
                drawn.append(
                    f"M{left + start * scale:.1f} {top:.1f}h{long:.1f}v{line}h-{long:.1f}z"
                )
        y += height + gap
    bands = [
        f'<rect x="{left + start * scale:.1f}" y="18" width="{max((stop - start) * scale, 2):.1f}" '
        f'height="{y - 16:.1f}" fill="{COLOURS[1]}" opacity="0.4"/>'
        for start, stop in _runs(evidence)
    ]
    parts.append(f'<path d="{"".join(drawn)}" fill="{COLOURS[0]}"/>')
    ticks = [(query * n) // 4 for n in range(5)]
    names = [
        text(left + at * scale, 13, f"{at:,}", anchor=("end" if at == query else "middle"), size=11)
        for at in ticks
    ]
    parts.append(text(0, 13, "layer", size=11))
    return svg(width, y + 4, [*parts, *bands, *names], title)


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring ascending positions as ranges [start, stop)."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and runs[-1][1] == position:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs
