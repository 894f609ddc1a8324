"""Experts: the sorted, grouped computation is the textbook's; any share of them can be held; statistics count once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.contract.seams import Dispatched
from tessera.models.families import family_of
from tessera.models.moe import Experts, LocalExperts, MoE, MoEConfig, Router, Routing, grouped_product
from tests.parity import reference as ref

TEXT: list[ref.Sample] = [[13], [5], [21], [1]]


def experts_of(count: int, hidden: int = 8, inner: int = 6, dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(0)
    experts = Experts(count, hidden, inner).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_()
    return experts


def textbook(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Every token through each of its experts, one at a time."""
    rows = []
    for token, ids, shares in zip(x, chosen, weights, strict=True):
        total = torch.zeros_like(token)
        for expert, share in zip(ids, shares, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
            total = total + share * (experts.down_proj[expert] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


def both(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> None:
    """Values and gradients of the sorted computation equal the textbook's."""
    seam, results = LocalExperts(), []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, weights)]
        experts.zero_grad()
        if ours:
            sent = seam.dispatch(leaves[0], chosen, experts.gate_up_proj.shape[0])
            out = seam.combine(experts(sent.rows, sent.counts), leaves[1], sent)
        else:
            out = textbook(experts, leaves[0], chosen, leaves[1])
        out.backward(torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out))
        grads = [tensor.grad for tensor in (*leaves, *experts.parameters())]
        results.append([out.detach(), *(grad.clone() for grad in grads if grad is not None)])
    assert len(results[0]) == len(results[1]) == 5
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize(("tokens", "count", "top_k"), [(17, 5, 2), (1, 8, 8), (3, 50, 2), (40, 3, 1)])
def test_sorted_is_one_at_a_time(tokens: int, count: int, top_k: int) -> None:
    experts, x = experts_of(count), torch.randn(tokens, 8, dtype=torch.float64)
    chosen = torch.rand(tokens, count).topk(top_k)[1]
    both(experts, x, chosen, torch.rand(tokens, top_k, dtype=torch.float64))


def test_all_tokens_to_one_expert() -> None:
    both(experts_of(4), torch.randn(9, 8, dtype=torch.float64), torch.full((9, 1), 2), torch.ones(9, 1).double())


def test_no_rows_at_all() -> None:
    """A rank may receive nothing; its experts still get a gradient, of zeros."""
    experts = experts_of(3)
    rows = torch.zeros(0, 8, dtype=torch.float64, requires_grad=True)
    experts(rows, torch.zeros(3, dtype=torch.int64)).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    assert rows.grad is not None and rows.grad.shape == (0, 8)


def test_an_expert_without_rows_has_a_zero_gradient() -> None:
    weight = torch.randn(3, 4, 5, requires_grad=True)
    grouped_product(torch.randn(6, 5), weight, torch.tensor([2, 0, 4])).sum().backward()
    assert weight.grad is not None
    assert [bool(grad.any()) for grad in weight.grad] == [True, False, True]


def test_frozen_experts_pass_gradients_through() -> None:
    experts = experts_of(3).requires_grad_(False)
    rows = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    experts(rows, torch.tensor([2, 0, 4])).sum().backward()
    assert rows.grad is not None and all(parameter.grad is None for parameter in experts.parameters())


class TwoHalves:
    """The seam of two ranks that each hold half of the experts, played by one process."""

    def __init__(self, halves: tuple[Experts, Experts]) -> None:
        self.halves = halves
        self.local = LocalExperts()

    def dispatch(self, x: Tensor, chosen: Tensor, experts: int) -> Dispatched:
        sent = self.local.dispatch(x, chosen, experts)
        outs, start = [], 0
        for half, counts in zip(self.halves, sent.counts.chunk(2), strict=True):
            end = start + int(counts.sum())
            outs.append(half(sent.rows[start:end], counts))
            start = end
        return Dispatched(torch.cat(outs), sent.counts, sent.state)

    def combine(self, rows: Tensor, weights: Tensor, dispatched: Dispatched) -> Tensor:
        return self.local.combine(rows, weights, dispatched)


def test_a_seam_may_hold_the_experts_elsewhere() -> None:
    config = MoEConfig(experts=6, top_k=2, inner=5, layers=frozenset({0}))
    torch.manual_seed(1)
    whole = MoE(config, 8, 0)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_()
    x = torch.randn(11, 8)
    expected = whole(x)
    halves = (Experts(3, 8, 5), Experts(3, 8, 5))
    with torch.no_grad():
        for name, parameter in whole.experts.named_parameters():
            for half, part in zip(halves, parameter.chunk(2), strict=True):
                half.get_parameter(name).copy_(part)
    whole.experts.forward = lambda rows, counts: rows  # type: ignore[method-assign]
    whole.seam = TwoHalves(halves)
    torch.testing.assert_close(whole(x), expected)


def test_half_precision_keeps_its_type() -> None:
    config = MoEConfig(experts=6, top_k=2, inner=5, layers=frozenset({0}), shared=4)
    layer = MoE(config, 8, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = torch.randn(11, 8)
    wide = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = layer(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert float((narrow - wide).abs().max().detach()) < 0.1 * float(wide.abs().max().detach())
    narrow.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("normalise", [True, False])
def test_sigmoid_routing_is_transformers(groups: int, kept: int, normalise: bool) -> None:
    from transformers.models.glm4v_moe.configuration_glm4v_moe import Glm4vMoeTextConfig
    from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextTopkRouter

    theirs = Glm4vMoeTextTopkRouter(
        Glm4vMoeTextConfig(
            hidden_size=16,
            n_routed_experts=16,
            num_experts_per_tok=3,
            n_group=groups,
            topk_group=kept,
            norm_topk_prob=normalise,
            routed_scaling_factor=2.5,
        )
    )
    config = MoEConfig(16, 3, 4, frozenset(), "sigmoid", normalise, 2.5, groups, kept)
    ours = Router(config, 16)
    torch.manual_seed(0)
    state = {"weight": torch.randn(16, 16), "e_score_correction_bias": torch.randn(16) * 0.3}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(50, 16)
    weights, chosen, shares = ours(x)
    _, expected, ids = theirs(x)
    order, other = chosen.argsort(-1), ids.argsort(-1)
    assert torch.equal(chosen.gather(1, order), ids.gather(1, other))
    torch.testing.assert_close(weights.gather(1, order), expected.gather(1, other))
    torch.testing.assert_close(shares.sum(-1), torch.ones(50))


def routed(recompute: bool, **changes: Any) -> tuple[Routing, dict[str, Tensor]]:
    """Statistics of a forward pass, and the gradients of a loss that uses hidden states and statistics."""
    config = ref.config_of("qwen3_moe", **changes)
    model = ref.ours(config).train()
    model.set_recompute(family_of(config).plan(config), decoder=recompute, tower=False)
    routing = Routing()
    total = model(ref.batch_of(config, TEXT), ref.loss, routing).total
    (total + (routing.probabilities() * routing.counts()).sum() * 1e-2).backward()
    return routing, ref.gradients(model)


def test_recomputation_counts_nothing_twice() -> None:
    (plain, expected), (again, gradients) = routed(False), routed(True)
    assert list(plain.loads) == list(again.loads) == [1, 2], "layer 0 is dense"
    assert torch.equal(plain.counts(), again.counts())
    assert torch.equal(plain.probabilities(), again.probabilities())
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_statistics_are_sums_over_tokens() -> None:
    routing, _ = routed(False)
    tokens = sum(int(part) for sample in TEXT for part in sample if isinstance(part, int))
    assert routing.tokens == tokens
    torch.testing.assert_close(routing.probabilities().sum(-1), torch.full((2,), float(tokens)))
    assert torch.equal(routing.counts().sum(-1), torch.full((2,), 3.0 * tokens))
