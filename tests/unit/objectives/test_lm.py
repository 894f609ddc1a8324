"""The chunked head and cross entropy equals the textbook one, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tessera.contract.batch import Batch, Segments
from tessera.contract.model import Head
from tessera.objectives.lm import NextToken, cross_entropy_sum


def textbook(rows, head, targets, weights):
    return (F.cross_entropy(rows.float() @ head.float().T, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_equals_textbook_in_value_and_gradient(chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(23, 16, generator=g, requires_grad=True)
    head = torch.randn(41, 16, generator=g, requires_grad=True)
    targets = torch.randint(0, 41, (23,), generator=g)
    weights = torch.rand(23, generator=g)
    ours, correct = cross_entropy_sum(rows, head, targets, weights, chunk=chunk)
    (3.0 * ours).backward()
    got = rows.grad.clone(), head.grad.clone()
    rows.grad = head.grad = None
    want = textbook(rows, head, targets, weights)
    (3.0 * want).backward()
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got[0], rows.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], head.grad, rtol=1e-5, atol=1e-5)
    assert int(correct) == int(((rows @ head.T).argmax(1) == targets).sum())


def test_frozen_head_gets_no_gradient_and_rows_do() -> None:
    rows = torch.randn(5, 8, requires_grad=True)
    head = torch.randn(9, 8)
    total, _ = cross_entropy_sum(rows, head, torch.arange(5), torch.ones(5))
    total.backward()
    assert rows.grad is not None and head.grad is None


def test_never_holds_the_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No float32 tensor of tokens x vocabulary is ever allocated: the profiler sees every allocation."""
    tokens, vocab, hidden, chunk = 512, 4096, 8, 32
    rows = torch.randn(tokens, hidden, requires_grad=True)
    head = torch.randn(vocab, hidden, requires_grad=True)
    targets, weights = torch.randint(0, vocab, (tokens,)), torch.ones(tokens)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        total, _ = cross_entropy_sum(rows, head, targets, weights, chunk=chunk)
        total.backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < tokens * vocab * 4 / 4, f"one operator allocated {largest} bytes"
    assert largest >= chunk * vocab * 4  # the profiler did see the chunk itself


def test_bfloat16_rows_keep_a_float32_loss() -> None:
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 32, generator=g).bfloat16().requires_grad_()
    head = torch.randn(100, 32, generator=g).requires_grad_()
    targets = torch.randint(0, 100, (64,), generator=g)
    total, _ = cross_entropy_sum(rows, head, targets, torch.ones(64), chunk=16)
    total.backward()
    assert total.dtype == torch.float32 and rows.grad.dtype == torch.bfloat16 and head.grad.dtype == torch.float32
    want = textbook(rows.detach(), head.detach(), targets, torch.ones(64))
    assert abs(float(total) - float(want)) / float(want) < 2e-2


def batch_of(loss_weight: torch.Tensor) -> Batch:
    n = loss_weight.numel()
    return Batch(
        tokens=torch.arange(n),
        targets=torch.arange(1, n + 1) % n,
        loss_weight=loss_weight,
        positions=torch.arange(n),
        segments=Segments.of([n]),
        supervised=loss_weight.nonzero().squeeze(1),
        weight=float(loss_weight.sum()),
        sample_ids=(0,),
    )


def test_objective_returns_sums_and_counts_only_supervised_tokens() -> None:
    weight = torch.tensor([0.0, 1.0, 0.5, 0.0])
    hidden = torch.randn(4, 8, requires_grad=True)
    head = torch.randn(4, 8)
    loss = NextToken()(hidden, Head(head), batch_of(weight))
    assert loss.weight == 1.5 and float(loss.metrics["count"]) == 2
    torch.testing.assert_close(loss.total, textbook(hidden, head, torch.tensor([1, 2, 3, 0]), weight))


def test_a_batch_without_targets_still_reaches_every_parameter() -> None:
    hidden = torch.randn(3, 8, requires_grad=True)
    head = torch.randn(4, 8, requires_grad=True)
    loss = NextToken()(hidden, Head(head), batch_of(torch.zeros(3)))
    loss.total.backward()
    assert float(loss.total) == 0.0
    assert torch.equal(hidden.grad, torch.zeros(3, 8)) and torch.equal(head.grad, torch.zeros(4, 8))
