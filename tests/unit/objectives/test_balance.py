"""The load-balancing loss is transformers', and the pieces of a batch add up to it however it is split."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tessera.models.moe import load
from tessera.objectives.balance import balance_loss

LAYERS, EXPERTS, TOP_K, TOKENS = 3, 8, 2, 60


def logits_of(seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(TOKENS, EXPERTS, generator=generator).double().requires_grad_() for _ in range(LAYERS))


def sums(logits: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, Tensor]:
    """(probabilities, counts) ``[L, E]`` of these rows."""
    loads = []
    for layer in logits:
        scores = layer[rows].softmax(-1)
        loads.append(load(scores.topk(TOP_K)[1], scores))
    return torch.stack([found.probabilities for found in loads]), torch.stack([found.counts for found in loads])


def gradients(logits: tuple[Tensor, ...], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, logits))


def test_equals_transformers() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = logits_of()
    mine = balance_loss(*sums(logits, slice(None)), TOKENS, coefficient=0.5)
    theirs = 0.5 * load_balancing_loss_func(logits, EXPERTS, TOP_K)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-6, atol=0)
    for ours, wanted in zip(gradients(logits, mine), gradients(logits, theirs), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("cuts", [(0, 60), (0, 20, 40, 60), (0, 1, 59, 60), (0, 7, 7, 60)])
def test_pieces_add_up_to_the_batch(cuts: tuple[int, ...], per_layer: bool) -> None:
    logits = logits_of()
    whole, counts = sums(logits, slice(None))
    expected = balance_loss(whole, counts, TOKENS, per_layer=per_layer)
    parts = [sums(logits, slice(*pair))[0] for pair in pairwise(cuts)]
    total = torch.stack([balance_loss(part, counts, TOKENS, per_layer=per_layer) for part in parts]).sum()
    torch.testing.assert_close(total, expected)
    for ours, wanted in zip(gradients(logits, total), gradients(logits, expected), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-9)


def test_uniform_routing_costs_top_k_and_one_expert_costs_all() -> None:
    even = torch.full((LAYERS, EXPERTS), TOKENS / EXPERTS)
    assert float(balance_loss(even, even * TOP_K, TOKENS)) == pytest.approx(TOP_K)
    one = torch.zeros(LAYERS, EXPERTS)
    one[:, 3] = TOKENS
    for per_layer in (False, True):
        assert float(balance_loss(one, one, TOKENS, per_layer=per_layer)) == pytest.approx(EXPERTS)


def test_layers_make_up_for_each_other_only_when_pooled() -> None:
    opposite = torch.zeros(2, 2)
    opposite[0, 0] = opposite[1, 1] = TOKENS
    assert float(balance_loss(opposite, opposite, TOKENS)) == pytest.approx(1.0)
    assert float(balance_loss(opposite, opposite, TOKENS, per_layer=True)) == pytest.approx(2.0)
