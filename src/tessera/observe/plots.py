"""``images/*.png``: one picture per curve of a run, made from ``logging.jsonl`` and therefore at any time.

A loss is drawn twice, raw in the background and smoothed (:func:`~tessera.observe.curves.ema`) in front. matplotlib is
optional and slow to import, so it is imported here, when the run is over; and only its object interface is used, which
has no global figure and no display to fail on.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tessera.observe.curves import Curves, Points, as_number, ema, finite, read_log


def draw(run_dir: Path) -> list[Path]:
    """Draw every curve of ``run_dir`` into ``run_dir/images`` and return the files, sorted.

    Without matplotlib: one line on stderr and an empty list; pictures are never a reason to fail a run.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("images/ not drawn: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return []
    curves = {name: points for name, points in tagged(read_log(run_dir)).items() if finite(points)}
    if not curves:
        return []
    images = run_dir / "images"
    images.mkdir(exist_ok=True)
    figure = Figure(figsize=(8, 5))
    canvas = FigureCanvasAgg(figure)
    made = []
    for name, points in curves.items():
        figure.clear()
        axes = figure.add_axes((0.1, 0.1, 0.87, 0.82))  # fixed: a layout solver would cost more than the drawing
        steps, values = zip(*finite(points), strict=True)
        marker = "o" if len(steps) < 20 else None
        if name.partition("_")[2] == "loss" and len(steps) > 1:
            axes.plot(steps, values, color="#9db8d9", linewidth=1, marker=marker, markersize=3, label="raw")
            axes.plot(steps, ema(values), color="#1f5fa8", linewidth=2, label="EMA 0.9")
            axes.legend(frameon=False)
        else:
            axes.plot(steps, values, color="#1f5fa8", linewidth=1.6, marker=marker, markersize=3)
        axes.set_title(name, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        path = images / f"{name}.png"
        canvas.print_png(path)
        made.append(path)
    return sorted(made)


def tagged(log: Curves) -> dict[str, Points]:
    """Curves by picture name: ``train_loss``, ``train_learning_rate``, ``eval_loss`` ... and the totals of the end."""
    out: dict[str, Points] = {}
    for key, points in log.curves.items():
        out[_slug(key if key.startswith("eval_") else f"train_{key}")] = points
    for key, value in log.last.items():
        number = as_number(value)
        if key.startswith("train_") and number is not None:
            out[_slug(f"train_{key}")] = [(int(log.last.get("global_step", log.steps)), number)]
    return out


def _slug(key: str) -> str:
    """``key`` as a file name: ``train_speed(s/it)`` -> ``train_speed_s_it``."""
    return re.sub(r"[^0-9A-Za-z]+", "_", key).strip("_")
