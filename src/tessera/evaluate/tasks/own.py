"""Any dataset of one's own as a benchmark: its last answers are the known ones, a named scorer judges.

A row is what ``tessera sft`` trains on (see :mod:`tessera.data.sample`): the last assistant message is the known answer
and is not shown. Where several answers are right, it may be a JSON list of texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from tessera.data.encode import located
from tessera.data.sample import BadRow, normalise
from tessera.data.sources import open_rows, parse_dataset_spec
from tessera.data.tables import Rows
from tessera.evaluate.files import listed
from tessera.evaluate.item import UNREAD, Benchmark, Item, Scored, accuracy, unknown
from tessera.evaluate.scorers import boxes, choice, vqa, words, yes_no
from tessera.evaluate.tasks import captions, grounding, latex

_CHOICE = re.compile(r"^\s*\(?([A-Z])[.):]\s*(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Own(Sequence[Item]):
    """The rows of a dataset as items; ``one_text``: the known answer is one text, not a list of them."""

    rows: Rows
    one_text: bool = False
    kept: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.rows) if self.kept is None else len(self.kept)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Own: ...
    def __getitem__(self, index: int | slice) -> Item | Own:
        kept = range(len(self.rows)) if self.kept is None else self.kept
        return replace(self, kept=kept[index]) if isinstance(index, slice) else self._item(kept[index])

    def _item(self, index: int) -> Item:
        try:
            sample = normalise(self.rows[index])
        except BadRow as error:
            return Item(str(index), {}, None, {}, str(error))
        answer = sample.answer or ""
        turns = [{"role": message.role, "content": message.content} for message in sample.messages[:-1]]
        row: dict[str, object] = {"messages": turns}
        if sample.images:
            images = [located(image, self.rows.base) for image in sample.images]
            row["images"] = [{"bytes": image} if isinstance(image, bytes) else image for image in images]
        if sample.videos:
            row["videos"] = [[located(frame, self.rows.base) for frame in frames] for frames in sample.videos]
        asked = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
        several = listed(answer)
        gold: object = several if len(several) and all(isinstance(each, str) for each in several) else [answer]
        problem = None if answer.strip() else "no answer is known"
        gold = answer if self.one_text else gold
        return Item(str(index), row, gold, {"question": asked}, problem)


def _items(path: Path) -> Own:
    return Own(open_rows(parse_dataset_spec(str(path))))


def _texts(path: Path) -> Own:
    return Own(open_rows(parse_dataset_spec(str(path))), one_text=True)


def _best(judge: Callable[[str, str], float]) -> Callable[[Item, str], Scored]:
    return lambda item, answer: Scored(max(judge(answer, gold) for gold in item.gold), answer.strip())


def _exact(answer: str, gold: str) -> float:
    return float(answer.split() == gold.split())


def _contains(answer: str, gold: str) -> float:
    return float(vqa.reads(answer, gold, formula=False))


def _same(answer: str, gold: str) -> float:
    return float(words.normal(answer, "vqa") == words.normal(gold, "vqa"))


def _anls(item: Item, answer: str) -> Scored:
    return Scored(vqa.anls(answer, item.gold), answer.strip())


def _choice(item: Item, answer: str) -> Scored:
    """The choices are the lines ``A. text`` or ``(A) text`` of the question."""
    found = dict(_CHOICE.findall(item.meta["question"])) or dict.fromkeys("ABCD", "\0")
    said = choice.inferred(answer, found)
    gold = choice.letter(item.gold[0], found) or item.gold[0].strip()
    return Scored(float(said == gold), said, "" if said else f"{UNREAD}: no choice can be inferred")


def _yes_no(item: Item, answer: str) -> Scored:
    said = yes_no.said(answer)
    return Scored(
        float(said is not None and said == yes_no.said(item.gold[0])), said, "" if said else f"{UNREAD}: no yes, no no"
    )


def _box(item: Item, answer: str) -> Scored:
    """Both boxes count in the same frame, whichever it is."""
    said, true = boxes.first_box(answer), boxes.first_box(item.gold[0])
    if said is None or true is None:
        return Scored(0.0, None, f"{UNREAD}: no box" if said is None else "the known answer has no box")
    shared = boxes.overlap(said, true)
    return Scored(float(shared >= grounding.THRESHOLD), str(list(said)), f"IoU {shared:.3f}")


def _plain(name: str, score: Callable[[Item, str], Scored], about: str) -> Benchmark:
    return Benchmark(name, _items, score, accuracy, about=about, max_new_tokens=512)


def _like(found: Benchmark, name: str, items: Callable[[Path], Sequence[Item]]) -> Benchmark:
    return replace(found, name=name, items=items, max_new_tokens=512)


_CAPTIONS = next(found for found in captions.BENCHMARKS if found.name == "coco@official")
_FORMULAS = next(found for found in latex.BENCHMARKS if found.name == "latexocr@im2markup")
SCORERS: Mapping[str, Benchmark] = {
    found.name: found
    for found in (
        _plain("exact", _best(_exact), "equal but for white space"),
        _plain("contains", _best(_contains), "the known text occurs in the answer, without case"),
        _plain("vqa", _best(_same), "equal after the VQA challenge's normalisation"),
        _plain("relaxed", _best(vqa.relaxed), "numbers within 5 %, other answers equal without case"),
        _plain("anls", _anls, "edit similarity, 0 below one half"),
        _plain("choice", _choice, "the letter of a choice; choices are lines of the question"),
        _plain("yes_no", _yes_no, "yes or no"),
        _plain("box", _box, "boxes that overlap by half"),
        _like(_FORMULAS, "latex", _texts),
        _like(_CAPTIONS, "caption", _items),
    )
}
"""What ``--scorer`` names, each as a benchmark whose items are the rows of a dataset."""


def find_scorer(name: str, flag: str = "--scorer") -> Benchmark:
    """The scorer called ``name``; UserError with the nearest names."""
    wanted = name.lower().replace("-", "_")
    if wanted not in SCORERS:
        raise unknown(flag, name, list(SCORERS))
    return SCORERS[wanted]
