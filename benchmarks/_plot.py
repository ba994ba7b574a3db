# SPDX-License-Identifier: Apache-2.0
"""Points over two logarithmic axes, as SVG that is readable on light and on dark pages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEFT, TOP, WIDE, HIGH = 70, 40, 520, 300
#: Pixels between the base lines of two labels.
LINE = 14
STYLE = (
    "text{fill:#333;font:12px sans-serif}.ours{fill:#0a7d4f}.other{fill:#b4451f}"
    "path{fill:none;stroke:#999}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.ours{fill:#4cd29a}.other{fill:#ff9a6b}}"
)


@dataclass(frozen=True, slots=True)
class Point:
    """A named mark; ``ours`` decides its colour, ``low`` to ``high`` is the range of y."""

    name: str
    x: float
    y: float
    low: float
    high: float
    ours: bool


def scatter(title: str, x_name: str, y_name: str, points: Sequence[Point]) -> str:
    """An SVG document. All values must be positive."""
    xs = _Axis.over([p.x for p in points])
    ys = _Axis.over([v for p in points for v in (p.low, p.high)])
    parts = [f"<style>{STYLE}</style>", f'<text x="{LEFT}" y="20">{title}</text>']
    parts.append(f'<path d="M{LEFT} {TOP}V{TOP + HIGH}H{LEFT + WIDE}"/>')
    for value in xs.ticks():
        at = LEFT + WIDE * xs.share(value)
        parts.append(_text(at, TOP + HIGH + 18, f"{value:g}", "middle"))
    for value in ys.ticks():
        parts.append(_text(LEFT - 6, TOP + HIGH * (1 - ys.share(value)) + 4, f"{value:g}", "end"))
    parts.append(_text(LEFT + WIDE / 2, TOP + HIGH + 38, x_name, "middle"))
    parts.append(_text(LEFT, TOP - 6, y_name, "end"))
    taken: list[tuple[float, float]] = []
    for p in sorted(points, key=lambda p: -p.y):
        at = LEFT + WIDE * xs.share(p.x)
        down, top, end = (TOP + HIGH * (1 - ys.share(v)) for v in (p.y, p.high, p.low))
        kind = "ours" if p.ours else "other"
        parts.append(f'<path d="M{at:.1f} {top:.1f}V{end:.1f}"/>')
        parts.append(f'<circle class="{kind}" cx="{at:.1f}" cy="{down:.1f}" r="4"/>')
        place = down + 4
        while any(abs(place - y) < LINE and abs(at - x) < 130 for x, y in taken):
            place += LINE / 2
        taken.append((at, place))
        parts.append(_text(at + 8, place, p.name, "start", kind))
    size = f'width="{LEFT + WIDE + 130}" height="{TOP + HIGH + 50}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "_Axis":
        return cls(math.log10(min(values)) - 0.05, math.log10(max(values)) + 0.05)

    def share(self, value: float) -> float:
        return (math.log10(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values, close enough that a narrow axis has some."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        every = [float(f"{m}e{e}") for e in powers for m in (1, 1.5, 2, 3, 5, 7)]
        return [v for v in every if 0 <= self.share(v) <= 1]


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    colour = f' class="{kind}"' if kind else ""
    return f'<text{colour} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
