"""What ranks write is what one process writes, byte for byte, and nobody gathers or exchanges anything for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.contract.layout import layout_of
from tessera.contract.weightmap import WeightMap
from tessera.models.families import family_of
from tessera.parallel import apply, fsdp
from tessera.parallel.apply import Spread
from tessera.parallel.mesh import Mesh, world_size
from tessera.recipes import placement
from tessera.weights.files import runs
from tessera.weights.hf import Checkpoint, save
from tessera.weights.saving import Saving
from tests.parity import reference as ref
from tests.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, int], str]] = {
    "dp2": (2, {}, "qwen3_vl"),
    "dp3-uneven": (3, {}, "qwen2_5_vl"),
    "zero0": (2, {"zero": 0}, "qwen3_vl"),
    "hsdp": (4, {"replicate": 2}, "qwen3_vl"),
    "tp2": (2, {"tp": 2}, "qwen2_5_vl"),
    "tp2xdp2": (4, {"tp": 2}, "qwen3_vl"),
    "tp2xdp2-experts": (4, {"tp": 2}, "glm4v_moe"),
    "pp2-tied": (2, {"pp": 2}, "llama-tied"),
    "pp2xtp2": (4, {"pp": 2, "tp": 2}, "internvl"),
    "tp2xdp2-fused": (4, {"tp": 2}, "NVLM_D"),
    "ep2xdp2": (4, {"ep": 2}, "qwen3_moe"),
    "ep2xdp2-turned": (4, {"ep": 2}, "qwen3_vl_moe"),
    "pp2xtp2xep2xdp2": (8, {"pp": 2, "tp": 2, "ep": 2}, "qwen3_moe"),
}


def config_for(model: str) -> dict[str, Any]:
    name, _, tied = model.partition("-")
    config = ref.config_of(name)
    return config | {"tie_word_embeddings": True} if tied else config


def make_source(path: Path, model: str, shard: int = 150_000) -> Path:
    """A checkpoint as its family releases it, in bfloat16, in several files, with a tied head written twice."""
    config = config_for(model)
    state = {key: value.to(torch.bfloat16) for key, value in ref.ours(config).state_dict().items()}
    disk = family_of(config).weightmap(config, []).forward(state)
    if model.endswith("tied"):
        disk["lm_head.weight"] = disk["model.embed_tokens.weight"]
    path.mkdir()
    save(disk, path, WeightMap(), max_shard_size=shard)
    (path / "config.json").write_text("{}")
    return path


def trained(config: dict[str, Any]) -> Any:
    """Another model than that of the checkpoint, in float32."""
    return ref.ours(config, seed=5)


VARIANTS: tuple[tuple[bool, torch.dtype | None], ...] = ((True, None), (True, torch.float32), (False, torch.bfloat16))
"""Like the source or not, in which type."""


def write_all(model: str, axes: dict[str, int], source: str, out: str) -> int:
    """Every rank writes its part of every variant; how many collectives it took."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = Mesh.from_env(layout_of(world_size(), **axes), timeout_s=180)
    config = config_for(model)
    family, module = family_of(config), trained(config)
    stages = placement.stages_of(module, mesh)
    apply.apply(module, family.plan(config), mesh, Spread(), compute_dtype=torch.float32, stages=stages)
    with CommDebugMode() as control:
        fsdp.full(next(p for p in module.parameters()).detach(), mesh)
    assert control.get_total_counts() > 0 or mesh.layout.zero == 0 or mesh.layout.shard * mesh.layout.tp == 1
    planned = 0
    for index, (like, dtype) in enumerate(VARIANTS):
        origin = Checkpoint(Path(source)) if like else None
        table = family.weightmap(config, [] if origin is None else origin.names)
        with CommDebugMode() as counter:
            tensors = module.state_dict()
            saving = Saving.of(tensors, table, origin=origin, dtype=dtype, max_shard_size=150_000, ranks=mesh)
            planned += counter.get_total_counts()
            before = counter.get_total_counts()
            saving.write(Path(out) / str(index))
        assert counter.get_total_counts() == before
    mesh.barrier()
    return planned


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] if LAYOUTS[name][0] > 4 else []) for name in LAYOUTS]
)
def test_ranks_write_what_one_process_writes(layout: str, tmp_path: Path) -> None:
    ranks, axes, model = LAYOUTS[layout]
    config = config_for(model)
    source = make_source(tmp_path / "source", model)
    for index, (like, dtype) in enumerate(VARIANTS):
        one = tmp_path / "one" / str(index)
        one.mkdir(parents=True)
        (tmp_path / "many" / str(index)).mkdir(parents=True)
        table = family_of(config).weightmap(config, Checkpoint(source).names if like else [])
        origin = source if like else None
        save(trained(config).state_dict(), one, table, source=origin, dtype=dtype, max_shard_size=150_000)
    counts = run_ranks(write_all, ranks, model, axes, str(source), str(tmp_path / "many"))
    assert "pp" in axes or not any(counts)
    for index in range(len(VARIANTS)):
        one, many = tmp_path / "one" / str(index), tmp_path / "many" / str(index)
        files = sorted(file.name for file in one.iterdir())
        assert len(files) > 2 and files == sorted(file.name for file in many.iterdir())
        for name in files:
            assert (one / name).read_bytes() == (many / name).read_bytes(), (layout, index, name)


def test_every_tensor_is_written_once() -> None:
    """Whatever is replicated, the bytes that ranks write add up to the size of the model."""
    for layout in ("hsdp", "tp2"):
        ranks, axes, model = LAYOUTS[layout]
        size = sum(value.numel() for value in trained(config_for(model)).state_dict().values())
        assert sum(run_ranks(numbers_written, ranks, model, axes)) == size


def numbers_written(model: str, axes: dict[str, int]) -> int:
    mesh = Mesh.from_env(layout_of(world_size(), **axes), timeout_s=180)
    config = config_for(model)
    family, module = family_of(config), trained(config)
    apply.apply(module, family.plan(config), mesh, Spread(), compute_dtype=torch.float32)
    saving = Saving.of(module.state_dict(), family.weightmap(config, []), ranks=mesh)
    return sum(share.values.numel() for share in saving.shares.values())


def test_a_stale_longer_file_leaves_nothing_behind(tmp_path: Path) -> None:
    save({"a": torch.ones(3)}, tmp_path, WeightMap())
    want = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    save({"a": torch.ones(3)}, tmp_path, WeightMap())
    assert (tmp_path / "model.safetensors").read_bytes() == want


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((), ()),
        ((7,), (slice(2, 5),)),
        ((6, 4), (slice(2, 5), slice(0, 4))),
        ((6, 4), (slice(2, 5), slice(1, 3))),
        ((3, 6, 4), (slice(1, 3), slice(0, 6), slice(0, 4))),
        ((3, 6, 4), (slice(0, 3), slice(2, 5), slice(0, 4))),
        ((3, 6, 4), (slice(1, 3), slice(2, 5), slice(3, 4))),
    ],
)
def test_runs_are_where_the_region_lies(shape: tuple[int, ...], part: tuple[slice, ...]) -> None:
    flat: Tensor = torch.arange(torch.Size(shape).numel())
    starts, length = runs(shape, part)
    found = torch.cat([flat[start : start + length] for start in starts])
    assert torch.equal(found, flat.view(shape)[part].flatten())
