"""Rotary position embedding (RoPE), for one position per token or for three.

RoPE turns each pair ``(x[i], x[i + D/2])`` of a query or key by the angle ``position * frequency[i]``; a dot product of
two turned vectors then depends on the distance of their positions only. Multimodal RoPE gives every token a time, a
height and a width, and lets each frequency follow one of the three::

    chunked      t t t t h h h h h h w w w w w w       sections [4, 6, 6] one behind the other
    interleaved  t h w t h w t h w t h w t h w t       every third is h, every third w, the rest t

so the whole difference is one small table, ``axes``. Angles are computed once per batch, in float32; all layers
share them. ``_Rotate`` applies them with three operators per tensor forward and three backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.config.errors import UserError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Base period ``theta``, m-RoPE ``sections`` (empty: one position per token) and the rule that scales frequencies.

    ``partial`` is the share of a head, its first dimensions, that is turned at all.
    ``scaling`` is the checkpoint's ``rope_scaling`` / ``rope_parameters`` dictionary; ``kind`` its ``rope_type``. Of
    ``dynamic`` there is only the part within ``max_position_embeddings``, where nothing is scaled.
    """

    theta: float
    kind: str = "default"
    scaling: Mapping[str, Any] | None = None
    sections: tuple[int, ...] = ()
    interleaved: bool = False
    partial: float = 1.0


def frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair, ``[head_dim / 2] float32`` on the CPU."""
    # The explicit device matters: models are built under torch.device("meta"), and these are values, not parameters.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    plain = 1.0 / (config.theta**exponents)
    scaling = config.scaling or {}
    if config.kind in ("default", "dynamic"):  # "dynamic" changes nothing within max_position_embeddings
        return plain
    if config.kind == "linear":
        return plain / scaling["factor"]
    if config.kind == "llama3":
        return _llama3(plain, scaling)
    raise UserError(
        f"config.json: rope_type {config.kind!r} is not supported (default, linear, llama3, dynamic); "
        "remove the rope scaling from config.json to train within the original context length"
    )


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by ``factor``, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    long, short = wavelength > context / low, wavelength < context / high
    stretched = torch.where(long, plain / factor, plain)
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * stretched / factor + blend * stretched
    return torch.where(~long & ~short, blended, stretched)


def axes(config: RopeConfig, head_dim: int) -> Tensor | None:
    """Which of (time, height, width) each frequency follows, ``[head_dim / 2] int64``; None without sections."""
    if not config.sections:
        return None
    half = head_dim // 2
    if config.interleaved:
        owner = [0] * half
        for axis in (1, 2):
            for index in range(axis, 3 * config.sections[axis], 3):
                owner[index] = axis
    else:
        owner = [axis % 3 for axis, size in enumerate(config.sections) for _ in range(size)]
        if len(owner) != half:
            raise UserError(
                f"config.json: mrope_section {list(config.sections)} must sum to half the head size, {half}"
            )
    return torch.tensor(owner, dtype=torch.int64, device="cpu")


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and sine of every token's angles, each ``[T, 1, D / 2]`` (D: the turned part) in the activation's type.

    Where nothing is learnt, ``wide`` holds ``(cos, cos)`` and ``(-sin, sin)``, ``[T, 1, D]`` each.
    """

    cos: Tensor
    sin: Tensor
    wide: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, angle: Tensor, dtype: torch.dtype = torch.float32) -> Angles:
        """From angles ``[T, D / 2] float32``, rounded to ``dtype`` after cosine and sine."""
        cos, sin = angle.cos().to(dtype).unsqueeze(1), angle.sin().to(dtype).unsqueeze(1)
        if torch.is_grad_enabled():
            return cls(cos, sin)
        return cls(cos, sin, (torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


class Rope:
    """Positions to :class:`Angles`. Holds constants, no parameters; they follow the positions to their device."""

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        turned = int(head_dim * config.partial)
        self._frequencies = frequencies(config, turned)
        self._axes = axes(config, turned)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """Angles of ``positions`` ``[T]`` or ``[3, T]`` int64, rounded to ``dtype`` after cosine and sine."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
            self._axes = None if self._axes is None else self._axes.to(positions.device)
        where = positions.float()
        if self._axes is None or positions.dim() == 1:
            angle = where.reshape(-1, positions.shape[-1])[0][:, None] * self._frequencies
        else:
            angle = where.index_select(0, self._axes).t() * self._frequencies
        return Angles.of(angle, dtype)


def axial_angles(positions: Tensor, head_dim: int, theta: float) -> Angles:
    """Angles in float32 for ``positions [P, 2] int64`` (row, column); half of the pairs follow each.

    The rotary embedding of vision towers.
    """
    plain = frequencies(RopeConfig(theta), head_dim // 2).to(positions.device)
    return Angles.of((positions[:, :, None].float() * plain).flatten(1))


class _Rotate(torch.autograd.Function):
    """Turns the last dimension of ``x [T, heads, D]``; the gradient is turned back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """``x [T, heads, D]`` turned by ``sign`` times the angles; dimensions beyond those angles are kept."""
    half = cos.shape[-1]
    both = 2 * half
    left, right = x[..., :half], x[..., half:both]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(left, cos, out=out[..., :half]).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=out[..., half:both]).addcmul_(left, sin, value=sign)
    if both < x.shape[-1]:
        out[..., both:] = x[..., both:]
    return out


def rotate(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
    """``q [T, heads, D]`` and ``k [T, kv_heads, D]`` turned by the angles of their tokens."""
    wide = angles.wide
    if torch.is_grad_enabled() or wide is None or wide[0].shape[-1] != q.shape[-1]:
        return _Rotate.apply(q, angles.cos, angles.sin), _Rotate.apply(k, angles.cos, angles.sin)
    # Both at once, in a third of the operators, to the same bits.
    both = torch.cat((q, k), 1)
    left, right = both.chunk(2, -1)
    swapped = torch.cat((right, left), -1)
    turned = both.mul_(wide[0]).addcmul_(swapped, wide[1])
    return turned[:, : q.shape[1]], turned[:, q.shape[1] :]
