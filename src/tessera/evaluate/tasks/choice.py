"""Questions with lettered choices: MMMU, MMBench, MMStar, AI2D.

VLMEvalKit asks all of them in the same words, and judges without a judge model by :func:`choice.inferred`. MMMU also
has questions without choices: VLMEvalKit makes them a choice between the known answer and ``Other Answers``.
MMBench asks each question once per rotation of its choices; it counts as right if every rotation is.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tessera.evaluate.files import Fields, Items, Layout, Source, in_split, listed, open_rows
from tessera.evaluate.item import UNREAD, Benchmark, Item, Judged, Scored, accuracy
from tessera.evaluate.scorers import choice, vqa
from tessera.evaluate.tasks.asking import asked, made, pictures, question_of
from tessera.infer.tasks import LETTER, SHORT, TASKS, untagged

CHOICES = Layout(
    {
        "id": ("index", "id", "question_id"),
        "question": ("question",),
        "answer": ("answer",),
        "image": ("image", "image_path", "image_1"),
        "options": ("options", "choices"),
        "hint": ("hint",),
        "category": ("category", "subfield"),
        "l2-category": ("l2-category", "l2_category"),
    }
)
ROTATION = 1_000_000
_INLINE = re.compile(r"(?:^|[,\n]\s*|\s)([A-H]): ")


def choices_of(fields: Fields) -> dict[str, str]:
    """The choices of a row by letter, from columns ``A``, ``B`` ..., a list, or MMStar's ``Options: A: x, B: y``."""
    lettered = {letter: str(fields.row[letter]) for letter in string.ascii_uppercase if _given(fields.row.get(letter))}
    if not lettered:
        lettered = dict(zip(string.ascii_uppercase, map(str, listed(fields.get("options"))), strict=False))
    if not lettered and "Options:" in str(fields.get("question", "")):
        parts = _INLINE.split(str(fields.get("question")).partition("Options:")[2])
        lettered = {letter: text.strip().rstrip(",") for letter, text in zip(parts[1::2], parts[2::2], strict=True)}
    return lettered


def _given(value: Any) -> bool:
    return value not in (None, "") and not (isinstance(value, float) and math.isnan(value))


def known_letter(fields: Fields, choices: Mapping[str, str]) -> Any:
    """The answer as a letter, where the file gives one, a place among the choices, or a choice's text."""
    answer = fields.get("answer")
    text = str(answer).strip() if answer is not None else ""
    if text in choices or not choices:
        return text
    if isinstance(answer, int) or text.isdigit():
        place = int(text)
        if 0 <= place < len(choices):
            return list(choices)[place]
    return next((letter for letter, content in choices.items() if content == text), text)


def vlmevalkit_prompt(fields: Fields, choices: Mapping[str, str]) -> str:
    """VLMEvalKit's words for a question with choices; a question without any stands alone."""
    hint = fields.get("hint")
    text = f"Hint: {hint}\n" if _given(hint) else ""
    text += f"Question: {question_of(fields)}\n"
    if choices:
        text += "Options:\n" + "".join(f"{letter}. {content}\n" for letter, content in choices.items())
        text += "Please select the correct answer from the options above. \n"
    return text


def _interleaved(fields: Fields, text: str, gold: Any, meta: Mapping[str, Any]) -> Item:
    """MMMU's item, each picture shown where ``<image i>`` names it; all in front if none is named."""
    images, problem = pictures(fields)
    parts = re.split(r"<image (\d)>", text)
    if len(parts) > 1 and problem is None:
        places = [int(place) - 1 for place in parts[1::2]]
        missing = [place + 1 for place in places if not 0 <= place < len(images)]
        if missing:
            problem = f"mentions image {missing[0]}, has {len(images)}"
        else:
            images = [images[place] for place in places]
    content = "<image>".join(parts[0::2]) if len(parts) > 1 and not problem else "<image>" * len(images) + text
    return made(fields, [{"role": "user", "content": content}], images, gold, meta, problem)


def _subject(fields: Fields) -> Any:
    found = re.fullmatch(r"[a-z]+_(.+)_\d+", fields.id)
    return found[1] if found else fields.get("category")


def mmmu(dialect: str) -> Callable[[Path], Items]:
    """A reader of MMMU; of a file with several splits the validation questions are asked."""

    def make(fields: Fields) -> Item:
        choices = choices_of(fields)
        meta = {"choices": choices, "category": _subject(fields)}
        if dialect == "vlmevalkit":
            return _interleaved(fields, vlmevalkit_prompt(fields, choices), _vlmevalkit_gold(fields, choices), meta)
        gold = known_letter(fields, choices) if choices else [str(each) for each in listed(fields.get("answer"))]
        question = str(fields.get("question", "")).strip()
        if choices:
            options = "".join(f"({letter}) {content}\n" for letter, content in choices.items())
            question = f"{question}\n{options}\n{LETTER}"
        else:
            question += SHORT
        if dialect == "megatron":
            return asked(fields, untagged(question), gold, meta, system=TASKS["MMMU"].system, first_image=True)
        return _interleaved(fields, question, gold, meta)

    def read(path: Path) -> Items:
        source = Source(open_rows(path, "validation", nested=True), CHOICES)
        return Items(source, make, in_split(source, ("validation", "val", "test")))

    return read


def _vlmevalkit_gold(fields: Fields, choices: Mapping[str, str]) -> Any:
    return known_letter(fields, choices) if choices else fields.get("answer")


def mmmu_vlmevalkit(item: Item, answer: str) -> Scored:
    """A letter, or for an open question the known answer against ``Other Answers``."""
    choices = item.meta["choices"]
    if choices:
        return letter_vlmevalkit(item, answer)
    gold = str(item.gold)
    return _vlmevalkit(answer, {"A": gold, "B": "Other Answers"}, gold if gold in string.ascii_uppercase else "A")


def letter_vlmevalkit(item: Item, answer: str) -> Scored:
    """The letter that VLMEvalKit infers."""
    return _vlmevalkit(answer, item.meta["choices"], item.gold)


def _vlmevalkit(answer: str, choices: Mapping[str, str], gold: str) -> Scored:
    said = choice.inferred(answer, choices)
    note = f"{UNREAD}: no choice can be inferred" if said is None else ""
    return Scored(float(said == gold), said, note)


def mmmu_official(item: Item, answer: str) -> Scored:
    """MMMU's own rule, but an answer without a letter is wrong where the script would draw one at random."""
    if not item.meta["choices"]:
        return Scored(float(choice.open_correct(answer, item.gold)), answer.strip())
    said = choice.letter(answer, item.meta["choices"])
    return Scored(float(said == item.gold), said, "" if said else f"{UNREAD}: no letter and no choice's text")


def mmmu_megatron(item: Item, answer: str) -> Scored:
    """Megatron's rule: where no letter is found, the first choice."""
    if not item.meta["choices"]:
        return Scored(float(choice.open_correct(answer, item.gold)), answer.strip())
    choices = item.meta["choices"]
    said = choice.letter(choice.unwrapped(answer), choices, half_open=True)
    first = next(iter(choices))
    note = "" if said else f"{UNREAD}: the first choice is taken, as this dialect does"
    return Scored(float((said or first) == item.gold), said or first, note)


def _lettered(rotated: bool = False) -> Callable[[Path], Items]:
    """A reader that asks in VLMEvalKit's words; with ``rotated`` an item knows which question it is a rotation of."""

    def make(fields: Fields) -> Item:
        choices = choices_of(fields)
        meta: dict[str, Any] = {"choices": choices}
        if rotated:
            group = fields.row.get("g_index")
            meta["question"] = int(group) if group is not None else _main_index(fields.id)
        stripped = without_choices(fields) if "Options:" in str(fields.get("question", "")) and choices else fields
        item = asked(stripped, vlmevalkit_prompt(stripped, choices), known_letter(fields, choices), meta)
        return item if choices else replace(item, problem=item.problem or "no choices (A, B ... or a list of options)")

    def read(path: Path) -> Items:
        return Items(Source(open_rows(path, "dev|val|test"), CHOICES), make)

    return read


def without_choices(fields: Fields) -> Fields:
    """The row with its choices taken out of its question, where they are written into it."""
    return fields.with_column("question", str(fields.get("question")).partition("Options:")[0].strip())


def _main_index(name: str) -> int | str:
    return int(name) % ROTATION if name.isdigit() else name


def rotations(judged: Judged) -> dict[Any, list[tuple[Item, Scored]]]:
    """The judged rotations of each question; a question whose first rotation was not asked is left out."""
    found: dict[Any, list[tuple[Item, Scored]]] = {}
    for item, scored in judged:
        found.setdefault(item.meta.get("question", item.id), []).append((item, scored))
    return {key: group for key, group in found.items() if any(item.id == str(key) for item, _ in group)}


def circular(judged: Judged) -> dict[str, float]:
    """The accuracy over questions, each right if all its rotations are; ``single`` that over rotations."""
    mains = []
    for key, group in rotations(judged).items():
        item = next(item for item, _ in group if item.id == str(key))
        right = all(scored.score == 1.0 for _, scored in group)
        mains.append((item, Scored(float(right), None)))
    return accuracy(mains) | {"single": accuracy(judged)["accuracy"]}


def circular_items(judged: Judged) -> list[Scored]:
    """Every rotation with the score of its question."""
    right = {key: float(all(s.score == 1.0 for _, s in group)) for key, group in rotations(judged).items()}
    return [replace(scored, score=right.get(item.meta.get("question", item.id), 0.0)) for item, scored in judged]


def _ai2d_megatron(path: Path) -> Items:
    """AI2D in Megatron's words; a question of its own files has its choices and the instruction in it."""

    def make(fields: Fields) -> Item:
        choices, question = choices_of(fields), question_of(fields)
        if choices:
            options = "".join(f"{letter}. {content}\n" for letter, content in choices.items())
            question = f"{question}\n{options}{LETTER}"
        return asked(fields, question, known_letter(fields, choices), {}, system=TASKS["AI2D"].system)

    return Items(Source(open_rows(path, "test"), CHOICES), make)


def same_words(item: Item, answer: str) -> Scored:
    """Megatron's rule for AI2D and RealworldQA."""
    gold = item.gold[0] if isinstance(item.gold, list) else item.gold
    return Scored(vqa.same_words(answer, gold), answer.strip())


_LONG = 1024
BENCHMARKS = (
    Benchmark("mmmu@vlmevalkit", mmmu("vlmevalkit"), mmmu_vlmevalkit, about="college subjects", max_new_tokens=_LONG),
    Benchmark("mmmu@official", mmmu("official"), mmmu_official, about="college subjects", max_new_tokens=_LONG),
    Benchmark("mmmu@megatron", mmmu("megatron"), mmmu_megatron, about="the first picture only", max_new_tokens=_LONG),
    Benchmark(
        "mmbench@vlmevalkit",
        _lettered(rotated=True),
        letter_vlmevalkit,
        circular,
        circular_items,
        about="20 abilities; right if right in every rotation of the choices",
        max_new_tokens=_LONG,
        together="question",
    ),
    Benchmark("mmstar@vlmevalkit", _lettered(), letter_vlmevalkit, about="needs the image", max_new_tokens=_LONG),
    Benchmark("ai2d@vlmevalkit", _lettered(), letter_vlmevalkit, about="science diagrams", max_new_tokens=_LONG),
    Benchmark("ai2d@megatron", _ai2d_megatron, same_words, about="science diagrams", max_new_tokens=32),
)
