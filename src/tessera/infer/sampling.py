"""From logits to the next token.

The most probable token (greedy), or a draw from the distribution after these steps, in this order:

    repetition penalty    logits of tokens that have occurred, prompt included, are moved towards improbable
    temperature           divide the logits; 0 means greedy
    top_k                 only the k most probable tokens
    top_p                 only the most probable tokens that together reach p

A draw needs a single uniform number: where it falls on the cumulative distribution decides. Every request owns the
CPU generator that supplies these numbers, so its answer depends on its own seed alone, never on which other rows
happen to share its batch, how many rows there are, or on which device the logits live.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tessera.config.run import InferArgs


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a next token is chosen; ``temperature`` 0 is greedy, ``top_k`` 0 and ``top_p`` 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @classmethod
    def of(cls, args: InferArgs, defaults: Mapping[str, Any]) -> Sampling:
        """What the flags say and, where they say nothing, ``defaults`` (a parsed ``generation_config.json``).

        Without ``--temperature`` a model samples only if its own file says so (``do_sample``) or another sampling
        flag asks for it.
        """
        asked = args.top_k is not None or args.top_p is not None
        temperature = args.temperature
        if temperature is None:
            samples = asked or bool(defaults.get("do_sample"))
            temperature = float(_first(defaults.get("temperature"), 1.0)) if samples else 0.0
        return cls(
            temperature=temperature,
            top_k=max(0, int(_first(args.top_k, defaults.get("top_k"), 0))),
            top_p=float(_first(args.top_p, defaults.get("top_p"), 1.0)),
            repetition_penalty=float(_first(args.repetition_penalty, defaults.get("repetition_penalty"), 1.0)) or 1.0,
        )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0

    def __str__(self) -> str:
        if self.greedy:
            return "greedy" + self._penalty()
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top_k {self.top_k}"] if self.top_k else []
        parts += [f"top_p {self.top_p:g}"] if self.top_p < 1 else []
        return ", ".join(parts) + self._penalty()

    def _penalty(self) -> str:
        return f", repetition_penalty {self.repetition_penalty:g}" if self.repetition_penalty != 1 else ""


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


class Sampler:
    """Chooses the next tokens of the rows of one batch; row ``i`` draws from a generator seeded with ``seeds[i]``.

    ``prompts[i]`` are the token ids of row ``i`` so far.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> None:
        assert len(prompts) == len(seeds)
        self._sampling = sampling
        self._prompts = [torch.tensor(list(prompt), dtype=torch.int64) for prompt in prompts]
        self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._seen: Tensor | None = None

    def choose(self, logits: Tensor) -> Tensor:
        """Next tokens ``[B] int64`` from ``logits [B, V]`` of the live rows; remembers them for the penalty."""
        scores = logits.float()
        if self._sampling.repetition_penalty != 1:
            scores = self._penalised(scores)
        chosen = scores.argmax(dim=-1) if self._sampling.greedy else self._drawn(scores)
        if self._seen is not None:
            self._seen.scatter_(1, chosen.unsqueeze(1), True)
        return chosen

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these (indices into the present ones)."""
        self._draws = [self._draws[row] for row in rows]
        self._prompts = [self._prompts[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[list(rows)]

    def _penalised(self, scores: Tensor) -> Tensor:
        if self._seen is None:
            self._seen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
            for row, prompt in enumerate(self._prompts):
                self._seen[row, prompt.to(scores.device)] = True
        penalty = self._sampling.repetition_penalty
        moved = torch.where(scores < 0, scores * penalty, scores / penalty)
        return torch.where(self._seen, moved, scores)

    def _drawn(self, scores: Tensor) -> Tensor:
        sampling, vocabulary = self._sampling, scores.shape[-1]
        kept = min(sampling.top_k or vocabulary, vocabulary)
        ranked, ids = torch.topk(scores / sampling.temperature, kept, dim=-1)
        probabilities = ranked.softmax(dim=-1)
        if sampling.top_p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            # The most probable token stays whatever p is.
            outside = before >= sampling.top_p
            outside[:, 0] = False
            probabilities = probabilities.masked_fill(outside, 0.0)
        cumulative = probabilities.double().cumsum(dim=-1)
        uniform = torch.cat([torch.rand(1, generator=draw, dtype=torch.float64) for draw in self._draws])
        point = uniform.to(scores.device).unsqueeze(1) * cumulative[:, -1:]
        # The first rank whose cumulative probability exceeds the point; rounding must not step past the last one kept.
        last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
        rank = torch.searchsorted(cumulative, point, right=True).minimum(last)
        return ids.gather(1, rank).squeeze(1)
