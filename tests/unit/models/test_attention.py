"""Packed attention against one call per segment: forward, backward, isolation, and how buckets are cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.contract.batch import Segments
from tessera.models.attention import PADDING, attend, permuted, plan

LENGTHS = [
    [1],
    [7],
    [5, 5, 5],
    [3, 9, 4],
    [20, 19, 18, 20, 3, 3, 2, 1],
    [64, 64, 48, 64, 64, 48, 16, 16, 12],
    [300, 290, 7, 300],
]


def naive(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    outs = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        b, c = b.repeat_interleave(groups, 1), c.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (a, b, c)), is_causal=causal)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool) -> Tensor:
    layout = plan(Segments.of(lengths), causal=causal, dtype=q.dtype)
    out = attend(*(permuted(x, layout.order, layout.inverse) for x in (q, k, v)), layout)
    return permuted(out, layout.inverse, layout.order)


def random_qkv(total: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(total)
    return [torch.randn(total, heads, 8, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_equals_one_call_per_segment(lengths: list[int], causal: bool) -> None:
    inputs = random_qkv(sum(lengths))
    weight = torch.randn(sum(lengths), 4, 8)
    results = []
    for function in (packed, naive):
        out = function(*inputs, lengths, causal)
        results.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_not_even_nan_crosses_segments(causal: bool) -> None:
    lengths = [6, 5, 6, 2]
    inputs = [x.detach() for x in random_qkv(sum(lengths))]
    clean = packed(*inputs, lengths, causal)
    spoiled = [x.clone() for x in inputs]
    for x in spoiled:
        x[6:11] = float("nan")
        x.requires_grad_()
    out = packed(*spoiled, lengths, causal)
    rows = torch.cat([torch.arange(6), torch.arange(11, 19)])
    assert torch.equal(out[rows], clean[rows])
    grads = torch.autograd.grad(out[rows].sum(), spoiled)
    assert all(grad[rows].isfinite().all() for grad in grads)


def test_padding_is_bounded_and_only_causal() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 400, (64,), generator=generator).tolist()
        for causal in (True, False):
            layout = plan(Segments.of(lengths), causal=causal, dtype=torch.float32)
            assert sum(bucket.rows for bucket in layout.buckets) == sum(lengths)
            for bucket in layout.buckets:
                assert bucket.rows >= (1 - PADDING) * bucket.count * bucket.length
                assert causal or bucket.gather is None


def test_many_short_segments_need_few_calls() -> None:
    lengths = [17 + index % 7 for index in range(64)]
    assert len(plan(Segments.of(lengths), causal=True, dtype=torch.float32).buckets) == 1
    assert len(plan(Segments.of(lengths), causal=False, dtype=torch.float32).buckets) == 7


def test_equal_lengths_are_a_view() -> None:
    layout = plan(Segments.of([9] * 5), causal=True, dtype=torch.float32)
    assert layout.order is None and [bucket.gather for bucket in layout.buckets] == [None]


def test_few_stretches_are_not_moved() -> None:
    """Windows of an image come in stretches of equal size: no row moves for those."""
    layout = plan(Segments.of([64, 64, 64, 48, 48, 16]), causal=False, dtype=torch.float32)
    assert layout.order is None and [bucket.count for bucket in layout.buckets] == [3, 2, 1]


def test_bfloat16_keeps_its_type() -> None:
    lengths = [5, 3]
    inputs = random_qkv(8, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = packed(*inputs, lengths, True)
    assert out.dtype == torch.bfloat16
    expected = naive(*(x.float() for x in inputs), lengths, True)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_equals_cpu(lengths: list[int], causal: bool, dtype: torch.dtype) -> None:
    host = [x.detach().repeat(1, 1, 4).to(dtype) for x in random_qkv(sum(lengths))]
    weight = torch.randn(sum(lengths), 4, 32).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        inputs = [x.to(device).requires_grad_() for x in host]
        layout = plan(Segments.of(lengths).to(device), causal=causal, dtype=dtype)
        assert bool(layout.buckets) == (device == "cpu" or dtype == torch.float32)
        out = attend(*(permuted(x, layout.order, layout.inverse) for x in inputs), layout)
        out = permuted(out, layout.inverse, layout.order)
        grads = torch.autograd.grad((out * weight.to(device)).sum(), inputs)
        results.append([x.float().cpu() for x in (out, *grads)])
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)
