"""From the words of a command line, a YAML file or an ``args.json`` to the value of one flag.

The grammar is small: ``--flag value``, ``--flag=value``, a bare ``--flag`` for true, several words for a list, and
``--flag-name`` for ``--flag_name``. Words that do not start with two dashes belong to the flag before them, so a
negative number needs no quoting. Names are never abbreviated: a command that runs today must not change its meaning
when a flag is added. Every failure is one sentence that names the flag, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.config.flags import BY_NAME, VERBS, Dialect, Flag, called, flags_of

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Words:
    """A command line cut at its flags: ``positional`` words, the words of each flag, and what looked odd.

    ``spelled`` is how the user wrote each flag, by its canonical name.
    """

    positional: tuple[str, ...]
    flags: dict[str, list[str]]
    notes: tuple[str, ...]
    cut_after: str = ""
    spelled: Mapping[str, str] = field(default_factory=dict)


def usage_error(message: str) -> UserError:
    """A mistake on the command line: exit code 2."""
    return UserError(message, exit_code=2)


def program(verb: str, dialect: Dialect = "swift") -> str:
    """``tessera sft`` or ``tessera megatron sft``."""
    return f"tessera {'megatron ' if dialect == 'megatron' else ''}{verb}"


def split(argv: Sequence[str], verb: str, dialect: Dialect = "swift") -> Words:
    """Cut the words after the verb at their flags; a flag given twice keeps its last words."""
    positional: list[str] = []
    uses: list[tuple[str, list[str]]] = []
    spelling: dict[str, str] = {}
    for word in argv:
        if re.match(r"--[A-Za-z]", word):
            spelled, equals, value = word[2:].partition("=")
            flag = lookup(spelled.replace("-", "_"), verb, f"--{spelled}", dialect)
            spelling[flag.name] = f"--{spelled}"
            uses.append((flag.name, [value] if equals else []))
        else:
            (uses[-1][1] if uses else positional).append(word)
    flags: dict[str, list[str]] = {}
    notes: list[str] = []
    cut_after = ""
    for name, words in uses:
        kept = words if words == [""] else [word for word in words if word.strip()]
        if kept != words:
            cut_after = spelling[name]
            notes.append(f"the command seems cut after {cut_after}: a backslash followed by a space ends it there")
        if flags.get(name, kept) != kept:
            both = ("the last one", "the first") if BY_NAME[name].secret else (shown(kept), shown(flags[name]))
            notes.append(f"{spelling[name]} is given twice: {both[0]} holds, {both[1]} is dropped")
        flags[name] = kept
    return Words(tuple(word for word in positional if word.strip()), flags, tuple(notes), cut_after, spelling)


def shown(words: Sequence[str]) -> str:
    """Words as a person would type them."""
    return " ".join(words) if words else "(no value)"


def lookup(name: str, verb: str, label: str, dialect: Dialect = "swift") -> Flag:
    """The row called ``name`` if ``verb`` takes it in ``dialect``; ``label`` is how the user wrote it."""
    flag, command = called(name, verb, dialect), program(verb, dialect)
    if flag is not None and flag.belongs_to(verb, dialect) and name in flag.names(dialect):
        return flag
    if flag is not None and flag.belongs_to(verb, dialect):
        raise usage_error(f"{label}: {command} calls it --{flag.name}; {program(verb, 'megatron')} takes both names")
    if flag is not None and flag.belongs_to(verb, "megatron"):
        raise usage_error(f"{label}: {command} has no such flag; {program(verb, 'megatron')} takes it")
    if flag is not None:
        takers = ", ".join(other for other in VERBS if flag.belongs_to(other, "megatron"))
        raise usage_error(f"{label}: {command} has no such flag; it belongs to {takers}")
    near = nearest(name, (spelling for flag in flags_of(verb, dialect) for spelling in flag.names(dialect)))
    hint = f"; nearest: {', '.join('--' + other for other in near)}" if near else ""
    raise usage_error(f"{label}: {command} has no such flag{hint} ({command} --help lists them)")


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Up to three of ``names`` that the user may have meant: those that ``name`` abbreviates, then similar ones."""
    known = list(names)
    starting = [other for other in known if other.startswith(name)]
    similar = [other for other in difflib.get_close_matches(name, known, 3, 0.6) if other not in starting]
    return [*starting, *similar][:3]


def convert(flag: Flag, words: Sequence[str], label: str) -> Any:
    """The value of ``flag`` from its words; ``label`` names the flag and its file in an error."""
    if flag.kind == "list":
        if not words:
            raise usage_error(f"{label} needs at least one value")
        return tuple(_choice(flag, word, label) for word in words)
    if flag.kind == "bool" and not words:
        return True
    if not words:
        raise usage_error(f"{label} needs a value{_allowed(flag)}")
    if len(words) > 1:
        raise usage_error(f"{label} takes one value but got {len(words)}: {shown(words)}")
    return _scalar(flag, words[0], label)


def _scalar(flag: Flag, word: str, label: str) -> Any:
    match flag.kind:
        case "str":
            return _choice(flag, word, label)
        case "bool":
            if word.lower() not in (*TRUE, *FALSE):
                raise usage_error(f"{label} {word}: expected true or false")
            return word.lower() in TRUE
        case "json":
            return json_object(word, label)
        case "size":
            return _size(word, label)
        case _:
            return _number(flag, word, label)


def _number(flag: Flag, word: str, label: str) -> int | float:
    wanted = "a number" if flag.kind != "int" else "a whole number"
    try:
        value = float(word)
    except ValueError:
        raise usage_error(f"{label} {word}: expected {wanted}{_allowed(flag)}") from None
    if flag.kind == "steps" and not (value == -1 or 0 < value < 1 or (value >= 1 and value.is_integer())):
        raise usage_error(f"{label} {word}: expected a number of steps, a share of the run below 1, or -1")
    if (flag.kind == "int" and not value.is_integer()) or value != value:
        raise usage_error(f"{label} {word}: expected {wanted}{_allowed(flag)}")
    if (flag.low is not None and value < flag.low) or (flag.high is not None and value > flag.high):
        raise usage_error(f"{label} {word}: expected {wanted}{_allowed(flag)}")
    if flag.kind == "int" or (flag.kind == "steps" and value.is_integer()):
        value = int(value)
        _choice(flag, str(value), label)
    return value


def _choice(flag: Flag, word: str, label: str) -> str:
    if flag.choices and word not in flag.choices:
        raise usage_error(f"{label} {word}: allowed are {', '.join(flag.choices)}")
    return word


def _allowed(flag: Flag) -> str:
    if flag.choices:
        return f"; allowed are {', '.join(flag.choices)}"
    bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", flag.low), ("<=", flag.high)) if bound is not None]
    return f" {' and '.join(bounds)}" if bounds else ""


def _size(word: str, label: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", word)
    if found is None or found[2].upper() not in SIZES or float(found[1]) <= 0:
        raise usage_error(f"{label} {word}: expected a size such as 5GB or 500MB")
    return int(float(found[1]) * SIZES[found[2].upper()])


def json_object(word: str, label: str) -> dict[str, Any]:
    """The JSON object that ``word`` is, or that lies in the file it names."""
    text, where = word, label
    if not word.lstrip().startswith("{"):
        path = Path(word)
        if not path.is_file():
            raise usage_error(f"{label} {word}: expected a JSON object or the path of a JSON file")
        text, where = path.read_text(encoding="utf-8"), f"{label} {word}"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise usage_error(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise usage_error(f"{where}: expected a JSON object")
    return value


def words_of(value: Any) -> list[str]:
    """A value of a YAML or JSON file, or of a program, as the words that would have been typed for it."""
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    return [str(value)]
