"""Where answers come from: the embedded engine, or any server that speaks OpenAI's protocol.

An :class:`Answerer` takes a stream of questions and gives back a stream of answers, in whatever order they are ready::

    for told in answerer.answers(asks):          asks is read only as fast as questions are answered
        store.add(asks_by_number[told.number], told)

It never looks at what is asked. A question that cannot be answered (an image is missing, the server refuses this one)
comes back with the reason; only what concerns all of them (no server, a wrong key) is raised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from tessera.data.sample import BadRow
from tessera.infer.request import Event, Failed, Piece, Refused, Request
from tessera.infer.session import DECODERS, Prepared, Session


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
    """Answers questions; ``settings`` is everything that decides an answer but the question itself.

    ``notes`` are what the user should be told once.
    """

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def answers(self, asks: Iterable[Ask]) -> Iterator[Told]: ...

    def close(self) -> None: ...


class Embedded:
    """Answers with a model in this process: questions join the running batch whenever there is room in it."""

    def __init__(self, session: Session, settings: Mapping[str, Any]) -> None:
        self._session = session
        self._settings = settings

    @property
    def settings(self) -> Mapping[str, Any]:
        """What decides an answer but the question itself."""
        return self._settings

    @property
    def notes(self) -> Sequence[str]:
        """What the session has to say."""
        return self._session.notes

    def answers(self, asks: Iterable[Ask]) -> Iterator[Told]:
        """Answers as they end; a few more questions than run at a time are made ready in threads."""
        scheduler = self._session.scheduler
        ahead = 2 * scheduler.sizes.rows
        coming: deque[tuple[Ask, Future[Prepared | str]]] = deque()
        running: dict[str, _Running] = {}
        source = iter(asks)
        with ThreadPoolExecutor(DECODERS) as pool:
            try:
                while True:
                    for ask in islice(source, ahead - len(coming)):
                        coming.append((ask, pool.submit(self._prepared, ask)))
                    yield from self._enter(coming, running)
                    if not coming and scheduler.idle:
                        return
                    for event in scheduler.step():
                        yield from self._heard(event, running)
            finally:
                for _, future in coming:
                    future.cancel()
                for name in running:
                    scheduler.cancel(name)
                scheduler.flush()

    def close(self) -> None:
        """Nothing to give back."""

    def _prepared(self, ask: Ask) -> Prepared | str:
        """The question with its pixels, or why it cannot be asked."""
        session = self._session
        try:
            question = session.question(ask.row, base=ask.base, seed=ask.seed)
            request = Request(
                question, session.sampling, seed=ask.seed, max_new_tokens=ask.max_new_tokens, stream=False
            )
            return session.prepare(request)
        except (BadRow, Refused) as error:
            return str(error)

    def _enter(self, coming: deque[tuple[Ask, Future[Prepared | str]]], running: dict[str, _Running]) -> Iterator[Told]:
        """Hand what is ready, in order, to the scheduler; wait for the first if it has nothing else to do."""
        scheduler = self._session.scheduler
        while coming and scheduler.waiting < scheduler.sizes.rows and (coming[0][1].done() or scheduler.idle):
            ask, future = coming.popleft()
            made = future.result()
            if isinstance(made, str):
                yield Told(ask.number, error=made)
                continue
            running[made.request.id] = _Running(ask.number)
            scheduler.add(made.request, made.prompt, made.grammar)

    def _heard(self, event: Event, running: dict[str, _Running]) -> Iterator[Told]:
        held = running[event.request]
        if isinstance(event, Piece):
            held.tokens.extend(event.tokens)
        elif isinstance(event, Failed):
            del running[event.request]
            yield Told(held.number, error=event.error if event.bad_request else f"failed: {event.error}")
        else:
            del running[event.request]
            text = self._session.text(held.tokens)
            yield Told(held.number, text, event.reason, event.prompt_tokens, len(held.tokens))


@dataclass(slots=True)
class _Running:
    """The tokens so far of the answer to question ``number``."""

    number: int
    tokens: list[int] = field(default_factory=list)
