"""What a person sees while a run is going on: a progress bar on a terminal, plain lines everywhere else.

A bar redraws itself with carriage returns. On a terminal that is a bar; in a log file, a CI page or ``nohup.out`` it is
garbage that drowns the numbers. So the bar exists only if stderr is a terminal, and the numbers themselves are always
printed, one dict-like line each, to stdout::

    {'loss': 2.1304, 'grad_norm': 1.92, 'learning_rate': 0.0001, ..., 'global_step/max_steps': '10/200', ...}
    Train:   5%|██▌                        | 10/200 [00:04<01:21,  2.33it/s]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any


def format_time(seconds: float) -> str:
    """``seconds`` as people say it: ``7s``, ``2m 5s``, ``1h 0m 3s``, ``2d 3h 0m 0s``."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (whole % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{number}{unit}" for number, unit in parts)


def format_row(row: Mapping[str, Any]) -> str:
    """A row of the log as one dict-like line, floats to 6 significant digits."""
    shown = ((key, f"{value:.6g}" if isinstance(value, float) else repr(value)) for key, value in row.items())
    return "{" + ", ".join(f"{key!r}: {value}" for key, value in shown) + "}"


class Progress:
    """One bar named ``label`` over ``total`` steps, or nothing at all where stderr is not a terminal.

    ``start`` is where a resumed run begins. ``visible=None`` means: if stderr is a terminal.
    """

    def __init__(self, label: str, total: int, *, start: int = 0, visible: bool | None = None) -> None:
        self._bar: Any = None
        if sys.stderr.isatty() if visible is None else visible:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=label, dynamic_ncols=True, leave=label != "Val")

    def to(self, position: int) -> None:
        """Move the bar to an absolute ``position``; never moves it back."""
        if self._bar is not None:
            self._bar.update(max(0, position - self._bar.n))

    def advance(self, steps: int = 1) -> None:
        """Move the bar ahead by ``steps``."""
        if self._bar is not None:
            self._bar.update(steps)

    def write(self, line: str) -> None:
        """Print ``line`` to stdout, above the bar if there is one."""
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)

    def close(self) -> None:
        """Leave the bar as it is and end its line; closing twice is harmless."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
