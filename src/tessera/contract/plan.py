"""How a model is cut, as data.

A family does not contain sharding code. It states, by module pattern, where its FSDP units and its recompute points
are and which module belongs to which freeze group; ``parallel/`` and ``adapt/`` apply that. A family supports a
parallel dimension exactly if its plan has rows for it, so the flag and the truth cannot drift apart.

Patterns are dotted module names in which ``*`` stands for one name component: ``model.visual.blocks.*`` matches
``model.visual.blocks.7`` and nothing below it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


def matches(pattern: str, name: str) -> bool:
    """Whether the dotted ``name`` fits ``pattern`` component for component (``*`` is any one component)."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def within(prefixes: Iterable[str], name: str) -> bool:
    """Whether ``name`` is one of ``prefixes`` or lies below one."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@dataclass(frozen=True, slots=True)
class Groups:
    """Module prefixes of the three parts of a VLM; an aligner may lie inside the tower and then wins over it."""

    llm: tuple[str, ...]
    aligner: tuple[str, ...] = ()
    vit: tuple[str, ...] = ()

    def of(self, name: str) -> str:
        """The group, ``llm``, ``aligner`` or ``vit``, of a parameter or module name."""
        for group, prefixes in (("aligner", self.aligner), ("vit", self.vit), ("llm", self.llm)):
            if within(prefixes, name):
                return group
        raise AssertionError(f"{name} belongs to no group of the plan")


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a family's model is cut: freeze ``groups``, FSDP units and recompute points of decoder and tower.

    ``tensor`` lists module pattern and style (``column``, ``row``, ``vocab``) of what tensor ranks split; everything
    else of the language model is whole on each of them. ``experts`` are the modules whose parameters are stacks of
    experts: every rank of a stage computes with them on tokens of its own, so they are never split by tensor ranks.

    ``recompute_modules`` are the finer points inside the decoder's layers, by the name users give them. With
    ``layer_loop`` the layers run in our own decoder, which can treat several of them as one and offload their
    activations.
    """

    groups: Groups
    fsdp_units: tuple[str, ...]
    recompute_decoder: tuple[str, ...]
    recompute_tower: tuple[str, ...] = ()
    tensor: tuple[tuple[str, str], ...] = ()
    experts: tuple[str, ...] = ()
    recompute_modules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layer_loop: bool = True

    def in_experts(self, name: str) -> bool:
        """Whether the module ``name`` is, or lies in, a stack of experts."""
        parts = name.split(".")
        return any(matches(pattern, ".".join(parts[: pattern.count(".") + 1])) for pattern in self.experts)
