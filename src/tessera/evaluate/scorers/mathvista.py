"""MathVista: a number, a list or one of several choices, where the authors let a judge model find it in the answer.

There is no judge here. An answer is taken to be what a judge would have extracted, after what each program tries before
it asks one; where that fails the answer is wrong and says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tessera.evaluate.scorers.choice import inferred, letter
from tessera.evaluate.scorers.edits import distance
from tessera.evaluate.scorers.words import plain_words, unpunctuated


def lettered(choices: Sequence[str]) -> dict[str, str]:
    """Choices by their letters."""
    return {chr(ord("A") + at): text for at, text in enumerate(choices)}


def vlmevalkit(answer: str, gold: str, choices: Sequence[str], kind: str) -> tuple[bool, str | None]:
    """VLMEvalKit's comparison of an extracted answer: (right, what was read); ``kind`` is the answer's type."""
    if choices:
        said = inferred(answer, lettered(choices))
        return said is not None and lettered(choices).get(said) == gold, said
    try:
        if kind == "integer":
            return int(answer) == int(gold), str(int(answer))
        if kind == "float":
            return float(answer) == float(gold), str(float(answer))
    except ValueError:
        return False, None
    return False, None


def official(answer: str, gold: str, choices: Sequence[str], kind: str, precision: int) -> tuple[bool, str | None]:
    """The authors' normalisation: a letter or the *nearest* choice, a whole number, a number rounded as the gold is."""
    quick = re.search(r'The answer is "(.*)"\.', answer)
    text = quick[1] if quick else answer
    if choices:
        text = text.strip()
        if not text:
            return False, None
        named = re.findall(r"\(([a-zA-Z])\)", text)
        text = named[0].upper() if named else text
        by_letter = lettered(choices)
        said = by_letter[text] if text in by_letter else min(choices, key=lambda choice: distance(text, choice))
        return said.strip() == gold.strip(), said
    try:
        if kind == "integer":
            text = str(int(float(text)))
        elif kind == "float":
            text = str(round(float(text), precision))
    except (ValueError, OverflowError):
        return False, None
    return text.strip() == gold.strip(), text


def _trimmed(text: str) -> str:
    """Megatron's number form: two places cut off, not rounded; zeros, per cent and a final full stop dropped."""
    found = re.fullmatch(r"(\d+)\.(\d+)\n?", text)
    if found:
        whole, places = found[1], found[2]
        text = whole + (f".{places}"[:3] if any(int(digit) for digit in places) else "")
    return text.replace("%", "").removesuffix(".")


def _stated(text: str) -> str:
    """The number in the first "answer is 5" of a text with letters, else the text."""
    if re.search(r"[a-zA-Z]", text) and "e+" not in text:
        found = re.search(r"answer is -*\d+\.*\d*", text)
        if found:
            return re.findall(r"-*\d+\.*\d*", found[0])[0]
    return text


def megatron(answer: str, gold: str, choices: Sequence[str]) -> tuple[bool, str | None]:
    """Megatron's rule; ``gold`` is a letter where there are ``choices``. (right, what was read, None: nothing)."""
    if choices:
        said = letter(answer, lettered(choices), half_open=True)
        return (said or "A") == gold, said
    said = _stated(_trimmed(plain_words(unpunctuated(answer, "vqa"))))
    return said == _trimmed(plain_words(unpunctuated(gold, "vqa"))), said
