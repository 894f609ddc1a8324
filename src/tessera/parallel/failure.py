"""What a rank that fails leaves to its launcher, so that one error is reported once.

When one rank of a run dies, the others notice it as a broken connection, a moment later, each with a traceback of its
own. The first error is the interesting one, so a rank does not print its error but writes it into a file, and the
launcher, which sees which rank failed first, prints that one::

    user   a mistake that can be mended: one line
    bug    anything else: the traceback
    lost   this rank only noticed that another one is gone: never reported if there is a better explanation
"""

from __future__ import annotations

import json
import os
import re
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tessera.config.errors import UserError

Kind = Literal["user", "bug", "lost"]

_LOST = re.compile(
    "|".join(
        (
            # gloo
            r"Connection (closed|reset) by peer|Broken pipe|pair closure|Read error \[|Write error \[",
            # NCCL
            r"ncclRemoteError|remote process (has )?exited|NCCL communicator (was|has been) aborted|ncclSystemError",
            # the store
            r"Connection was likely closed|failed to (recv|send)|remote server shutdown",
        )
    ),
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a rank failed: ``text`` is what to print, ``code`` the exit code."""

    kind: Kind
    text: str
    code: int

    @property
    def summary(self) -> str:
        """The last line, which names the error, for those who only need to know who was first."""
        lines = self.text.strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def diagnose(error: BaseException, rank: int) -> Failure:
    """What ``error``, raised on ``rank``, is to the user."""
    lost = [cause for cause in _causes(error) if isinstance(cause, (RuntimeError, OSError)) and _is_lost(cause)]
    if lost:
        reason = " ".join(str(lost[-1]).split())[:200]
        return Failure("lost", f"error: rank {rank} lost the connection to another rank: {reason}", 1)
    if isinstance(error, UserError):
        prefix = f"rank {rank}: " if rank else ""
        return Failure("user", f"error: {prefix}{' '.join(str(error).split())}", error.exit_code)
    trace = "".join(traceback.format_exception(error)).rstrip()
    return Failure("bug", f"{trace}\nerror: rank {rank} failed: {type(error).__name__}: {_first_line(error)}", 1)


def _is_lost(error: BaseException) -> bool:
    return _LOST.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def record(failure: Failure, path: Path) -> None:
    """Leave ``failure`` for the launcher; ``message`` and ``timestamp`` are what torchrun would read."""
    aside = path.with_suffix(".writing")
    data = {"message": failure.text, "timestamp": int(time.time()), "kind": failure.kind, "code": failure.code}
    aside.write_text(json.dumps(data), encoding="utf-8")
    os.replace(aside, path)


def read(path: Path) -> Failure | None:
    """The failure that a rank left, if it left one."""
    if not path.is_file():
        return None
    data = json.loads(path.read_text(encoding="utf-8"))
    return Failure(data["kind"], data["message"], data["code"])
