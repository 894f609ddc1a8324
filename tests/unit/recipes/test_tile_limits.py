"""How many tiles an image becomes: one flag from training to inference, and into what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera import adapt
from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.resolve import resolve, run_of
from tessera.infer.session import attach
from tessera.models.vlm import VLM
from tessera.recipes import export
from tests.models import make_model_dir
from tests.parity import reference as ref

TILED = ("internvl", *ref.REMOTE)
WHERE = {"internvl": ("preprocessor_config.json", "max_patches", "crop_to_patches")} | dict.fromkeys(
    ref.REMOTE, ("config.json", "max_dynamic_patch", "dynamic_image_size")
)
WIDE = (56, 56 * 9)


def grid_of(model: Path, **flags: Any) -> int:
    """How many tiles the wide image becomes."""
    return door.describe(run_of("infer", model=str(model), **flags).model).geometry.grid(*WIDE)[0]


@pytest.mark.parametrize("name", TILED)
def test_limits_go_into_what_is_exported(tmp_path: Path, name: str) -> None:
    made = make_model_dir(tmp_path / "made", name)
    usual = 7 if name == "NVLM_D" else 5
    assert grid_of(made) == usual and grid_of(made, max_num=2) == 3 and grid_of(made, use_tiling=False) == 1
    file, most, cut = WHERE[name]
    before = json.loads((made / file).read_text())

    def exported(out: str, *flags: str, **env: str) -> tuple[Path, dict[str, Any]]:
        words = ["export", "--model", str(made), "--output_dir", str(tmp_path / out), *flags]
        path = export.main(resolve(words, env))
        (path / "args.json").unlink()  # whoever loads the directory by its configs alone gets the same
        return path, json.loads((path / file).read_text())

    two, config = exported("two", "--max_num", "2")
    assert config == before | config and config[most] == 2 and config[cut] is True and grid_of(two) == 3
    area, config = exported("area", MAX_PIXELS=str(3 * 56 * 56))
    assert config[most] == 3 and grid_of(area) == 4
    whole, config = exported("whole", "--use_tiling", "false")
    assert config[cut] is False and grid_of(whole) == 1 and grid_of(whole, use_tiling=True) == usual
    eight, config = exported("eight", MAX_NUM="8")
    assert config[most] == 8 and grid_of(eight) == 9
    assert (two / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    plain, config = exported("plain")
    assert config == before and grid_of(plain) == usual


def test_limits_are_carried_from_training(tmp_path: Path) -> None:
    made = make_model_dir(tmp_path / "made", "NVLM_D")
    rows = ["--dataset", "rows.jsonl", "--model", str(made)]
    trained = resolve(["sft", *rows], {"MAX_NUM": "3"})
    assert trained.model.max_num == 3 and trained.provenance["max_num"] == "env"
    (made / "args.json").write_text(json.dumps(trained.to_json()))
    asked = ["infer", "--model", str(made), "--val_dataset", "rows.jsonl"]
    assert resolve(asked, {}).model.max_num == 3
    assert resolve([*asked, "--use_tiling", "false"], {}).model.use_tiling is False
    assert resolve([*asked, "--model_kwargs", '{"max_num": 2}'], {}).model.max_num == 2
    with pytest.raises(UserError, match="max_num"):
        resolve([*asked, "--max_num", "0"], {})


def test_a_model_without_tiles_says_so(tmp_path: Path) -> None:
    made = make_model_dir(tmp_path / "made", "qwen3_vl")
    with pytest.raises(UserError, match="--max_num 3: this model does not cut images into tiles"):
        grid_of(made, max_num=3)


@pytest.mark.parametrize("name", ref.REMOTE)
def test_adapters_of_tower_and_decoder_merge_into_the_fused_layout(tmp_path: Path, name: str) -> None:
    made = make_model_dir(tmp_path / "made", name)
    run = run_of("sft", model=str(made), dataset=("x",), lora_rank=4, freeze_vit=False, freeze_aligner=False)
    source = door.describe(run.model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    adaptation = adapt.apply(module, run.adapt, source.plan, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    here = tmp_path / "checkpoint-1"
    adapt.save_adapter(adapt.adapter_tensors(module, adaptation), adaptation, here, base_model=str(made))
    (here / "args.json").write_text(json.dumps(run.to_json()))
    held = json.loads((here / "adapter_config.json").read_text())
    assert "vision_tower" in str(held["target_modules"])

    words = ["export", "--adapters", str(here), "--merge_lora", "true", "--output_dir", str(tmp_path / "merged")]
    merged = export.main(resolve(words, {}))
    assert door.Checkpoint(merged).names == source.checkpoint.names
    config = dict(source.config)
    batch = ref.batch_of(config, [[5, (1, 4, 6), 7], [9]])
    beside = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    attach(source, beside, str(here))
    alone = door.load(
        door.describe(run_of("infer", model=str(merged)).model), dtype=torch.float32, device=torch.device("cpu")
    )
    assert isinstance(alone, VLM) and isinstance(beside, VLM)
    expected, found = ref.logits_of(beside.eval(), batch), ref.logits_of(alone.eval(), batch)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_adapters_named_like_the_repository_are_read(tmp_path: Path) -> None:
    """peft's names of an adapter trained on the repository's own modelling code."""
    from safetensors.torch import load_file, save_file

    made = make_model_dir(tmp_path / "made", "internvl_chat")
    run = run_of("sft", model=str(made), dataset=("x",), lora_rank=4)
    source = door.describe(run.model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    adaptation = adapt.apply(module, run.adapt, source.plan, seed=1)
    here = tmp_path / "adapter"
    adapt.save_adapter(adapt.adapter_tensors(module, adaptation), adaptation, here, base_model=str(made))
    file = here / "adapter_model.safetensors"
    tensors = {
        name.replace("model.model.language_model.", "model.language_model.model."): value
        for name, value in load_file(file).items()
    }
    assert all("base_model.model.language_model.model.layers" in name for name in tensors)
    save_file(tensors, file)
    again = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    attach(source, again, str(here))
    state = again.state_dict()
    assert sum(".lora_A." in name for name in state) == sum(".lora_A." in name for name in tensors)
