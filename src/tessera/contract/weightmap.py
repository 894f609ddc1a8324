"""What a family's tensors are called on disk, as rules that read in both directions.

A model in memory uses transformers' module names; a checkpoint may use older ones, leave out a tensor that equals
another, or carry one that nobody needs. Three kinds of rule say so::

    Rename("model.visual.**", "visual.**")                               ours <-> disk; ** is the rest of the name
    Tie("model.embed_tokens.weight", "lm_head.weight")                   disk holds a second copy of our tensor
    ignored = ("model.layers.*.self_attn.rotary_emb.inv_freq",)          on disk, not in the model

Import reads the table from right to left, export from left to right, so the two cannot drift apart:
``inverse(forward(x)) == x`` for every ``x`` of our tensors. The map moves values it never looks at; they may be
tensors, shapes or file offsets. The first rule that fits wins and a name that fits no rule is the same on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


def _rewrite(source: str, target: str, name: str) -> str | None:
    """``name`` carried from pattern ``source`` to pattern ``target``; None if it does not fit."""
    if not source.endswith("**"):
        return target if name == source else None
    prefix = source[:-2]
    return target[:-2] + name[len(prefix) :] if name.startswith(prefix) else None


@dataclass(frozen=True, slots=True)
class Rename:
    """Our name is called ``disk`` there; both may end in ``**``, which stands for the same rest of the name."""

    ours: str
    disk: str

    def __post_init__(self) -> None:
        assert self.ours.endswith("**") == self.disk.endswith("**"), f"{self} has a wildcard on one side only"


@dataclass(frozen=True, slots=True)
class Tie:
    """The disk name ``copy`` holds the same values as our tensor ``ours`` (which also has its own disk name)."""

    ours: str
    copy: str


@dataclass(frozen=True, slots=True)
class WeightMap:
    """Rules between our names and disk names; see the module docstring. ``ignored`` patterns: ``*`` one component."""

    renames: tuple[Rename, ...] = ()
    ties: tuple[Tie, ...] = ()
    ignored: tuple[str, ...] = ()

    def to_disk(self, name: str) -> str:
        """What our tensor ``name`` is called on disk."""
        for rule in self.renames:
            found = _rewrite(rule.ours, rule.disk, name)
            if found is not None:
                return found
        return name

    def to_ours(self, name: str) -> str:
        """What the tensor ``name`` on disk is called in the model."""
        for rule in self.renames:
            found = _rewrite(rule.disk, rule.ours, name)
            if found is not None:
                return found
        return name

    def is_ignored(self, name: str) -> bool:
        """Whether the disk tensor ``name`` is known to have no counterpart in the model."""
        return any(
            re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None for pattern in self.ignored
        )

    def forward(self, ours: Mapping[str, T]) -> dict[str, T]:
        """Our names to disk names, tied copies included."""
        disk = {self.to_disk(name): value for name, value in ours.items()}
        assert len(disk) == len(ours), "two of our tensors map to one disk name"
        return disk | {tie.copy: ours[tie.ours] for tie in self.ties if tie.ours in ours}

    def inverse(self, disk: Mapping[str, T]) -> dict[str, T]:
        """Disk names to our names, without tied copies and ignored tensors."""
        copies = {tie.copy for tie in self.ties}
        kept = {name: value for name, value in disk.items() if name not in copies and not self.is_ignored(name)}
        ours = {self.to_ours(name): value for name, value in kept.items()}
        assert len(ours) == len(kept), "two disk tensors map to one of our names"
        return ours
