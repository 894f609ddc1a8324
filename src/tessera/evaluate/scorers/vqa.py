"""Short answers against known ones: agreement (VQA), relaxed numbers (charts), edit similarity (documents), OCR.

Where two authors' programs disagree there is a function, or a ``style``, for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from tessera.evaluate.scorers.edits import distance
from tessera.evaluate.scorers.words import normal, plain_words, unpunctuated

TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5


def leave_one_out(answer: str, golds: Sequence[str], style: str) -> float:
    """VQA accuracy: over each person, min(1, how many *others* say the same / 3); the mean of that."""
    said = normal(answer, style)
    agree = [normal(gold, style) == said for gold in golds]
    total = sum(agree)
    return sum(min(1.0, (total - same) / 3) for same in agree) / len(agree)


def _megatron(text: str) -> str:
    """Megatron's normal form: as the VQAv2 script's, but line breaks are punctuation's business."""
    return plain_words(unpunctuated(text, "vqa"))


def agreement(answer: str, golds: Sequence[str]) -> float:
    """Megatron's VQA accuracy: min(1, how many people say the same / 3)."""
    said = _megatron(answer)
    return min(1.0, sum(_megatron(gold) == said for gold in golds) / 3)


def same_words(answer: str, gold: str) -> float:
    """Megatron's rule for AI2D and RealworldQA: equal after VQA's normalisation (``A`` is an article, and vanishes)."""
    return float(_megatron(answer) == _megatron(gold))


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(answer: str, gold: str) -> float:
    """ChartQA: numbers within 5 % of a gold that is not 0 (per cent are hundredths), else equality without case."""
    answer = answer.strip()
    said, true = _number(answer), _number(gold)
    if said is not None and true:
        return float(abs(said - true) / abs(true) <= TOLERANCE)
    return float(answer.lower() == gold.lower())


def relaxed_megatron(answer: str, gold: str) -> float:
    """Megatron's ChartQA: VQA's normalisation, a final ``%`` dropped from both sides, then 5 %."""
    said, true = _megatron(answer).rstrip("%"), _megatron(gold).rstrip("%")
    try:
        number, target = float(said), float(true)
    except ValueError:
        return float(said == true)
    return float(target * (1 - TOLERANCE) <= number <= target * (1 + TOLERANCE))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def anls(answer: str, golds: Sequence[str]) -> float:
    """Best 1 - NL over the golds, 0 if below 0.5; NL is the edit distance over the longer text *as it was given*."""
    best = 0.0
    for gold in golds:
        longest = max(len(gold.upper()), len(answer.upper()))
        best = max(best, 1 - distance(_plain(gold), _plain(answer)) / longest if longest else 1.0)
    return best if best >= ANLS_THRESHOLD else 0.0


def anls_megatron(answer: str, golds: Sequence[str]) -> float:
    """Megatron's ANLS: VQA's normalisation first, NL over the longer normalised text, 0 where NL is not below 0.5."""
    said, best = _plain(_megatron(answer)), 0.0
    for gold in golds:
        true = _plain(_megatron(gold))
        longest = max(len(true.upper()), len(said.upper()))
        apart = distance(true, said) / longest if longest else 0.0
        if apart < ANLS_THRESHOLD:
            best = max(best, 1 - apart)
    return best


def _joined(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def reads(answer: str, gold: str, *, formula: bool) -> bool:
    """OCRBench: whether ``gold`` occurs in the answer, without case; in a ``formula`` with case and without spaces."""
    if formula:
        return _joined(gold) in _joined(answer)
    return gold.lower().strip().replace("\n", " ") in answer.lower().strip().replace("\n", " ")
