"""However the same samples are laid out, three optimiser steps end in the same place."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tessera.contract.layout import layout_of
from tessera.parallel.mesh import Mesh, world_size
from tests.invariance.engine import Trajectory, assert_same, train
from tests.parity.reference import batch_of, config_of
from tests.ranks import run_ranks

# One step: four samples; the second has no image, the third has two.
SAMPLES = [(5, (1, 4, 6), 7), (9,), (3, (1, 4, 4), 4, (1, 2, 4), 2), (4, (1, 6, 4), 6)]
TOLERANCE = 2e-5


def packed(config: dict[str, Any], per_batch: int, step: int) -> list[Any]:
    """The step's samples, ``per_batch`` to a microbatch; sample ``i`` is the same tokens and pixels in any layout."""
    samples = SAMPLES if "vision_config" in config else [tuple(n for n in s if isinstance(n, int)) for s in SAMPLES]
    sees = "vision_config" in config
    singles = [batch_of(config, [sample], seed=100 * step + i, minimal=sees) for i, sample in enumerate(samples)]
    return [join(config, singles[i : i + per_batch]) for i in range(0, len(singles), per_batch)]


def join(config: dict[str, Any], singles: list[Any]) -> Any:
    """One batch of several one-sample batches."""
    from tessera.contract.batch import Batch, Segments
    from tests.parity.reference import geometry_of

    if len(singles) == 1:
        return singles[0]
    offsets = [0]
    for single in singles:
        offsets.append(offsets[-1] + single.num_tokens)
    real = [(index, s.media) for index, s in enumerate(singles) if s.media is not None and not s.media.minimal]
    media = None
    if real:
        sizes = [size for _, m in real for size in m.sizes]
        inputs, segments = geometry_of(config).tower_inputs(sizes)
        media = dataclasses.replace(
            real[0][1],
            patches=torch.cat([m.patches for _, m in real]),
            grids=torch.cat([m.grids for _, m in real]),
            dest=torch.cat([m.dest + offsets[index] for index, m in real]),
            sizes=tuple(sizes),
            owners=tuple(index for index, m in real for _ in m.sizes),
            tower=inputs,
            tower_segments=segments,
        )
    elif singles[0].media is not None:
        media = singles[0].media
    return Batch(
        tokens=torch.cat([s.tokens for s in singles]),
        targets=torch.cat([s.targets for s in singles]),
        loss_weight=torch.cat([s.loss_weight for s in singles]),
        positions=torch.cat([s.positions for s in singles], dim=-1),
        segments=Segments.of([s.num_tokens for s in singles]),
        supervised=torch.cat([s.supervised + offset for s, offset in zip(singles, offsets, strict=False)]),
        weight=sum(s.weight for s in singles),
        sample_ids=tuple(range(len(singles))),
        media=media,
    )


def single_process(name: str, per_batch: int = 4, **kwargs: Any) -> Trajectory:
    config = config_of(name)
    return train(config, [packed(config, per_batch, step) for step in range(3)], **kwargs)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "NVLM_D"])
@pytest.mark.parametrize("per_batch", [1, 2])
def test_packed_is_unpacked_and_accumulation_is_a_larger_batch(name: str, per_batch: int) -> None:
    assert_same(single_process(name, per_batch), single_process(name, 4), TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "glm4v_moe", "internvl", "NVLM_D"])
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)])
def test_recompute_changes_nothing(name: str, which: tuple[bool, bool]) -> None:
    assert_same(single_process(name, recompute=which), single_process(name), 0.0)


def on_ranks(name: str, stage: int, flags: dict[str, Any]) -> Trajectory:
    """This rank's share: microbatch ``r::world`` of each step, so rank 1 of two starts with the imageless sample."""
    mesh = Mesh.from_env(layout_of(world_size(), zero=stage), timeout_s=60)
    config = config_of(name)
    steps = [packed(config, 1, step)[mesh.rank :: mesh.world] for step in range(3)]
    return train(config, steps, mesh=mesh, **flags)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_are_one_process(stage: int) -> None:
    want = single_process("qwen3_vl", 1)
    for got in run_ranks(on_ranks, 2, "qwen3_vl", stage, {}):
        assert_same(got, want, TOLERANCE)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("qwen2_5_vl", {}),
        ("qwen3_vl", {"train_type": "lora", "freeze_vit": True, "freeze_aligner": True}),
        ("qwen3_vl", {"freeze_llm": True, "freeze_vit": True}),
        ("qwen3_vl", {"freeze_vit": True, "freeze_aligner": True}),
        pytest.param("NVLM_D", {"freeze_llm": True, "freeze_vit": True}, marks=pytest.mark.parallel),
        ("glm4v_moe", {}),
        ("qwen3_vl_moe", {"train_type": "lora", "freeze_vit": True, "freeze_aligner": True}),
    ],
    ids=["all", "lora", "aligner-only", "llm-only", "tagged-aligner-only", "experts", "experts-lora"],
)
def test_two_ranks_are_one_process_whatever_is_frozen(name: str, flags: dict[str, Any]) -> None:
    want = single_process(name, 1, **flags)
    for got in run_ranks(on_ranks, 2, name, 3, flags):
        assert_same(got, want, TOLERANCE)


def test_muon_on_replicated_ranks_is_muon() -> None:
    flags = {"optim": "muon"}
    want = single_process("qwen3_vl", 1, **flags)
    for got in run_ranks(on_ranks, 2, "qwen3_vl", 0, flags):
        assert_same(got, want, 2e-4)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    config = config_of("qwen3_vl")
    good = [packed(config, 2, step) for step in range(2)]
    bad = [dataclasses.replace(good[0][0], loss_weight=good[0][0].loss_weight * float("inf")), good[0][1]]
    want = train(config, good)
    got = train(config, [good[0], bad, good[1]])
    assert [r.skipped for r in got.results] == [None, "loss is not finite", None]
    assert_same(dataclasses.replace(got, losses=[got.losses[0], got.losses[2]], norms=got.norms[::2]), want, 0.0)
