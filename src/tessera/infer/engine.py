"""A thread that answers requests from any number of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from tessera.config.run import Run
from tessera.infer.constrain import Constraint
from tessera.infer.request import Event, Failed, Finished, Full, Piece, Question, Refused, Request, TokenLogprob
from tessera.infer.sampling import Sampling
from tessera.infer.session import Session

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
"""Called in the engine's thread, so it must return at once and must not raise."""


class Ticket(Protocol):
    """A submitted request."""

    @property
    def id(self) -> str: ...

    def cancel(self) -> None:
        """End it as soon as possible; its choices finish as ``cancelled``. Harmless when it has ended."""
        ...


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


class Engine:
    """See the module docstring. ``session`` makes questions; ``failed`` says why the thread died, None while it lives.

    ``adapters`` are the names that requests may choose.
    """

    session: Session
    failed: str | None
    adapters: tuple[str, ...]

    @classmethod
    def open(
        cls,
        run: Run,
        adapters: Mapping[str, str] | None = None,
        *,
        max_rows: int = 64,
        max_waiting: int = 256,
    ) -> Engine:
        """The model that ``run`` names, with these adapters (name to directory)."""
        raise NotImplementedError

    def submit(self, request: Request, listen: Listen) -> Ticket:
        """Queue ``request``; its events go to ``listen``. Full if the queue is; Refused if it can never be answered."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """A consistent picture of this moment."""
        raise NotImplementedError

    def close(self, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests, finish those there are (``drain``) or cancel them, end the thread.

        False if that took longer than ``timeout`` seconds: what was left is cancelled.
        """
        raise NotImplementedError
