"""What ``tessera deploy`` is told, checked as far as that needs no model: names of adapters, limits, the backend.

``--adapters`` takes directories with a name in front, ``math=output/a/checkpoint-10``: requests choose them by it. One
directory without a name is the model that is served, instead of the base model it was trained on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.config.parse import usage_error

MEDIA = ("image", "video")
EMBEDDED = ("tessera", "pt", "transformers")
_NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)


def named(word: str) -> tuple[str, str]:
    """(name, directory) of an entry of ``--adapters``; an empty name if it has none."""
    found = _NAMED.fullmatch(word)
    return ("", word) if found is None or Path(word).is_dir() else (found[1], found[2])


def placed(verb: str, words: Sequence[str], local: Callable[[str, str], str]) -> tuple[str, ...]:
    """The entries of ``--adapters`` with the paths that ``local`` finds; only ``deploy`` takes names before them."""
    if verb != "deploy":
        return tuple(local("--adapters", word) for word in words)
    pairs = [named(word) for word in words]
    return tuple(f"{name}={local('--adapters', path)}" if name else local("--adapters", path) for name, path in pairs)


def environment(verb: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Variables for another engine's server: a key on its command line would be there for every user to read."""
    if verb != "deploy" or values["infer_backend"] != "vllm" or values["api_key"] is None:
        return {}
    return {"VLLM_API_KEY": values["api_key"]}


def settle(verb: str, values: dict[str, Any], chosen: bool, notes: list[str]) -> None:
    """Settle the flags of a server in place; UserError for what cannot be served.

    ``chosen``: the user named a backend, which for every verb but ``deploy`` can only be the engine that is there.
    """
    backend = values["infer_backend"]
    if verb == "eval" and backend not in EMBEDDED:
        return  # asked over a server of that engine
    if verb != "deploy":
        if backend not in EMBEDDED:
            raise usage_error(
                f"--infer_backend {backend}: allowed are {', '.join(EMBEDDED)}; tessera deploy serves with {backend}"
            )
        if chosen:
            notes.append("--infer_backend has no effect: the engine is tessera's own")
        values["infer_backend"] = "tessera"
        return
    if backend in EMBEDDED:
        _embedded(values, notes)
    _limits(values["limit_mm_per_prompt"])
    _adapters(values["adapters"])
    _files(values)
    for name in ("api_key", "served_model_name"):
        if values[name] is not None and not values[name].strip():
            raise usage_error(f"--{name}: it is empty; leave the flag out instead")


def _embedded(values: dict[str, Any], notes: list[str]) -> None:
    if values["infer_backend"] != "tessera":
        notes.append(f"--infer_backend {values['infer_backend']}: the engine is tessera's own")
    values["infer_backend"] = "tessera"
    if values["tensor_parallel_size"] > 1:
        raise usage_error(
            f"--tensor_parallel_size {values['tensor_parallel_size']}: tessera's own engine serves from one device; "
            "--infer_backend vllm splits a model"
        )
    if values["gpu_memory_utilization"] is not None:
        notes.append("--gpu_memory_utilization has no effect: tessera's own engine takes memory as it needs it")


def _limits(limits: Mapping[str, Any] | None) -> None:
    for kind, most in (limits or {}).items():
        if kind not in MEDIA:
            raise usage_error(f"--limit_mm_per_prompt {kind}: allowed are {', '.join(MEDIA)}")
        if not isinstance(most, int) or isinstance(most, bool) or most < 0:
            raise usage_error(f"--limit_mm_per_prompt {kind}: {most!r}: expected a whole number >= 0")


def _adapters(words: Sequence[str]) -> None:
    names = [named(word)[0] for word in words]
    for name in names:
        if names.count(name) > 1:
            which = f"two are called {name}" if name else "only one may be without a name"
            raise usage_error(f"--adapters: {which}; write NAME=DIR")


def _files(values: dict[str, Any]) -> None:
    if (values["ssl_keyfile"] is None) != (values["ssl_certfile"] is None):
        given, lacking = ("keyfile", "certfile") if values["ssl_keyfile"] else ("certfile", "keyfile")
        raise usage_error(f"--ssl_{given} {values[f'ssl_{given}']}: HTTPS also needs --ssl_{lacking}")
    for name in ("ssl_keyfile", "ssl_certfile"):
        if values[name] is not None and not Path(values[name]).is_file():
            raise usage_error(f"--{name} {values[name]}: no such file")
    if values["allowed_media_dir"] is not None:
        if not Path(values["allowed_media_dir"]).is_dir():
            raise usage_error(f"--allowed_media_dir {values['allowed_media_dir']}: no such directory")
        values["allowed_media_dir"] = os.path.realpath(values["allowed_media_dir"])
