"""The frame of the report: one HTML page, its style and its few lines of script, all inline.

The page must open from a disk without a network, in ten years, in light and in dark; so there are no fonts, no
libraries and no links that load anything. Everything in it is readable without script, which only adds a crosshair.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --ink: #1c2330; --soft: #5f6b7c; --edge: #dfe3ea;
  --c0: #2563b8; --c1: #d9722c; --c2: #2f9467; --c3: #9356b8; --good: #1f7a4d; --bad: #c0362c; --badbg: #fbe3e0;
  --goodbg: #dcf2e6; --warnbg: #fdf1d6; --warn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --bg: #12151b; --card: #1a1f28; --ink: #e4e8ef; --soft: #98a3b5;
  --edge: #2c3442; --c0: #6aa5f2; --c1: #f0965a; --c2: #5cc795; --c3: #c08be0; --good: #66cf9b; --bad: #ff8c80;
  --badbg: #4a2320; --goodbg: #173a29; --warnbg: #3d3115; --warn: #f0c465; } }
* { box-sizing: border-box } body { margin: 0; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 64px }
h1 { font-size: 26px; line-height: 1.25; margin: 0 }
h2 { font-size: 18px; margin: 40px 0 12px } .sub { color: var(--soft); margin: 4px 0 20px; overflow-wrap: anywhere }
.badge { display: inline-block; font-size: 12px; font-weight: 600; padding: 1px 9px; border-radius: 99px;
  background: var(--edge); color: var(--ink); white-space: nowrap }
h1 .badge { vertical-align: 5px; margin-left: 10px }
.badge.good, .right .badge { background: var(--goodbg); color: var(--good) }
.badge.bad, .wrong .badge { background: var(--badbg); color: var(--bad) }
.badge.warn { background: var(--warnbg); color: var(--warn) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px }
.tile, .chart, .card, .box { background: var(--card); border: 1px solid var(--edge); border-radius: 10px }
.tile { padding: 12px 16px } .tile b { display: block; font-size: 22px; line-height: 1.3; font-weight: 650;
  font-variant-numeric: tabular-nums } .tile span { color: var(--soft); font-size: 13px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 14px }
.chart { margin: 0; padding: 12px 14px 6px; position: relative }
.chart svg { display: block; width: 100%; height: auto }
figcaption { display: flex; gap: 14px; align-items: baseline; font-size: 14px; flex-wrap: wrap }
.note { color: var(--soft); font-size: 13px } figcaption .note { margin-left: auto }
.key { font-size: 12.5px; color: var(--soft) } .key i { display: inline-block; width: 16px; height: 3px;
  border-radius: 2px; margin-right: 5px; vertical-align: 3px } .key i.faint { opacity: .4 }
.grid { stroke: var(--edge); stroke-width: 1 }
.tick { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums }
.end { text-anchor: end } .mid { text-anchor: middle } .line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.line.faint { stroke-width: 1; opacity: .4 } .dot { stroke: none }
.cross { stroke: var(--soft); stroke-dasharray: 3 3 }
.s0 { stroke: var(--c0) } .s1 { stroke: var(--c1) } .s2 { stroke: var(--c2) } .s3 { stroke: var(--c3) }
.dot.s0, i.s0 { fill: var(--c0); background: var(--c0) } .dot.s1, i.s1 { fill: var(--c1); background: var(--c1) }
.dot.s2, i.s2 { fill: var(--c2); background: var(--c2) } .dot.s3, i.s3 { fill: var(--c3); background: var(--c3) }
.tip { position: absolute; top: 44px; pointer-events: none; background: var(--card); border: 1px solid var(--edge);
  border-radius: 6px; padding: 4px 8px; font-size: 12px; white-space: pre; font-variant-numeric: tabular-nums }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 285px), 1fr)); gap: 14px }
.card { overflow: hidden; display: flex; flex-direction: column } .card.wrong { border-color: var(--bad) }
.pictures { background: #fff; border-bottom: 1px solid var(--edge); padding: 8px; display: flex; flex-wrap: wrap;
  gap: 8px; justify-content: center; align-items: center; min-height: 64px }
.pictures img { max-width: 100%; max-height: 240px; min-height: 44px; object-fit: contain }
.pictures p { color: #5f6b7c }
.text { padding: 10px 14px 12px } .question { margin: 6px 0; color: var(--soft); font-size: 13px;
  overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: auto 1fr; gap: 2px 12px; margin: 6px 0 0 }
dt { color: var(--soft); font-size: 13px }
dd { margin: 0; overflow-wrap: anywhere } .card dd { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  white-space: pre-wrap; max-height: 12em; overflow-y: auto }
ins, del { text-decoration: none; border-radius: 3px; font-weight: 650 }
ins { background: var(--badbg); color: var(--bad) }
del { background: var(--goodbg); color: var(--good) }
.box { padding: 14px 18px; margin-bottom: 14px; overflow-x: auto } .box h3 { margin: 0 0 8px; font-size: 15px }
.cols { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px;
  align-items: start }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th { text-align: left; color: var(--soft); font-weight: 600 }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--edge); vertical-align: top; overflow-wrap: anywhere }
tr:last-child td { border-bottom: 0 } .num { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12.5px }
.missing { color: var(--soft); font-style: italic; margin: 4px 0; font-size: 13px; overflow-wrap: anywhere }
.named td:first-child { color: var(--soft); white-space: nowrap }
details summary { cursor: pointer; color: var(--soft) }
footer { color: var(--soft); font-size: 13px; margin-top: 40px }
@media print { body { background: #fff } .tile, .chart, .card, .box { break-inside: avoid } }
"""

SCRIPT = """
for (const figure of document.querySelectorAll('[data-chart]')) {
  const {x, y, lines} = JSON.parse(figure.dataset.chart), svg = figure.querySelector('svg');
  const tip = document.createElement('div'); tip.className = 'tip'; tip.hidden = true; figure.append(tip);
  const cross = document.createElementNS(svg.namespaceURI, 'line'); cross.setAttribute('class', 'cross');
  cross.setAttribute('y1', y[0]); cross.setAttribute('y2', y[1]); svg.append(cross);
  const hide = () => { tip.hidden = true; cross.style.display = 'none'; }; hide();
  svg.addEventListener('pointerleave', hide);
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const step = x[2] + (at - x[0]) / (x[1] - x[0]) * (x[3] - x[2]);
    const near = lines.map(([label, color, points]) => [label, points.reduce((best, p) =>
      Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best)]);
    const first = near.reduce((a, b) => Math.abs(b[1][0] - step) < Math.abs(a[1][0] - step) ? b : a)[1][0];
    const px = x[0] + (first - x[2]) / (x[3] - x[2]) * (x[1] - x[0]);
    cross.setAttribute('x1', px); cross.setAttribute('x2', px); cross.style.display = '';
    tip.textContent = near.map(([label, p]) => `${label}  ${p[1]}  (step ${p[0]})`).join('\\n'); tip.hidden = false;
    const left = px / svg.viewBox.baseVal.width * box.width + 14;
    if (left > box.width / 2) { tip.style.left = ''; tip.style.right = (box.width - left + 42) + 'px'; }
    else { tip.style.right = ''; tip.style.left = (left + 12) + 'px'; }
  });
}
"""


def page(title: str, body: Iterable[str]) -> str:
    """A complete HTML document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A titled part of the page; nothing if all ``parts`` are empty."""
    inner = "\n".join(part for part in parts if part)
    return f"<section><h2>{html.escape(title)}</h2>\n{inner}</section>" if inner else ""


def box(title: str, inner: str) -> str:
    """A bordered block with a small title."""
    return f'<div class="box"><h3>{html.escape(title)}</h3>{inner}</div>'


def tile(value: str, label: str) -> str:
    """A large figure with a caption."""
    return f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def missing(text: str) -> str:
    """A sentence about something that is not there."""
    return f'<p class="missing">{html.escape(text)}</p>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Sequence[int] = ()) -> str:
    """A table of plain values, every cell escaped; columns in ``numeric`` are aligned to the right. ``head`` may be
    empty."""

    def cells(row: Sequence[object], tag: str) -> str:
        parts = (
            f"<{tag}{' class=num' if index in numeric else ''}>{html.escape(str(cell))}</{tag}>"
            for index, cell in enumerate(row)
        )
        return "".join(parts)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if head else ""
    kind = "" if head else ' class="named"'
    return f"<table{kind}>{top}<tbody>{body}</tbody></table>"
