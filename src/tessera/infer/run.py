"""``tessera infer``: a model or an adapter over a dataset, or in conversation.

With ``--dataset``, ``--val_dataset`` or ``--load_data_args true`` (the validation rows of the training that made the
model, found again from its ``args.json``) every row is answered, printed and written to a result file::

    [QUERY] Using LaTeX to perform OCR on the image.
    [LABELS] \\int x d x
    [RESPONSE] \\int x d x
    --------------------------------------------------

At most ``--max_batch_size`` rows are answered at a time; where one ends the next begins. Without ``--stream`` a few
batches of rows are sorted by length first, so that neighbours end at about the same time; they are reported in the
order of the dataset all the same. With it, the first unfinished row of the batch is printed as it comes and the others
when their turn comes. A row that cannot be read is skipped and counted. Without a dataset the terminal becomes a
conversation (``infer/chat.py``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tessera.config.errors import UserError
from tessera.config.run import DataArgs, Run
from tessera.data.corpus import Chosen, Skips, select
from tessera.data.sample import BadRow
from tessera.data.tables import place_of
from tessera.infer.chat import Chat
from tessera.infer.request import Question
from tessera.infer.results import RULE, Results, result_file, result_row, shown, summary
from tessera.infer.session import Reply, Session
from tessera.infer.tasks import TaskResults, TaskRows, output_file

WINDOW = 4
"""Batches that are sorted by length together."""

TASK_TOKENS = 128
"""Most tokens of an answer to a benchmark's question, if nothing else is asked for."""


def main(run: Run, *, source: TextIO | None = None, sink: TextIO | None = None) -> Path | None:
    """Infer as ``run`` says; the result file, None for a conversation.

    ``source`` and ``sink`` default to the console.
    """
    source, sink = source or sys.stdin, sink or sys.stdout
    if run.infer.task is not None:
        return answer_task(run, sink)
    over_rows = bool(run.data.dataset or run.data.val_dataset)
    if run.data.load_data_args and not over_rows:
        raise UserError(
            "--load_data_args true: the args.json of the model or adapter names no dataset (is there one?); "
            "give --val_dataset"
        )
    # Asked for before the weights are read, so that a wrong path is told at once.
    chosen = rows_of(run.data) if over_rows else []
    path = result_file(run.infer.result_path, result_home(run)) if over_rows else None
    if run.dry_run:
        total = sum(len(part.indices) for part in chosen)
        sink.write(f"would answer {total} rows into {path}\n" if path else "would start a conversation\n")
        return path
    session = _session(run, sink)
    if path is None:
        types, stream = source.isatty(), run.infer.stream is not False
        Chat(_Turn(session, count(run.train.seed)), source, sink, stream=stream, types=types).run()
        return None
    with Results(path) as results:
        closing = answer_rows(session, chosen, results, sink, run)
    sink.write(f"{closing}\nresults in {path}\n")
    sink.flush()
    return path


def answer_task(run: Run, sink: TextIO) -> Path:
    """Answer the questions of a benchmark; the file of answers."""
    asked = run.infer
    assert asked.task is not None and asked.input_image_path and asked.output_path, "checked by config.resolve"
    images, truths = (
        Path(asked.input_image_path).expanduser(),
        Path(asked.gt_path).expanduser() if asked.gt_path else None,
    )
    part, parts = asked.partition_id, asked.num_partitions
    rows = TaskRows(asked.task, images, truths, part=part, parts=parts, size=asked.num_samples_per_partition)
    path = output_file(asked.output_path, asked.task, 0, part)
    if path.exists():
        raise UserError(f"--output_path: {path} exists already; answers are never overwritten, choose a new name")
    if run.dry_run:
        sink.write(f"would answer {len(rows)} questions into {path}\n")
        return path
    run = replace(run, infer=replace(asked, max_new_tokens=asked.max_new_tokens or TASK_TOKENS))
    session = _session(run, sink)
    with TaskResults(path, rows) as results:
        closing = answer_rows(session, [Chosen(rows, np.arange(len(rows)))], results, sink, run)
    sink.write(f"{closing}\nanswers in {path}\n")
    sink.flush()
    return path


def _session(run: Run, sink: TextIO) -> Session:
    session = Session.open(run)
    for note in session.notes:
        sink.write(f"note: {note}\n")
    return session


def rows_of(data: DataArgs) -> list[Chosen]:
    """The rows to answer: the validation rows if ``data`` has any, else all of ``--dataset`` in the file's order."""
    train, held = select(data)
    return held or [Chosen(chosen.rows, np.sort(chosen.indices)) for chosen in train]


def result_home(run: Run) -> Path:
    """Where ``infer_result`` goes: into the adapter's or model's directory, or one named after the model's id."""
    model = Path(run.model.adapters[0] if run.model.adapters else run.model.model or "")
    return model if model.is_dir() else Path("result") / model.name


def answer_rows(session: Session, chosen: Sequence[Chosen], results: Results, sink: TextIO, run: Run) -> dict[str, Any]:
    """Answer, print and write every row; the closing dict."""
    stream = bool(run.infer.stream)
    size = run.infer.max_batch_size
    report = _Report(sink, results, stream)
    skips = Skips()
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as reader:
        windows = _windows(session, chosen, skips, run, size if stream else size * WINDOW)
        ahead = reader.submit(next, windows, None)
        # The next window is rendered and its image headers are read while this one is being answered.
        while (window := ahead.result()) is not None:
            ahead = reader.submit(next, windows, None)
            _answer_window(session, window, report, skips)
    runtime = time.perf_counter() - started
    if len(skips):
        sink.write(f"skipped {len(skips)} rows: {skips.summary()}\n")
    closing = summary(
        results,
        prompt_tokens=report.prompt_tokens,
        generated_tokens=report.generated_tokens,
        runtime=runtime,
        skipped=len(skips),
    )
    if not results.rows:
        raise UserError(f"no row could be answered: {skips.summary()}")
    return closing


@dataclass(frozen=True, slots=True)
class _Item:
    """A question and where it comes from."""

    question: Question
    dataset: str
    index: int


def _windows(session: Session, chosen: Sequence[Chosen], skips: Skips, run: Run, size: int) -> Iterator[list[_Item]]:
    """Questions in the dataset's order, ``size`` at a time; rows that are none are noted in ``skips``."""
    window: list[_Item] = []
    for number, (rows, index) in enumerate(_listed(chosen, run.infer.val_dataset_sample)):
        try:
            # A row draws from its own place in the dataset: the same whatever the batch size and what was skipped.
            question = session.question(rows[index], base=rows.base, seed=_seed(run.train.seed, number))
        except BadRow as error:
            if run.data.strict:
                raise UserError(f"--strict true: row {index} of {rows.name}: {error}") from None
            skips.add(rows.name, index, str(error), place_of(rows, index))
            continue
        window.append(_Item(question, rows.name, index))
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _seed(seed: int, number: int) -> int:
    """A seed per row."""
    return (seed * 1_000_003 + number) % 2**63


def _listed(chosen: Sequence[Chosen], limit: int | None) -> Iterator[tuple[Any, int]]:
    listed = ((part.rows, int(index)) for part in chosen for index in part.indices)
    return (pair for _, pair in zip(range(limit), listed, strict=False)) if limit is not None else listed


def _answer_window(session: Session, window: list[_Item], report: _Report, skips: Skips) -> None:
    places = list(range(len(window)))
    if not report.stream:
        places.sort(key=lambda place: -len(window[place].question.encoded.tokens))
    report.begin([item.question for item in window])

    def ended(index: int, reply: Reply | BadRow) -> None:
        place = places[index]
        if isinstance(reply, BadRow):
            skips.add(window[place].dataset, window[place].index, str(reply))
        report.finish(place, reply)

    session.answer([window[place].question for place in places], report.listener(places), ended)


@dataclass
class _Report:
    """Prints and records the rows of a window in order, however their texts become ready."""

    sink: TextIO
    results: Results
    stream: bool
    prompt_tokens: list[int] = field(default_factory=list)
    generated_tokens: list[int] = field(default_factory=list)
    _questions: list[Question] = field(default_factory=list)
    _replies: dict[int, Reply | BadRow] = field(default_factory=dict)
    _unprinted: dict[int, list[str]] = field(default_factory=dict)
    _begun: set[int] = field(default_factory=set)
    _ended: set[int] = field(default_factory=set)
    _printing: int = 0
    _recording: int = 0

    def begin(self, questions: list[Question]) -> None:
        """Start a window of these questions."""
        self._questions, self._replies, self._unprinted = questions, {}, {}
        self._begun, self._ended = set(), set()
        self._printing = self._recording = 0

    def listener(self, places: Sequence[int]) -> Callable[[int, str | None], None] | None:
        """What to call with text of the questions at ``places``; None if nothing is streamed."""
        return (lambda index, piece: self._hear(places[index], piece)) if self.stream else None

    def finish(self, place: int, reply: Reply | BadRow) -> None:
        """Note the reply to the question at ``place``; record it and those behind it that waited for it."""
        self._replies[place] = reply
        if isinstance(reply, Reply) and not self.stream:
            self._unprinted[place] = [reply.text, f"\n{RULE}\n"]
        self._ended.add(place)
        self._print()
        while self._recording in self._replies:
            self._record(self._questions[self._recording], self._replies[self._recording])
            self._recording += 1

    def _hear(self, place: int, piece: str | None) -> None:
        self._unprinted.setdefault(place, []).append(f"\n{RULE}\n" if piece is None else piece)
        if piece is None:
            self._ended.add(place)
        self._print()

    def _print(self) -> None:
        """Print what the first unfinished row has to say, and whatever was only waiting for those before it."""
        while self._printing < len(self._questions):
            place = self._printing
            pieces = self._unprinted.pop(place, [])
            if pieces and place not in self._begun:
                self._begun.add(place)
                question = self._questions[place]
                self.sink.write(shown(question.prompt, question.labels))
            self.sink.write("".join(pieces))
            if place not in self._ended:
                break
            self._printing += 1
        self.sink.flush()

    def _record(self, question: Question, reply: Reply | BadRow) -> None:
        if isinstance(reply, BadRow):
            return
        self.results.write(result_row(question.row, question.prompt, question.labels, reply.text))
        self.prompt_tokens.append(reply.answer.prompt_tokens)
        self.generated_tokens.append(len(reply.answer.tokens))


@dataclass(frozen=True, slots=True)
class _Turn:
    """Answers one turn of a conversation, each with the next of ``seeds``."""

    session: Session
    seeds: Iterator[int]

    def __call__(self, row: dict[str, Any], on_text: Callable[[str], None]) -> str:
        def hear(index: int, piece: str | None) -> None:
            if piece is not None:
                on_text(piece)

        try:
            question = self.session.question(row, seed=next(self.seeds))
            [reply] = self.session.answer([question], hear)
        except BadRow as error:
            raise UserError(str(error)) from None
        if isinstance(reply, BadRow):
            raise UserError(str(reply))
        return reply.text
