"""Counts what a process sends to other ranks: every collective, at the one place where all of them pass.

Whoever starts a collective (FSDP, DTensor, torch's pipeline schedules, our own seams), it becomes an operator of
``c10d`` or ``_c10d_functional``, and a dispatch mode sees every operator. Each one is booked with the ranks of its
group, its element type, who asked for it (the innermost known file on the stack) and the bytes that this rank *sends*,
by the convention of a ring over ``W`` ranks, ``S`` being the size of the whole tensor::

    all-gather, reduce-scatter   (W - 1) / W * S          all-to-all    what is not for this rank itself
    all-reduce               2 * (W - 1) / W * S          send          all of it

An operator that is not in the table below is an error, so nothing can pass unseen.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SOURCES = {
    "torch.distributed.tensor": "dtensor", "torch.distributed.fsdp": "fsdp",
    "torch.distributed.pipelining": "pipeline", "tessera.parallel.": "", "tessera.train.": "",
}  # fmt: skip
"""Modules that start collectives, and what they are called here (empty: by their own name, ``tessera.`` left out)."""

FREE = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_", "recv_", "recv_any_source_", "irecv")


@dataclass(frozen=True, order=True)
class Entry:
    """What kind of traffic: operation, who asked for it, the ranks of the group, element type."""

    operation: str
    source: str
    ranks: tuple[int, ...]
    dtype: str


@dataclass
class Ledger(TorchDispatchMode):
    """Use as a context manager: ``sent[entry]`` bytes in ``calls[entry]`` calls."""

    sent: Counter[Entry] = field(default_factory=Counter)
    calls: Counter[Entry] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what becomes of it on this rank comes by again
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"):
            self._book(func._schema.name.split("::")[1], args)
        return func(*args, **(kwargs or {}))

    def _book(self, name: str, args: Any) -> None:
        if name in FREE:
            return
        group = _group(args)
        operation, tensor, sent = _sent(name, args, group)
        entry = Entry(operation, _source(), tuple(dist.get_process_group_ranks(group)), str(tensor.dtype)[6:])
        self.sent[entry] += sent
        self.calls[entry] += 1


def _group(args: Any) -> dist.ProcessGroup:
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg)
    names = [arg for arg in args if isinstance(arg, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1])


def _sent(name: str, args: Any, group: dist.ProcessGroup) -> tuple[str, Tensor, int]:
    """(kind of collective, a tensor of it, bytes this rank sends)."""
    world, rank = group.size(), group.rank()
    if name in ("allreduce_", "all_reduce", "all_reduce_"):
        (tensor,) = args[0] if isinstance(args[0], list) else [args[0]]
        return "all-reduce", tensor, 2 * (world - 1) * tensor.nbytes // world
    if name == "_allgather_base_":
        return "all-gather", args[1], (world - 1) * args[1].nbytes
    if name == "all_gather_into_tensor":
        return "all-gather", args[0], (world - 1) * args[0].nbytes
    if name == "allgather_":
        return "all-gather", args[1][0], (world - 1) * args[1][0].nbytes
    if name == "_reduce_scatter_base_":
        return "reduce-scatter", args[1], (world - 1) * args[0].nbytes
    if name == "reduce_scatter_tensor":
        return "reduce-scatter", args[0], (world - 1) * args[0].nbytes // world
    if name == "alltoall_base_":
        tensor, parts = args[1], list(args[4])
        kept = parts[rank] * tensor[0].nbytes if parts and len(tensor) else 0 if parts else tensor.nbytes // world
        return "all-to-all", tensor, tensor.nbytes - kept
    if name == "send":
        return "send", args[0][0], args[0][0].nbytes
    if name == "broadcast_":
        return "broadcast", args[0][0], args[0][0].nbytes
    raise AssertionError(f"no rule for the collective {name}")


def _source() -> str:
    frame = sys._getframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        for prefix, short in SOURCES.items():
            if name.startswith(prefix):
                return short or name.removeprefix("tessera.")
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
