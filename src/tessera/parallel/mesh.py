"""The ranks of a run, as an object that is passed in.

A laptop, one GPU and a cluster run the same code; only the :class:`Mesh` differs. On one process there is no process
group at all and every collective is the identity. Under ``torchrun`` the mesh opens the process group (NCCL on GPUs,
gloo on CPUs), arranges the ranks along the axes of a :class:`~tessera.contract.layout.ParallelLayout`, and offers the
few host-level collectives the training loop needs. The axes are seen in groups, all of them over the same ranks::

    fsdp      data shards x context     what the decoder's parameters are sharded over
    stage     data shards x context x tensor     what the tower's parameters are sharded over, and images shared among
    model     context x tensor          the ranks that work on the same batch

Nothing else in tessera reads ``RANK``, ``WORLD_SIZE`` or ``LOCAL_RANK``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from tessera.config.errors import UserError
from tessera.contract.layout import ParallelLayout, layout_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

AXES = ("pp", "replicate", "shard", "cp", "tp")


def pick_device(local_rank: int = 0) -> torch.device:
    """This rank's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def world_size() -> int:
    """Processes of this run, as the launcher says."""
    # LOCAL_RANK is torchrun's own; schedulers also set RANK and WORLD_SIZE, and mean machines by them.
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


@dataclass(frozen=True)
class Place:
    """Where a process stands in the grid of ranks."""

    rank: int
    device: torch.device
    layout: ParallelLayout = field(default_factory=ParallelLayout)

    @property
    def world(self) -> int:
        return self.layout.world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def at(self, axis: str) -> int:
        """This rank's index along one of ``AXES``."""
        stride = 1
        for name in reversed(AXES):
            size = getattr(self.layout, name)
            if name == axis:
                return self.rank // stride % cast(int, size)
            stride *= size
        raise AssertionError(f"no axis {axis}")

    @property
    def data_rank(self) -> int:
        """Which of the ``layout.dp`` shares of every batch is this rank's."""
        return self.at("replicate") * self.layout.shard + self.at("shard")

    @property
    def is_stage_main(self) -> bool:
        """Whether this rank writes for its pipeline stage: the first of it."""
        return self.rank % (self.layout.world // self.layout.pp) == 0

    @property
    def is_last_stage(self) -> bool:
        return self.at("pp") == self.layout.pp - 1

    @property
    def counts_tokens(self) -> bool:
        """Whether this rank's tokens and losses enter sums over all ranks: one of each tensor group, last stage."""
        return self.at("tp") == 0 and self.is_last_stage

    @property
    def counts_samples(self) -> bool:
        """Whether this rank speaks for its batches: one of all that work on the same."""
        return self.at("tp") == self.at("cp") == 0 and self.is_last_stage


@dataclass(frozen=True)
class Mesh(Place):
    """A process's place, and the groups of ranks it belongs to; ``grid`` is None on a single process."""

    grid: DeviceMesh | None = None
    groups: Mapping[str, DeviceMesh] = field(default_factory=dict)
    experts: DeviceMesh | None = None

    @classmethod
    def single(cls) -> Mesh:
        """The mesh of one process, without a process group."""
        return cls(0, pick_device())

    @classmethod
    def planned(cls, layout: ParallelLayout) -> Mesh:
        """Rank 0 of a run that is only planned: it knows the layout, and no other rank exists."""
        return cls(0, pick_device(), layout)

    @classmethod
    def from_env(cls, layout: ParallelLayout | None = None, *, timeout_s: float = 1800.0) -> Mesh:
        """Join the process group that torchrun's environment describes, or stay single.

        Without a ``layout`` all ranks are data parallel. Raises UserError if the ranks cannot meet.
        """
        world = world_size()
        layout = layout or layout_of(world)
        assert world == layout.world, f"{layout} is not for {world} processes"
        if world == 1:
            return cls.single()
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        # Tensors that are split twice along one dimension are gathered in two steps, only when they are saved.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        rank = int(os.environ["RANK"])
        device = pick_device(int(os.environ["LOCAL_RANK"]))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise UserError(
                f"MASTER_ADDR/MASTER_PORT: rank {rank} of {world} could not join the process group: {error}"
            ) from error
        sizes = tuple(getattr(layout, axis) for axis in AXES)
        grid = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        groups = {
            "fsdp": grid["shard", "cp"]._flatten("fsdp"),
            "stage": grid["shard", "cp", "tp"]._flatten("stage"),
            "model": grid["cp", "tp"]._flatten("model"),
        }
        experts = None
        if layout.ep > 1:
            edp = layout.shard * layout.cp * layout.tp // layout.ep
            names = ("pp", "replicate", "edp", "ep")
            experts = init_device_mesh(device.type, (layout.pp, layout.replicate, edp, layout.ep), mesh_dim_names=names)
        return cls(rank, device, layout, grid, groups, experts)

    def group(self, axis: str) -> ProcessGroup:
        """The process group along an axis or group of axes."""
        return self.axis(axis).get_group()

    def axis(self, name: str) -> DeviceMesh:
        """The one-dimensional device mesh along an axis or group of axes."""
        assert self.grid is not None
        return self.groups[name] if name in self.groups else self.grid[name]

    def sharded(self, name: str) -> DeviceMesh:
        """The mesh that parameters are sharded over along ``name``, behind a dimension of replicas if there are any."""
        assert self.grid is not None
        if name == "edp":
            assert self.experts is not None
            return self.experts["replicate", "edp"] if self.layout.replicate > 1 else self.experts["edp"]
        if self.layout.replicate == 1:
            return self.axis(name)
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh._concatenate([self.grid["replicate"], self.axis(name)])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over the ranks, in float64."""
        if self.grid is None:
            return [float(value) for value in values]
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return cast(list[float], tensor.tolist())

    def broadcast(self, value: T) -> T:
        """Rank 0's (picklable, small) ``value`` on every rank."""
        if self.grid is None:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T, axis: str | None = None) -> list[T]:
        """Every rank's (picklable, small) ``value``, in rank order, on every rank; along ``axis`` if given."""
        if self.grid is None:
            return [value]
        import torch.distributed as dist

        group = None if axis is None else self.group(axis)
        box: list[T] = [value] * dist.get_world_size(group)
        dist.all_gather_object(box, value, group=group)
        return box

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.grid is not None:
            import torch.distributed as dist

            dist.barrier()

    def close(self) -> None:
        """Leave the process group; call once, at the very end."""
        if self.grid is not None:
            import torch.distributed as dist

            dist.barrier()
            dist.destroy_process_group()
