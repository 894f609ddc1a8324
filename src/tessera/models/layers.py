"""The pieces of a transformer block that are not attention: RMSNorm, MLPs, patch embedding, recomputation.

Numbers must equal transformers' to the last bit in float32, so the *order* of roundings is theirs: statistics in
float32, back to the input's type, then times the weight. What differs is the cost. A block of a small model on a CPU
spends most of its time dispatching operators, and autograd triples their number; ``_RMSNorm`` therefore carries its
own backward, which needs half the operators and keeps one tensor alive instead of four.

Parameters may be float32 masters while activations are bfloat16 (autocast): weights are cast to the activation's
type where they are used, so that the residual stream keeps its type and its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from tessera.config.errors import UserError
from tessera.contract.seams import Divisible

Activation = Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}
"""Activation functions by their name in a ``config.json``."""


def activation(name: str) -> Activation:
    """The activation function of that name; UserError if there is none."""
    if name not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act {name!r} is not supported ({', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


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


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``_RMSNorm`` without a backward, to the same bits."""
    wide = x.float()
    # A sum and a division: the mean, in fewer operators than ``mean``.
    scale = (wide * wide).sum(-1, keepdim=True).div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight.to(x.dtype))


class Linear(nn.Linear, Divisible):
    """``nn.Linear`` over this rank's part of its parameters."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Linear gives it)
        bias = None if self.bias is None else self.part(self.bias)
        if bias is not None and self.bias_share != 1.0:
            bias = bias * self.bias_share
        return F.linear(input, self.part(self.weight), bias)


class RMSNorm(Divisible):
    """Root-mean-square normalisation over the last dimension of ``[..., size]``; no mean, no bias."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # autograd's bookkeeping costs as much as the norm of a few rows
            return _normed(x, self.part(self.weight), self.eps)
        out: Tensor = _RMSNorm.apply(x, self.part(self.weight), self.eps)
        return out

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class _Forgotten:
    """The output of a norm that was not kept: made again from the norm's input, once for all who saved it."""

    def __init__(self, norm: RMSNorm, x: Tensor) -> None:
        self.norm = norm
        self.x = x.detach()
        self.users = 0
        self.made: Tensor | None = None

    def again(self) -> Tensor:
        with torch.no_grad():
            made = self.norm(self.x) if self.made is None else self.made
        self.users -= 1
        self.made = made if self.users > 0 else None
        return made


def forgetting(norm: RMSNorm, x: Tensor) -> AbstractContextManager[Tensor]:
    """``norm(x)`` for use within a ``with`` block; with ``norm.recompute`` it is not kept but made again in backward.

    A checkpoint around the norm would not help: what costs memory is its output, which the linears that read it save.
    """
    normed: Tensor = norm(x)
    if norm.recompute and norm.training and torch.is_grad_enabled():
        return _forgotten(norm, x, normed)
    return nullcontext(normed)


@contextmanager
def _forgotten(norm: RMSNorm, x: Tensor, normed: Tensor) -> Iterator[Tensor]:
    forgotten = _Forgotten(norm, x)
    known = (normed.data_ptr(), normed.dtype, normed.shape, normed.stride())

    def pack(saved: Tensor) -> Tensor | _Forgotten:
        if (saved.data_ptr(), saved.dtype, saved.shape, saved.stride()) != known:
            return saved
        forgotten.users += 1
        return forgotten

    def unpack(packed: Tensor | _Forgotten) -> Tensor:
        return packed.again() if isinstance(packed, _Forgotten) else packed

    with saved_tensors_hooks(pack, unpack):
        yield normed


class Recomputable(nn.Module):
    """A module whose activations can be dropped after forward and computed again in backward (``recompute``).

    Subclasses implement ``run``. The checkpoint lies inside ``forward`` so that hooks around the module (parameter
    gathering) run once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recompute = False

    def forward(self, *args: Any) -> Tensor:
        if self.recompute and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.run, *args, use_reentrant=False)
            return out
        return self.run(*args)

    def run(self, *args: Any) -> Tensor:
        """The module's computation."""
        raise NotImplementedError


class _Gate(torch.autograd.Function):
    """``silu(gate) * up``, keeping its two inputs only; backward computes ``silu`` again, which costs less than memory.

    Gradients of ``[T, inner]`` are the largest tensors of a block, so each is written where a dead one was.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(grads[0])
        d_gate = grads[0] * up
        return torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate), d_up


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    if not torch.is_grad_enabled():
        return F.silu(gate).mul_(up)
    out: Tensor = _Gate.apply(gate, up)
    return out


class GatedMLP(Recomputable):
    """``down(act(gate(x)) * up(x))`` on ``[T, H]``."""

    def __init__(self, size: int, inner: int, bias: bool, act: Activation = F.silu) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner, bias=bias)
        self.up_proj = Linear(size, inner, bias=bias)
        self.down_proj = Linear(inner, size, bias=bias)
        self.act = act

    def run(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor = self.down_proj(gated(gate, up) if self.act is F.silu else self.act(gate) * up)
        return out


class MLP(nn.Module):
    """``fc2(act(fc1(x)))`` on ``[P, E]``."""

    def __init__(self, size: int, inner: int, act: Activation) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(size, inner)
        self.linear_fc2 = nn.Linear(inner, size)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_fc2(self.act(self.linear_fc1(x)))
        return out


class PatchEmbed(nn.Module):
    """Patches ``[P, T * p * p * C]`` to ``[P, E]``: a convolution whose stride is its kernel, as the product it is.

    Pixels keep the order they have in an image, channels last; the kernel is turned to meet them, which is less work
    than turning every image. A still image is a frame shown ``T`` times: it comes as ``[P, p * p * C]``, once, and
    meets the sum of the kernel over time, for half the pixels and half the arithmetic.
    """

    def __init__(self, channels: int, temporal: int, patch: int, size: int, bias: bool) -> None:
        super().__init__()
        kernel = (temporal, patch, patch)
        self.proj = nn.Conv3d(channels, size, kernel_size=kernel, stride=kernel, bias=bias)

    def forward(self, patches: Tensor) -> Tensor:
        weight: Tensor = self.proj.weight
        still = patches.shape[1] * weight.shape[2] == weight[0].numel()
        kernel = weight.sum(2, keepdim=True) if still else weight
        flat = kernel.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(patches.to(weight.dtype), flat, self.proj.bias)
