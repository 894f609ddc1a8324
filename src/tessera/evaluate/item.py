"""What a benchmark is: questions with known answers, a rule for one answer, and a rule for all of them.

An :class:`Item` is one question in the shape of every tessera dataset row, so that whatever answers rows answers
benchmarks. :class:`Benchmark` names its *dialect* behind an ``@``, because the same files give different numbers under
different authors' rules::

    textvqa@official   mean over the people of min(1, agreeing others / 3)
    textvqa@megatron   min(1, agreeing people / 3)

``score`` judges one answer; where a number is no mean over items (CIDEr-D, BLEU, F1, all rotations right),
``aggregate`` makes it from the judged items. An answer from which nothing could be read scores 0 and says so in
``note``; it is never replaced by a guess unless the dialect's own rule is that guess, and then the note says that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError

UNREAD = "not parsed"
"""What the note of an answer begins with from which nothing could be read."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question: ``row`` is ``{"messages": ..., "images": ...}`` without the answer, ``gold`` what is true.

    ``meta`` holds what the rule needs besides (choices, category, sizes); ``problem`` says why the question cannot be
    asked as it is meant (image missing, no answer known). Such an item counts, with whatever its rule gives: 0.
    """

    id: str
    row: Mapping[str, Any]
    gold: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """What a rule makes of an answer: ``score`` (None: cannot be judged), what was read in it, and a remark."""

    score: float | None
    parsed: str | None
    note: str = ""

    @property
    def unread(self) -> bool:
        """Whether nothing could be read in the answer."""
        return self.note.startswith(UNREAD)


Judged = Sequence[tuple[Item, Scored]]
Aggregate = Callable[[Judged], dict[str, float]]


def mean(judged: Judged) -> float:
    """Mean score; an item that could not be judged counts 0."""
    return sum(scored.score or 0.0 for _, scored in judged) / len(judged) if judged else 0.0


def groups(judged: Judged, field: str) -> dict[str, list[tuple[Item, Scored]]]:
    """The judged items by ``meta[field]``, sorted by name; items without it are left out."""
    found: dict[str, list[tuple[Item, Scored]]] = {}
    for item, scored in judged:
        if item.meta.get(field) not in (None, ""):
            found.setdefault(str(item.meta[field]), []).append((item, scored))
    return dict(sorted(found.items()))


def accuracy(judged: Judged) -> dict[str, float]:
    """``accuracy``, and ``accuracy/<name>`` for every split, ability and category if there are several."""
    out = {"accuracy": mean(judged)}
    for name in ("split", "l2-category", "category"):
        parts = groups(judged, name)
        if len(parts) > 1:
            out |= {f"accuracy/{part}": mean(found) for part, found in parts.items()}
    return out


def as_judged(judged: Judged) -> list[Scored]:
    """Every item's own score, where it does not depend on the other items."""
    return [scored for _, scored in judged]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark in one dialect.

    ``name`` is ``benchmark@dialect``; ``metric`` the key of ``aggregate``'s result that is *the* number; ``higher`` is
    false where a small one is good. ``items`` reads a file or directory in a published layout, without decoding images.
    ``scale`` is what the number is multiplied by where it is published (100 for per cent).

    ``settle`` gives, when all is judged, what each item contributes in the end: CIDEr-D knows a caption's score only
    then, and a question that is asked in several rotations is right if all are. Tables of items and tests that compare
    two runs item by item are made of these. Items that stand or fall together have the same ``meta[together]``.
    """

    name: str
    items: Callable[[Path], Sequence[Item]]
    score: Callable[[Item, str], Scored]
    aggregate: Aggregate = accuracy
    settle: Callable[[Judged], list[Scored]] = as_judged
    metric: str = "accuracy"
    scale: float = 100.0
    max_new_tokens: int = 64
    about: str = ""
    together: str = ""

    def judge(self, item: Item, answer: str) -> Scored:
        """:attr:`score`, except that an item with a problem scores 0 whatever the answer."""
        if item.problem is not None:
            return Scored(0.0, None, f"bad row: {item.problem}")
        return self.score(item, answer)


def unknown(flag: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a ``name`` that is none of ``known``, with the nearest ones."""
    import difflib

    spelled = {each.lower(): each for each in known}
    near = [spelled[found] for found in difflib.get_close_matches(name.lower(), list(spelled), n=3, cutoff=0.4)]
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
    return UserError(f"{flag} {name}: unknown; {hint}", exit_code=2)
