r"""Formulas read from images: equal or not, how far apart, and BLEU, over tokens.

Two ways to cut a formula into tokens. ``spaced`` is im2markup's: the data set writes ``\frac { a } { b }``, a token a
word, and white space is all that may differ. ``signs`` cuts any formula, ``\frac{a}{b}`` too: commands, and single
characters; fences that models put around a formula (``$$``, ``\[ \]``, a code block) are taken off first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tessera.evaluate.scorers.captions import bleu
from tessera.evaluate.scorers.edits import distance

_SIGN = re.compile(r"\\[a-zA-Z]+\*?|\\.|\S")
_FENCES = (
    re.compile(r"\s*```(?:latex|tex|math)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL),
    re.compile(r"\s*\\\[(.*)\\\]\s*", re.DOTALL),
    re.compile(r"\s*\\\((.*)\\\)\s*", re.DOTALL),
    re.compile(r"\s*\$\$(.*)\$\$\s*", re.DOTALL),
    re.compile(r"\s*\$([^$]*)\$\s*", re.DOTALL),
)


def spaced(text: str) -> list[str]:
    """The words of a formula; one empty word if it has none, as im2markup counts."""
    return text.split() or [""]


def signs(text: str) -> list[str]:
    """The commands and characters of a formula without its fence; one empty token if it has none."""
    for fence in _FENCES:
        found = fence.fullmatch(text)
        text = found[1] if found else text
    return _SIGN.findall(text) or [""]


def closeness(answers: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> float:
    """1 - sum of edit distances / sum of the longer lengths, over all formulas together."""
    longest = sum(max(len(answer), len(gold)) for answer, gold in zip(answers, golds, strict=True))
    apart = sum(distance(gold, answer) for answer, gold in zip(answers, golds, strict=True))
    return 1 - apart / longest if longest else 0.0


def bleu4(answers: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of all formulas together, not smoothed, as ``multi-bleu.perl`` counts it; 0 to 1."""
    said = [[token for token in answer if token] for answer in answers]
    return bleu(said, [[[token for token in gold if token]] for gold in golds], smooth=False)[3]
