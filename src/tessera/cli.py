"""The command line: find the verb, resolve its flags, hand the Run to the room that does the work.

Nothing heavy is imported before the command line is known to be right, so that ``--help`` and a misspelt flag are
answered at once. Training on several processes (``NPROC_PER_NODE``, ``NNODES``) starts this same program once per
process through torch's elastic launcher, the engine of ``torchrun``, and returns the exit code of the first process
that failed. Exit codes: 0, 1 for a mistake found at work, 2 for a wrong command line, 130 after Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tessera import __version__
from tessera.config.errors import UserError
from tessera.config.flags import TRAIN
from tessera.config.manual import program_help, verb_help

if TYPE_CHECKING:
    from tessera.config.run import Run

ENTRY: Mapping[str, str] = {
    "pt": "tessera.recipes.supervised:main",
    "sft": "tessera.recipes.supervised:main",
    "infer": "tessera.infer.run:main",
    "export": "tessera.recipes.export:main",
    "data": "tessera.recipes.data:main",
    "report": "tessera.observe.report:main",
    "demo": "tessera.recipes.demo:main",
}
SHUTDOWN_S = 600
"""Seconds that ranks have to save a checkpoint after a signal before they are killed."""
GRACE_S = 1.0
"""How long another rank than 0 waits before it reports an error, so that an error common to all is reported once."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` if not given) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _report(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of our output left (`tessera ... | head`); closing stdout quietly keeps the interpreter silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(program_help())
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        print(f"tessera {__version__}")
        return 0
    from tessera.config.resolve import resolve, under_launcher, verb_of

    if {"-h", "--help"} & set(words[1:]):
        print(verb_help(verb_of(words)))
        return 0
    run = resolve(words, os.environ)
    for name, value in run.env.items():
        os.environ.setdefault(name, value)
    if not under_launcher(os.environ) and run.verb in TRAIN and not run.dry_run and _several(run):
        return launch(run, words)
    if _rank() == 0:
        for note in run.notes:
            print(f"note: {note}", file=sys.stderr)
    entry_of(run.verb)(run)
    return 0


def entry_of(verb: str) -> Callable[[Run], object]:
    """The function that does the work of ``verb``; importing it imports what the verb needs."""
    module, _, name = ENTRY[verb].partition(":")
    entry: Callable[[Run], object] = getattr(importlib.import_module(module), name)
    return entry


def _rank() -> int:
    from tessera.config.resolve import under_launcher

    return int(os.environ.get("RANK", "0")) if under_launcher(os.environ) else 0


def _several(run: Run) -> bool:
    return run.parallel.nproc_per_node * run.parallel.nnodes > 1


def _report(error: UserError) -> int:
    """Print ``error: ...`` once, even if every rank fails in the same way; returns the exit code."""
    rank = _rank()
    prefix = ""
    if rank > 0:
        # If rank 0 failed too, the launcher ends this process during the wait.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_S)
        prefix = f"rank {rank}: "
    sys.stdout.flush()
    print(f"error: {prefix}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return error.exit_code


def launch(run: Run, words: Sequence[str]) -> int:
    """Start ``nproc_per_node`` ranks of this command and return the exit code of the first that fails, else 0."""
    place = run.parallel
    address = place.master_addr or "127.0.0.1"
    port = place.master_port or (_free_port() if place.nnodes == 1 else 29500)
    nodes = ["--nnodes", str(place.nnodes), "--node_rank", str(place.node_rank), "--master_addr", address]
    shown = ["--nproc_per_node", str(place.nproc_per_node), *(nodes if place.nnodes > 1 else [])]
    command = ["-m", "torch.distributed.run", *shown, "--master_port", str(port), "-m", "tessera", *words]
    print(f"run sh: `{shlex.join([Path(sys.executable).name, *_masked(command)])}`", flush=True)

    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // place.nproc_per_node)))
    config = LaunchConfig(
        min_nodes=place.nnodes,
        max_nodes=place.nnodes,
        nproc_per_node=place.nproc_per_node,
        run_id="tessera",
        role="rank",
        rdzv_backend="static",
        rdzv_endpoint=f"{address}:{port}",
        rdzv_configs={"rank": place.node_rank},
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT",  # not SIGHUP: `nohup tessera sft ...` must outlive its terminal
        shutdown_timeout=SHUTDOWN_S,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "tessera", *words)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(f"error: rank {rank} was ended by {name} (SIGKILL: often out of memory)", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _masked(command: Sequence[str]) -> list[str]:
    """The command without the secret it may hold."""
    out = list(command)
    for at, word in enumerate(out[:-1]):
        if word == "--hub_token":
            out[at + 1] = "***"
    return out


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
