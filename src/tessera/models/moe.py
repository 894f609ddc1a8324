"""Mixture of experts: a block with many small MLPs, of which every token uses a few.

A *router* scores all experts for a token and picks ``k``; the token's result is the sum of theirs, weighted by score.
Nothing is padded and no token is dropped: rows are sorted by expert, so each expert's rows lie together, and one
*grouped product* multiplies every stretch of rows by its own expert's matrix::

    x [T, H] -> route -> chosen [T, k], weights [T, k]
             -> seam.dispatch -> rows [T * k, H] sorted by expert -> gate_up, silu, down -> seam.combine -> [T, H]

Experts are held as two stacked parameters, ``gate_up_proj [E, 2I, H]`` and ``down_proj [E, H, I]``. A rank may hold
some of the rows only: :class:`Experts` computes with as many as it has, and where a token's experts live is the seam's
business (``contract/seams.py``).

Routers tend to favour few experts. What a loss against that, or a log, needs to know is how often each was chosen and
how much probability it got; both are sums over tokens, so :class:`Routing` collects sums, and
``objectives/balance.py`` turns them into a loss that does not depend on how the batch was split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.contract.seams import Dispatched, Divisible, ExpertSeam
from tessera.models.layers import GatedMLP, gated


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Options of the sparse layers, which are those whose index is in ``layers``.

    ``scoring`` is ``softmax`` over all experts, or ``sigmoid`` of each on its own, then with a correction bias that
    acts on the choice and not on the weight. ``normalise`` makes a token's weights sum to one, ``scale`` multiplies
    them. With ``groups`` a token chooses within its best ``top_groups`` groups only. ``shared`` is the inner size of
    an MLP that every token passes through besides (0: none).
    """

    experts: int
    top_k: int
    inner: int
    layers: frozenset[int]
    scoring: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What one layer's router did with one microbatch of ``tokens`` tokens.

    ``counts [E] float32`` is how often each expert was chosen, ``probabilities [E] float32`` the sum of its scores over
    all tokens (differentiable; a token's scores sum to one).
    """

    counts: Tensor
    probabilities: Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class Shares:
    """By layer, ``rates [E] float32``: what a unit of summed probability costs at each expert."""

    rates: Mapping[int, Tensor]


class Routing:
    """Collects the :class:`Load` of every sparse layer in one forward pass; hand in a fresh one per microbatch.

    Only the first ``rows`` rows are tokens (None: all of them); the rest fill a rank's share up. With ``shares`` a
    layer's probabilities have a price, whose gradient backward adds. ``detached`` loads keep no graph alive.

    With activation recomputation a layer runs twice. The first report counts: its graph is the one that backward goes
    through (a checkpoint recomputes the values that graph saved), the second is dropped. Not a dataclass, because
    FSDP's hooks would hand each layer a copy.
    """

    def __init__(self, rows: int | None = None, shares: Shares | None = None, *, detached: bool = False) -> None:
        self.rows, self.shares = rows, shares
        self.loads: dict[int, Load] = {}
        self._detached = detached

    def report(self, layer: int, load: Load) -> None:
        """Keep what layer ``layer`` did, unless it is known."""
        if self._detached:
            load = replace(load, probabilities=load.probabilities.detach())
        self.loads.setdefault(layer, load)

    def counts(self) -> Tensor:
        """``[L, E] float32`` of all layers, in their order."""
        return torch.stack([self.loads[layer].counts for layer in sorted(self.loads)])

    def probabilities(self) -> Tensor:
        """``[L, E] float32`` of all layers, in their order; differentiable."""
        return torch.stack([self.loads[layer].probabilities for layer in sorted(self.loads)])

    @property
    def tokens(self) -> int:
        """Tokens of the microbatch on this device."""
        return next(iter(self.loads.values())).tokens if self.loads else 0


class Router(Divisible):
    """Scores and chooses; called ``gate`` in checkpoints, like the matrix in an expert that it is not."""

    e_score_correction_bias: Tensor

    def __init__(self, config: MoEConfig, hidden: int) -> None:
        super().__init__()
        assert config.scoring in ("softmax", "sigmoid")
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, hidden))
        if config.scoring == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [T, H]`` to ``weights [T, k]``, ``chosen [T, k]`` and each token's scores, ``[T, E]`` summing to one."""
        return self.route(x, self.part(self.weight))

    def route(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with another ``weight [E, H]`` than its own."""
        if self.config.scoring == "softmax":
            scores = F.linear(x, weight).softmax(-1, dtype=torch.float32)
            weights, chosen = scores.topk(self.config.top_k, dim=-1)
            shares = scores
        else:
            # Scores that differ by a rounding change the choice, so this is float32 whatever the rest computes in.
            with torch.autocast(x.device.type, enabled=False):
                scores = F.linear(x.float(), weight.float()).sigmoid()
            chosen = self._allowed(scores.detach() + self.e_score_correction_bias).topk(self.config.top_k, dim=-1)[1]
            weights = scores.gather(1, chosen)
            shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        if self.config.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if self.config.scoring == "sigmoid" else 0.0))
        return weights * self.config.scale if self.config.scale != 1.0 else weights, chosen, shares

    def _allowed(self, scores: Tensor) -> Tensor:
        """``scores [T, E]`` with minus infinity outside each token's best groups; a group's two best speak for it."""
        groups, kept = self.config.groups, self.config.top_groups
        if groups == kept:
            return scores
        grouped = scores.unflatten(-1, (groups, -1))
        best = grouped.topk(2, dim=-1)[0].sum(-1).topk(kept, dim=-1)[1]
        barred = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, value=False)
        return grouped.masked_fill(barred[:, :, None], float("-inf")).flatten(1)


class _GroupedProduct(torch.autograd.Function):
    """Rows ``[N, A]``, sorted by expert, times each expert's ``weight [E, B, A]``, transposed, to ``[N, B]``.

    The CPU's: one product per expert, written where it belongs, forward and backward. Autograd through slices of the
    stack would instead make a gradient as large as the whole stack for every single expert.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        out = rows.new_empty(rows.shape[0], weight.shape[1])
        # tensor_split takes its cuts as a tensor on the host: the sizes are data, and a CPU does not wait for itself.
        for part, matrix, result in zip(rows.tensor_split(ends), weight, out.tensor_split(ends), strict=True):
            if part.shape[0]:
                torch.mm(part, matrix.t(), out=result)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        inputs, upstream = rows.tensor_split(ends), grad.tensor_split(ends)
        for expert, (part, pull) in enumerate(zip(inputs, upstream, strict=True)):
            if part.shape[0] and d_weight is not None:
                torch.mm(pull.t(), part, out=d_weight[expert])
        if d_rows is not None:
            for matrix, pull, result in zip(weight, upstream, d_rows.tensor_split(ends), strict=True):
                if pull.shape[0]:
                    torch.mm(pull, matrix, out=result)
        return d_rows, d_weight, None


def grouped_product(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``rows [N, A]`` in stretches of ``counts [E]``, each times its ``weight[e] [B, A]`` transposed, to ``[N, B]``."""
    weight = weight.to(rows.dtype)
    if rows.is_cuda:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0).to(torch.int32))
    out: Tensor = _GroupedProduct.apply(rows, weight, counts.cumsum(0)[:-1])
    return out


class Experts(Divisible):
    """The experts held here: ``down(silu(gate(x)) * up(x))`` of each for its own rows."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """``rows [N, H]`` sorted by expert, ``counts [E held here]`` of each, to ``[N, H]``."""
        gate, up = grouped_product(rows, self.part(self.gate_up_proj), counts).chunk(2, dim=-1)
        return grouped_product(gated(gate, up), self.part(self.down_proj), counts)


class _Spread(torch.autograd.Function):
    """Row ``order[i] // k`` of ``x [T, H]`` at place ``i``, to ``[T * k, H]``.

    The gradient is gathered by ``inverse`` and summed over the k copies: the same sum in the same order every time,
    where an indexed addition on a GPU would add in any.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order.div(copies, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse).unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    """``x.index_select(0, inverse)`` for a permutation ``inverse``, whose gradient is gathered by ``order``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None, None


class LocalExperts:
    """The seam of one device: all experts are here, so tokens are only sorted."""

    def dispatch(self, x: Tensor, chosen: Tensor, experts: int) -> Dispatched:
        """The rows of ``x``, each as often as it has experts, sorted by expert."""
        ranked, order = chosen.flatten().sort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.shape[0], device=order.device)
        # Sorted ids are counted by where each number ends: no histogram, no answer the host has to wait for.
        ends = torch.searchsorted(ranked, torch.arange(experts, device=order.device), right=True)
        counts = ends.diff(prepend=ends.new_zeros(1))
        rows: Tensor = _Spread.apply(x, order, inverse, chosen.shape[1])
        return Dispatched(rows, counts, (order, inverse))

    def combine(self, rows: Tensor, weights: Tensor, dispatched: Dispatched) -> Tensor:
        """The weighted sum over each token's experts."""
        order, inverse = dispatched.state
        sorted_back: Tensor = _Gather.apply(rows, order, inverse)
        tokens, copies = weights.shape
        mixed = torch.bmm(weights.to(rows.dtype).unsqueeze(1), sorted_back.view(tokens, copies, rows.shape[1]))
        return mixed.squeeze(1)


class _Priced(torch.autograd.Function):
    """``x`` as it is; backward also starts a gradient of one at the 0-dim ``price``.

    So a loss that arises inside a layer needs no way out of it: not through a pipeline stage's output, not through a
    checkpoint.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, price: Tensor) -> Tensor:
        ctx.like = price.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.like


class MoE(nn.Module):
    """Router, experts and, for some models, an MLP shared by all tokens; takes the place of an MLP on ``[T, H]``.

    ``seam`` is :class:`LocalExperts` until a parallel engine replaces it. ``overlap`` lets the shared experts run
    beside the exchange of tokens.
    """

    def __init__(self, config: MoEConfig, hidden: int, index: int) -> None:
        super().__init__()
        self.index = index
        self.gate = Router(config, hidden)
        self.experts = Experts(config.experts, hidden, config.inner)
        self.shared_experts = GatedMLP(hidden, config.shared, bias=False) if config.shared else None
        self.seam: ExpertSeam = LocalExperts()
        self.overlap = False

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """``x [T, H]`` to ``[T, H]``; what the router did goes to ``routing``."""
        weights, chosen, scores = self.gate(x)
        shared = self._beside(x)
        dispatched = self.seam.dispatch(x, chosen, scores.shape[1])
        out = self.seam.combine(self.experts(dispatched.rows, dispatched.counts), weights, dispatched)
        if routing is not None:
            found = load(chosen[: routing.rows], scores[: routing.rows])
            routing.report(self.index, found)
            if routing.shares is not None:
                out = _Priced.apply(out, (found.probabilities * routing.shares.rates[self.index]).sum())
        return out if shared is None else out + shared()

    def _beside(self, x: Tensor) -> Callable[[], Tensor] | None:
        """The shared experts on ``x``, begun before the exchange; on a GPU on a stream of their own if ``overlap``."""
        shared = self.shared_experts
        if shared is None:
            return None
        if not (self.overlap and x.is_cuda):
            return lambda: shared(x)
        side, main = torch.cuda.Stream(x.device), torch.cuda.current_stream(x.device)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            out: Tensor = shared(x)

        def joined() -> Tensor:
            main.wait_stream(side)
            out.record_stream(main)
            return out

        return joined


def load(chosen: Tensor, scores: Tensor) -> Load:
    """How ``chosen [T, k]`` and ``scores [T, E]`` fall on the experts."""
    flat = chosen.flatten()
    # Ones add up exactly in float32 (to 16 million per expert and microbatch), in whatever order.
    counts = scores.new_zeros(scores.shape[1]).scatter_add_(0, flat, scores.new_ones(1).expand(flat.shape[0]))
    return Load(counts, scores.sum(0), chosen.shape[0])
