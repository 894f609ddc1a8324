"""The one loop that generates: prompts join a running batch between steps, and rows leave it as they end.

    step 1   [ prompt a     ][ prompt b   ]            packed, no padding; images through the tower, once each
    step 2   a b    then  [ prompt c          ]        running rows first, then what has arrived
    step 3   a b c
    step 4   a c          b has ended; d d d waits for room

A step is one token for every running row, then at most ``prefill_tokens`` of prompts, so that long prompts hold nobody
up: they are read a part at a time. Keys and values lie in lanes (``models/cache.py``); what prompts have in common with
earlier ones is copied instead of computed (``infer/prefix.py``), and a prompt that shares much with one that is being
read waits for it. The choices of one request share the pass over their prompt.

A request is let in when the longest answer it may get fits beside those that are promised already: there is always
room to finish what was begun. It then waits in line, and nobody overtakes. Each adapter has a model of its own around
the same base weights; models take turns within a step, and rows of all are drawn for together.

Everything here runs in one thread. ``infer/engine.py`` puts it into one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.contract.batch import Normalisation
from tessera.contract.model import Geometry
from tessera.infer.choice import Choice, Decode
from tessera.infer.detokenise import Detokeniser, Stream
from tessera.infer.limits import Limits
from tessera.infer.prefix import BLOCK
from tessera.infer.prompt import Prompt
from tessera.infer.request import MAX_CHOICES, MAX_LOGPROBS, Event, Failed, Finished, Refused, Request
from tessera.infer.resident import Parts, Resident, Running, Sight
from tessera.infer.sampling import Allows, Chosen, Draws, choose, seed_of
from tessera.models.cache import Budget, size_class
from tessera.models.vlm import VLM

WORTH_WAITING = 64
"""Tokens that a prompt must share with one that is being read to wait for it."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is done and kept at a time.

    ``rows`` run together; ``cache_tokens`` of keys and values are promised at most; ``prefix_tokens`` of earlier
    prompts are kept, ``tower_bytes`` of images; ``prefill_tokens`` of prompts are read per step.
    """

    rows: int = 64
    cache_tokens: int = 1 << 20
    prefix_tokens: int = 1 << 16
    tower_bytes: int = 1 << 28
    prefill_tokens: int = 512


@dataclass(eq=False, slots=True)
class Waiting:
    """A request in line; its choices from ``first`` on, of at most ``room`` tokens, have not started.

    Each takes ``price`` tokens of the cache, and a copy of ``grammar``.
    """

    request: Request
    prompt: Prompt
    room: int
    price: int
    grammar: Allows | None
    first: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """Rows of a resident that are due a token, and their hidden states ``[B, H]``."""

    resident: Resident
    rows: list[Running]
    hidden: Tensor


@dataclass(slots=True)
class Counts:
    """Totals since the beginning."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    failed: int = 0
    finished: Counter[str] = field(default_factory=Counter)


class Scheduler:
    """See the module docstring. ``models`` are by adapter name, None the one without.

    ``decode`` gives the text of tokens, a ``stream`` gives it piece by piece.
    """

    def __init__(
        self,
        models: Mapping[str | None, VLM],
        limits: Limits,
        geometry: Geometry,
        decode: Decode,
        stream: Callable[[], Stream] | None = None,
        *,
        device: torch.device | str = "cpu",
        sizes: Sizes = Sizes(),
        normalisation: Normalisation | None = None,
    ) -> None:
        self.limits, self.sizes, self.counts = limits, sizes, Counts()
        self._decode: Decode = decode
        self._stream = stream or partial(Detokeniser, lru_cache(maxsize=1 << 15)(decode))
        budget, share = Budget(sizes.cache_tokens), len(models)
        sight = Sight(geometry, normalisation or geometry.normalisation, torch.device(device))
        kept = {"blocks": sizes.prefix_tokens // BLOCK // share, "tower_bytes": sizes.tower_bytes // share}
        self.residents = {name: Resident(name, model, budget, sight, **kept) for name, model in models.items()}
        self._waiting: deque[Waiting] = deque()
        self._promised = 0
        self._events: list[Event] = []

    # ------------------------------------------------------------------------------------------------------- asking

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do and nothing to tell."""
        return not (self._waiting or self._events or self.rows)

    @property
    def rows(self) -> int:
        """Choices that are running or whose prompt is being read."""
        return sum(len(held.choices) for _, held in self._held())

    @property
    def vocabulary(self) -> int:
        """Tokens that the models know."""
        return next(iter(self.residents.values())).model.head_weight.shape[0]

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._waiting)

    @property
    def promised(self) -> int:
        """Tokens of the cache that running rows may come to need."""
        return self._promised

    def room(self, request: Request, prompt_tokens: int) -> int:
        """How many tokens each answer may have; Refused if the request can never be answered."""
        limits, capacity = self.limits, self.sizes.cache_tokens
        if request.adapter not in self.residents:
            known = ", ".join(sorted(name for name in self.residents if name is not None)) or "none"
            raise Refused(f"no adapter is called {request.adapter!r} (there are: {known})")
        if not 1 <= request.n <= MAX_CHOICES:
            raise Refused(f"n is {request.n}; it must be 1 to {MAX_CHOICES}")
        if request.logprobs is not None and not 0 <= request.logprobs <= MAX_LOGPROBS:
            raise Refused(f"{request.logprobs} log-probabilities per token were asked for; at most {MAX_LOGPROBS}")
        if request.max_new_tokens is not None and request.max_new_tokens < 1:
            raise Refused(f"max_new_tokens is {request.max_new_tokens}; it must be 1 or more")
        left = limits.max_positions - prompt_tokens
        if left < 1:
            raise Refused(
                f"the prompt has {prompt_tokens} tokens; the model takes {limits.max_positions}, answer included"
            )
        room = min(limits.max_new_tokens if request.max_new_tokens is None else request.max_new_tokens, left)
        if request.max_new_tokens is None:  # nobody asked for that many
            while room > 1 and size_class(prompt_tokens + room) > capacity:
                room //= 2
        if size_class(prompt_tokens + room) > capacity:
            raise Refused(
                f"a prompt of {prompt_tokens} tokens with {room} new ones needs {size_class(prompt_tokens + room)} "
                f"tokens of cache; there are {capacity} in all"
            )
        return room

    def add(self, request: Request, prompt: Prompt, grammar: Allows | None = None) -> None:
        """Put ``request`` in line; Refused if it can never be answered. Its answers must fit ``grammar``."""
        room = self.room(request, len(prompt))
        self._waiting.append(Waiting(request, prompt, room, size_class(len(prompt) + room), grammar))

    @torch.inference_mode()
    def cancel(self, request: str) -> None:
        """End the request with this id, if there is one; its choices finish as ``cancelled``."""
        for entry in [entry for entry in self._waiting if entry.request.id == request]:
            self._waiting.remove(entry)
            for index in range(entry.first, entry.request.n):
                self.counts.finished["cancelled"] += 1
                self._events.append(Finished(request, index, "cancelled", len(entry.prompt), 0, 0))
        for resident, held in list(self._held()):
            if held.choice.request.id == request:
                self._end(resident, held, "cancelled")

    def forget(self) -> None:
        """Drop what is kept of prompts and images: the weights have changed."""
        for resident in self.residents.values():
            resident.forget()

    # ------------------------------------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One more token for every row, and the next prompts; what there is to tell."""
        self.counts.steps += 1
        turns: list[Turn] = []
        for resident in self.residents.values():
            if resident.running:
                self._try(turns, resident, list(resident.running.values()), resident.step)
        for resident, parts in self._parts():
            self._try(turns, resident, [held for held, _ in parts], partial(resident.read, parts))
        turns = [turn for turn in turns if turn.rows]
        if turns:
            self._choose(turns)
        return self.flush()

    def flush(self) -> list[Event]:
        """What there is to tell without a step."""
        events, self._events = self._events, []
        return events

    def _try(
        self,
        turns: list[Turn],
        resident: Resident,
        rows: list[Running],
        act: Callable[[], tuple[list[Running], Tensor]],
    ) -> None:
        """Do a pass over ``rows``; if it fails, their requests fail and the others go on."""
        try:
            turns.append(Turn(resident, *act()))
        except Exception as error:  # noqa: BLE001 - whatever it was, it is told to those who asked
            for request in {held.choice.request.id for held in rows}:
                self._fail(request, f"{type(error).__name__}: {error}")

    def _parts(self) -> list[tuple[Resident, Parts]]:
        """What of which prompts is read in this step; prompts that are new and those that are begun do not mix."""
        left = self.sizes.prefill_tokens
        found: list[tuple[Resident, Running, int]] = []
        for resident, held in [(r, held) for r in self.residents.values() for held in r.reading]:
            found.append((resident, held, min(left, held.unread)))
            left -= found[-1][2]
        passed: list[Waiting] = []
        while self._waiting and left > 0:
            entry = self._waiting[0]
            resident = self.residents[entry.request.adapter]
            choices = self._fitting(entry)
            if not choices:
                break
            known = resident.known(entry.prompt)
            unread = len(entry.prompt) - known
            if _better_later(resident, entry.prompt, known):
                passed.append(self._waiting.popleft())
                continue
            # A prompt is not cut for the sake of a few tokens.
            if unread > left and left < self.sizes.prefill_tokens // 2:
                break
            try:
                held = self._start(resident, entry, choices, known, aside=unread > left)
            except Exception as error:  # noqa: BLE001 - as in _try
                self._fail(entry.request.id, f"{type(error).__name__}: {error}")
                continue
            found.append((resident, held, min(left, unread)))
            left -= found[-1][2]
            if entry.first < entry.request.n:
                break
            self._waiting.popleft()
        self._waiting.extendleft(reversed(passed))
        grouped: dict[tuple[Resident, bool], list[tuple[Running, int]]] = {}
        for resident, held, count in found:
            if count:
                grouped.setdefault((resident, held.row.length == 0), []).append((held, count))
        return [(resident, parts) for (resident, _), parts in grouped.items()]

    def _fitting(self, entry: Waiting) -> int:
        """How many of the choices of ``entry`` can start now."""
        rows = self.sizes.rows - self.rows
        room = (self.sizes.cache_tokens - self._promised) // entry.price
        return max(0, min(entry.request.n - entry.first, rows, room))

    def _start(self, resident: Resident, entry: Waiting, choices: int, known: int, *, aside: bool) -> Running:
        request, prompt = entry.request, entry.prompt
        made = [self._choice(entry, index) for index in range(entry.first, entry.first + choices)]
        assert request.adapter == resident.adapter
        held = resident.start(made, prompt, known, entry.price, aside=aside)
        entry.first += choices
        self._promised += entry.price * choices
        self.counts.prompt_tokens += len(prompt)
        self.counts.cached_tokens += known
        return held

    def _choice(self, entry: Waiting, index: int) -> Choice:
        request = entry.request
        draws = Draws(
            request.sampling,
            entry.prompt.tokens,
            seed_of(request.seed, index),
            logprobs=request.logprobs,
            constraint=None if entry.grammar is None else entry.grammar.copy(),
        )
        return Choice(request, index, draws, entry.room, self._decode, self._stream())

    def _choose(self, turns: Sequence[Turn]) -> None:
        """Give every row of ``turns`` its next token, and end those for which it is the last."""
        heads = [turn.resident.model.head_weight for turn in turns]
        logits = [F.linear(turn.hidden.to(head.dtype), head) for turn, head in zip(turns, heads, strict=True)]
        rows = [(turn.resident, held) for turn in turns for held in turn.rows]
        for (resident, held), chosen in zip(rows, self._chosen(torch.cat(logits), rows), strict=True):
            if held.row not in resident.running:  # a choice beside it failed
                continue
            if isinstance(chosen, Chosen) and chosen.token >= 0:
                self.counts.generated_tokens += 1
                self._events.extend(held.choice.take(chosen, self.limits))
                if held.choice.reason is not None:
                    self._end(resident, held, held.choice.reason)
            elif isinstance(chosen, Chosen):
                self._fail(held.choice.request.id, "the model's output is not a number", wipe=True)
            else:
                self._fail(held.choice.request.id, f"{type(chosen).__name__}: {chosen}")

    def _chosen(self, logits: Tensor, rows: Sequence[tuple[Resident, Running]]) -> list[Chosen | Exception]:
        """The next token of each row, or why it has none."""
        draws = [held.choice.draws for _, held in rows]
        try:
            return list(choose(logits, draws))
        except Exception as error:  # noqa: BLE001 - one row's trouble must not be another's
            if len(rows) == 1:
                return [error]
        return [found for index, row in enumerate(rows) for found in self._chosen(logits[index : index + 1], [row])]

    def _held(self) -> Iterator[tuple[Resident, Running]]:
        for resident in self.residents.values():
            for held in (*resident.reading, *resident.running.values()):
                yield resident, held

    def _end(self, resident: Resident, held: Running, reason: str) -> None:
        for choice in held.choices:
            self._events.extend(choice.finish(reason, len(held.prompt), held.cached))
        self.counts.finished[reason] += len(held.choices)
        self._release(resident, held, remember=reason != "cancelled")

    def _fail(self, request: str, error: str, *, wipe: bool = False) -> None:
        """The request with this id cannot be answered."""
        for entry in [entry for entry in self._waiting if entry.request.id == request]:
            self._waiting.remove(entry)
        for resident, held in list(self._held()):
            if held.choice.request.id == request:
                self._release(resident, held, wipe=wipe)
        self.counts.failed += 1
        self._events.append(Failed(request, error, bad_request=False))

    def _release(self, resident: Resident, held: Running, *, wipe: bool = False, remember: bool = False) -> None:
        self._promised -= held.price * len(held.choices)
        resident.end(held, wipe=wipe, remember=remember)


def _better_later(resident: Resident, prompt: Prompt, known: int) -> bool:
    """Whether much of ``prompt`` is being read for another, so that it can be copied in the next step."""
    coming = resident.coming(prompt, known)
    return coming >= WORTH_WAITING and 4 * coming >= len(prompt) - known
