"""Muon on CPUs: torch's optimiser, with its iteration in float32 and equal shapes in one batched product.

Muon (Jordan et al., 2024) replaces the momentum ``M = U S V'`` of a weight matrix by something close to ``U V'``. It
never computes the decomposition: a quintic polynomial in ``M M'``, applied five times, drives all singular values
towards one (Newton-Schulz). torch.optim.Muon runs that iteration in bfloat16, matrix by matrix. That is right on a
GPU; on a CPU without bfloat16 units it takes about thirty times as long as float32, and small matrices drown in
per-call overhead. The update is the same function; only precision and batching differ.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz on a stack ``[N, A, B]`` of matrices, in its own dtype; singular values end up around one."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """torch.optim.Muon for CPU tensors; same arguments, same state (``momentum_buffer``)."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "the training step computes the loss"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._update(group, shape, parameters)
        return None

    def _update(self, group: dict[str, Any], shape: torch.Size, parameters: list[Tensor]) -> None:
        momentum = group["momentum"]
        directions = []
        for parameter in parameters:
            gradient = cast(Tensor, parameter.grad)
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            directions.append(gradient.lerp(buffer, momentum) if group["nesterov"] else buffer)
        stack = torch.stack(directions).float()
        updates = orthogonalise(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
        scale = math.sqrt(max(1.0, shape[0] / shape[1]))
        if group["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(shape))
        for parameter, update in zip(parameters, updates.unbind(), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)
