"""Where answers end: at a token that says so, at the user's limit, or where the model's positions do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tessera.models.families import text_config

OPEN_ENDED = 2048
"""Most tokens of an answer where nobody set a limit: a model that never stops should not run until its memory ends."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Where answers end: at one of ``stop_ids``, after ``max_new_tokens``, or at the model's ``max_positions``."""

    stop_ids: frozenset[int]
    max_new_tokens: int
    max_positions: int

    def room(self, prompt_tokens: int) -> int:
        """How many tokens an answer to a prompt of this length may have; below 1 if the prompt fills the model."""
        return min(self.max_new_tokens, self.max_positions - prompt_tokens)


def stop_ids(*sources: Mapping[str, Any]) -> frozenset[int]:
    """Every ``eos_token_id`` (a number or a list) of these parsed configuration files."""
    found = [source.get("eos_token_id") for source in sources]
    lists = [value if isinstance(value, list) else [value] for value in found if value is not None]
    return frozenset(int(value) for values in lists for value in values)


def max_positions(config: Mapping[str, Any]) -> int:
    """Longest sequence of the model that a parsed ``config.json`` describes."""
    text = text_config(config)
    return int(text.get("max_position_embeddings") or config.get("max_position_embeddings") or 2**31)
