"""All ranks once more, for work beside training.

Collectives pair up by their order within a group, so two threads of a rank must never share one: which of them came
first would differ between ranks. What runs beside training (a checkpoint being written) therefore gets a group of its
own, over host memory, in which a slow disk keeps nobody from training. Making it is a collective of all ranks; on a
single process there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from tessera.parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class Aside:
    """The ranks of a run, seen from a thread beside training; ``group`` is None on a single process."""

    group: ProcessGroup | None = None

    @classmethod
    def of(cls, mesh: Mesh, timeout_s: float = 1800.0) -> Aside:
        """A new group over all ranks of ``mesh``; every rank calls this at the same place."""
        if mesh.grid is None:
            return cls()
        import torch.distributed as dist

        return cls(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.group is not None:
            import torch.distributed as dist

            dist.barrier(self.group)
