"""What a row of the table of flags is, and which verbs and rooms there are.

The rows themselves are in :mod:`tessera.config.flags`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["str", "int", "float", "bool", "list", "json", "steps", "size"]
"""How text becomes a value. ``steps`` is a count, a share of the run below 1, or -1 (only at the end); ``size`` is a
number of bytes such as ``5GB``; ``json`` is a JSON object or the path of a file that holds one."""

Dialect = Literal["swift", "megatron"]
"""Whose names and defaults hold: ``tessera VERB`` or ``tessera megatron VERB``."""

TRAIN, USE = ("pt", "sft"), ("infer", "deploy", "export", "eval")
ANSWER = ("infer", "deploy", "eval")
VERBS: Mapping[str, str] = {
    "pt": "continue pre-training a model: loss on every token",
    "sft": "fine-tune a model on conversations, with or without images",
    "infer": "run a model or adapter over a dataset, or talk to it",
    "eval": "ask a model a benchmark's questions and score the answers, or compare two evaluations",
    "deploy": "serve a model and its adapters over HTTP, as OpenAI's API",
    "export": "merge an adapter, change the dtype, convert from or to Megatron, push to a hub",
    "compose": "make a new model from the tower of one and the language model of another",
    "data": "show what a dataset becomes; lint, stats, show, convert and prepare datasets",
    "report": "tessera report RUN: one self-contained HTML page about a run",
    "demo": "tessera demo [DIR]: compose, train, export and score a small model on handwriting",
}
ROOMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "model": ("which model, at which resolution", (*TRAIN, *USE, "data")),
    "data": ("which rows, and how they become batches", (*TRAIN, "infer", "eval", "data")),
    "adapt": ("what is trainable", TRAIN),
    "train": ("in what order, how fast", TRAIN),
    "memory": ("what stays on the device", TRAIN),
    "save": ("what is kept", TRAIN),
    "log": ("what is shown", TRAIN),
    "parallel": ("on how many processes", TRAIN),
    "infer": ("how answers are generated", ("infer", "eval")),
    "evaluate": ("what is asked and how it is scored", ("eval",)),
    "deploy": ("how a model is served", ("deploy",)),
    "export": ("what leaves the house", ("export",)),
    "convert": ("between Hugging Face and Megatron", ("export",)),
    "short": ("short for other flags", TRAIN),
    "shards": ("how shards are made and rows looked at", ("data",)),
    "compose": ("what a new model is made of", ("compose",)),
    "run": ("the command itself", tuple(VERBS)),
    "inert": ("accepted from other tools, without effect", (*TRAIN, *USE, "data")),
}


@dataclass(frozen=True, slots=True)
class Flag:
    """One row of the table; see the module docstring.

    ``low`` and ``high`` are inclusive bounds of a number. ``verbs`` overrides the verbs of the flag's room.
    ``megatron`` are further names in ``tessera megatron``; a flag with ``only`` exists in that dialect alone. ``means``
    maps a value to the flags it sets. ``carry`` says when infer and export take the flag from an ``args.json`` unless
    it is given: ``always``, from that of an ``adapter`` only, the ``data`` they were made with under
    ``--load_data_args true``, or ``never``. The value of a ``secret`` is shown and stored nowhere.
    """

    name: str
    room: str
    kind: Kind
    default: Any = None
    help: str = ""
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    env: str = ""
    carry: Literal["never", "always", "adapter", "data"] = "never"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    verbs: tuple[str, ...] = ()
    megatron: tuple[str, ...] = ()
    only: Dialect | Literal[""] = ""
    means: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    inert: str = ""
    secret: bool = False

    def default_for(self, verb: str, dialect: Dialect = "swift") -> Any:
        """The flag's default under ``verb`` in ``dialect``."""
        return self.defaults.get(dialect, self.defaults.get(verb, self.default))

    def belongs_to(self, verb: str, dialect: Dialect = "swift") -> bool:
        """Whether ``verb`` takes this flag in ``dialect``."""
        return verb in (self.verbs or ROOMS[self.room][1]) and self.only in ("", dialect)

    def names(self, dialect: Dialect = "swift") -> tuple[str, ...]:
        """Its spellings in ``dialect``, the canonical one first."""
        return (self.name, *self.aliases, *(self.megatron if dialect == "megatron" else ()))
