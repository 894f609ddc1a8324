"""Each rank reads its own share of a checkpoint and no more, and the model is that of one process, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera import adapt
from tessera.checkpoint import open as door
from tessera.config.resolve import resolve
from tessera.config.run import Run
from tessera.contract.layout import layout_of
from tessera.contract.shards import Part, whole
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh, world_size
from tessera.recipes import placement
from tessera.weights.hf import Checkpoint
from tessera.weights.shards import held, local, plain
from tests.models import make_model_dir
from tests.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, int], str]] = {
    "dp2": (2, {}, "qwen3_vl"),
    "tp2": (2, {"tp": 2}, "qwen3_vl"),
    "pp2": (2, {"pp": 2}, "qwen3_vl"),
    "ep2": (2, {"ep": 2}, "qwen3_moe"),
    "tp2xdp2": (4, {"tp": 2}, "qwen2_5_vl"),
    "hsdp": (4, {"replicate": 2}, "qwen3"),
    "pp2xtp2-experts": (4, {"pp": 2, "tp": 2}, "qwen3_moe"),
}
KINDS: dict[str, list[str]] = {
    "full": ["--train_type", "full"],
    "lora": ["--train_type", "lora", "--target_modules", "all-linear"],
    "dora": ["--train_type", "lora", "--use_dora", "true", "--target_modules", "q_proj", "down_proj"],
}


def settings(model: str, kind: str, *more: str) -> Run:
    words = ["sft", "--model", model, "--dataset", "unused", "--torch_dtype", "bfloat16", *KINDS[kind], *more]
    return resolve(words, {})


def placed(run: Run, mesh: Mesh) -> tuple[torch.nn.Module, adapt.Adaptation, dict[str, list[Part]]]:
    """The model where it belongs, and every region of every disk tensor that was read on the way."""
    read: dict[str, list[Part]] = {}
    plain_read = Checkpoint.read

    def counted(self: Checkpoint, name: str, part: Part | None = None) -> Tensor:
        found = plain_read(self, name, part)
        read.setdefault(name, []).append(part or whole(self.entries[name].shape))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", counted)
        source = door.describe(run.model)
        made = placement.load_model(run, source, mesh, torch.bfloat16)
    return made.model, made.adaptation, read


def loaded(model: str, axes: dict[str, int], kind: str, more: list[str]) -> dict[str, Any]:
    """What a rank read, what of the base it holds, and the values of everything that it holds."""
    mesh = Mesh.from_env(layout_of(world_size(), **axes), timeout_s=180)
    module, made, read = placed(settings(model, kind, *more), mesh)
    everything = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    base = {name: value for name, value in everything.items() if adapt.stored_name(name) is not None}
    values = {name: (held(value), local(value).clone(), value.requires_grad) for name, value in everything.items()}
    replicated = {
        adapt.stored_name(name)
        for name, value in base.items()
        if plain(value) or any(kind.is_replicate() for kind in value.placements)  # type: ignore[attr-defined]
    }
    for index, names in enumerate(stages := mesh.gather({adapt.stored_name(name) for name in base}, "pp")):
        for others in stages[:index]:
            replicated |= names & others  # a tied embedding, on both ends of a pipeline
    whole_adapter = {}
    if made.mode == "lora":
        tensors = adapt.adapter_tensors(module, made, lambda tensor: fsdp.full(tensor, mesh))
        whole_adapter = {name: value for part in mesh.gather(tensors, "pp") for name, value in part.items()}
        if mesh.is_main and not more:
            noise = {name: torch.randn(value.shape) for name, value in whole_adapter.items()}
            adapt.save_adapter(noise, made, Path(model) / "adapter", base_model=None)
        mesh.barrier()
    numbers = sum(local(value).numel() for value in base.values())
    return {"read": read, "numbers": numbers, "values": values, "replicated": replicated, "adapter": whole_adapter}


def check_bytes(folder: Path, ranks: list[dict[str, Any]]) -> None:
    """Every number of the file is read; on several ranks only if they all hold it; and none twice by one rank."""
    checkpoint = Checkpoint(folder)
    weightmap = door.describe(settings(str(folder), "full").model).weightmap
    for rank in ranks:
        sizes = [torch.Size(cut.stop - cut.start for cut in part).numel() for p in rank["read"].values() for part in p]
        assert sum(sizes) == rank["numbers"]
    replicated = set().union(*(rank["replicated"] for rank in ranks))
    for name, entry in checkpoint.entries.items():
        times = torch.zeros(entry.shape, dtype=torch.int32)
        for rank in ranks:
            for part in rank["read"].get(name, []):
                times[part] += 1
        assert bool((times >= 1).all()), f"nobody read all of {name}"
        if weightmap.to_ours(name) not in replicated:
            assert bool((times == 1).all()), f"{name} was read {int(times.max())} times"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[] if "x" not in name else [pytest.mark.parallel]) for name in LAYOUTS]
)
def test_each_rank_reads_its_own_bytes(layout: str, kind: str, tmp_path: Path) -> None:
    count, axes, family = LAYOUTS[layout]
    if kind == "dora" and (axes.get("tp") or family.endswith("moe")):
        pytest.skip("refused")
    folder = make_model_dir(tmp_path / "model", family, dtype=torch.bfloat16)
    for more in ([], ["--adapters", str(folder / "adapter")]):
        if more and kind != "lora":
            continue
        model, _, _ = placed(settings(str(folder), kind, *more), Mesh.single())
        want = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        ranks = run_ranks(loaded, count, str(folder), axes, kind, more)
        check_bytes(folder, ranks)
        for rank in ranks:
            for name, (part, value, trained) in rank["values"].items():
                assert value.dtype == want[name].dtype and trained == want[name].requires_grad, name
                assert torch.equal(value, want[name].detach()[part]), name


def test_a_quarter_of_the_model_is_a_quarter_of_the_bytes(tmp_path: Path) -> None:
    """Nothing is replicated under plain data parallelism: the shares add up to the file."""
    folder = make_model_dir(tmp_path / "model", "qwen3", dtype=torch.bfloat16)
    size = sum(entry.end - entry.start for entry in Checkpoint(folder).entries.values())
    for kind in ("full", "lora"):
        ranks = run_ranks(loaded, 2, str(folder), {}, kind, [])
        assert 2 * sum(rank["numbers"] for rank in ranks) == size
        assert max(rank["numbers"] for rank in ranks) < 0.55 * size / 2
