"""Attention over packed sequences: each segment attends to itself, and no mask ever exists.

On CUDA that is one call of the variable-length flash kernel. Elsewhere ``scaled_dot_product_attention`` wants
rectangles, so segments are put into *buckets* of equal or similar length and each bucket is one batched call::

    lengths 20 20 20 19 18 | 7 7        2 buckets: [5, 20] (padded by 3 rows) and [2, 7] (a plain view)

A causal bucket is padded at the *end* of its rows: a pad key comes after every real query and is masked by causality
itself; pad queries are dropped. Padding repeats the segment's own last row, so not even a NaN can cross segments.
Without causality only equal lengths share a bucket. What goes where is planned on the host once per batch
(:class:`Layout`), not once per layer, and the decoder lays its row out in bucket order beforehand, so that within a
layer every bucket is a contiguous slice.

Half precision is widened to float32 around the CPU kernel, whose bfloat16 backward took six times as long where it
was measured (a CPU without bfloat16 instructions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.contract.batch import Segments

PADDING = 0.25
"""Largest share of padding in a causal bucket."""

PADDED_UP_TO = 256
"""Longest segment that is padded: beyond it the arithmetic costs more than another call."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """``rows`` tokens that follow each other, seen as ``count`` segments of ``length``.

    ``gather [count * length]`` lists the run's row of each slot and ``valid [rows]`` the slot of each row if segments
    are shorter than ``length``; both are None if the run is a rectangle already.
    """

    rows: int
    count: int
    length: int
    gather: Tensor | None = None
    valid: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of one batch go through attention; made by :func:`plan`.

    ``order [T]`` lists the batch's rows in bucket order and ``inverse`` is its inverse (None: as they are).
    ``buckets`` is empty where the flash kernel takes ``segments`` directly, and where ``keys`` are others than queries.
    """

    segments: Segments
    causal: bool
    keys: Segments | None = None
    buckets: tuple[Bucket, ...] = ()
    order: Tensor | None = None
    inverse: Tensor | None = None


def plan(
    segments: Segments, *, causal: bool, dtype: torch.dtype, keys: Segments | None = None, reorder: bool = True
) -> Layout:
    """The layout for ``segments`` on their device, for activations of ``dtype``.

    With ``keys`` segment ``i`` attends to key segment ``i``, which ends with it. Without ``reorder`` the rows stay in
    their order (``order`` is None).
    """
    device = segments.cu_seqlens.device
    lengths = segments.lengths
    if keys is not None or (device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)):
        return Layout(segments, causal, keys=keys)
    if len(set(lengths)) == 1:
        single = Bucket(segments.total, len(lengths), lengths[0])
        return Layout(segments, causal, buckets=(single,))
    ranks = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    buckets = tuple(_bucket(group, device) for group in _groups([lengths[i] for i in ranks], causal))
    order = inverse = None
    if not reorder or (not causal and _runs(lengths) <= len(buckets) + 2):
        # A few equal stretches in the order they come in are cheaper than moving every row twice per layer.
        buckets = tuple(_bucket([length] * count, device) for length, count in _stretches(lengths))
    elif ranks != list(range(len(ranks))):
        order, inverse = _permutation(lengths, ranks)
        order, inverse = order.to(device, non_blocking=True), inverse.to(device, non_blocking=True)
    return Layout(segments, causal, None, buckets, order, inverse)


def _stretches(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of equal neighbours as (length, count)."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


def _runs(lengths: Sequence[int]) -> int:
    return len(_stretches(lengths))


def _groups(lengths: Sequence[int], causal: bool) -> list[list[int]]:
    """Falling ``lengths`` cut into buckets: equal ones, or (causal, short) similar ones."""
    groups: list[list[int]] = []
    rows = 0
    for length in lengths:
        group = groups[-1] if groups else []
        longest = group[0] if group else 0
        padded = causal and longest <= PADDED_UP_TO and rows + length >= (1 - PADDING) * longest * (len(group) + 1)
        if group and (length == longest or padded):
            group.append(length)
            rows += length
        else:
            groups.append([length])
            rows = length
    return groups


def _bucket(lengths: Sequence[int], device: torch.device) -> Bucket:
    """The bucket of these segments; the first is the longest."""
    count, longest, rows = len(lengths), lengths[0], sum(lengths)
    if rows == count * longest:
        return Bucket(rows, count, longest)
    sizes = torch.tensor(lengths, device="cpu")
    starts = torch.cumsum(sizes, 0) - sizes
    slots = torch.arange(longest, device="cpu").expand(count, longest)
    gather = starts[:, None] + torch.minimum(slots, sizes[:, None] - 1)
    valid = (slots < sizes[:, None]).flatten().nonzero().flatten()
    return Bucket(
        rows,
        count,
        longest,
        gather.flatten().to(device, non_blocking=True),
        valid.to(device, non_blocking=True),
    )


def _permutation(lengths: Sequence[int], ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Row order ``[T]`` in which segment ``ranks[0]`` comes first, and its inverse."""
    sizes = torch.tensor(lengths, device="cpu")
    starts = torch.cumsum(sizes, 0) - sizes
    chosen = torch.tensor(ranks, device="cpu")
    sizes = sizes[chosen]
    ends = torch.cumsum(sizes, 0)
    total = sum(lengths)
    shift = torch.repeat_interleave(starts[chosen] - (ends - sizes), sizes, output_size=total)
    order = torch.arange(total, device="cpu") + shift
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(total, device="cpu")
    return order, inverse


class _Permute(torch.autograd.Function):
    """Rows of ``x`` in another order; a gather in both directions, never a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Pad(torch.autograd.Function):
    """Rows to padded slots. A pad slot's gradient is zero by causality, so backward keeps the real slots only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(valid)
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Unpad(torch.autograd.Function):
    """Padded slots back to rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(valid)
        ctx.slots = x.shape[0]
        return x.index_select(0, valid)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        return grad.new_zeros(ctx.slots, *grad.shape[1:]).index_copy_(0, ctx.saved_tensors[0], grad), None


def permuted(x: Tensor, order: Tensor | None, inverse: Tensor | None) -> Tensor:
    """``x [T, ...]`` with row ``order[i]`` at place ``i``; ``x`` itself if ``order`` is None."""
    if order is None:
        return x
    out: Tensor = _Permute.apply(x, order, inverse)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None = None) -> Tensor:
    """``q [T, heads, D]``, ``k``, ``v`` ``[T, kv_heads, D]`` in layout order to ``[T, heads, D]``, segment by segment.

    ``heads`` is a multiple of ``kv_heads`` (grouped-query attention); ``scale`` defaults to ``D ** -0.5``. The result
    has the type of ``v``; ``q`` and ``k`` may be wider.
    """
    if not layout.buckets and q.device.type == "cuda" and v.dtype in (torch.float16, torch.bfloat16):
        return _flash(q, k, v, layout, scale)
    with torch.autocast(q.device.type, enabled=False):
        return _bucketed(q, k, v, layout, scale) if layout.buckets else _paired(q, k, v, layout, scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """The variable-length flash kernel (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = layout.segments, layout.keys or layout.segments
    out = varlen_attn(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.max_seqlen,
        keys.max_seqlen,
        scale=scale,
        window_size=(-1, 0) if layout.causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def _paired(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """Runs of queries over longer runs of keys that end with them, one call each, in float32."""
    assert layout.causal and layout.keys is not None
    dtype, gqa = v.dtype, q.shape[1] != k.shape[1]
    counts = layout.segments.lengths, layout.keys.lengths
    outs = []
    for mine, key, value in zip(
        q.float().split(counts[0]), k.float().split(counts[1]), v.float().split(counts[1]), strict=True
    ):
        rows, seen = mine.shape[0], key.shape[0]
        mask = torch.ones(rows, seen, dtype=torch.bool, device=q.device).tril(seen - rows)
        mine, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (mine, key, value))
        out = F.scaled_dot_product_attention(mine, key, value, mask, scale=scale, enable_gqa=gqa)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outs).to(dtype)


def _bucketed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None) -> Tensor:
    """One batched call per bucket, in float32 on the CPU."""
    dtype = v.dtype
    if q.device.type == "cpu" and dtype != torch.float32:
        q, k, v = q.float(), k.float(), v.float()
    if len(layout.buckets) == 1:
        return _rectangle(q, k, v, layout.buckets[0], layout.causal, scale).to(dtype)
    rows = [bucket.rows for bucket in layout.buckets]
    # split, not slices: its backward is one concatenation, that of a slice writes zeros over the whole row.
    parts = zip(q.split(rows), k.split(rows), v.split(rows), layout.buckets, strict=True)
    return torch.cat([_rectangle(*part, layout.causal, scale) for part in parts]).to(dtype)


def _rectangle(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, causal: bool, scale: float | None) -> Tensor:
    """Attention of one bucket, ``[rows, heads, D]`` each."""
    if bucket.gather is not None:
        q, k, v = (_Pad.apply(x, bucket.gather, bucket.valid) for x in (q, k, v))
    shape = (bucket.count, bucket.length)
    out = F.scaled_dot_product_attention(
        q.unflatten(0, shape).transpose(1, 2),
        k.unflatten(0, shape).transpose(1, 2),
        v.unflatten(0, shape).transpose(1, 2),
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if bucket.gather is None else _Unpad.apply(out, bucket.valid)
