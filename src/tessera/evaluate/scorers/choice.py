"""Which letter an answer chooses, and whether an open answer holds the known one.

Three rules for letters, because published numbers rest on all three:

* :func:`inferred` (VLMEvalKit without a judge model): one single letter among the words, near the end; else the text
  of exactly one choice; anything else is wrong;
* :func:`letter` (MMMU's own script): ``(B)``, else the last word that is a letter, else in an answer of over five
  words the last choice whose text occurs. Where nothing is found the script draws at random; here nothing is nothing;
* :func:`letter` with ``half_open`` (Megatron): ``B)`` counts too; where nothing is found *the first choice* is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

NONE_OF_THEM = "Z"
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED = "Failed to obtain answer via API"
_LAST = 4
"""The single letter must be one of the last four words, where it occurs first."""


def inferred(answer: str, choices: Mapping[str, str]) -> str | None:
    """VLMEvalKit's letter for an answer; ``Z`` for a refusal, None where nothing can be inferred."""
    return _inferred_letter(answer, choices) or _inferred_text(answer, choices)


def _inferred_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    if _FAILED in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(_SEPARATORS).split()
    named = [choice for choice in choices if choice in words]
    if len(named) == 1:
        return named[0] if words.index(named[0]) > len(words) - _LAST - 1 else None
    return NONE_OF_THEM if not named and NONE_OF_THEM in words else None


def _inferred_text(answer: str, choices: Mapping[str, str]) -> str | None:
    if len(answer.lower()) > 2 * sum(len(text) for text in choices.values()):
        return None
    found = [choice for choice, text in choices.items() if text.lower() in answer.lower()]
    return found[0] if len(found) == 1 else None


def letter(answer: str, choices: Mapping[str, str], *, half_open: bool = False) -> str | None:
    """The letter that MMMU's own rule reads in an answer, None if it reads none."""
    for sign in ",.!?;:'":
        answer = answer.strip(sign)
    text = f" {answer} "
    ways: list[tuple[str, list[str]]] = [
        ("({})", [name for name in choices if f"({name})" in text or (half_open and f"{name})" in text)]),
        (" {} ", [name for name in choices if f" {name} " in text]),
    ]
    for form, found in ways:
        if found:
            return _last(found, [text.rfind(form.format(name)) for name in found])
    if len(text.split()) <= 5:
        return None
    found = [name for name, content in choices.items() if content.lower() in text.lower()]
    return _last(found, [text.lower().rfind(choices[name].lower()) for name in found]) if found else None


def _last(names: Sequence[str], places: Sequence[int]) -> str:
    """The name at the greatest place; the first of them if several are there."""
    return names[places.index(max(places))]


def unwrapped(answer: str) -> str:
    """What stands in the first ``\\answer{}``, else in the first ``\\boxed{}``, as Megatron does before it looks."""
    for command in ("answer", "boxed"):
        found = re.search(rf"\\{command}\{{(.*?)\}}", answer)
        if found:
            return found[1]
    return answer.replace("Answer:", "Answer: ")


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""Looking back for digits changes no match, and spares an attempt from each digit of a long number."""
_TRIVIAL = frozenset((":", ",", ".", "!", "?", ";", "'"))


def _comparable(text: str) -> list[str | float]:
    """A number rounded to two places; else lower case, a single character with a space on one side or the other."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def open_answers(answer: str) -> list[str | float]:
    """What MMMU's script takes an open answer to say: the ends of its key sentences, and the numbers in those."""
    text = answer.strip().strip(".").lower()
    lines, ends = text.split("\n"), []
    for place, line in enumerate(lines):
        keys = (*_KEYS, "=") if place == len(lines) - 1 else _KEYS
        end = ""
        for key in keys:
            if key in line:
                tail = line.split(key)[-1].strip()
                end = tail if not end or len(tail) < len(end) else end
        if end and end not in _TRIVIAL:
            ends.append(end)
    ends = ends or [text]
    said = ends + [number for end in ends for pattern in _NUMBERS for number in pattern.findall(end)]
    return list(dict.fromkeys(part for text in said for part in _comparable(text)))


def open_correct(answer: str, golds: Iterable[str]) -> bool:
    """MMMU's rule for open questions: a known text occurs in one said, or a known number equals one said."""
    known = [part for gold in golds for part in _comparable(gold)]
    texts = [part for part in known if isinstance(part, str)]
    return any(
        any(text in said for text in texts) if isinstance(said, str) else said in known for said in open_answers(answer)
    )
