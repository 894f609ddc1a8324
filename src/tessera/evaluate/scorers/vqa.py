"""Short answers against several people's: agreement (VQA), relaxed numbers (charts), edit similarity (documents)."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.evaluate.scorers.words import normal


def leave_one_out(answer: str, golds: Sequence[str], style: str) -> float:
    """VQA accuracy: over each person, min(1, how many *others* say the same / 3); the mean of that."""
    said = normal(answer, style)
    agree = [normal(gold, style) == said for gold in golds]
    total = sum(agree)
    return sum(min(1.0, (total - same) / 3) for same in agree) / len(agree)


def agreement(answer: str, golds: Sequence[str], style: str = "vqa") -> float:
    """VQA accuracy, simplified: min(1, how many people say the same / 3)."""
    said = normal(answer, style)
    return min(1.0, sum(normal(gold, style) == said for gold in golds) / 3)
