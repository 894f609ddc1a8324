"""Starting the ranks of one machine, and ending all of them when one fails.

Every machine runs one launcher. The one of node 0 opens the meeting point (a ``TCPStore`` at MASTER_ADDR:MASTER_PORT),
through which the machines find each other, the ranks open their process group, and a failure becomes known::

    gather the machines -> start the ranks -> look at them ten times a second -> end with the first failure's code

A rank that fails leaves what it has to say in its error file (:func:`tessera.parallel.failure.record`); the launcher
prints it, once, and kills the other ranks, which can only wait for the dead one. Ranks that fail because another one
vanished say so in their file and are never taken for the first failure. A signal is not a failure: it is passed on and
the ranks get the time to save a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType

from torch.distributed import DistError, TCPStore

from tessera.config.errors import UserError
from tessera.parallel.failure import read

LOOK_S, ASK_S = 0.1, 1.0
"""How often a launcher looks at its own ranks, and how often it asks for failures on other machines."""
SHUTDOWN_S = 600.0
"""Seconds that ranks have to save a checkpoint after a signal before they are killed."""
REPEAT_S, HURRY_S = 3.0, 5.0
"""A second signal later than the first of these means "now", and ranks have the second one to end."""
LEAVE_S, LINGER_S = 300.0, 10.0
"""How long node 0 keeps the meeting point open for the other machines: after success, after a failure."""
QUIET_S = 10.0
"""How long a launcher waits for other machines before it says so."""
ORDERLY = (128 + signal.SIGTERM, 128 + signal.SIGINT)
"""Exit codes of a rank that was asked to stop, saved and stopped."""
FAILED = "failed"
"""Under this key the first failure of all machines is kept."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Where this machine stands among the machines of the run; ``port`` 0 means any free one (single machine)."""

    nproc: int
    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"{self.address}:{self.port}"


def open_store(nodes: Nodes, timeout_s: float) -> TCPStore:
    """Open or find the meeting point and wait until all machines have come. Raises UserError if they do not."""
    deadline = time.monotonic() + timeout_s
    if nodes.rank == 0:
        _require_free(nodes)
    else:
        _wait_for_first(nodes, deadline)
    try:
        # Node 0 talks to its own server through loopback: its public name may not resolve on itself yet.
        host = "127.0.0.1" if nodes.rank == 0 else nodes.address
        limit = timedelta(seconds=60)
        store = TCPStore(host, nodes.port, None, nodes.rank == 0, limit, wait_for_workers=False)
        _gather(store, nodes, deadline)
    except DistError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"MASTER_ADDR:MASTER_PORT {nodes.endpoint}: cannot meet the other machines: {reason}") from None
    return store


def _require_free(nodes: Nodes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free for a server
        try:
            probe.bind(("", nodes.port))
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            everywhere = " on all machines" if nodes.count > 1 else ""
            raise UserError(
                f"MASTER_PORT={nodes.port}: cannot be opened ({reason}); another run or program uses it. "
                f"Set another MASTER_PORT{everywhere}"
            ) from None


def _wait_for_first(nodes: Nodes, deadline: float) -> None:
    """Until node 0 listens. Asking quietly first keeps torch from printing every refused connection."""
    start, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((nodes.address, nodes.port), timeout=5).close()
            return
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        if time.monotonic() > deadline:
            raise UserError(
                f"MASTER_ADDR:MASTER_PORT {nodes.endpoint}: the first machine (NODE_RANK=0) does not answer: {reason}"
            )
        if not told and time.monotonic() - start > QUIET_S:
            told = True
            print(f"waiting for the first machine at {nodes.endpoint} ({reason})", file=sys.stderr, flush=True)
        time.sleep(0.5)


def _gather(store: TCPStore, nodes: Nodes, deadline: float) -> None:
    """Until all machines are here; they have to agree on how many they are and how many ranks each of them has."""
    if nodes.count == 1:
        return
    if store.add(f"node/{nodes.rank}", 1) > 1:
        raise UserError(f"NODE_RANK={nodes.rank} is another machine's already; each of them needs its own")
    shape = f"NNODES={nodes.count} NPROC_PER_NODE={nodes.nproc}"
    theirs = store.compare_set("shape", "", shape).decode()
    if theirs != shape:
        raise UserError(f"{shape} here but {theirs} on another machine; they have to be the same")
    store.add("here", 1)
    start, told = time.monotonic(), False
    while (here := store.add("here", 0)) < nodes.count:
        if time.monotonic() > deadline:
            raise UserError(f"NNODES={nodes.count}: only {here} of them came to {nodes.endpoint}")
        if not told and time.monotonic() - start > QUIET_S:
            told = True
            print(f"waiting for the other machines: {here} of {nodes.count} are here", file=sys.stderr, flush=True)
        time.sleep(0.1)


def environment(nodes: Nodes, store: TCPStore, local: int, error_file: Path) -> dict[str, str]:
    """The variables of one rank: those that torchrun sets, so that everything that knows torchrun works."""
    return {
        "RANK": str(nodes.rank * nodes.nproc + local),
        "LOCAL_RANK": str(local),
        "GROUP_RANK": str(nodes.rank),
        "WORLD_SIZE": str(nodes.count * nodes.nproc),
        "LOCAL_WORLD_SIZE": str(nodes.nproc),
        "MASTER_ADDR": nodes.address,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "tessera",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_ERROR_FILE": str(error_file),
    }


@dataclass(frozen=True, slots=True)
class End:
    """How the run ended here: the exit code, and what to say about it."""

    code: int
    text: str = ""


@dataclass(slots=True)
class Ranks:
    """The processes of this machine's ranks, looked after until the last one has ended."""

    nodes: Nodes
    store: TCPStore
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    files: dict[int, Path] = field(default_factory=dict)
    stop_by: float = math.inf
    _asked: float = 0.0
    _signalled: float = 0.0

    def start(self, command: Sequence[str], errors: Path, base: Mapping[str, str]) -> None:
        """Start every rank, in a session of its own: Ctrl-C reaches it through the launcher only."""
        for local in range(self.nodes.nproc):
            self.files[local] = errors / f"rank{local}.json"
            env = {**base, **environment(self.nodes, self.store, local, self.files[local])}
            self.processes[local] = subprocess.Popen(command, env=env, start_new_session=True)

    def signal(self, number: int) -> None:
        """Pass a signal on to whoever still runs, and set the time by which they have to be gone.

        The second one means now: a rank that waits inside a collective cannot even hear it.
        """
        now = time.monotonic()
        again = self._signalled and now - self._signalled > REPEAT_S
        self._signalled = self._signalled or now
        self.stop_by = min(self.stop_by, now + (HURRY_S if again else SHUTDOWN_S))
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End every rank that still runs, with everything it started, now."""
        for process in self.processes.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LINGER_S)  # a process in the kernel's hands cannot be ended; do not wait for it for ever

    def look(self) -> End | None:
        """How the run ended, or None if it has not."""
        codes = {local: process.poll() for local, process in self.processes.items()}
        if any(code in ORDERLY for code in codes.values()):
            # Asked to stop, here or on another machine: all ranks save and leave together.
            self.stop_by = min(self.stop_by, time.monotonic() + SHUTDOWN_S)
        stopping = self.stop_by < math.inf
        early = [-code for code in codes.values() if code in (-signal.SIGTERM, -signal.SIGINT)] if stopping else []
        if early:
            # That rank was not training yet, so no checkpoint can be written together: there is nothing to wait for.
            self.stop_by = min(self.stop_by, time.monotonic() + HURRY_S)
        fine = (0, *ORDERLY, -signal.SIGTERM, -signal.SIGINT) if stopping else (0,)
        bad = [local for local, code in codes.items() if code is not None and code not in fine]
        if bad:
            return self._first(bad)
        if all(code is not None for code in codes.values()):
            return End(max((code or 0 if (code or 0) >= 0 else 128 - (code or 0)) for code in codes.values()))
        if time.monotonic() > self.stop_by:
            if early:
                return End(128 + early[0])
            return End(1, "error: not all ranks stopped in time after the signal; the rest was killed")
        return self._elsewhere()

    def _first(self, bad: Sequence[int]) -> End:
        """Explain the failure of these ranks, unless another machine was first."""
        found = {local: read(self.files[local]) for local in bad}
        # Who only lost a peer is never the first; among others who failed within one look, the lowest speaks for all.
        local = min(bad, key=lambda at: ((failure := found[at]) is not None and failure.kind == "lost", at))
        failure, code = found[local], self.processes[local].returncode
        rank = self.nodes.rank * self.nodes.nproc + local
        text = failure.text if failure else ""
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
            text = f"error: rank {rank} was ended by {name}{hint}"
        end = End(code if code > 0 else 128 - code, text)
        if self.nodes.count == 1:
            return end
        summary = failure.summary if failure else text.removeprefix("error: ") or f"exit code {end.code}"
        mine = f"rank {rank} (host {socket.gethostname()}) failed first: {summary}"
        try:
            first = self.store.compare_set(FAILED, "", mine).decode()
        except DistError:
            return end
        return end if first == mine else End(end.code, f"error: stopped, because {first}")

    def _elsewhere(self) -> End | None:
        """The end of the run if a rank of another machine failed, or if the first machine is gone."""
        now = time.monotonic()
        if self.nodes.count == 1 or now - self._asked < ASK_S:
            return None
        self._asked = now
        try:
            if not self.store.check([FAILED]):
                return None
            return End(1, f"error: stopped, because {self.store.get(FAILED).decode()}")
        except DistError:
            if self.stop_by < math.inf:
                return None
            return End(1, f"error: stopped, because the first machine ({self.nodes.endpoint}) is gone")

    def leave(self, code: int) -> None:
        """Node 0 holds the meeting point open until the other machines have read what they need."""
        if self.nodes.count == 1:
            return
        try:
            self.store.add("left", 1)
            deadline = time.monotonic() + (LINGER_S if code else LEAVE_S)
            while self.nodes.rank == 0 and self.store.add("left", 0) < self.nodes.count:
                if time.monotonic() > deadline or (not code and self.store.check([FAILED])):
                    return
                time.sleep(LOOK_S)
        except DistError:
            return  # the others are gone already


@contextmanager
def _signals(act: Callable[[int], None]) -> Iterator[None]:
    """Pass SIGTERM and SIGINT to ``act``; SIGHUP is left alone, for ``nohup tessera sft ...`` outlives its terminal."""

    def handle(number: int, frame: FrameType | None) -> None:
        act(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(command: Sequence[str], nodes: Nodes, base: Mapping[str, str], timeout_s: float) -> int:
    """Run ``command`` as every rank of this machine; the exit code of the first that fails, else 0.

    The machines have ``timeout_s`` to find each other. Raises UserError if they do not.
    """
    store = open_store(nodes, timeout_s)
    ranks, asked = Ranks(nodes, store), 0

    def passed_on(number: int) -> None:
        nonlocal asked
        asked = number
        ranks.signal(number)

    with tempfile.TemporaryDirectory(prefix="tessera-") as errors, _signals(passed_on):
        try:
            ranks.start(command, Path(errors), base)
            while (end := ranks.look()) is None:
                time.sleep(LOOK_S)
        finally:
            ranks.kill()
        if end.text:
            sys.stdout.flush()
            print(end.text, file=sys.stderr, flush=True)
        ranks.leave(end.code)
    return end.code or (128 + asked if asked else 0)
