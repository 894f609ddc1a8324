"""Generation: one packed pass over the prompts of a batch, then one token per row and step.

The prompts of a batch are an ordinary :class:`~tessera.contract.batch.Batch`: laid end to end, images included, no
padding. That pass (*prefill*) leaves keys and values of every prompt in a cache; afterwards each step feeds only the
newest token of every row and reads the rest from there::

    prefill   a a a a a b b b c c c c c c        one call, T tokens
    step 1    a b c                              B tokens
    step 2    a b c        b ends: its row leaves the cache and every later step is narrower
    step 3    a c

An image occupies a box of positions (m-RoPE), so the text behind it continues after the largest position of the
prompt, not after its number of tokens. In half precision the weights are cast once, when they are loaded: casting
them in every step, as autocast would, costs more than the step itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.contract.batch import Batch
from tessera.infer.sampling import Sampler, Sampling
from tessera.models.decoder import KVCache
from tessera.models.families import text_config

OPEN_ENDED = 2048
"""Most tokens of an answer where nobody set a limit: a model that never stops should not run until its memory ends."""

OnToken = Callable[[int, int | None], None]
"""Called with a row and its newest token, and with None when the row has ended."""

_RESERVE = 256


class Decodes(Protocol):
    """What generation needs of a model."""

    @property
    def head_weight(self) -> Tensor: ...

    def prefill(self, batch: Batch, cache: KVCache) -> Tensor: ...

    def step(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """The new ``tokens`` of one row, without the one that ended it; ``stopped`` is false if the limit cut it off."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped: bool


@dataclass(frozen=True, slots=True)
class Limits:
    """Where answers end: at one of ``stop_ids``, after ``max_new_tokens``, or at the model's ``max_positions``."""

    stop_ids: frozenset[int]
    max_new_tokens: int
    max_positions: int

    def room(self, prompt_tokens: int) -> int:
        """How many tokens an answer to a prompt of this length may have; below 1 if the prompt fills the model."""
        return min(self.max_new_tokens, self.max_positions - prompt_tokens)


def stop_ids(*sources: Mapping[str, Any]) -> frozenset[int]:
    """Every ``eos_token_id`` (a number or a list) of these parsed configuration files."""
    found = [source.get("eos_token_id") for source in sources]
    lists = [value if isinstance(value, list) else [value] for value in found if value is not None]
    return frozenset(int(value) for values in lists for value in values)


def max_positions(config: Mapping[str, Any]) -> int:
    """Longest sequence of the model that a parsed ``config.json`` describes."""
    text = text_config(config)
    return int(text.get("max_position_embeddings") or config.get("max_position_embeddings") or 2**31)


class Generator:
    """Answers batches of prompts with ``model``, whose weights lie on ``device``."""

    def __init__(self, model: Decodes, limits: Limits, device: torch.device | str) -> None:
        self.limits = limits
        self._model = model
        self._device = torch.device(device)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Batch,
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> list[Answer]:
        """One answer per segment of ``prompts`` (on any device).

        ``on_token(segment, token)`` is called as tokens come.
        ``seeds[s]`` decides what segment ``s`` draws; it is not used when ``sampling`` is greedy.
        """
        lengths = prompts.segments.lengths
        rows = _Rows(lengths, self.limits, on_token)
        assert all(room > 0 for room in rows.rooms), "a prompt fills the model; it should have been refused"
        sampler = Sampler(sampling, [part.tolist() for part in prompts.tokens.split(list(lengths))], seeds)
        positions = _next_positions(prompts).to(self._device)
        cache = KVCache(len(lengths), max(lengths) + min(max(rows.rooms), _RESERVE))
        hidden = self._model.prefill(prompts.to(self._device), cache)
        while True:
            head = self._model.head_weight
            tokens = sampler.choose(F.linear(hidden.to(head.dtype), head))
            kept = rows.take(tokens.tolist())
            if not kept:
                return rows.answers()
            if len(kept) < tokens.shape[0]:
                chosen = torch.tensor(kept, device=self._device)
                tokens, positions = tokens[chosen], positions[..., chosen]
                cache.keep(kept)
                sampler.keep(kept)
            hidden = self._model.step(tokens, positions, cache)
            positions = positions + 1


class _Rows:
    """Bookkeeping of a batch: what each row has said, and which rows are still live, in cache order."""

    def __init__(
        self, lengths: Iterable[int], limits: Limits, on_token: Callable[[int, int | None], None] | None
    ) -> None:
        self._lengths = tuple(lengths)
        self._limits = limits
        self._on_token = on_token
        self._live = list(range(len(self._lengths)))
        self._tokens: list[list[int]] = [[] for _ in self._lengths]
        self._stopped = [False] * len(self._lengths)
        self.rooms = [limits.room(length) for length in self._lengths]

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Note one new token per live row; the places, among the rows that were live, of those that go on."""
        kept = []
        for place, (row, token) in enumerate(zip(self._live, tokens, strict=True)):
            self._stopped[row] = token in self._limits.stop_ids
            if not self._stopped[row]:
                self._tokens[row].append(token)
                self._hand_on(row, token)
            if self._stopped[row] or len(self._tokens[row]) == self.rooms[row]:
                self._hand_on(row, None)
            else:
                kept.append(place)
        self._live = [self._live[place] for place in kept]
        return kept

    def _hand_on(self, row: int, token: int | None) -> None:
        if self._on_token is not None:
            self._on_token(row, token)

    def answers(self) -> list[Answer]:
        """All rows, in batch order."""
        rows = zip(self._tokens, self._lengths, self._stopped, strict=True)
        return [Answer(tuple(tokens), length, stopped) for tokens, length, stopped in rows]


def _next_positions(prompts: Batch) -> Tensor:
    """Position of the first new token of every segment, ``[S]`` or ``[3, S]`` like the batch's."""
    parts = prompts.positions.split(list(prompts.segments.lengths), dim=-1)
    following = torch.stack([part.max() for part in parts]) + 1
    return following if prompts.positions.ndim == 1 else following.expand(3, -1)
