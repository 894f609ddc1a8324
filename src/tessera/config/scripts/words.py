"""What every translated script shares: its surroundings, its result, and its words cut at positions or at flags.

Three shapes of script occur. Positional ones (``run.sh A B C``) are read with :func:`positional`, those with flags of
their own (``convert.py --load-dir X``) with :func:`options`, and those with everything filled in (``sft.sh``) are a
list of flags that the user's words override, :func:`preset`. In all three, trailing flags of ours are kept as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.config.flags import BY_NAME
from tessera.config.parse import nearest, usage_error


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a script is called: ``place`` is its path as written, ``gpus`` how many this machine shows."""

    place: str
    env: Mapping[str, str]
    gpus: int


@dataclass(frozen=True, slots=True)
class Translation:
    """A command line of ours (without the program's name) and remarks about it."""

    argv: tuple[str, ...]
    notes: tuple[str, ...] = ()


def positional(words: Sequence[str], names: Sequence[Sequence[str]], script: str) -> tuple[dict[str, str], list[str]]:
    """(value by name, trailing flags): the words before the first flag, which must be as many as one of ``names``."""
    first = next((at for at, word in enumerate(words) if word.startswith("--")), len(words))
    found, rest = list(words[:first]), list(words[first:])
    for shape in names:
        if len(shape) == len(found):
            return dict(zip(shape, found, strict=True)), rest
    counts = " or ".join(str(len(shape)) for shape in names)
    raise usage_error(f"{script} takes {counts} arguments and got {len(found)}: {' '.join(names[0])}")


def options(words: Sequence[str], known: Iterable[str], script: str) -> tuple[dict[str, str], list[str]]:
    """(value by name, flags of ours) of a script with flags of its own; a bare flag is ``true``."""
    own = set(known)
    ours: list[str] = []
    held: dict[str, str] = {}
    current: str | None = None
    for word in words:
        if not re.match(r"--[A-Za-z]", word):
            if current is None and not ours:
                raise usage_error(f"{script} {word}: unexpected; a flag starts with two dashes")
            if current is None:
                ours.append(word)
            else:
                held[current] = word
            continue
        spelled, equals, value = word[2:].partition("=")
        name = spelled.replace("-", "_")
        if name in own:
            current, held[name] = name, value if equals else "true"
        elif name in BY_NAME:
            current = None
            ours.append(word)
        else:
            near = nearest(name, own)
            hint = f"; nearest: {', '.join('--' + other.replace('_', '-') for other in near)}" if near else ""
            raise usage_error(f"--{spelled}: {script} has no such flag{hint}")
    return held, ours


def preset(flags: Mapping[str, str], words: Sequence[str], together: Iterable[Iterable[str]] = ()) -> list[str]:
    """The words of ``flags`` that the user's ``words`` do not override, then those words.

    A flag of one of the groups in ``together`` is overridden by any other of its group.
    """
    spelled = (word[2:].partition("=")[0].replace("-", "_") for word in words if re.match(r"--[A-Za-z]", word))
    given = {BY_NAME[name].name for name in spelled if name in BY_NAME}
    for group in together:
        if given & set(group):
            given |= set(group)
    kept = {name: value for name, value in flags.items() if BY_NAME[name].name not in given}
    return [*(word for name, value in kept.items() for word in (f"--{name}", value)), *words]


def required(held: Mapping[str, str], names: Iterable[str], script: str) -> None:
    """UserError if one of ``names`` is missing."""
    for name in names:
        if name not in held:
            raise usage_error(f"{script}: --{name.replace('_', '-')} is required")


def one_of(value: str, allowed: Sequence[str], label: str) -> str:
    """``value``, if it is allowed."""
    if value not in allowed:
        raise usage_error(f"{label} {value}: allowed are {', '.join(allowed)}")
    return value


def whole(value: str, label: str) -> int:
    """``value`` as a whole number of at least 1."""
    if not re.fullmatch(r"[0-9]+", value) or int(value) < 1:
        raise usage_error(f"{label} {value}: expected a whole number >= 1")
    return int(value)


def shape_of(directory: str) -> tuple[int, int] | None:
    """(layers, hidden size) of the decoder, from the ``config.json`` in ``directory``; None without one."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise usage_error(f"{path}: not a readable JSON file ({error})") from None
    text = config.get("text_config") or config.get("llm_config") or config
    layers, hidden = text.get("num_hidden_layers"), text.get("hidden_size")
    return (int(layers), int(hidden)) if layers and hidden else None
