# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG inside a page: colours are the page's, so that they follow light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: Units of a plot: small, so that letters stay legible at the width of a phone.
WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 34


@dataclass(frozen=True, slots=True)
class Series:
    """``points``: x, y. ``css``: its class, ``a`` or ``b``. ``mark``: line, dots or bars."""

    css: str
    points: Sequence[tuple[float, float]]
    mark: str = "line"
    titles: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """``ticks``: place and label. ``log``: in decades."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """0 .. 1 along the axis."""
        low, high, x = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, x = math.log(low), math.log(high), math.log(x)
        return (x - low) / (high - low)


def linear(label: str, low: float, high: float, count: int = 5) -> Axis:
    """Round ticks between two values; from the low one to the next tick above the high one."""
    span = max(high - low, 1e-30)
    power: float = 10.0 ** math.floor(math.log10(span / count))
    step = next((s * power for s in (1, 2, 5, 10) if span / (s * power) <= count), 10 * power)
    top = low + math.ceil(span / step - 1e-9) * step
    ticks = [low + i * step for i in range(round((top - low) / step) + 1)]
    return Axis(label, low, top, [(t, f"{t:.6g}") for t in ticks])


def decades(label: str, values: Sequence[float]) -> Axis:
    """Powers of ten around positive values."""
    found = [v for v in values if v > 0] or [1.0]
    low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    high = max(high, low + 1)
    step = max(1, (high - low) // 6)
    ticks = [
        (10.0**i, f"1e{i}" if abs(i) > 2 else f"{10.0**i:g}") for i in range(low, high + 1, step)
    ]
    return Axis(label, 10.0**low, 10.0**high, ticks, log=True)


def chart(x: Axis, y: Axis, series: Sequence[Series], joins: Sequence[tuple[int, ...]] = ()) -> str:
    """Axes and series. ``joins``: numbers of two series whose points of one x are joined."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return LEFT + wide * x.at(point[0]), TOP + high * (1 - y.at(point[1]))

    parts = [*_axes(x, y)]
    for first, second in joins:
        for p, q in zip(series[first].points, series[second].points, strict=True):
            (x1, y1), (_, y2) = place(p), place(q)
            parts.append(f'<path class="join" d="M{x1:.1f} {y1:.1f}V{y2:.1f}"/>')
    for one in series:
        parts += _marks(one, [place(p) for p in one.points], wide)
    return _svg(parts, HEIGHT, f"{y.label} over {x.label}")


def _marks(one: Series, places: Sequence[tuple[float, float]], wide: float) -> list[str]:
    titles = [f"<title>{escape(t)}</title>" for t in one.titles] or [""] * len(places)
    if one.mark == "line":
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in places)
        return [f'<path class="line {one.css}" d="M{path}"/>'] if places else []
    if one.mark == "dots":
        radius = 3.2 if len(places) <= 40 else 2
        return [
            f'<circle class="dot {one.css}" cx="{px:.1f}" cy="{py:.1f}" r="{radius}">{t}</circle>'
            for (px, py), t in zip(places, titles, strict=True)
        ]
    bar = max(1.0, 0.7 * wide / max(len(places), 1))
    floor = HEIGHT - BOTTOM
    return [
        f'<rect class="bar {one.css}" x="{px - bar / 2:.1f}" y="{py:.1f}" width="{bar:.1f}" '
        f'height="{max(floor - py, 0.5):.1f}">{t}</rect>'
        for (px, py), t in zip(places, titles, strict=True)
    ]


def _axes(x: Axis, y: Axis) -> list[str]:
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, label in y.ticks:
        at = TOP + (floor - TOP) * (1 - y.at(value))
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{right}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{at + 4:.1f}">{escape(label)}</text>')
    for value, label in x.ticks:
        at = LEFT + (right - LEFT) * x.at(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {floor}v4"/>')
        parts.append(f'<text class="mid" x="{at:.1f}" y="{floor + 16}">{escape(label)}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="mid dim" x="{middle}" y="{HEIGHT - 4}">{escape(x.label)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{right}"/>')
    return parts


@dataclass(frozen=True, slots=True)
class Cell:
    """One square of a grid: how strong its colour is, 0 .. 1, and what it says when pointed at."""

    strength: float
    title: str


def grid(rows: Sequence[tuple[str, Sequence[Cell | None], str]], label: str) -> str:
    """``rows``: name, a cell for each column (None: nothing there), and a figure at the end."""
    columns = max(len(cells) for _, cells, _ in rows)
    tall = 22
    left = min(190.0, 12 + 6.9 * max(len(name) for name, _, _ in rows))
    right = 10 + 6.6 * max(len(figure) for _, _, figure in rows)
    wide = (WIDTH - left - right) / columns
    gap = min(1.5, wide / 6)
    parts = []
    for r, (name, cells, figure) in enumerate(rows):
        top = r * tall
        parts.append(f'<text x="0" y="{top + 15}">{escape(name)}</text>')
        for c, cell in enumerate(cells):
            if cell is not None:
                parts.append(
                    f'<rect class="cell" x="{left + c * wide:.2f}" y="{top + 2}" '
                    f'width="{wide - gap:.2f}" height="{tall - 4}" '
                    f'fill-opacity="{0.08 + 0.92 * min(max(cell.strength, 0), 1):.3f}">'
                    f"<title>{escape(cell.title)}</title></rect>"
                )
        parts.append(f'<text class="end" x="{WIDTH}" y="{top + 15}">{escape(figure)}</text>')
    floor = len(rows) * tall
    step = max(1, math.ceil(columns / 12))
    for c in range(0, columns, step):
        at = left + (c + 0.5) * wide
        parts.append(f'<text class="mid dim" x="{at:.1f}" y="{floor + 14}">{c}</text>')
    middle = left + columns * wide / 2
    parts.append(f'<text class="mid dim" x="{middle:.1f}" y="{floor + 30}">{escape(label)}</text>')
    return _svg(parts, floor + 34, label)


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
