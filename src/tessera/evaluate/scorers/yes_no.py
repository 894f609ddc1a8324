"""Yes or no, and the figures of a detector: accuracy, precision, recall, F1 of ``yes``."""

from __future__ import annotations

from collections.abc import Sequence

from tessera.evaluate.scorers.words import unpunctuated


def said(answer: str) -> str | None:
    """VLMEvalKit: ``Yes`` or ``No`` if exactly one of the two words occurs, else None."""
    words = unpunctuated(answer.lower(), "vlmevalkit").split()
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


def said_pope(answer: str) -> str:
    """POPE's own script: ``No`` if the first sentence has the word No, no or not, else ``Yes``."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "No" if {"No", "no", "not"} & set(words) else "Yes"


def detection(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """``precision``, ``recall``, ``f1`` and ``yes_ratio`` of (known, said) pairs; 0 where a share is of nothing."""
    hits = sum(known and told for known, told in pairs)
    told, known = sum(told for _, told in pairs), sum(known for known, _ in pairs)
    precision, recall = hits / told if told else 0.0, hits / known if known else 0.0
    both = precision + recall
    return {
        "f1": 2 * precision * recall / both if both else 0.0,
        "precision": precision,
        "recall": recall,
        "yes_ratio": told / len(pairs) if pairs else 0.0,
    }
