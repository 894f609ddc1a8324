"""What ``--help`` prints and ``docs/flags.md`` holds: the table of flags, made readable."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from tessera.config.flags import FLAGS, ROOMS, TRAIN, VERBS, Dialect, Flag, flags_of
from tessera.config.parse import program
from tessera.config.scripts import NAMES
from tessera.config.scripts import VERBS as MEGATRON_VERBS
from tessera.config.tasks import TASKS

WIDTH = 110
USAGE: Mapping[str, str] = {
    "report": "tessera report RUN",
    "demo": "tessera demo [DIR] [--flag value ...]",
    "data": "tessera data [lint|stats|show|prepare|convert ...] [--flag value ...]",
}
KINDS: Mapping[str, str] = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "list": "list",
    "json": "JSON object or file",
    "steps": "steps, share of the run, or -1",
    "size": "size",
}


def program_help() -> str:
    """``tessera --help``: the verbs."""
    verbs = "\n".join(f"  {verb:<8} {text}" for verb, text in VERBS.items())
    return (
        "tessera: train, export and run vision-language models\n\n"
        "usage: tessera VERB [run.yaml] [--flag value ...]\n"
        f"\n{verbs}\n\n"
        "tessera VERB --help lists the flags of a verb; tessera --version prints the version.\n"
        "NPROC_PER_NODE=2 tessera sft ... trains on two processes; --dry_run true only checks and shows the plan.\n"
        "tessera megatron VERB takes the names and defaults of Megatron; tessera megatron --help says more."
    )


def megatron_help() -> str:
    """``tessera megatron --help``: its verbs, and the scripts of other projects that it runs."""
    verbs = "\n".join(f"  {verb:<8} {VERBS[verb]}" for verb in MEGATRON_VERBS)
    scripts = "\n".join(f"  {name}" for name in NAMES)
    return (
        "tessera megatron: the same engine with the flags and defaults of Megatron-SWIFT\n\n"
        "usage: tessera megatron VERB [run.yaml] [--flag value ...]\n"
        f"\n{verbs}\n\n"
        "usage: tessera megatron SCRIPT ...    a script of another project with its own arguments, as a command here\n"
        f"\n{scripts}\n\n"
        "tessera megatron VERB --help lists flags, tessera megatron SCRIPT --help what becomes of its arguments."
    )


def verb_help(verb: str, dialect: Dialect = "swift") -> str:
    """``tessera VERB --help``: its flags by room, one or two lines each."""
    lines = [
        f"usage: {USAGE.get(verb, f'{program(verb, dialect)} [run.yaml] [--flag value ...]')}",
        "",
        f"{VERBS[verb]}.",
    ]
    if verb == "data":
        lines += ["", *(f"  {text}" for text in TASKS.values())]
    for room, (title, _) in ROOMS.items():
        flags = [flag for flag in flags_of(verb, dialect) if flag.room == room]
        if not flags:
            continue
        lines += ["", f"{room}: {title}"]
        if room == "inert":
            names = ", ".join(f"--{flag.name}" for flag in flags)
            lines += textwrap.wrap(names, WIDTH, initial_indent="  ", subsequent_indent="  ")
            continue
        for flag in flags:
            text = f"{flag.help}{_details(flag, verb, dialect)}"
            head = f"  --{flag.name:<28} "
            lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines)


def flags_page() -> str:
    """``docs/flags.md``: every flag with its verbs, values, default and meaning."""
    lines = [
        "# Flags",
        "",
        "Made from the table in `src/tessera/config/flags.py` by `make docs`; a test keeps it current.",
        "Order of precedence: flag, YAML file, environment variable, `args.json` of the model or adapter (`infer` and",
        "`export`), default. `train` in the column of verbs means `pt` and `sft`. What stands behind `megatron` is a",
        "name or a default in `tessera megatron` only; the other names hold there, too.",
    ]
    for room, (title, _) in ROOMS.items():
        flags = [flag for flag in FLAGS if flag.room == room]
        lines += ["", f"## {room}: {title}", ""]
        if room == "inert":
            lines += ["| flag | values | why it has no effect |", "|---|---|---|"]
            lines += [f"| {_names(flag)} | {_values(flag)} | {flag.inert} |" for flag in flags]
            continue
        lines += ["| flag | verbs | values | default | meaning |", "|---|---|---|---|---|"]
        for flag in flags:
            default = _shown(flag.default) + "".join(f"; {verb}: {_shown(v)}" for verb, v in flag.defaults.items())
            env = f" (env `{flag.env}`)" if flag.env else ""
            lines.append(f"| {_names(flag)} | {_verbs(flag)} | {_values(flag)} | {default} | {flag.help}{env} |")
    return "\n".join(lines) + "\n"


def _names(flag: Flag) -> str:
    names = " ".join(f"`--{name}`" for name in (flag.name, *flag.aliases))
    theirs = " ".join(f"`--{name}`" for name in flag.megatron)
    return f"megatron: {names}" if flag.only else f"{names}, megatron: {theirs}" if theirs else names


def _details(flag: Flag, verb: str, dialect: Dialect) -> str:
    parts = []
    if flag.choices:
        parts.append(" | ".join(flag.choices))
    default = flag.default_for(verb, dialect)
    if default not in (None, ()):
        parts.append(f"default {_shown(default).strip('`')}")
    others = flag.names(dialect)[1:]
    if others:
        parts.append(f"also --{', --'.join(others)}")
    if flag.env:
        parts.append(f"env {flag.env}")
    return f" [{'; '.join(parts)}]" if parts else ""


def _values(flag: Flag) -> str:
    if flag.choices:
        return ", ".join(f"`{choice}`" for choice in flag.choices)
    bounds = [f"{sign} {bound:g}" for sign, bound in (("≥", flag.low), ("≤", flag.high)) if bound is not None]
    return " ".join([KINDS[flag.kind], *bounds])


def _verbs(flag: Flag) -> str:
    verbs = [verb for verb in VERBS if flag.belongs_to(verb, "megatron")]
    if len(verbs) == len(VERBS):
        return "all"
    if set(TRAIN) <= set(verbs):
        verbs = ["train", *(verb for verb in verbs if verb not in TRAIN)]
    return ", ".join(verbs)


def _shown(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    return f"`{value}`"
