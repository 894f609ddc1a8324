"""Optimisers: AdamW, or Muon for the hidden matrices with AdamW for everything else.

AdamW scales every coordinate by its own running gradient size. Muon (Jordan et al., 2024) treats a weight matrix as
a matrix: the momentum is replaced by the nearest orthogonal matrix (a few Newton-Schulz iterations), so that every
direction of the layer moves equally far. It is defined for matrices between hidden states only; embeddings, the
head, norms, biases and convolutions stay with AdamW. Both are torch's own (on CPUs see :mod:`tessera.train.muon`).

:class:`Optimizers` is the pair seen as one. Learning rates come from a stateless schedule; optimiser state is read
and written by parameter *name*, which makes checkpoints independent of grouping, of the data-parallel layout and of
whether AdamW runs on the device or (:mod:`tessera.train.host`) on the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tessera.adapt.trainable import ParamGroup
from tessera.config.errors import UserError
from tessera.config.run import TrainArgs
from tessera.parallel.mesh import Mesh
from tessera.train.host import HostAdamW, buckets, chosen
from tessera.train.muon import Muon
from tessera.train.schedule import Schedule

# State tensors of each optimiser, by torch's own key; "step" is a 0-dim float32 on the CPU.
_STATE_KEYS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    HostAdamW: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.Muon: ("momentum_buffer",),
    Muon: ("momentum_buffer",),
}


def _hidden_matrices(model: nn.Module) -> set[int]:
    """Ids of the parameters Muon is meant for: the weights of linear layers between hidden states."""
    outer = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    linear = {id(m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    return linear - outer


class Optimizers:
    """The torch optimisers of the trainable parameters, stepped, scheduled and saved as one.

    ``host_share`` of the elements that AdamW trains are stepped on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[ParamGroup],
        args: TrainArgs,
        schedule: Schedule,
        mesh: Mesh,
        *,
        host_share: float = 0.0,
    ):
        self.schedule = schedule
        self.names = {id(p): name for name, p in model.named_parameters()}
        matrices = _hidden_matrices(model) if args.optim == "muon" else set()
        if matrices and mesh.world > mesh.layout.replicate * mesh.layout.pp:
            raise UserError(
                "--optim muon orthogonalises whole matrices and cannot run on sharded ones; "
                "add --deepspeed zero0, or use --optim adamw_torch_fused"
            )
        moved = chosen(((self.names[id(p)], p) for group in groups for p in group.params), host_share)
        adam, muon, host = [], [], []
        every = [p for group in groups for p in group.params]
        # The order in which a norm is summed: it must not depend on where the optimiser lives.
        self._trained = [p for kind in (False, True) for p in every if (id(p) in matrices) == kind]
        for group in groups:
            row = {"lr": group.lr, "base_lr": group.lr, "weight_decay": group.weight_decay, "name": group.name}
            inner = [p for p in group.params if id(p) in matrices]
            outer = [p for p in group.params if id(p) not in matrices and id(p) not in moved]
            there = [p for p in group.params if id(p) not in matrices and id(p) in moved]
            muon += [{**row, "params": inner}] if inner else []
            adam += [{**row, "params": outer}] if outer else []
            host += [{**row, "params": there}] if there else []
        self.parts: list[torch.optim.Optimizer] = []
        options: dict[str, Any] = {"lr": 0.0, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        options["fused"] = args.optim != "adamw_torch"
        if adam:
            self.parts.append(torch.optim.AdamW(adam, **options))
        self.hosts = [HostAdamW(bucket, mesh, **options) for bucket in buckets(host)]
        self.parts += self.hosts
        if muon:
            kind = Muon if mesh.device.type == "cpu" else torch.optim.Muon
            self.parts.append(kind(muon, lr=0.0))
        self.set_step(0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that is trained."""
        return list(self._trained)

    def set_step(self, step: int) -> None:
        """Set every group's rate to that of 0-based ``step``."""
        factor = self.schedule.factor(step)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["base_lr"] * factor

    def rates(self) -> dict[str, float]:
        """The current learning rate of each named group."""
        return {group["name"]: group["lr"] for part in self.parts for group in part.param_groups} or {"": 0.0}

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for host in self.hosts:
            host.fetch()
        for part in self.parts:  # the device's first: it works while the host does
            part.step()
        for host in self.hosts:
            host.settle()

    def refresh(self) -> None:
        """Take note that parameters were changed from outside, by a loaded checkpoint."""
        for host in self.hosts:
            host.refresh()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """State tensors by ``<parameter name>.<key>``; allocated (as zeros) where no step was taken yet."""
        return {f"{self.names[id(p)]}.{key}": tensor for p, key, tensor in self._slots()}

    def _slots(self) -> Iterable[tuple[nn.Parameter, str, Tensor]]:
        for part in self.parts:
            keys = _STATE_KEYS[type(part)]
            for group in part.param_groups:
                for p in group["params"]:
                    state: dict[str, Any] = part.state[p]
                    for key in keys:
                        if key not in state:
                            state[key] = torch.zeros((), dtype=torch.float32) if key == "step" else torch.zeros_like(p)
                        if isinstance(part, HostAdamW):
                            shown = state[key] if key == "step" else part.shown(p, state[key])
                            yield part.origins[id(p)], key, shown
                        else:
                            yield p, key, state[key]
