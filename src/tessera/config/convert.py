"""Which conversions a command line can ask for, and which of its flags contradict each other.

    --model HF --to_mcore true                             Hugging Face -> Megatron
    --mcore_model DIR --to_hf true                         and back
    --mcore_adapters DIR --to_hf true                      with an adapter added in (or kept: --merge_lora false)
    --mcore_model DIR --to_mcore true --target_...         Megatron -> Megatron, for other ranks or in another format
    --mcore_model LM --mcore_vision_model TOWER --to_...   two checkpoints become one

The result lies in ``--output_dir``, by default beside its source with ``-mcore`` or ``-hf`` added to the name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tessera.config.parse import usage_error

WRITTEN = (
    "mcore_format",
    "mcore_dialect",
    "mcore_layer_layout",
    "target_tensor_parallel_size",
    "target_pipeline_parallel_size",
    "target_expert_parallel_size",
    "make_vocab_size_divisible_by",
    "padded_vocab_size",
)
"""Flags about a Megatron checkpoint that is written."""


def output_of(values: Mapping[str, Any]) -> str | None:
    """Where a conversion goes by default; None if nothing is converted."""
    if not (values["to_mcore"] or values["to_hf"]):
        return None
    adapters = values["mcore_adapters"] or values["adapters"]
    source: str = adapters[0] if adapters else values["mcore_model"] or values["model"] or "model"
    return f"{source.rstrip('/')}-{'mcore' if values['to_mcore'] else 'hf'}"


def check(values: Mapping[str, Any], given: Callable[[str], bool], label: Callable[[str], str]) -> None:
    """UserError for flags of ``export`` that do not go together."""
    to_mcore, to_hf = values["to_mcore"], values["to_hf"]
    theirs = [name for name in ("mcore_model", "mcore_adapters", "mcore_vision_model") if values[name]]
    if to_mcore and to_hf:
        raise usage_error("--to_mcore true and --to_hf true: one command converts one way; drop one of them")
    if theirs and not (to_mcore or to_hf):
        raise usage_error(
            f"{label(theirs[0])} {_shown(values[theirs[0]])}: add --to_hf true, or --to_mcore true for other ranks or "
            "another format"
        )
    if to_hf and not theirs:
        raise usage_error("--to_hf true needs --mcore_model DIR or --mcore_adapters DIR, a Megatron checkpoint")
    if (to_mcore or to_hf) and len(values["mcore_adapters"]) + len(values["adapters"]) > 1:
        name = "mcore_adapters" if values["mcore_adapters"] else "adapters"
        raise usage_error(f"{label(name)}: one adapter is exported at a time")
    if values["mcore_vision_model"] and not values["mcore_model"]:
        raise usage_error(f"{label('mcore_vision_model')} needs --mcore_model, the language model to combine it with")
    _written(values, given, label)
    for name in ("test_convert_precision", "test_convert_dtype"):
        needed = (
            "--to_mcore true or --to_hf true" if name == "test_convert_precision" else "--test_convert_precision true"
        )
        missing = not (to_mcore or to_hf) if name == "test_convert_precision" else not values["test_convert_precision"]
        if given(name) and values[name] and missing:
            raise usage_error(f"{label(name)} {_shown(values[name])} needs {needed}")


def _written(values: Mapping[str, Any], given: Callable[[str], bool], label: Callable[[str], str]) -> None:
    for name in WRITTEN:
        if given(name) and not values["to_mcore"]:
            raise usage_error(f"{label(name)} {values[name]} needs --to_mcore true")
    if values["make_vocab_size_divisible_by"] and values["padded_vocab_size"]:
        raise usage_error("--make_vocab_size_divisible_by and --padded_vocab_size both set one size; drop one of them")
    if values["mcore_format"] == "torch" and values["mcore_layer_layout"]:
        raise usage_error(
            f"--mcore_layer_layout {values['mcore_layer_layout']} is about --mcore_format torch_dist; files by rank "
            "hold layers one by one"
        )


def _shown(value: Any) -> str:
    return (
        " ".join(value) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )
