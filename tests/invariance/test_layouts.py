"""Every layout of ranks takes the steps that one process takes: losses, gradient norms and all parameters.

The matrix is data: one row per layout, and who runs it with which model and flags. ``make test`` runs the rows marked
``core``; ``make test-parallel`` runs everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tessera.contract.batch import Batch
from tessera.contract.layout import layout_of
from tessera.models.families import text_config
from tessera.parallel.apply import Spread
from tessera.parallel.mesh import Mesh, world_size
from tests.invariance.engine import Trajectory, assert_same, train
from tests.invariance.test_step import TOLERANCE, packed
from tests.parity.reference import Sample, batch_of, config_of
from tests.ranks import run_ranks

LORA = {"train_type": "lora", "freeze_vit": True, "freeze_aligner": True}


@dataclass(frozen=True)
class Row:
    """One layout: processes, axis sizes, what goes over them."""

    ranks: int
    axes: dict[str, int]
    model: str = "qwen3_vl"
    spread: Spread = field(default_factory=Spread)
    flags: dict[str, Any] = field(default_factory=dict)
    per_batch: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    layers: int | None = None
    core: bool = False

    def __str__(self) -> str:
        axes = "x".join(f"{name}{size}" for name, size in self.axes.items())
        extra = [self.spread.cp_comm] if "cp" in self.axes else []
        extra += ["local"] if not self.spread.vision_balance else []
        extra += ["lora"] if "train_type" in self.flags else []
        extra += [name for name in self.flags if name in ("use_dora", "freeze_llm", "optim")]
        extra += [self.schedule] if "pp" in self.axes else []
        extra += [f"packs{self.per_batch}"] if self.per_batch > 1 else []
        return "-".join([self.model, axes, *extra])


A2A, LOCAL = Spread(cp_comm="a2a"), Spread(vision_balance=False)
DENSE = ("qwen2", "qwen3", "llama", "qwen2_5_vl", "qwen3_vl", "internvl", "NVLM_D", "composite")
SPARSE = ("qwen3_moe", "qwen3_vl_moe", "glm4v_moe")
INTERLEAVED = {"schedule": "interleaved", "chunks": 2, "layers": 8}
ZERO_BUBBLE = {"schedule": "zero_bubble", "chunks": 2, "layers": 8}

CORE = [
    Row(2, {"tp": 2}),
    Row(2, {"cp": 2}, per_batch=2),
    Row(2, {"cp": 2}, spread=A2A, per_batch=2),
    Row(2, {"pp": 2}),
    Row(2, {"pp": 2}, **INTERLEAVED),
    Row(2, {"ep": 2}, "qwen3_moe"),
    Row(4, {"tp": 2}, flags=LORA),
    Row(8, {"pp": 2, "tp": 2}),
]
"""What every test run checks: each kind of parallelism once, and most of them together."""

LAYOUTS: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (2, {"tp": 2}, {}),
    (2, {"tp": 2}, {"per_batch": 4}),
    (2, {"cp": 2}, {}),
    (2, {"cp": 2}, {"spread": A2A}),
    (2, {"pp": 2}, {}),
    (2, {"pp": 2}, INTERLEAVED),
    (2, {"pp": 2}, ZERO_BUBBLE),
    (2, {"zero": 0}, {}),
    (2, {"zero": 1}, {}),
    (2, {"zero": 2}, {"spread": LOCAL}),
    (2, {"zero": 3}, {}),
    (4, {"replicate": 2}, {}),
    (4, {"pp": 2, "tp": 2}, {}),
    (4, {"cp": 2, "tp": 2}, {"per_batch": 2}),
    (4, {"pp": 2, "cp": 2}, {}),
    (8, {"pp": 2, "tp": 2}, {}),
]
EXPERTS: list[tuple[int, dict[str, int], dict[str, Any]]] = [
    (2, {"ep": 2}, {}),
    (2, {"ep": 2}, {"per_batch": 2}),
    (4, {"ep": 2, "tp": 2}, {}),
    (4, {"ep": 4, "tp": 2}, {}),
    (4, {"ep": 2, "cp": 2}, {}),
    (4, {"ep": 2, "replicate": 2}, {}),
    (8, {"pp": 2, "ep": 4, "tp": 2}, {}),
    (8, {"pp": 2, "ep": 2, "cp": 2, "tp": 2}, {}),
]
MORE = [
    Row(2, {"ep": 2}, "internvl_chat+qwen3_moe"),
    Row(4, {"ep": 2, "tp": 2}, "internvl_chat+qwen3_moe", flags=LORA),
    Row(4, {"tp": 2, "zero": 3}),
    Row(4, {"tp": 2, "zero": 0}),
    Row(4, {"tp": 2}, spread=LOCAL),
    Row(2, {"pp": 2}, schedule="zero_bubble"),
    Row(4, {"pp": 4}, layers=8),
    Row(2, {"pp": 2}, "qwen3", flags={"optim": "muon"}),
    Row(4, {"pp": 2}, flags={"freeze_llm": True, "freeze_vit": True}),
    Row(2, {"tp": 2}, flags={"freeze_llm": True, "freeze_vit": True}),
    Row(2, {"cp": 2}, flags={"use_dora": True, **LORA}),
    Row(2, {"pp": 2}, flags={"use_dora": True, **LORA}),
    Row(2, {"tp": 2}, flags={"use_dora": True, **LORA}),
    Row(2, {"tp": 2}, "qwen2_5_vl", flags={"use_dora": True, "lora_bias": "all", **LORA}),
    Row(4, {"tp": 2, "pp": 2}, flags={"use_dora": True, **LORA}),
    Row(8, {"pp": 2, "tp": 2}, **INTERLEAVED),
    Row(8, {"pp": 2, "tp": 2}, flags=LORA, **ZERO_BUBBLE),
    Row(8, {"pp": 2, "cp": 2, "tp": 2}),
]


def matrix() -> list[Any]:
    """CORE, then every family with every layout, trained whole and with adapters, and some more."""
    rows = [replace(row, core=True) for row in CORE]
    for name in (*DENSE, *SPARSE):
        for ranks, axes, more in [*LAYOUTS, *(EXPERTS if name in SPARSE else [])]:
            rows += [Row(ranks, axes, name, flags=flags, **more) for flags in ({}, LORA)]
    named: dict[str, Row] = {}
    for row in [*rows, *MORE]:
        named.setdefault(str(row), row)
    return [pytest.param(row, id=name, marks=[] if row.core else [pytest.mark.parallel]) for name, row in named.items()]


def config_for(row: Row) -> dict[str, Any]:
    name, _, decoder = row.model.partition("+")
    config = config_of(name, **({"llm_config": config_of(decoder)} if decoder else {}))
    if row.layers is not None:
        text = dict(text_config(config))
        text["num_hidden_layers"] = row.layers
        nested = [key for key in ("text_config", "llm_config") if key in config]
        return config | {nested[0]: text} if nested else text
    return config


def on_ranks(row: Row) -> Trajectory:
    mesh = Mesh.from_env(layout_of(world_size(), **row.axes), timeout_s=60)
    config = config_for(row)
    steps = [packed(config, row.per_batch, step)[mesh.data_rank :: mesh.layout.dp] for step in range(3)]
    shape = {"spread": row.spread, "schedule": row.schedule, "chunks": row.chunks}
    return train(config, steps, mesh=mesh, **shape, **row.flags)


@pytest.mark.parametrize("row", matrix())
def test_layout_is_one_process(row: Row) -> None:
    config = config_for(row)
    want = train(config, [packed(config, row.per_batch, step) for step in range(3)], **row.flags)
    for got in run_ranks(on_ranks, row.ranks, row):
        assert_same(got, want, TOLERANCE)


SHORT: list[list[Sample]] = [[[1], [2], [3]], [[2], [1]], [[1, 1], [4]]]
"""Rows of one to four tokens: fewer than the chunks they are cut into."""


def short(config: dict[str, Any]) -> list[list[Batch]]:
    return [[batch_of(config, samples, seed)] for seed, samples in enumerate(SHORT)]


def on_ranks_with_short_rows(axes: dict[str, int], spread: Spread) -> Trajectory:
    config = config_of("qwen3")
    mesh = Mesh.from_env(layout_of(world_size(), **axes), timeout_s=60)
    return train(config, short(config), mesh=mesh, spread=spread)


@pytest.mark.parametrize(
    ("axes", "spread"),
    [
        ({"cp": 2}, Spread()),
        pytest.param({"cp": 2}, A2A, marks=pytest.mark.parallel),
        pytest.param({"cp": 4}, A2A, marks=pytest.mark.parallel),
        pytest.param({"cp": 2, "tp": 2}, Spread(), marks=pytest.mark.parallel),
        pytest.param({"tp": 2}, Spread(), marks=pytest.mark.parallel),
    ],
    ids=lambda value: "x".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else value.cp_comm,
)
def test_rows_shorter_than_the_number_of_ranks(axes: dict[str, int], spread: Spread) -> None:
    want = train(config_of("qwen3"), short(config_of("qwen3")))
    for got in run_ranks(on_ranks_with_short_rows, math.prod(axes.values()), axes, spread):
        assert_same(got, want, TOLERANCE)
