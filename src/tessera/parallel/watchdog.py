"""A run that stands still says where, and ends.

When one rank is stuck (a dead network disk, a full data queue, a stopped process), the others wait for it inside a
collective, and nobody says anything. So every rank keeps a :class:`Heartbeat`, three attributes that the loop writes
as it goes along, and a thread that looks at it. The thread also tells the others, through the store that the process
group was opened with, what its rank is doing::

    loop    heart.enter("forward")                                plain attribute writes, nothing else
    thread  every few seconds: store["watch/<rank>"] = step, phase, where in the code
            no beat for --ddp_timeout seconds: read everybody's, name who holds up whom in one line, end the process

Threads of a rank run while its main thread waits inside a collective, because that wait releases the interpreter's
lock. Only the first rank to notice speaks; the launcher then ends the others.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, Store

from tessera.parallel.mesh import Mesh

EXIT_CODE = 1
SLOWEST_LOOK_S = 5.0
PATIENCE_S = 30.0
"""How long a rank that lost the word to another one waits for the launcher to end it."""


def group_timeout(ddp_timeout: float) -> float:
    """The process group's own timeout: later than the watchdog, which has more to say."""
    return 1.25 * ddp_timeout + 60.0


@dataclass(slots=True)
class Heartbeat:
    """What the loop is doing: the last finished ``step``, the ``phase`` it is in, and how many phases it entered."""

    step: int = 0
    phase: str = "start"
    beats: int = 0

    def enter(self, phase: str) -> None:
        """The loop has come to ``phase``."""
        self.phase = phase
        self.beats += 1


@dataclass(frozen=True, slots=True)
class Report:
    """One rank's state as the others see it; ``collective`` is empty unless its code is inside one."""

    rank: int
    host: str
    look: int
    step: int
    phase: str
    beats: int
    collective: str
    where: str

    @property
    def place(self) -> str:
        return f"(host {self.host})"

    @property
    def doing(self) -> str:
        """The phase, and the line of our code that the rank is at."""
        return f"step {self.step} (phase: {self.phase}{f', {self.where}' if self.where else ''})"


def whereabouts(stack: FrameType | None) -> tuple[str, str]:
    """The collective that this stack is inside, if any, and the innermost line of tessera's own code."""
    collective, where = "", ""
    while stack is not None:
        module, name = str(stack.f_globals.get("__name__", "")), stack.f_code.co_name
        if module.startswith("torch.distributed") and not collective and not where and name != "wrapper":
            collective = name
        if module.startswith("tessera.") and not where:
            where = f"{Path(stack.f_code.co_filename).name}:{stack.f_lineno} {name}"
        stack = stack.f_back
    return collective, where


def verdict(reports: Sequence[Report | None], silent: Sequence[int], seconds: float) -> str:
    """One line: who has not moved, and who waits for whom. ``silent`` ranks do not even answer the question."""
    known = [report for report in reports if report is not None]
    unseen = [rank for rank, report in enumerate(reports) if report is None]
    guilty = [report for report in known if report.rank in silent]
    parts = [f"rank {r.rank} {r.place} does not respond, last seen at {r.doing}" for r in guilty]
    parts += [f"rank {rank} was never heard of" for rank in unseen]
    if not parts:
        # A rank that is ahead waits for those behind it; among equals, those outside a collective hold up the others.
        behind = [report for report in known if report.beats == min(report.beats for report in known)]
        guilty = [report for report in behind if not report.collective] or (behind if len(behind) < len(known) else [])
        parts = [
            f"rank {r.rank} {r.place} has not moved since {r.doing}{f' in {r.collective}' if r.collective else ''}"
            for r in guilty
        ]
    groups: dict[str, list[int]] = {}
    for report in known:
        if report not in guilty:
            what = f"in {report.collective} at {report.where}" if report.collective else f"at {report.doing}"
            groups.setdefault(what, []).append(report.rank)
    for what, ranks in groups.items():
        several = len(ranks) > 1
        parts.append(f"{'ranks' if several else 'rank'} {spans(ranks)} {'wait' if several else 'waits'} {what}")
    return f"error: no progress for {seconds:.0f} s (--ddp_timeout): {'; '.join(parts)}"


def spans(ranks: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(slots=True)
class Watchdog:
    """Watches one rank's heartbeat from a thread of its own; ``end`` is called with the exit code when it stopped."""

    heart: Heartbeat
    rank: int
    world: int
    store: Store
    timeout_s: float
    end: Callable[[int], object] = os._exit

    def watch(self, stopped: threading.Event, main: int) -> None:
        """Look at the heart of thread ``main`` until ``stopped``."""
        pause = min(SLOWEST_LOOK_S, self.timeout_s / 20)
        parent = os.getppid()
        seen, still, look, last = self.heart.beats, 0.0, 0, time.monotonic()
        while not stopped.wait(pause):
            if os.getppid() != parent:
                self._finish(f"error: rank {self.rank} ends because its launcher was killed")
            now, look = time.monotonic(), look + 1
            # A process that was stopped for an hour (a suspended laptop) was not stuck for an hour.
            still, last = still + min(now - last, 2 * pause), now
            if self.heart.beats != seen:
                seen, still = self.heart.beats, 0.0
            try:
                self._tell(look, main)
                if still >= self.timeout_s:
                    self._speak(look, main, pause)
            except DistError:
                # The store is gone because the launcher of the first machine is; its ranks' sockets tell the rest.
                if still >= self.timeout_s:
                    self._finish(verdict([self._report(look, main)], (), self.timeout_s))

    def _report(self, look: int, main: int) -> Report:
        frames = sys._current_frames()
        collective, where = whereabouts(frames.get(main))
        if not collective and self.heart.phase == "backward":
            # Autograd runs hooks, and so the reduction of gradients, in threads of its own.
            others = (frame for ident, frame in frames.items() if ident not in (main, threading.get_ident()))
            collective = next((found for frame in others if (found := whereabouts(frame)[0])), "")
        heart = self.heart
        return Report(self.rank, socket.gethostname(), look, heart.step, heart.phase, heart.beats, collective, where)

    def _tell(self, look: int, main: int) -> None:
        self.store.set(f"watch/{self.rank}", json.dumps(asdict(self._report(look, main))))

    def _heard(self) -> list[Report | None]:
        keys = [f"watch/{rank}" for rank in range(self.world)]
        return [Report(**json.loads(self.store.get(key))) if self.store.check([key]) else None for key in keys]

    def _speak(self, look: int, main: int, pause: float) -> None:
        """Name the culprit, if no other rank does so already, and end this process."""
        if self.store.compare_set("watch/speaker", "", str(self.rank)) != str(self.rank).encode():
            time.sleep(PATIENCE_S)
            self.end(EXIT_CODE)
            return
        before = self._heard()
        time.sleep(3 * pause)
        self._tell(look + 1, main)
        after = self._heard()
        silent = [
            new.rank
            for old, new in zip(before, after, strict=True)
            if old is not None and new is not None and old.look == new.look and new.rank != self.rank
        ]
        self._finish(verdict(after, silent, self.timeout_s))

    def _finish(self, line: str) -> None:
        os.write(2, f"{line}\n".encode())
        self.end(EXIT_CODE)


@contextmanager
def watching(heart: Heartbeat, mesh: Mesh, timeout_s: float) -> Iterator[None]:
    """Watch ``heart``, beaten by this thread, for the block; a single process waits for nobody and is not watched."""
    if mesh.world == 1:
        yield
        return
    import torch.distributed as dist

    # A connection of its own: the group's is held by whoever waits in it.
    store: Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    dog = Watchdog(heart, mesh.rank, mesh.world, store, timeout_s)
    stopped = threading.Event()
    thread = threading.Thread(target=dog.watch, args=(stopped, threading.get_ident()), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
