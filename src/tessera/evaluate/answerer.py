"""Where answers come from: the embedded engine, or any server that speaks OpenAI's protocol.

An :class:`Answerer` takes a stream of questions and gives back a stream of answers, in whatever order they are ready::

    for told in answerer.answers(asks):          asks is read only as fast as questions are answered
        store.add(asks_by_number[told.number], told)

It never looks at what is asked. A question that cannot be answered (an image is missing, the server refuses this one)
comes back with the reason; only what concerns all of them (no server, a wrong key) is raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

from tessera.data.sample import BadRow
from tessera.infer.generate import Generator
from tessera.infer.session import Question, Reply, Session

WINDOW = 4
"""Batches that are sorted by length together."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A question: its ``number`` comes back with the answer, relative image paths of ``row`` are beside ``base``."""

    number: int
    row: Mapping[str, Any]
    base: Path | None
    seed: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Told:
    """An answer, or (``error``) why there is none; ``finish`` is ``stop``, or ``length`` if the limit cut it off."""

    number: int
    text: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


class Answerer(Protocol):
    """Answers questions; ``settings`` is everything that decides an answer but the question itself."""

    @property
    def settings(self) -> Mapping[str, Any]: ...

    def answers(self, asks: Iterable[Ask]) -> Iterator[Told]: ...

    def close(self) -> None: ...


class Embedded:
    """Answers with a model in this process, ``size`` rows at a time."""

    def __init__(self, session: Session, settings: Mapping[str, Any], size: int) -> None:
        self._session = session
        self._settings = settings
        self._size = size

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides an answer but the question itself."""
        return self._settings

    def answers(self, asks: Iterable[Ask]) -> Iterator[Told]:
        """Answer in windows of a few batches, sorted by length; the next one is prepared in the meantime."""
        source = iter(asks)
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._window, source)
            while (window := ahead.result()) is not None:
                ahead = reader.submit(self._window, source)
                yield from self._answered(window)

    def close(self) -> None:
        """Nothing to give back."""

    def _window(self, source: Iterator[Ask]) -> list[tuple[Ask, Question | BadRow]] | None:
        asks = list(islice(source, self._size * WINDOW))
        return [(ask, self._question(ask)) for ask in asks] or None

    def _question(self, ask: Ask) -> Question | BadRow:
        try:
            return self._session.question(ask.row, base=ask.base, seed=ask.seed)
        except BadRow as error:
            return error

    def _answered(self, window: Sequence[tuple[Ask, Question | BadRow]]) -> Iterator[Told]:
        ready: list[tuple[Ask, Question]] = []
        for ask, question in window:
            if isinstance(question, BadRow):
                yield Told(ask.number, error=str(question))
            else:
                ready.append((ask, question))
        # Rows of a batch have one limit, and end at about the same time if they are about as long.
        ready.sort(key=lambda pair: (pair[0].max_new_tokens, -len(pair[1].encoded.tokens)))
        for tokens, group in groupby(ready, key=lambda pair: pair[0].max_new_tokens):
            alike = list(group)
            self._limit(tokens)
            for start in range(0, len(alike), self._size):
                part = alike[start : start + self._size]
                replies = self._session.answer([question for _, question in part])
                yield from (_told(ask.number, reply) for (ask, _), reply in zip(part, replies, strict=True))

    def _limit(self, tokens: int) -> None:
        held = self._session.generator
        if held.limits.max_new_tokens != tokens:
            limits = replace(held.limits, max_new_tokens=tokens)
            self._session.generator = Generator(held._model, limits, held._device)


def _told(number: int, reply: Reply | BadRow) -> Told:
    if isinstance(reply, BadRow):
        return Told(number, error=str(reply))
    answer = reply.answer
    finish = "stop" if answer.stopped else "length"
    return Told(number, reply.text, finish, answer.prompt_tokens, len(answer.tokens))
