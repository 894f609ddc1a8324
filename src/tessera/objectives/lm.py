"""Next-token prediction: the head and the cross entropy, together, a chunk of tokens at a time.

The largest tensor of language-model training is not a weight but the logits: ``T x vocabulary`` in float32, three
times over (logits, probabilities, their gradient). Two observations make it disappear. Only supervised tokens need
logits at all; prompts and images, most of a multimodal sequence, are skipped through ``batch.supervised``. And for
the rest, the loss of a chunk of tokens is a closed form whose gradient can be taken on the spot::

    logits = rows @ head.T            [c, V]   exists for one chunk at a time
    loss   = w * (logsumexp(logits) - logits[target])
    d rows = w * (softmax(logits) - onehot(target)) @ head
    d head = w * (softmax(logits) - onehot(target)).T @ rows

With a vocabulary split over tensor ranks, each rank holds some columns of the logits; highest logit, normaliser and the
target's logit are then reduced over the ranks, three numbers per token, and nothing else changes (Megatron-LM, sec. 3).

So the forward pass also computes the gradient (it is a sum over tokens, hence known up to the factor that arrives
from above), and the backward pass only scales it. Products run in the model's dtype, sums and softmax in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.contract.batch import Batch
from tessera.contract.model import Head, LossSum
from tessera.contract.seams import Vocabulary

DEFAULT_CHUNK = 1024
WHOLE = Vocabulary()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over tokens of ``weight * CE(rows @ head.T, target)``; also the number of argmax hits."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_LH: Tensor,
        head_VH: Tensor,
        targets_L: Tensor,
        weights_L: Tensor,
        vocabulary: Vocabulary,
        chunk: int,
        repeatable: bool,
    ) -> tuple[Tensor, Tensor]:
        wants_rows, wants_head = ctx.needs_input_grad[:2]
        head = head_VH.detach().to(rows_LH.dtype)
        total = torch.zeros((), dtype=torch.float32, device=rows_LH.device)
        correct = torch.zeros((), dtype=torch.float32, device=rows_LH.device)
        d_rows = torch.empty_like(rows_LH) if wants_rows else None
        d_head = torch.zeros_like(head_VH, dtype=torch.float32) if wants_head else None
        for start in range(0, rows_LH.shape[0], chunk):
            rows = rows_LH[start : start + chunk]
            weights = weights_L[start : start + chunk]
            logits = (rows @ head.T).float()
            targets = targets_L[start : start + chunk] - vocabulary.offset
            losses, hits, d_logits, index, held = _losses(logits, targets, vocabulary)
            correct += hits
            total += (weights * losses).sum()
            if not (wants_rows or wants_head):
                continue
            d_logits.scatter_add_(1, index, -held)
            d_logits = d_logits.mul_(weights.unsqueeze(1)).to(rows.dtype)
            if d_rows is not None:
                torch.mm(d_logits, head, out=d_rows[start : start + chunk])
            if d_head is not None:
                d_head += d_logits.T @ rows
        ctx.save_for_backward(d_rows, d_head)
        ctx.repeatable = repeatable
        ctx.head_dtype = head_VH.dtype
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_correct: Tensor) -> tuple[Tensor | None, ...]:
        d_rows, d_head = ctx.saved_tensors
        scaled = torch.mul if ctx.repeatable else Tensor.mul_
        rows = None if d_rows is None else scaled(d_rows, d_total)
        head = None if d_head is None else scaled(d_head, d_total).to(ctx.head_dtype)
        return rows, head, None, None, None, None, None


def _losses(logits: Tensor, targets: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cross entropies ``[c]`` and argmax hits of ``logits [c, V]``, this rank's part of the vocabulary.

    Also the softmax (in the logits' memory), and each target's column and whether this rank holds it (1.0 or 0.0),
    ``[c, 1]``. ``targets`` count from the rank's first entry.
    """
    size = logits.shape[1]
    index = targets.clamp(0, size - 1).unsqueeze(1)
    held = (index.squeeze(1) == targets).float().unsqueeze(1)
    peak, best = logits.max(dim=1)
    highest = vocabulary.max(peak)
    # Of the ranks that hold the highest logit the first one counts, as in an argmax over everything.
    first = vocabulary.min(torch.where(peak == highest, best + vocabulary.offset, torch.iinfo(torch.int64).max))
    hits = (first == targets + vocabulary.offset).sum()
    chosen = vocabulary.sum((logits.gather(1, index) * held).squeeze(1))
    soft = logits.sub_(highest.unsqueeze(1)).exp_()
    norm = vocabulary.sum(soft.sum(dim=1))
    losses = highest + norm.log() - chosen
    return losses, hits, soft.div_(norm.unsqueeze(1)), index, held


def cross_entropy_sum(
    rows: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    vocabulary: Vocabulary = WHOLE,
    chunk: int = DEFAULT_CHUNK,
    repeatable: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of ``rows [L, H]`` through ``head [V, H]``, summed (float32), and the argmax hits.

    ``targets [L] int64``; ``weights [L] float32``. Never holds more than ``chunk x V`` logits. If the head is one part
    of a ``vocabulary``, the sums are those of the whole and the gradient of ``rows`` is this part's summand. Only a
    ``repeatable`` one survives two backward passes (of a schedule that takes inputs and weights apart).
    """
    with torch.autocast(rows.device.type, enabled=False):
        total, correct = _ChunkedCrossEntropy.apply(rows, head, targets, weights, vocabulary, chunk, repeatable)
    return total, correct


@dataclass(frozen=True, slots=True)
class NextToken:
    """The language-model objective: sum of ``loss_weight * -log p(target)`` over the supervised tokens.

    Metrics: ``correct`` (argmax hits) and ``count`` (supervised tokens), whose ratio is the token accuracy. ``chunk``
    is how many rows of logits exist at a time; ``repeatable`` as in :func:`cross_entropy_sum`.
    """

    chunk: int = DEFAULT_CHUNK
    repeatable: bool = False
    metrics: tuple[str, ...] = ("correct", "count")

    def __call__(self, hidden: Tensor, head: Head, batch: Batch) -> LossSum:
        rows = hidden.index_select(0, batch.supervised)
        targets = batch.targets.index_select(0, batch.supervised)
        weights = batch.loss_weight.index_select(0, batch.supervised)
        total, correct = cross_entropy_sum(
            rows,
            head.weight,
            targets,
            weights,
            vocabulary=head.vocabulary,
            chunk=self.chunk,
            repeatable=self.repeatable,
        )
        if batch.supervised.numel() == 0:
            # A microbatch without targets must still reach every parameter, so that ranks stay in step.
            total = total + 0.0 * (hidden.float().sum() + head.weight.float().sum())
        count = torch.full_like(correct, float(batch.supervised.numel()))
        return LossSum(total, batch.weight, {"correct": correct, "count": count})
