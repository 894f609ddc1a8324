"""Between the event loop that speaks HTTP and the thread that computes.

The engine tells its events in its own thread; a :class:`Hearing` carries them over into the loop and hands them out in
order. Whoever stops listening, because the client has gone, cancels what was asked: its rows leave the batch at the
next step. The :class:`Desk` is also the one place that knows whether the server still takes requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tessera.infer.engine import Engine, Event, Failed, Finished, Full, Piece, Refused, Request, Ticket
from tessera.infer.serve.errors import ApiError, bad, dead, ending, full, internal
from tessera.infer.serve.metrics import Metrics

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]
LOG = logging.getLogger("uvicorn.error")
"""The server's own log, which goes to the console."""


class Gone(Exception):  # noqa: N818 - it says what happened
    """The client closed its connection."""


class Desk:
    """Takes requests to ``engine``. ``draining``: it takes no more; ``active`` counts requests that have not ended."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine = engine
        self.metrics = metrics
        self.draining = False
        self.active = 0

    @property
    def status(self) -> str:
        """``ok``, ``draining`` or ``dead``."""
        return "dead" if self.engine.failed is not None else "draining" if self.draining else "ok"

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A request is being answered."""
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def admit(self) -> None:
        """503 if no request can be taken."""
        if self.engine.failed is not None:
            raise dead()
        if self.draining:
            raise ending()

    def submit(self, requests: Sequence[Request]) -> Hearing:
        """Hand over ``requests``, all or none: 429 if the queue is full, 400 for what can never be answered."""
        self.admit()
        hearing = Hearing(self, requests)
        try:
            for place, request in enumerate(requests):
                hearing.tickets.append(self.engine.submit(request, hearing.listener(place)))
        except Full:
            hearing.cancel()
            raise full() from None
        except Refused as error:
            hearing.cancel()
            raise bad(str(error)) from None
        except RuntimeError:  # it died or began to close between the look and the leap
            hearing.cancel()
            raise (dead() if self.engine.failed is not None else ending()) from None
        return hearing


class Hearing:
    """The events of some requests that were submitted together."""

    def __init__(self, desk: Desk, requests: Sequence[Request]) -> None:
        self.tickets: list[Ticket] = []
        self._desk = desk
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open = sum(request.n for request in requests)
        self._clock = _Clock(desk.metrics) if all(request.stream for request in requests) else None

    def listener(self, place: int) -> Callable[[Event], None]:
        """What the engine calls, in its thread, with events of the request at ``place``."""

        def hear(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (place, event))
            except RuntimeError:  # the loop has ended, and with it everyone who might listen
                return

        return hear

    def cancel(self) -> None:
        """End what has not ended; harmless otherwise."""
        if self._open:
            self._open = 0
            for ticket in self.tickets:
                ticket.cancel()

    async def events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """Pieces and ends with the place of their request, until every choice has ended; ApiError if one cannot."""
        try:
            while self._open:
                # Not wait_for: under load it swallows the cancellation that a client's leaving is.
                place, event = await self._events.get()
                if isinstance(event, Failed):
                    if self._desk.engine.failed is not None:
                        raise dead()
                    if event.bad_request:
                        raise bad(event.error)
                    LOG.error("request %s failed: %s", event.request, event.error[:200])
                    raise internal()
                if isinstance(event, Finished):
                    if event.reason == "cancelled":
                        raise ending()
                    self._open -= 1
                if self._clock is not None:
                    self._clock.hear(place, event)
                yield place, event
        finally:
            self.cancel()


class _Clock:
    """Times the pieces of a stream for the histograms; an answer in one piece has no first token."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._last: dict[tuple[int, int], float] = {}

    def hear(self, place: int, event: Event) -> None:
        """Note when ``event`` arrived."""
        if not isinstance(event, Piece) or not event.tokens:
            return
        now, choice = time.perf_counter(), (place, event.choice)
        before = self._last.get(choice)
        self._last[choice] = now
        if before is None:
            self._metrics.first.observe(now - self._started)
        else:
            self._metrics.between.observe((now - before) / len(event.tokens))


class Presence:
    """Whether the client of one request is still there; ``close`` when it has been answered."""

    def __init__(self, receive: Receive) -> None:
        self._leaving = asyncio.ensure_future(_left(receive))

    async def unless_gone(self, work: Awaitable[T]) -> T:
        """``work``'s result; if the client leaves before, ``work`` is cancelled and Gone raised."""
        working = asyncio.ensure_future(work)
        try:
            await asyncio.wait({working, self._leaving}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise Gone
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    def close(self) -> None:
        """Stop watching."""
        self._leaving.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def refusal(error: Exception) -> ApiError:
    """``error`` as the client is told."""
    return error if isinstance(error, ApiError) else internal()
