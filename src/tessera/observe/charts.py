"""Line charts as inline SVG, in a page that loads nothing.

A chart is a handful of ``<path>`` elements over a grid of round numbers. Colours are CSS variables, so the page's light
and dark themes both fit. Every chart also carries its numbers as JSON; a few lines of script in the page use them for
a crosshair, and without script nothing is missing but that.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass

from tessera.observe.curves import Points, finite, thin, ticks

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart; ``faint`` draws it thin and pale, for raw values behind smoothed ones."""

    label: str
    points: Points
    color: int = 0
    faint: bool = False


def number(value: float) -> str:
    """A tick label or value: up to 4 significant digits, no trailing zeros, ``1e-05`` for small ones."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 10000 else f"{value:,.0f}"


def chart(title: str, lines: Sequence[Line], *, note: str = "", zero: bool = False) -> str:
    """An SVG chart of ``lines`` over steps as a ``<figure>``, or a sentence if there is nothing to draw.

    ``zero`` lets the values' axis start at 0, so that the noise of a rate does not look like a trend.
    """
    shown = [Line(x.label, thin(finite(x.points)), x.color, x.faint) for x in lines]
    shown = [line for line in shown if line.points]
    said = f"<span class=note>{html.escape(note)}</span>" if note else ""
    head = f"<figcaption><b>{html.escape(title)}</b>{_legend(shown)}{said}</figcaption>"
    if not shown:
        return f'<figure class="chart">{head}<p class=missing>Nothing was logged.</p></figure>'
    steps = [step for line in shown for step, _ in line.points]
    values = [value for line in shown for _, value in line.points]
    y_ticks = ticks(min([*values, 0]) if zero else min(values), max(values))
    low, high = y_ticks[0], y_ticks[-1]
    first, last = min(steps), max(*steps, min(steps) + 1)

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    body = [_y_grid(tick, y(tick)) for tick in y_ticks]
    body += [_x_label(tick, x(tick)) for tick in ticks(first, last, 6) if first <= tick <= last and tick == int(tick)]
    for line in shown:
        klass = f"s{line.color}{' faint' if line.faint else ''}"
        if len(line.points) > 1:
            path = "M" + "L".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line.points)
            body.append(f'<path class="line {klass}" d="{path}"/>')
        if len(line.points) <= 30 and not line.faint:
            body += [f'<circle class="dot {klass}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2.6"/>' for s, v in line.points]
    data = {
        "x": [LEFT, WIDTH - RIGHT, first, last],
        "y": [TOP, HEIGHT - BOTTOM, high, low],
        "lines": [[line.label, line.color, [[s, float(f"{v:.5g}")] for s, v in line.points]] for line in shown],
    }
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{"".join(body)}</svg>'
    packed = html.escape(json.dumps(data, separators=(",", ":")))
    return f'<figure class="chart" data-chart="{packed}">{head}{svg}</figure>'


def _y_grid(tick: float, y: float) -> str:
    return (
        f'<line class=grid x1={LEFT} x2={WIDTH - RIGHT} y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick end" x={LEFT - 8} y="{y + 3.5:.1f}">{number(tick)}</text>'
    )


def _x_label(tick: float, x: float) -> str:
    return f'<text class="tick mid" x="{x:.1f}" y={HEIGHT - 10}>{number(tick)}</text>'


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    keys = (
        f'<span class=key><i class="s{line.color}{" faint" if line.faint else ""}"></i>{html.escape(line.label)}</span>'
        for line in lines
    )
    return "".join(keys)
