"""What ``tessera eval`` is asked to do, from its flags: exactly one of four things.

tessera eval --model DIR --eval_datasets MMMU=FILE ...     ask and score
tessera eval --eval_url URL --eval_datasets ...            ask a server and score
tessera eval --input_path FILE_OR_DIR                      score what tessera infer --task wrote
tessera eval --compare A B                                 compare two evaluations
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tessera.config.parse import shown, usage_error


def require(values: Mapping[str, Any], given: Callable[[str], bool]) -> None:
    """UserError unless the flags of ``tessera eval`` ask for one thing and bring what it needs."""
    asked = [name for name in ("compare", "input_path") if given(name)]
    if len(asked) > 1:
        raise usage_error("--compare and --input_path are two different things; give one of them")
    if given("compare"):
        if len(values["compare"]) != 2:
            raise usage_error(
                f"--compare takes two directories, got {len(values['compare'])}: {shown(values['compare'])}"
            )
        return
    if given("input_path"):
        return
    if not any((values["model"], values["adapters"], values["eval_url"])):
        raise usage_error("tessera eval: --model, --adapters or --eval_url is required")
    if values["eval_url"] and values["adapters"]:
        raise usage_error("--eval_url asks a server, which has its own adapters; leave --adapters out")
    if not values["eval_dataset"] and not values["dataset"]:
        raise usage_error("tessera eval: --eval_datasets NAME=PATH is required (or --dataset FILE --scorer NAME)")
    if values["dataset"] and not values["scorer"]:
        raise usage_error(f"--dataset {shown(values['dataset'])}: how is it scored? give --scorer NAME")
    if values["scorer"] and not values["dataset"]:
        raise usage_error(f"--scorer {values['scorer']} is for the rows of --dataset; benchmarks bring their own")
