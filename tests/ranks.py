"""Run a function on several gloo ranks of this machine and collect what each returns.

A fork server that has torch loaded makes ranks cheap (a spawned process would import it again). Ranks meet on a free
loopback port, run with one thread each, and are killed by process id if they outlive ``timeout`` seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.models.qwen3_vl.modeling_qwen3_vl",
]


def free_port() -> int:
    """A loopback port nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _rank(fn: Callable[..., Any], rank: int, world: int, port: int, out: str, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        result: Any = ("ok", fn(*args))
    except BaseException:
        result = ("error", traceback.format_exc())
    torch.save(result, f"{out}/{rank}.pt.tmp")
    os.rename(f"{out}/{rank}.pt.tmp", f"{out}/{rank}.pt")
    os._exit(0)  # gloo's threads sometimes abort at interpreter exit; the result is on disk


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 180.0) -> list[Any]:
    """``[fn(*args) on rank 0, ... on rank world-1]``; raises with the first failing rank's traceback."""
    import torch

    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as out:
        port = free_port()
        processes = [context.Process(target=_rank, args=(fn, r, world, port, out, args)) for r in range(world)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
                time.sleep(0.02)
                failed = [p for p in Path(out).glob("*.pt") if torch.load(p, weights_only=False)[0] == "error"]
                if failed:
                    break
        finally:
            for process in processes:
                if process.is_alive() and not (Path(out) / f"{processes.index(process)}.pt").exists():
                    process.kill()
                process.join(10)
        results = []
        for rank in range(world):
            path = Path(out) / f"{rank}.pt"
            results.append(torch.load(path, weights_only=False) if path.exists() else ("missing", "no result"))
        for wanted in ("error", "missing"):
            for rank, (status, value) in enumerate(results):
                if status == wanted:
                    raise AssertionError(f"rank {rank} of {world}: {status}\n{value}")
        return [value for _, value in results]
