"""A thread that answers requests from any number of others.

    submit --> preparing (worker threads: images) --> inbox --> [ engine thread: Scheduler ] --> listen(event)

Anyone may submit and cancel at any time. What needs no model, reading, decoding and resizing images above all, is done
by worker threads; the engine's own thread does nothing but step the scheduler and tell what has happened, and sleeps
when there is nothing to do. A request whose images cannot be read fails alone, as does one that makes the model raise.
If the thread itself dies, all requests fail and :attr:`Engine.failed` says why.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.data.sample import BadRow
from tessera.infer.constrain import Constraint
from tessera.infer.memory import Demand, sizes_for
from tessera.infer.prefix import BLOCK
from tessera.infer.request import Event, Failed, Finished, Full, Piece, Question, Refused, Request, TokenLogprob
from tessera.infer.sampling import Sampling
from tessera.infer.scheduler import Sizes
from tessera.infer.session import DECODERS, Prepared, Session

__all__ = [
    "Constraint",
    "Engine",
    "EngineStats",
    "Event",
    "Failed",
    "Finished",
    "Full",
    "Piece",
    "Question",
    "Refused",
    "Request",
    "Sampling",
    "Ticket",
    "TokenLogprob",
]

Listen = Callable[[Event], None]
"""Called in one of the engine's threads, so it should return at once; if it raises, its request is cancelled."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A submitted request."""

    id: str
    _cancel: Callable[[str], None]

    def cancel(self) -> None:
        """End it as soon as possible; its choices finish as ``cancelled``. Harmless when it has ended."""
        self._cancel(self.id)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is doing (first the present, then totals since it was opened).

    ``running`` counts choices, ``waiting`` requests. ``cache_tokens`` of ``cache_capacity`` tokens of keys and values
    are promised to running rows. ``finished`` counts choices by reason.
    """

    running: int = 0
    waiting: int = 0
    cache_tokens: int = 0
    cache_capacity: int = 0
    prefix_tokens: int = 0
    prefix_capacity: int = 0
    tower_bytes: int = 0
    tower_capacity: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    images_encoded: int = 0
    images_reused: int = 0
    steps: int = 0
    failed: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Asked:
    """A request that has not ended: whom to tell, and how many of its choices are missing."""

    listen: Listen
    missing: int
    cancelled: bool = False


class Engine:
    """See the module docstring. ``session`` makes questions; ``adapters`` are the names that requests may choose.

    At most ``max_waiting`` requests wait to be started. ``deaf`` is what a listener raised last.
    """

    def __init__(self, session: Session, *, max_waiting: int = 256) -> None:
        self.session = session
        self.max_waiting = max_waiting
        self.adapters = tuple(name for name in session.scheduler.residents if name is not None)
        self.failed: str | None = None
        self.deaf: str | None = None
        self._scheduler = session.scheduler
        self._changed = threading.Condition()
        self._asked: dict[str, _Asked] = {}
        self._inbox: deque[Prepared] = deque()
        self._cancels: deque[str] = deque()
        self._preparing = 0
        self._line = 0
        self._forget = False
        self._closing = False
        self._stats = self._now()
        self._workers = ThreadPoolExecutor(DECODERS, thread_name_prefix="tessera-prepare")
        self._thread = threading.Thread(target=self._live, name="tessera-engine", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        run: Run,
        adapters: Mapping[str, str] | None = None,
        *,
        max_rows: int = 64,
        max_waiting: int = 256,
        memory: int | None = None,
    ) -> Engine:
        """The model that ``run`` names, with these ``adapters`` (name to directory).

        ``max_rows`` answers are generated together; ``memory`` bytes are used beside the weights (None: a share of
        what there is).
        """

        def sizes(demand: Demand) -> Sizes:
            return sizes_for(replace(demand, rows=max_rows), memory)

        return cls(Session.open(run, adapters, sizes=sizes), max_waiting=max_waiting)

    def submit(self, request: Request, listen: Listen) -> Ticket:
        """Queue ``request``; its events go to ``listen``.

        Full if the waiting queue is; Refused if the request can never be answered; RuntimeError if the engine is
        closing or its thread has died.
        """
        self._scheduler.room(request, len(request.question.encoded.tokens))
        with self._changed:
            if self.failed is not None:
                raise RuntimeError(f"the engine has died: {self.failed}")
            if self._closing:
                raise RuntimeError("the engine is closing")
            if self._preparing + self._line >= self.max_waiting:
                raise Full(f"{self.max_waiting} requests are waiting already")
            if request.id in self._asked:
                raise Refused(f"request {request.id} is being answered already")
            self._asked[request.id] = _Asked(listen, request.n)
            self._preparing += 1
        self._workers.submit(self._prepare, request)
        return Ticket(request.id, self._cancel)

    def stats(self) -> EngineStats:
        """A consistent picture of a moment ago."""
        with self._changed:
            return replace(self._stats, waiting=self._preparing + self._line)

    def forget(self) -> None:
        """Drop what is kept of prompts and images before the next step: the weights have changed."""
        with self._changed:
            self._forget = True
            self._changed.notify()

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, finish those there are (``drain``) or cancel them, end the thread.

        False if that took longer than ``timeout`` seconds: what was left is cancelled.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._closing = True
            if not drain:
                self._cancel_all()
            self._changed.notify()
        self._thread.join(timeout)
        in_time = not self._thread.is_alive()
        if not in_time:
            with self._changed:
                self._cancel_all()
                self._changed.notify()
            self._thread.join(None if deadline is None else 10)
        self._workers.shutdown(wait=False, cancel_futures=True)
        return in_time

    # ------------------------------------------------------------------------------------------------ other threads

    def _prepare(self, request: Request) -> None:
        try:
            made = self.session.prepare(request)
        except (BadRow, UserError) as error:
            self._tell(Failed(request.id, str(error), bad_request=True))
        except Exception as error:  # noqa: BLE001 - one request's trouble; it is told to whom it concerns
            self._tell(Failed(request.id, f"{type(error).__name__}: {error}", bad_request=False))
        else:
            with self._changed:
                self._inbox.append(made)
                self._changed.notify()
            return
        with self._changed:
            self._preparing -= 1
            self._changed.notify()  # a closing engine may have waited for this one

    def _cancel(self, request: str) -> None:
        with self._changed:
            if request in self._asked:
                self._asked[request].cancelled = True
                self._cancels.append(request)
                self._changed.notify()

    def _cancel_all(self) -> None:
        for request, asked in self._asked.items():
            asked.cancelled = True
            self._cancels.append(request)

    # ------------------------------------------------------------------------------------------------- the engine's

    def _live(self) -> None:
        try:
            while self._sleep():
                for event in self._scheduler.step():
                    self._tell(event)
                stats = self._now()
                with self._changed:
                    self._stats, self._line = stats, self._scheduler.waiting
        except BaseException as error:  # noqa: BLE001 - nobody else would hear of it
            self._die(f"{type(error).__name__}: {error}")

    def _sleep(self) -> bool:
        """Wait until there is something to do and take it in; False if there is nothing left to do, ever."""
        with self._changed:
            while not (self._inbox or self._cancels or self._forget or not self._scheduler.idle):
                if self._closing and not self._asked:
                    return False
                self._changed.wait()
            made, cancels = list(self._inbox), list(self._cancels)
            self._inbox.clear()
            self._cancels.clear()
            forget, self._forget = self._forget, False
        if forget:
            self._scheduler.forget()
        for prepared in made:
            self._enter(prepared)
        for request in cancels:
            self._scheduler.cancel(request)
        return True

    def _enter(self, prepared: Prepared) -> None:
        request = prepared.request
        with self._changed:
            self._preparing -= 1
            self._line += 1
            cancelled = self._asked[request.id].cancelled
        if cancelled:
            for choice in range(request.n):
                self._tell(Finished(request.id, choice, "cancelled", len(prepared.prompt), 0, 0))
        else:
            self._scheduler.add(request, prepared.prompt, prepared.grammar)

    def _tell(self, event: Event) -> None:
        """Hand ``event`` on, and forget whoever has heard everything."""
        with self._changed:
            asked = self._asked.get(event.request)
            if asked is None:
                return
            if isinstance(event, Finished):
                asked.missing -= 1
            if isinstance(event, Failed) or not asked.missing:
                del self._asked[event.request]
        try:
            asked.listen(event)
        except Exception as error:  # noqa: BLE001 - a deaf listener must not end the thread
            self.deaf = f"a listener raised {type(error).__name__}: {error}"
            self._cancel(event.request)

    def _die(self, why: str) -> None:
        with self._changed:
            self.failed = why
            left = list(self._asked)
        for request in left:
            self._tell(Failed(request, f"the engine has died: {why}", bad_request=False))

    def _now(self) -> EngineStats:
        scheduler = self._scheduler
        counts, residents = scheduler.counts, scheduler.residents.values()
        return EngineStats(
            running=scheduler.rows,
            cache_tokens=scheduler.promised,
            cache_capacity=scheduler.sizes.cache_tokens,
            prefix_tokens=sum(len(resident.prefixes) for resident in residents) * BLOCK,
            prefix_capacity=sum(resident.prefixes.blocks for resident in residents) * BLOCK,
            tower_bytes=sum(resident.sights.used for resident in residents),
            tower_capacity=sum(resident.sights.limit for resident in residents),
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            generated_tokens=counts.generated_tokens,
            images_encoded=sum(resident.encoded for resident in residents),
            images_reused=sum(resident.reused for resident in residents),
            steps=counts.steps,
            failed=counts.failed,
            finished=dict(counts.finished),
        )
