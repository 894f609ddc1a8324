"""AdamW on the host: state and arithmetic leave the device, only gradients and parameters cross the bus.

AdamW keeps two float32 values per trained element and touches them once a step; between steps they are dead weight on
the device. Here a share of the parameters has a *twin* in host memory. A step copies their gradients down, runs
torch's fused CPU AdamW on the twins and copies the new values up (Ren et al., 2021, ZeRO-Offload). Parameters go in
*buckets*, so that one bucket is computed while the next one's gradients and the last one's values are under way, and
the device meanwhile steps the parameters that are its own.

Only this rank's shard of a sharded parameter has a twin. State is handed out in the shape of the parameter, so a
checkpoint does not show where the optimiser lived.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh

BUCKET = 2**26
"""Elements that are copied and stepped together."""


def chosen(named: Iterable[tuple[str, nn.Parameter]], share: float) -> set[int]:
    """Ids of the parameters to move: as many elements as fit into ``share`` of all, the largest first.

    Depends on global sizes and names only, so every rank chooses alike.
    """
    order = sorted(named, key=lambda pair: (-pair[1].numel(), pair[0]))
    room = share * sum(p.numel() for _, p in order)
    found = set()
    for _, parameter in order:
        if parameter.numel() <= room:
            room -= parameter.numel()
            found.add(id(parameter))
    return found


def buckets(groups: Sequence[dict[str, Any]], size: int = BUCKET) -> list[list[dict[str, Any]]]:
    """Parameter groups cut, in order, into lists of groups that hold about ``size`` elements each."""
    cut: list[list[dict[str, Any]]] = []
    filled = size
    for group in groups:
        piece: dict[str, Any] | None = None
        for parameter in group["params"]:
            if filled >= size:
                cut.append([])
                filled, piece = 0, None
            if piece is None:
                piece = {**group, "params": []}
                cut[-1].append(piece)
            piece["params"].append(parameter)
            filled += parameter.numel()
    return cut


class HostAdamW(torch.optim.AdamW):
    """AdamW over host twins of device parameters. A step is ``fetch``, :meth:`step`, ``settle``, in this order."""

    def __init__(self, groups: Sequence[dict[str, Any]], mesh: Mesh, **options: Any) -> None:
        self.mesh = mesh
        self.origins: dict[int, nn.Parameter] = {}
        self.cuda = mesh.device.type == "cuda"
        self.stream = torch.cuda.Stream(mesh.device) if self.cuda else None
        self.arrived: Any = None
        twins = [{**group, "params": [self._twin(p) for p in group["params"]]} for group in groups]
        super().__init__(twins, **options)

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(twin, parameter), in order."""
        return [(twin, self.origins[id(twin)]) for group in self.param_groups for twin in group["params"]]

    @torch.no_grad()
    def fetch(self) -> None:
        """Start copying the gradients down."""
        with self._beside():
            for twin, origin in self.pairs():
                if origin.grad is None:
                    twin.grad = None
                    continue
                if twin.grad is None:
                    twin.grad = self._host(fsdp.local(origin, self.mesh))
                twin.grad.copy_(fsdp.local(origin.grad, self.mesh), non_blocking=True)
            if self.stream is not None:
                self.arrived = self.stream.record_event()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the twins and start copying them up."""
        assert closure is None, "the training step computes the loss"
        if self.arrived is not None:
            self.arrived.synchronize()
        super().step()
        with self._beside():
            for twin, origin in self.pairs():
                if twin.grad is not None:
                    fsdp.local(origin.detach(), self.mesh).copy_(twin, non_blocking=True)

    def settle(self) -> None:
        """Later work on the device sees the new values."""
        if self.stream is not None:
            torch.cuda.current_stream(self.mesh.device).wait_stream(self.stream)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the parameters' values, after something else has changed them (a checkpoint was loaded)."""
        for twin, origin in self.pairs():
            twin.copy_(fsdp.local(origin.detach(), self.mesh))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the device's gradients; the twins' buffers are used again."""
        for _, origin in self.pairs():
            origin.grad = None

    def shown(self, twin: nn.Parameter, value: Tensor) -> Tensor:
        """A state tensor of ``twin`` as a state tensor of its parameter: a shard, if that is sharded. No copy."""
        return fsdp.like(value, self.origins[id(twin)], self.mesh)

    def _twin(self, parameter: nn.Parameter) -> nn.Parameter:
        local = fsdp.local(parameter.detach(), self.mesh)
        twin = nn.Parameter(self._host(local).copy_(local))
        self.origins[id(twin)] = parameter
        return twin

    def _host(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=self.cuda)

    def _beside(self) -> AbstractContextManager[Any]:
        """On the side stream, after what the device was asked to do so far; nothing of the kind on a CPU."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream(self.mesh.device))
        return torch.cuda.stream(self.stream)
