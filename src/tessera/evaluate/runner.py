"""One benchmark, asked and judged: by as many ranks as there are, from wherever an earlier run stopped.

    items i % world == rank  ->  answered already?  ->  in another benchmark's answers?  ->  ask     (every rank)
    all answers  ->  judge, in the benchmark's order  ->  :class:`Outcome`                           (rank 0)

Items are read when their turn comes and never more of them than are being answered. Nothing that an item or its answer
can be stops the run: what is wrong with one is a :class:`Trouble`, counted and listed, and the item scores what the
benchmark gives for no answer.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.data import media
from tessera.data.encode import located
from tessera.data.sample import BadRow, normalise
from tessera.evaluate.answerer import Answerer, Ask
from tessera.evaluate.item import Benchmark, Item, Scored
from tessera.evaluate.results import Answers, Line

TROUBLES: Mapping[str, str] = {
    "row": "questions that cannot be asked",
    "image": "images missing or broken",
    "refused": "refused by the server",
    "failed": "not answered for another reason",
    "unanswered": "without an answer",
    "empty": "empty answers",
    "unread": "answers in which nothing could be read",
    "cut": "answers cut off by the limit of tokens",
    "unjudged": "answers that cannot be judged",
}
"""Kinds of trouble, in the order in which they are shown."""

UNSCORABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError)
"""What a scorer raises over a truth or an answer that it did not expect."""


@dataclass(frozen=True, slots=True)
class Job:
    """A benchmark, the file or directory of its questions, where its answers go, and how many items are wanted."""

    name: str
    benchmark: Benchmark
    path: Path
    directory: Path
    limit: int | None = None
    seed: int = 42
    max_new_tokens: int | None = None

    @property
    def base(self) -> Path:
        """What relative image paths are beside."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def tokens(self) -> int:
        """Most tokens of an answer."""
        return self.max_new_tokens or self.benchmark.max_new_tokens


@dataclass(frozen=True, slots=True)
class Verdict:
    """An item, its answer (None: there is none), what the rule makes of it, and what is wrong with it, by kind."""

    place: int
    item: Item
    line: Line | None
    scored: Scored
    troubles: tuple[str, ...] = ()
    reason: str = ""

    @property
    def answer(self) -> str | None:
        """The text of the answer."""
        return None if self.line is None or self.line.error else self.line.answer


@dataclass(frozen=True, slots=True)
class Outcome:
    """A benchmark's verdicts in its order, and its own figures."""

    job: Job
    verdicts: Sequence[Verdict]
    metrics: Mapping[str, float]
    total: int

    @property
    def judged(self) -> list[tuple[Item, Scored]]:
        """Items with their scores, as the benchmark's own rules take them."""
        return [(verdict.item, verdict.scored) for verdict in self.verdicts]

    @property
    def together(self) -> list[str]:
        """For each item what it stands or falls with: its own name if nothing else."""
        field = self.job.benchmark.together
        return [str(v.item.meta.get(field, v.item.id)) if field else f"{v.place} {v.item.id}" for v in self.verdicts]

    @property
    def troubles(self) -> dict[str, int]:
        """How many items have which kind of trouble."""
        counts = {kind: sum(kind in verdict.troubles for verdict in self.verdicts) for kind in TROUBLES}
        return {kind: count for kind, count in counts.items() if count}


@dataclass(slots=True)
class Counts:
    """Where the answers of one rank came from."""

    resumed: int = 0
    remembered: int = 0
    asked: int = 0
    tokens: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)


def wanted(job: Job) -> Sequence[Item]:
    """The benchmark's items; UserError if there is not one."""
    items = job.benchmark.items(job.path)
    if not len(items):
        raise UserError(f"--eval_dataset {job.name}: {job.path} holds no questions")
    return items


def number_of(job: Job, items: Sequence[Item]) -> int:
    """How many items are asked."""
    return len(items) if job.limit is None else min(job.limit, len(items))


def item_at(items: Sequence[Item], place: int) -> Item:
    """Item number ``place``; one that cannot be read is an item with a problem."""
    try:
        return items[place]
    except BadRow as error:
        return Item(f"row {place}", {}, None, {}, str(error))


def answer(
    job: Job,
    items: Sequence[Item],
    answerer: Answerer,
    store: Answers,
    *,
    rank: int = 0,
    world: int = 1,
    memory: Mapping[str, Line] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Counts:
    """Answer this rank's share of the items into ``store``; ``memory`` holds other answers by key.

    UserError if an item that is answered already was another question then.
    """
    counts, under_way = Counts(), dict[int, tuple[str, str]]()

    def asks() -> Iterator[Ask]:
        for place in range(rank, number_of(job, items), world):
            item = item_at(items, place)
            name = f"{place} {item.id}"
            try:
                if item.problem is not None:  # it counts nothing, whatever is answered
                    raise BadRow(f"row: {item.problem}")
                key = question_key(item.row, job.base, job.tokens)
            except BadRow as error:
                store.add(Line(name, "", error=str(error) if str(error).startswith("row: ") else f"image: {error}"))
                tick()
                continue
            known = store.lines.get(name)
            if known is not None and not known.error:
                _same(job, item, known, key)
                counts.resumed += 1
                tick()
                continue
            if memory and key in memory:
                store.add(replace(memory[key], id=name))
                counts.remembered += 1
                tick()
                continue
            under_way[place] = name, key
            yield Ask(place, item.row, job.base, seed_of(job.seed, item.id), job.tokens)

    for told in answerer.answers(asks()):
        name, key = under_way.pop(told.number)
        error = (
            told.error if told.error.startswith(("failed: ", "refused: ")) or not told.error else f"image: {told.error}"
        )
        store.add(Line(name, key, told.text, told.finish, told.prompt_tokens, told.completion_tokens, error))
        counts.asked += 1
        counts.tokens += told.completion_tokens
        tick()
    counts.seconds = time.monotonic() - counts.started
    return counts


def _same(job: Job, item: Item, known: Line, key: str) -> None:
    if known.key != key:
        raise UserError(
            f"--eval_output_dir: {job.directory} holds an answer to item {item.id} of {job.name} that was another "
            "question then (its prompt, an image or the limit of tokens has changed); choose another directory, or "
            "remove that one"
        )


def seed_of(seed: int, item: str) -> int:
    """A seed per item, whatever its place, the rank and the limit are."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {item}".encode(), digest_size=7).digest(), "big")


def question_key(row: Mapping[str, Any], base: Path, tokens: int) -> str:
    """A hash of a conversation, the bytes of its images and the limit of tokens; BadRow if an image is missing."""
    sample = normalise(row, need_answer=False)
    turns = [(message.role, message.content, list(message.tool_calls)) for message in sample.messages]
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([turns, list(sample.tools), tokens], ensure_ascii=False, default=str).encode())
    for source in [*sample.images, *(frame for video in sample.videos for frame in video)]:
        data = media.load(located(source, base))
        digest.update(hashlib.blake2b(data, digest_size=16).digest())
    return digest.hexdigest()


def judge(job: Job, items: Sequence[Item], lines: Mapping[str, Line]) -> Outcome:
    """Every wanted item with its verdict, and the benchmark's figures over them."""
    verdicts = []
    for place in range(number_of(job, items)):
        item = item_at(items, place)
        verdicts.append(verdict_of(job.benchmark, place, item, lines.get(f"{place} {item.id}")))
    return outcome_of(job, verdicts, len(items))


def outcome_of(job: Job, verdicts: Sequence[Verdict], total: int) -> Outcome:
    """The benchmark's figures over ``verdicts``, which then hold what each item contributes to them in the end."""
    judged = [(verdict.item, verdict.scored) for verdict in verdicts]
    metrics, settled = job.benchmark.aggregate(judged), job.benchmark.settle(judged)
    final = [replace(verdict, scored=scored) for verdict, scored in zip(verdicts, settled, strict=True)]
    return Outcome(job, final, metrics, total)


def verdict_of(benchmark: Benchmark, place: int, item: Item, line: Line | None) -> Verdict:
    """What an answer is worth; no answer is judged as an empty one."""
    troubles, reason = [], ""
    if item.problem is not None:
        troubles, reason = ["row"], item.problem
    if line is None:
        troubles.append("unanswered")
    elif line.error:
        kind, _, text = line.error.partition(": ")
        troubles += [kind] if kind not in troubles else []
        reason = reason or text
    elif not line.answer.strip():
        troubles.append("empty")
    elif line.finish == "length":
        troubles.append("cut")
    text = "" if line is None or line.error else line.answer
    try:
        scored = benchmark.judge(item, text)
    except UNSCORABLE as error:
        scored = Scored(0.0, None, f"cannot be judged: {type(error).__name__}: {error}")
        troubles.append("unjudged")
        reason = reason or scored.note
    if scored.unread and text.strip():
        troubles.append("unread")
    return Verdict(place, item, line, scored, tuple(troubles), reason)


def question_text(item: Item) -> str:
    """What the model is asked, without the tags of media."""
    try:
        messages = normalise(item.row, need_answer=False).messages
    except BadRow:
        return ""
    asked = [message.content for message in messages if message.role == "user"]
    return re.sub(r"<(image|video)>", "", asked[-1]).strip() if asked else ""
