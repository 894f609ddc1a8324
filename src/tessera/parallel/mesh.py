"""The ranks of a run, as an object that is passed in.

A laptop, one GPU and a cluster run the same code; only the :class:`Mesh` differs. On one process there is no process
group at all and every collective is the identity. Under ``torchrun`` the mesh opens the process group (NCCL on GPUs,
gloo on CPUs), owns the ``DeviceMesh`` that parameters are sharded over, and offers the few host-level collectives the
training loop needs. Nothing else in tessera reads ``RANK``, ``WORLD_SIZE`` or ``LOCAL_RANK``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from tessera.config.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def pick_device(local_rank: int = 0) -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


@dataclass(frozen=True)
class Mesh:
    """This process's place among the ranks: data axis only, ``data`` is None on a single process."""

    rank: int
    world: int
    device: torch.device
    data: DeviceMesh | None = None

    @classmethod
    def single(cls) -> Mesh:
        """The mesh of one process, without a process group."""
        return cls(0, 1, pick_device())

    @classmethod
    def from_env(cls, *, timeout_s: float = 1800.0, replicate: bool = False) -> Mesh:
        """Join the process group that torchrun's environment describes, or stay single.

        ``replicate`` lays the data axis out as (replicas, 1 shard): parameters are replicated as in plain data
        parallelism; otherwise they are sharded over all ranks. Raises UserError if the ranks cannot meet.
        """
        # LOCAL_RANK is torchrun's own; schedulers also set RANK and WORLD_SIZE, and mean machines by them.
        if "LOCAL_RANK" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
            return cls.single()
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        device = pick_device(int(os.environ["LOCAL_RANK"]))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise UserError(
                f"MASTER_ADDR/MASTER_PORT: rank {rank} of {world} could not join the process group: {error}"
            ) from error
        if replicate:
            data = init_device_mesh(device.type, (world, 1), mesh_dim_names=("replicate", "shard"))
        else:
            data = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        return cls(rank, world, device, data)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        if self.data is None:
            return [float(value) for value in values]
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return cast(list[float], tensor.tolist())

    def broadcast(self, value: T) -> T:
        """Rank 0's (picklable, small) ``value`` on every rank."""
        if self.data is None:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's (picklable, small) ``value``, in rank order, on every rank."""
        if self.data is None:
            return [value]
        import torch.distributed as dist

        box: list[T] = [value] * self.world
        dist.all_gather_object(box, value)
        return box

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.data is not None:
            import torch.distributed as dist

            dist.barrier()

    def close(self) -> None:
        """Leave the process group; call once, at the very end."""
        if self.data is not None:
            import torch.distributed as dist

            dist.barrier()
            dist.destroy_process_group()
