"""The command line: find the verb, resolve its flags, hand the Run to the room that does the work.

Nothing heavy is imported before the command line is known to be right, so that ``--help`` and a misspelt flag are
answered at once. Training on several processes (``NPROC_PER_NODE``, ``NNODES``) starts this same program once per
process with torchrun's variables (``parallel/launcher.py``; ``torchrun -m tessera ...`` works as well) and returns the
exit code of the first process that failed. Exit codes: 0, 1 for a mistake found at work, 2 for a wrong command line,
130 after Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tessera import __version__
from tessera.config.errors import UserError
from tessera.config.flags import TRAIN
from tessera.config.manual import megatron_help, program_help, verb_help

if TYPE_CHECKING:
    from tessera.config.run import Run

ENTRY: Mapping[str, str] = {
    "pt": "tessera.recipes.supervised:main",
    "sft": "tessera.recipes.supervised:main",
    "infer": "tessera.infer.run:main",
    "eval": "tessera.evaluate.run:main",
    "deploy": "tessera.infer.serve.run:main",
    "export": "tessera.recipes.export:main",
    "compose": "tessera.recipes.compose:main",
    "data": "tessera.recipes.data:main",
    "report": "tessera.observe.report:main",
    "demo": "tessera.recipes.demo:main",
}
LAUNCHED = (*TRAIN, "eval")
"""Verbs that start themselves once per process."""

GRACE_S, PEER_GRACE_S = 1.0, 8.0
"""How long another rank than 0 waits before it reports an error, so that an error common to all is reported as rank
0's, and how long a rank that only noticed another one's end waits for the launcher to learn the cause."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (``sys.argv`` if not given) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(words)
        sys.stdout.flush()
        return code
    except Exception as error:
        if (errors := _errors()) is not None:
            return _leave(error, errors)
        if isinstance(error, UserError):
            return _report(error)
        if not isinstance(error, BrokenPipeError):
            raise
        # The reader of our output left (`tessera ... | head`); closing stdout quietly keeps the interpreter silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(program_help())
        return 0 if words else 2
    if words[0] in ("-V", "--version", "version"):
        print(f"tessera {__version__}")
        return 0
    from tessera.config import scripts
    from tessera.config.resolve import resolve, under_launcher

    if {"-h", "--help"} & set(words[1:]):
        print(_manual(words))
        return 0
    if words == ["megatron"]:
        print(megatron_help())
        return 2
    run = resolve(words, os.environ)
    if scripts.find(words) is not None:
        words, _ = scripts.translated(words, os.environ)
        if _rank() == 0:
            print(f"runs: {shlex.join(_masked(['tessera', *words]))}", flush=True)
    for name, value in run.env.items():
        os.environ.setdefault(name, value)
    if not under_launcher(os.environ) and run.verb in LAUNCHED and not run.dry_run and _several(run):
        return launch(run, words)
    if _rank() == 0:
        for note in run.notes:
            print(f"note: {note}", file=sys.stderr)
    entry_of(run.verb)(run)
    return 0


def _manual(words: list[str]) -> str:
    """What ``--help`` prints: about a verb, a script of another project, or the Megatron dialect."""
    from tessera.config import scripts
    from tessera.config.resolve import command_of

    if words[0] == "megatron" and words[1].startswith("-"):
        return megatron_help()
    if scripts.find(words) is not None:
        return scripts.described(words)
    dialect, verb, _ = command_of(words)
    return verb_help(verb, dialect)


def entry_of(verb: str) -> Callable[[Run], object]:
    """The function that does the work of ``verb``; importing it imports what the verb needs."""
    module, _, name = ENTRY[verb].partition(":")
    entry: Callable[[Run], object] = getattr(importlib.import_module(module), name)
    return entry


def _rank() -> int:
    from tessera.config.resolve import under_launcher

    return int(os.environ.get("RANK", "0")) if under_launcher(os.environ) else 0


def _errors() -> Path | None:
    """Where this process leaves its error if it is a rank of :func:`launch`; None if it speaks for itself."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(path) if path and os.environ.get("TORCHELASTIC_RUN_ID") == "tessera" else None


def _several(run: Run) -> bool:
    return run.parallel.nproc_per_node * run.parallel.nnodes > 1


def _report(error: UserError) -> int:
    """Print ``error: ...``; returns the exit code."""
    sys.stdout.flush()
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return error.exit_code


def _leave(error: Exception, errors: Path) -> int:
    """End this rank after ``error``, which the launcher reports if no other rank's comes first; returns the code."""
    from tessera.parallel import failure

    rank = _rank()
    found = failure.diagnose(error, rank)
    # Whoever explains the failure goes first, and rank 0 before the others: the launcher ends who waits here.
    time.sleep(PEER_GRACE_S if found.kind == "lost" else GRACE_S if rank else 0.0)
    failure.record(found, errors)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not exit: threads that read data, or wait for a rank that is gone, would be waited for.
    os._exit(found.code)


def launch(run: Run, words: Sequence[str]) -> int:
    """Start ``nproc_per_node`` ranks of this command and return the exit code of the first that fails, else 0."""
    place = run.parallel
    address = place.master_addr or "127.0.0.1"
    port = place.master_port or (0 if place.nnodes == 1 else 29500)
    nodes = ["--nnodes", str(place.nnodes), "--node_rank", str(place.node_rank), "--master_addr", address]
    shown = ["--nproc_per_node", str(place.nproc_per_node), *(nodes if place.nnodes > 1 else [])]
    shown += ["--master_port", str(port)] if port else ["--standalone"]
    command = ["-m", "torch.distributed.run", *shown, "-m", "tessera", *words]
    # What torchrun would be asked to do; its own part, starting and ending processes, is parallel/launcher.py.
    print(f"run sh: `{shlex.join([Path(sys.executable).name, *_masked(command)])}`", flush=True)

    # When a machine vanishes, torch's C++ part prints a page of stack; what happened is said in one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from tessera.parallel import launcher

    threads = str(max(1, (os.cpu_count() or 1) // place.nproc_per_node))
    where = launcher.Nodes(place.nproc_per_node, place.nnodes, place.node_rank, address, port)
    return launcher.run(
        [sys.executable, "-u", "-m", "tessera", *words],
        where,
        {"OMP_NUM_THREADS": threads, **os.environ},
        float(place.ddp_timeout),
    )


def _masked(command: Sequence[str]) -> list[str]:
    """The command without the secret it may hold."""
    out = list(command)
    for at, word in enumerate(out[:-1]):
        if word in ("--hub_token", "--api_key", "--hub-token", "--api-key"):
            out[at + 1] = "***"
    return out
