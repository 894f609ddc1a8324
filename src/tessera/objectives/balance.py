"""Keeping the experts of a sparse model equally busy: the load-balancing loss, for batches in any number of pieces.

With ``f[e]`` the share of tokens that chose expert ``e`` (these sum to k) and ``P[e]`` the mean probability it was
given, ``E * sum_e f[e] * P[e]`` is smallest, and equal to k, when both are uniform. Choosing is not differentiable, so
the gradient flows through ``P`` alone and ``f`` acts as a number.

Both are means over the *global* batch, and their product is not a sum over tokens: computed per microbatch and
averaged, the loss would depend on how the batch was split, and would punish a microbatch of one language or subject
for being what it is. So ``f`` comes in as numbers, counted over all microbatches and ranks, and what a microbatch adds
is linear in its own probabilities: the pieces of a batch add up to the loss, and their gradients to its gradient.
"""

from __future__ import annotations

from torch import Tensor


def balance_loss(
    probabilities: Tensor, counts: Tensor, tokens: float, *, coefficient: float = 1.0, per_layer: bool = False
) -> Tensor:
    """What one microbatch adds to the load-balancing loss of the global batch, 0-dim float32.

    ``probabilities [L, E]`` are router scores of ``L`` sparse layers, summed over this microbatch's tokens
    (differentiable); ``counts [L, E]`` how often each expert was chosen and ``tokens`` how many tokens there were, both
    in the global batch. All layers together are seen as one router, as transformers does it; ``per_layer`` averages
    the layers' own losses instead, so that two layers cannot make up for each other.
    """
    assert probabilities.shape == counts.shape, f"{tuple(probabilities.shape)} is not {tuple(counts.shape)}"
    layers, experts = probabilities.shape
    shares = counts.detach().float() / tokens
    if per_layer:
        return coefficient * experts * (shares * probabilities.float()).sum() / (tokens * layers)
    means = probabilities.float().sum(0) / (tokens * layers)
    return coefficient * experts * (shares.mean(0) * means).sum()
