"""The pieces of a transformer block that are not attention: RMSNorm, gated MLP, patch embedding.

Numbers must equal transformers' to the last bit in float32, so the *order* of roundings is theirs: statistics in
float32, back to the input's type, then times the weight. What differs is the cost. A block of a small model on a CPU
spends most of its time dispatching operators, and autograd triples their number; ``_RMSNorm`` therefore carries its
own backward, which needs half the operators and keeps one tensor alive instead of four.

Parameters may be float32 masters while activations are bfloat16 (autocast): weights are cast to the activation's
type where they are used, so that the residual stream keeps its type and its memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """``weight * (x / rms(x))`` over the last dimension, rounded as transformers rounds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].float()
        normal = x.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        inner = grad * weight.float()
        pull = (inner * normal).mean(-1, keepdim=True)
        return inner.addcmul_(normal, pull, value=-1).mul_(scale).to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension of ``[..., size]``; no mean, no bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return out

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))`` on ``[T, H]``."""

    def __init__(self, size: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class PatchEmbed(nn.Module):
    """Patches ``[P, D]`` to ``[P, E]``: the convolution whose stride is its kernel, as the matrix product it is.

    Takes over the ``proj`` convolution of a vision tower, so the parameter keeps its name, shape and values.
    """

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: Tensor) -> Tensor:
        weight, bias = self.proj.weight, self.proj.bias
        assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
        return F.linear(patches.to(weight.dtype), weight.flatten(1), bias)
