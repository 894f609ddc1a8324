"""Calls of tools in what a model says.

The common form is a JSON object in tags of its own, as in Hermes' and its successors' templates::

    I will look it up. <tool_call>
    {"name": "weather", "arguments": {"city": "Bergen"}}
    </tool_call>

:class:`ToolReader` takes text as it comes and separates the two. Text that might still become a tag is held back;
what looks like a call and is none is given back as text. A whole answer and a streamed one go through the same reader,
so they cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from tessera.infer.engine import Constraint
from tessera.infer.serve import protocol as wire
from tessera.infer.serve.errors import bad

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """A call that the model made; ``arguments`` is JSON text."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """As OpenAI's API writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


Said = str | Call


def call_of(text: str) -> Call | None:
    """The call that ``text`` is, as JSON with a name and arguments; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(_name(), found["name"], arguments)
    if not isinstance(arguments, Mapping):
        return None
    return Call(_name(), found["name"], json.dumps(arguments, ensure_ascii=False))


def _name() -> str:
    return f"call_{uuid4().hex[:24]}"


class ToolReader:
    """Separates text and calls of one answer; with ``bare`` the whole answer is one call without tags."""

    def __init__(self, *, bare: bool = False) -> None:
        self.calls = 0
        self._bare = bare
        self._inside = False
        self._held = ""

    def push(self, text: str) -> list[Said]:
        """What is certain after some more ``text``."""
        self._held += text
        out: list[Said] = []
        while not self._bare and self._step(out):
            pass
        return out

    def finish(self) -> list[Said]:
        """What is left when no more text comes; a call without its end tag is one all the same."""
        held, self._held = self._held, ""
        if self._inside or self._bare:
            return [self._read(held, OPEN + held if self._inside else held)]
        return [] if not held or (self.calls and not held.strip()) else [held]

    def _step(self, out: list[Said]) -> bool:
        """Move what is certain to ``out``; whether there may be more."""
        tag = CLOSE if self._inside else OPEN
        at = self._held.find(tag)
        if at < 0:
            if not self._inside:
                certain = len(self._held) - _undecided(self._held)
                self._say(self._held[:certain], out)
                self._held = self._held[certain:]
            return False
        before, self._held = self._held[:at], self._held[at + len(tag) :]
        if self._inside:
            out.append(self._read(before, OPEN + before + CLOSE))
        else:
            self._say(before.rstrip(), out)
        self._inside = not self._inside
        return True

    def _read(self, text: str, otherwise: str) -> Said:
        call = call_of(text)
        self.calls += call is not None
        return otherwise if call is None else call

    def _say(self, text: str, out: list[Said]) -> None:
        if text and (text.strip() or not self.calls):
            out.append(text)


def _undecided(text: str) -> int:
    """How many characters at the end may yet turn out to be, or to stand before, a tag."""
    for length in range(min(len(OPEN) - 1, len(text)), 0, -1):
        if OPEN.startswith(text[-length:]):
            rest = text[:-length]
            return length + len(rest) - len(rest.rstrip())
    return len(text) - len(text.rstrip())


def forced(tools: Sequence[wire.Tool], choice: wire.NamedTool | str | None) -> Constraint | None:
    """What makes an answer a call, where ``choice`` demands one; None where it is up to the model."""
    if isinstance(choice, wire.NamedTool):
        chosen = [tool.function for tool in tools if tool.function.name == choice.function.name]
        if not chosen:
            raise bad(f"tool_choice names {choice.function.name[:64]!r}, which is not among tools", "tool_choice")
    elif choice == "required":
        chosen = [tool.function for tool in tools]
    else:
        return None
    shapes = [
        {
            "type": "object",
            "properties": {"name": {"const": one.name}, "arguments": one.parameters or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in chosen
    ]
    return Constraint("json_schema", json.dumps(shapes[0] if len(shapes) == 1 else {"anyOf": shapes}))
