"""How the memory flags of three dialects become one decision.

``--gradient_checkpointing`` says yes or no, the ``--recompute_*`` flags say what exactly. One rule relates them::

    --gradient_checkpointing true    (the default)  is   --recompute_granularity full --recompute_method uniform
                                                         --recompute_num_layers 1
    --gradient_checkpointing false                  is   --recompute_granularity none
    --recompute_granularity given                   wins; only `false` with `full` is a contradiction and refused

The tower follows ``--vit_gradient_checkpointing``; without it, it is recomputed unless the decoder is not at all.
DeepSpeed's ``zero2_offload`` and ``zero3_offload`` are the stage with ``--optimizer_cpu_offload true``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tessera.config.parse import json_object, usage_error


def settle(values: dict[str, Any], given: Callable[[str], bool]) -> None:
    """Decide every memory flag in ``values``, in place; UserError for combinations that contradict themselves.

    ``given`` says whether the user set a flag.
    """
    _recompute(values, given)
    _offload(values, given)
    _float8(values)


def stage_of(values: dict[str, Any], given: Callable[[str], bool], notes: list[str]) -> None:
    """``--deepspeed`` as one of zero0 to zero3, in place; offloading in it becomes ``--optimizer_cpu_offload``."""
    asked = values["deepspeed"]
    if asked is None:
        return
    if values["fsdp"] is not None:
        raise usage_error(f"--deepspeed {asked} and --fsdp {values['fsdp']} mean the same; give one of them")
    stage, moved = asked, {"optimizer"} if asked.endswith("_offload") else set()
    if asked.lstrip().startswith("{") or asked.endswith(".json"):
        zero = json_object(asked, "--deepspeed").get("zero_optimization", {})
        stage = f"zero{zero.get('stage', 0)}"
        moved = {
            key.removeprefix("offload_")
            for key in ("offload_optimizer", "offload_param")
            if (zero.get(key) or {}).get("device", "none") != "none"
        }
    stage = stage.removesuffix("_offload")
    if stage not in ("zero0", "zero1", "zero2", "zero3") or asked in ("zero0_offload", "zero1_offload"):
        raise usage_error(
            f"--deepspeed {asked}: allowed are zero0, zero1, zero2, zero3, zero2_offload, zero3_offload or a "
            "DeepSpeed JSON file"
        )
    if "optimizer" in moved:
        if given("optimizer_cpu_offload") and not values["optimizer_cpu_offload"]:
            raise usage_error(f"--deepspeed {asked} contradicts --optimizer_cpu_offload false; drop one of them")
        values["optimizer_cpu_offload"] = True
    if "param" in moved or asked == "zero3_offload":
        notes.append(f"--deepspeed {asked}: parameters are sharded but stay on the device; only the optimizer moves")
    values["deepspeed"] = stage


def _recompute(values: dict[str, Any], given: Callable[[str], bool]) -> None:
    granularity = values["recompute_granularity"]
    if granularity is None or (given("gradient_checkpointing") and not given("recompute_granularity")):
        granularity = "full" if values["gradient_checkpointing"] else "none"
        source = f"--gradient_checkpointing {str(values['gradient_checkpointing']).lower()}"
    else:
        source = f"--recompute_granularity {granularity}"
        if granularity == "full" and not values["gradient_checkpointing"]:
            raise usage_error("--gradient_checkpointing false contradicts --recompute_granularity full; drop one")
    for name in ("recompute_method", "recompute_num_layers"):
        if given(name) and granularity != "full":
            raise usage_error(f"--{name} {values[name]} needs --recompute_granularity full, not {source}")
    if given("recompute_modules") and values["recompute_modules"] and granularity != "selective":
        shown = " ".join(values["recompute_modules"])
        raise usage_error(f"--recompute_modules {shown} needs --recompute_granularity selective, not {source}")
    values["recompute_granularity"] = granularity
    values["recompute_method"] = values["recompute_method"] or "uniform"
    values["recompute_num_layers"] = values["recompute_num_layers"] or 1
    values["recompute_modules"] = (values["recompute_modules"] or ("core_attn",)) if granularity == "selective" else ()
    if values["vit_gradient_checkpointing"] is None:
        values["vit_gradient_checkpointing"] = granularity != "none"


def _offload(values: dict[str, Any], given: Callable[[str], bool]) -> None:
    if values["activation_cpu_offload"] and "layernorm" in values["recompute_modules"]:
        raise usage_error(
            "--recompute_modules layernorm does not go with --activation_cpu_offload true, which moves the norms' "
            "output to the host anyway; drop layernorm"
        )
    if given("activation_offload_num_layers") and not values["activation_cpu_offload"]:
        count = values["activation_offload_num_layers"]
        raise usage_error(f"--activation_offload_num_layers {count} needs --activation_cpu_offload true")
    if given("optimizer_offload_fraction") and not values["optimizer_cpu_offload"]:
        share = values["optimizer_offload_fraction"]
        raise usage_error(f"--optimizer_offload_fraction {share} needs --optimizer_cpu_offload true")
    if values["optimizer_cpu_offload"] and values["optim"] == "muon":
        raise usage_error(
            "--optimizer_cpu_offload true steps with AdamW on the host, not with Muon; use --optim adamw_torch_fused"
        )


def _float8(values: dict[str, Any]) -> None:
    if values["fp8"] is None:
        values["fp8"] = values["fp8_format"] is not None
    values["fp8_format"] = values["fp8_format"] or "hybrid"
    if values["fp8"] and values["train_type"] != "full":
        raise usage_error(
            f"--fp8 true trains weights in float8 products and needs --train_type full, not {values['train_type']}"
        )
