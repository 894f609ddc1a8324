"""From logits to the next tokens of a batch whose rows have different settings.

The most probable token (greedy), or a draw from the distribution after these steps, in this order:

    penalties             logits of tokens that have occurred are moved towards improbable: ``repetition`` scales them
                          (prompt included), ``presence`` and ``frequency`` are subtracted (answer only)
    constraint            tokens that cannot go on to an allowed text are out
    temperature           divide the logits; 0 means greedy
    top_k                 only the k most probable tokens
    top_p                 only the most probable tokens that together reach p
    min_p                 only tokens at least min_p times as probable as the most probable one

A draw needs a single uniform number: where it falls on the cumulative distribution decides. That number is a function
of the row's seed and of how many tokens it has drawn, so an answer depends on its own seed alone, never on which other
rows happen to share its batch, how many there are, or on which device the logits live. Rows are handled together where
their settings allow it; a row's arithmetic is the same in every company.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tessera.config.run import InferArgs


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a next token is chosen; ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off."""

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
        asked = any(value is not None for value in (args.top_k, args.top_p, args.min_p))
        temperature = args.temperature
        if temperature is None:
            samples = asked or bool(defaults.get("do_sample"))
            temperature = float(_first(defaults.get("temperature"), 1.0)) if samples else 0.0
        return cls(
            temperature=temperature,
            top_k=max(0, int(_first(args.top_k, defaults.get("top_k"), 0))),
            top_p=float(_first(args.top_p, defaults.get("top_p"), 1.0)),
            repetition_penalty=float(_first(args.repetition_penalty, defaults.get("repetition_penalty"), 1.0)) or 1.0,
            min_p=float(_first(args.min_p, defaults.get("min_p"), 0.0)),
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
        parts += [f"min_p {self.min_p:g}"] if self.min_p > 0 else []
        return ", ".join(parts) + self._penalty()

    @property
    def ranked(self) -> bool:
        """Whether a draw needs to know the order of the tokens."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalised(self) -> bool:
        """Whether what has occurred matters."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _penalty(self) -> str:
        named = {"repetition": (self.repetition_penalty, 1), "presence": (self.presence_penalty, 0)}
        named["frequency"] = (self.frequency_penalty, 0)
        return "".join(f", {name}_penalty {value:g}" for name, (value, off) in named.items() if value != off)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of ``token`` in the model's own distribution: before penalties, temperature and restrictions.

    ``top`` are the most probable tokens in its place with theirs, falling.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Allows(Protocol):
    """What knows which tokens may come next; see ``infer/constrain.py``."""

    def mask(self, size: int) -> np.ndarray:
        """``[size] bool``: the tokens that may come next."""
        ...

    def take(self, token: int) -> None:
        """Note the token that came."""
        ...

    def copy(self) -> Allows:
        """Another at the same place."""
        ...


class Draws:
    """What one answer has drawn so far, and by which rules; ``prompt [T]`` are the tokens before it.

    ``logprobs`` None: nobody asks for log-probabilities; else of how many alternatives.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: np.ndarray,
        seed: int,
        *,
        logprobs: int | None = None,
        constraint: Allows | None = None,
    ) -> None:
        self.sampling = sampling
        self.logprobs = logprobs
        self.constraint = constraint
        self.drawn = 0
        self._seed = _mixed(seed % 2**64)
        # Token -> how often the answer has it; 0 for tokens of the prompt only.
        self._counts: dict[int, int] = {}
        if sampling.repetition_penalty != 1:
            self._counts = dict.fromkeys(np.unique(prompt).tolist(), 0)

    def uniform(self) -> float:
        """The number in [0, 1) that decides the next draw."""
        return (_mixed(self._seed + (self.drawn + 1) * _GOLDEN) >> 11) * 2.0**-53

    def take(self, token: int) -> None:
        """Note the token that was chosen."""
        self.drawn += 1
        if self.sampling.penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.constraint is not None:
            self.constraint.take(token)

    def penalties(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``tokens [n] int64`` that have occurred, what their logits are divided by (or multiplied, below 0), what is
        then subtracted (both ``[n] float32``)."""
        how = self.sampling
        tokens = np.fromiter(self._counts.keys(), dtype=np.int64, count=len(self._counts))
        counts = np.fromiter(self._counts.values(), dtype=np.float32, count=len(self._counts))
        minus = how.frequency_penalty * counts + how.presence_penalty * (counts > 0)
        return tokens, np.full(len(tokens), how.repetition_penalty, dtype=np.float32), minus.astype(np.float32)


_GOLDEN = 0x9E3779B97F4A7C15


def _mixed(x: int) -> int:
    """64 bits in which every bit depends on every bit of ``x`` (the finaliser of SplitMix64)."""
    x &= 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def seed_of(seed: int, choice: int) -> int:
    """The seed of a request's choice: its own for the first."""
    return seed if choice == 0 else _mixed((seed % 2**64) ^ _mixed(choice * _GOLDEN))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of one row, -1 if its logits are no numbers; ``logprob`` where it was asked for."""

    token: int
    logprob: TokenLogprob | None = None


@torch.inference_mode()
def choose(logits: Tensor, rows: Sequence[Draws]) -> list[Chosen]:
    """The next token of each of ``rows`` from ``logits [B, V]``; the rows take note of it."""
    asked = [row for row, draws in enumerate(rows) if draws.logprobs is not None]
    raw = logits[asked].float().log_softmax(-1) if asked else None
    scores = logits.float()
    penalised = [row for row, draws in enumerate(rows) if draws.sampling.penalised]
    if scores is logits and (penalised or any(draws.constraint is not None for draws in rows)):
        scores = logits.clone()
    if penalised:
        _penalise(scores, penalised, rows)
    for row, draws in enumerate(rows):
        if draws.constraint is not None:
            allowed = torch.from_numpy(draws.constraint.mask(scores.shape[1])).to(scores.device)
            scores[row].masked_fill_(~allowed, float("-inf"))
    best, likeliest = scores.max(dim=-1)
    drawing = [row for row, draws in enumerate(rows) if not draws.sampling.greedy]
    for ranked in (False, True):
        group = [row for row in drawing if rows[row].sampling.ranked == ranked]
        if group:
            where = torch.tensor(group, device=scores.device)
            draw = _ranked if ranked else _plain
            likeliest[where] = draw(scores[where], [rows[row] for row in group])
    # One transfer: token numbers are exact in float64.
    found = torch.stack([likeliest.double(), best.double()]).tolist()
    tokens = [int(token) if -np.inf < top < np.inf else -1 for token, top in zip(*found, strict=True)]
    for token, draws in zip(tokens, rows, strict=True):
        if token >= 0:
            draws.take(token)
    told = dict(zip(asked, _told(raw, [tokens[row] for row in asked], [rows[row] for row in asked]), strict=True))
    return [Chosen(token, told.get(row)) for row, token in enumerate(tokens)]


def _told(raw: Tensor | None, tokens: Sequence[int], rows: Sequence[Draws]) -> list[TokenLogprob | None]:
    """What rows that asked for log-probabilities are told about their ``tokens``; ``raw [B, V]`` are all of them."""
    if raw is None:
        return []
    most = max(draws.logprobs or 0 for draws in rows)
    chosen = raw.gather(1, torch.tensor(tokens, device=raw.device).clamp_(min=0)[:, None]).squeeze(1).tolist()
    values, ids = (part.tolist() for part in raw.topk(min(most, raw.shape[1]), dim=-1))
    return [
        TokenLogprob(token, own, tuple(zip(ids[row][: draws.logprobs], values[row][: draws.logprobs], strict=True)))
        if token >= 0
        else None
        for row, (token, own, draws) in enumerate(zip(tokens, chosen, rows, strict=True))
    ]


def _penalise(scores: Tensor, penalised: Sequence[int], rows: Sequence[Draws]) -> None:
    """Move the ``scores [B, V]`` of tokens that have occurred, in place."""
    found = [rows[row].penalties() for row in penalised]
    owners = torch.from_numpy(np.repeat(np.array(penalised), [len(tokens) for tokens, _, _ in found]))
    tokens, factor, minus = (torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))
    owners, tokens = owners.to(scores.device), tokens.to(scores.device)
    factor, minus = factor.to(scores.device), minus.to(scores.device)
    old = scores[owners, tokens]
    scores[owners, tokens] = torch.where(old < 0, old * factor, old / factor) - minus


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One value per row, ``[B, 1]``."""
    return torch.tensor(values, dtype=dtype, device=like.device).unsqueeze(1)


def _plain(scores: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Draws ``[B]`` from the whole distribution of ``scores [B, V]``."""
    scores = scores / _column([draws.sampling.temperature for draws in rows], scores)
    return _at(scores.softmax(dim=-1), rows).squeeze(1)


def _at(probabilities: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Where each row's number falls on its ``probabilities [B, K]``, which need not add up to one; ``[B, 1] int64``."""
    cumulative = probabilities.double().cumsum(dim=-1)
    point = _column([draws.uniform() for draws in rows], cumulative, torch.float64) * cumulative[:, -1:]
    # The first place whose cumulative probability exceeds the point; rounding must not step past the last one kept.
    rank = torch.searchsorted(cumulative, point, right=True)
    places = torch.arange(probabilities.shape[1], device=rank.device)
    last = torch.where(probabilities > 0, places, -1).amax(dim=-1, keepdim=True).clamp_(min=0)
    return rank.minimum(last)


FIRST_RANKS = 512
"""Ranks that are looked at first where only probabilities say how many are kept."""


def _ranked(scores: Tensor, rows: Sequence[Draws]) -> Tensor:
    """Draws ``[B]`` among the most probable tokens of ``scores [B, V]``."""
    scores = scores / _column([draws.sampling.temperature for draws in rows], scores)
    vocabulary = scores.shape[1]
    limits = [min(draws.sampling.top_k or vocabulary, vocabulary) for draws in rows]
    # A row without top_k is divided by the whole sum, so that its ranks can be looked at a few at a time.
    total = scores.logsumexp(dim=-1, keepdim=True)
    out = torch.empty(len(rows), dtype=torch.int64, device=scores.device)
    todo, depth = list(range(len(rows))), FIRST_RANKS
    while todo:
        depth = min(depth, vocabulary)
        tried = [row for row in todo if limits[row] <= depth or limits[row] == vocabulary or depth == vocabulary]
        where = torch.tensor(tried, device=scores.device)
        few = [rows[row] for row in tried]
        chosen, enough = _among(scores[where], total[where], few, [limits[row] for row in tried], depth)
        fine = [row for row, complete in zip(tried, enough, strict=True) if complete]
        if fine:
            out[torch.tensor(fine, device=out.device)] = chosen[torch.tensor(enough, device=out.device)]
        todo = [row for row in todo if row not in set(fine)]
        depth *= 8
    return out


def _among(
    scores: Tensor, total: Tensor, rows: Sequence[Draws], limits: Sequence[int], depth: int
) -> tuple[Tensor, list[bool]]:
    """Draws ``[B]`` among the first ``depth`` ranks, and of which rows all that are kept lie there."""
    deepest = max(min(limit, depth) for limit in limits)
    ranked, ids = torch.topk(scores, deepest, dim=-1)
    kept = torch.arange(deepest, device=scores.device) < _column(limits, scores, torch.int64)
    ranked = ranked.masked_fill(~kept, float("-inf"))
    cut = _column([float(limit < scores.shape[1]) for limit in limits], scores) > 0
    probabilities = (ranked - torch.where(cut, ranked.logsumexp(dim=-1, keepdim=True), total)).exp()
    top_p = _column([draws.sampling.top_p for draws in rows], scores)
    min_p = _column([draws.sampling.min_p for draws in rows], scores)
    reached = probabilities.cumsum(dim=-1)
    # The most probable token stays whatever p is.
    outside = ((reached - probabilities >= top_p) & (top_p < 1)) | (probabilities < min_p * probabilities[:, :1])
    outside[:, 0] = False
    whole = torch.tensor([min(limit, scores.shape[1]) <= deepest for limit in limits], device=scores.device)
    enough = whole | outside[:, -1]
    drawn = _at(probabilities.masked_fill(outside, 0.0), rows)
    return ids.gather(1, drawn).squeeze(1), enough.tolist()
