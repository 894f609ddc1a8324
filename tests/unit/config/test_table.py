"""The table and the typed rooms say the same: names, kinds, and values that fit their types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from tessera.config.flags import BY_NAME, FLAGS, ROOMS, VERBS, Dialect
from tessera.config.manual import flags_page, verb_help
from tessera.config.parse import convert
from tessera.config.resolve import run_of
from tessera.config.run import ROOM_CLASSES

TYPES: Mapping[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": bool,
    "list": tuple[str, ...],
    "json": Mapping[str, str],
    "steps": int | float,
    "size": int,
}


def test_every_field_is_a_row_and_every_row_a_field() -> None:
    for room, kind in ROOM_CLASSES.items():
        rows = [flag.name for flag in FLAGS if flag.room == room and flag.name != "model_kwargs"]
        assert rows == [spec.name for spec in fields(kind)], room
    assert set(ROOM_CLASSES) == set(ROOMS) - {"run", "inert", "short"}


def test_kinds_are_the_types_of_the_fields() -> None:
    rows = {flag.name: flag for flag in FLAGS}
    for kind in ROOM_CLASSES.values():
        for name, hint in get_type_hints(kind).items():
            expected = Mapping[str, int] if name == "limit_mm_per_prompt" else TYPES[rows[name].kind]
            nested = (Mapping[str, Any] | None,) if rows[name].kind == "json" else ()
            assert hint in (expected, expected | None, *nested), f"{name}: {hint}"


def test_values_of_a_run_have_the_types_of_their_fields() -> None:
    run = run_of("sft", model="a", dataset=["b"])
    optional = {
        name for kind in ROOM_CLASSES.values() for name, hint in get_type_hints(kind).items() if "None" in str(hint)
    }
    for flag in FLAGS:
        if flag.name in run.values():
            value = run.values()[flag.name]
            allowed = {"list": tuple, "json": dict, "steps": (int, float), "size": int}.get(flag.kind, TYPES[flag.kind])
            assert (value is None and flag.name in optional) or isinstance(value, allowed), f"{flag.name}: {value!r}"


def test_names_are_unique_and_rows_make_sense() -> None:
    for verb in VERBS:
        names = [name for flag in FLAGS if flag.belongs_to(verb, "megatron") for name in flag.names("megatron")]
        assert len(names) == len(set(names)), verb
    own = [flag.name for flag in FLAGS]
    assert len(own) == len(set(own))
    assert all(BY_NAME[name].name == name for name in own)
    for flag in FLAGS:
        assert flag.room in ROOMS, flag.name
        assert set(flag.verbs) | set(flag.defaults) - {"megatron"} <= set(VERBS), flag.name
        for value, meant in flag.means.items():
            assert flag.room == "short" and value in (flag.choices or ("true", "false")), flag.name
            for name, word in meant.items():
                convert(BY_NAME[name], [word], name)
        assert bool(flag.inert) == (flag.room == "inert"), flag.name
        assert flag.inert or flag.help, flag.name
        if flag.choices and flag.kind != "list":
            assert {flag.default, *flag.defaults.values()} - {None} <= set(flag.choices), flag.name
    assert sum(len(fields(kind)) for kind in ROOM_CLASSES.values()) <= 240


@pytest.mark.parametrize("dialect", ["swift", "megatron"])
@pytest.mark.parametrize("verb", VERBS)
def test_help_and_page_hold_every_flag(verb: str, dialect: Dialect) -> None:
    text = verb_help(verb, dialect)
    listed = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
    inert = text[text.rindex("\ninert:") :].replace(",", " ").split() if "\ninert:" in text else []
    for flag in FLAGS:
        assert (f"--{flag.name}" in {*listed, *inert}) == flag.belongs_to(verb, dialect), flag.name
        assert f"`--{flag.name}`" in flags_page()
    assert max(map(len, text.splitlines())) <= 110
