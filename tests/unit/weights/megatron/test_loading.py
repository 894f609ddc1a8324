"""A model loads from a Megatron directory as from safetensors: whole, or the slices that a rank holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tessera.config.errors import UserError
from tessera.models.init import drawn
from tessera.weights import hf
from tessera.weights.megatron.checkpoint import LEGACY, TORCH_DIST, open_as_ours
from tessera.weights.megatron.options import Options
from tessera.weights.megatron.ranks import Ranks
from tests.megatron import Model


@pytest.mark.parametrize("kind", [TORCH_DIST, LEGACY])
@pytest.mark.parametrize(("name", "dialect"), [("qwen3_vl_moe", "pai"), ("qwen2_5_vl", "swift"), ("internvl", "lm")])
def test_a_module_is_filled(tmp_path: Path, name: str, dialect: str, kind: str) -> None:
    model = Model(tmp_path / "hf", name)
    options = Options(dialect=dialect, format=kind, ranks=Ranks(tp=2))
    root = model.to_megatron(tmp_path / "m", options)
    checkpoint = open_as_ours(root, model.family, model.config)
    with torch.device("meta"):
        module = model.family.build(model.config)
    report = hf.load(module, checkpoint, checkpoint.weightmap, dtype=torch.float32)
    assert report.tensors == len(checkpoint.entries) and not report.left_out
    ours = model.ours
    for key, value in module.state_dict().items():
        assert torch.equal(value, ours[key].to(value.dtype)), key


@pytest.mark.parametrize("kind", [TORCH_DIST, LEGACY])
def test_slices_are_slices(tmp_path: Path, kind: str) -> None:
    model = Model(tmp_path / "hf", "qwen3_moe")
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm", format=kind, ranks=Ranks(tp=2, ep=2)))
    checkpoint = open_as_ours(root, model.family, model.config)
    for name, value in model.ours.items():
        part = tuple(slice(size // 4, size - size // 3) for size in value.shape)
        assert checkpoint.entries[name].shape == tuple(value.shape) and checkpoint.entries[name].dtype == value.dtype
        assert torch.equal(checkpoint.read(name, part), value[part]), name
        assert torch.equal(checkpoint.read(name), value), name


def test_a_slice_opens_its_chunks_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's rows: one archive of the many is opened, and no file is read whole."""
    from tessera.weights.megatron import archive

    model = Model(tmp_path / "hf", "qwen3_moe")
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm"))
    checkpoint = open_as_ours(root, model.family, model.config)
    opened: list[int] = []
    real = archive.load

    def load(file: Path, start: int = 0, length: int | None = None) -> object:
        opened.append(start)
        return real(file, start, length)

    monkeypatch.setattr(archive, "load", load)
    checkpoint.read("model.layers.1.mlp.experts.down_proj", (slice(3, 4), slice(0, 10), slice(0, 48)))
    assert len(opened) == 1


def test_a_projection_that_is_yet_to_be_trained(tmp_path: Path) -> None:
    """Absent only if it may be; what is absent is drawn, a function of its name, and everything else loads."""
    from tests.unit.weights.megatron.test_reading import legacy_save

    model = Model(tmp_path / "hf", "internvl")
    root = model.to_megatron(tmp_path / "m", Options(dialect="lm", format=LEGACY))
    held = torch.load(root / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)["model"]
    bare = legacy_save(
        tmp_path / "bare", {"mp_rank_00": {k: v for k, v in held.items() if not k.startswith("vision_projection.")}}
    )
    with pytest.raises(UserError, match=r"6 missing: vision_projection.encoder"):
        open_as_ours(bare, model.family, model.config)
    checkpoint = open_as_ours(bare, model.family, model.config, absent=["vision_projection."])
    with torch.device("meta"):
        module = model.family.build(model.config)
    hf.load(module, checkpoint, checkpoint.weightmap, dtype=torch.bfloat16)
    for name, value in module.state_dict().items():
        if name.startswith("model.multi_modal_projector."):
            expected = drawn(name, tuple(value.shape), model.config, 0).to(torch.bfloat16)
        else:
            expected = model.ours[name]
        assert torch.equal(value, expected), name
    weight = "model.multi_modal_projector.linear_1.weight"
    part = (slice(3, 5), slice(0, 7))
    assert torch.equal(checkpoint.read(weight, part), checkpoint.read(weight)[part])
