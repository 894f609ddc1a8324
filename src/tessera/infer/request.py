"""What is asked of an engine, and what it tells: plain data that crosses threads.

A :class:`Request` is one question with its own settings; ``n`` answers to it are its *choices*. While it runs, its
listener hears events::

    Piece  Piece  Piece ... Finished        once per choice, choices interleaved
    Failed                                  instead of all that is still missing, of every choice

The texts of a choice's pieces join to its answer, their ``tokens`` to its tokens. The token that ended it (an end of
turn) is in no piece; :class:`Finished` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from tessera.config.errors import UserError
from tessera.data.render import Encoded
from tessera.data.sample import Sample
from tessera.infer.constrain import Constraint
from tessera.infer.sampling import Sampling, TokenLogprob

MAX_CHOICES = 128
"""Most choices of one request."""

MAX_LOGPROBS = 20
"""Most alternatives whose log-probabilities are told per token."""


class Refused(UserError):  # noqa: N818 - the name says what happened
    """A request that can never be answered as it is: too long, too many choices, an adapter that is not loaded."""


class Full(Exception):  # noqa: N818
    """No more requests are taken for now: the waiting queue is full."""


@dataclass(frozen=True, slots=True)
class Question:
    """A row ready to be answered: its ``prompt`` without the label, the ``labels`` if it brings any, its tokens."""

    row: Mapping[str, Any]
    prompt: Sample
    labels: str | None
    encoded: Encoded
    seed: int


def _name() -> str:
    return uuid4().hex


@dataclass(frozen=True, slots=True)
class Request:
    """One question, answered ``n`` times.

    ``max_new_tokens`` None is the session's own limit. An answer ends before the first of the texts ``stop``.
    ``logprobs`` None: none are told; k: those of every token and of the k most probable ones in its place (0: of the
    token alone). ``adapter`` None is the model as it was opened. ``seed`` decides all draws. Without ``stream`` each
    choice is one piece.
    """

    question: Question
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    adapter: str | None = None
    constraint: Constraint | None = None
    stream: bool = True
    id: str = field(default_factory=_name)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of choice ``choice`` of the request with the id ``request``.

    ``tokens`` are those whose text is complete with this piece; ``logprobs``, one for each of them, is empty if none
    were asked for. A piece may have tokens and no text.
    """

    request: str
    choice: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a choice.

    ``reason`` is ``stop`` (an end token or a stop text), ``length`` or ``cancelled``. ``completion_tokens`` counts the
    ``end`` token, too, which is None where no token ended the choice. Of the ``prompt_tokens``, ``cached_tokens`` were
    known from earlier prompts. ``stopped_by`` is the stop text that was found.
    """

    request: str
    choice: int
    reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    end: int | None = None
    end_logprob: TokenLogprob | None = None
    stopped_by: str | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request will not be answered; ``bad_request`` if it is the fault of what was asked (an unreadable image)."""

    request: str
    error: str
    bad_request: bool


Event = Piece | Finished | Failed
