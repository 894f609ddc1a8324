"""``tessera export``: merged equals unmerged, directories are complete or absent, and what is pushed."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tessera import adapt
from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.resolve import resolve, run_of
from tessera.config.run import Run
from tessera.infer.session import attach
from tessera.models.vlm import VLM
from tessera.recipes import export
from tessera.weights import files, hf
from tessera.weights.saving import Saving
from tests.disk import save_checkpoint
from tests.parity import reference as ref
from tests.stubhub import TOKEN, running

SAMPLES: list[ref.Sample] = [[5, (1, 4, 6), 7], [9]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "base", "qwen3_vl")


def opened(model: Path, adapter: Path | None = None) -> VLM:
    """The model in float32, with the adapter beside its weights."""
    source = door.describe(run_of("infer", model=str(model)).model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    if adapter is not None:
        attach(source, module, str(adapter))
    assert isinstance(module, VLM)
    return module.eval()


def logits(model: VLM) -> Tensor:
    config = ref.config_of("qwen3_vl")
    with torch.no_grad():
        return ref.logits_of(model, ref.batch_of(config, SAMPLES))


def write_adapter(base: Path, directory: Path, **flags: Any) -> Path:
    """A trained-looking adapter in a checkpoint directory with its args.json."""
    run = run_of("sft", model=str(base), dataset=("rows.jsonl",), lora_rank=4, **flags)
    source = door.describe(run.model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    adaptation = adapt.apply(module, run.adapt, source.plan, seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapt.save_adapter(adapt.adapter_tensors(module, adaptation), adaptation, directory, base_model=str(base))
    (directory / "args.json").write_text(json.dumps(run.to_json()))
    return directory


def exporting(*argv: str | Path, **env: str) -> Run:
    return resolve(["export", *map(str, argv)], env)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "freeze_vit": False, "freeze_aligner": False},
        {"modules_to_save": ("model.visual.merger",)},
        {"lora_bias": "all"},
    ],
    ids=["lora", "dora", "everything", "saved", "biases"],
)
def test_merged_equals_unmerged(base: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    adapter = write_adapter(base, tmp_path / "checkpoint-7", **flags)
    out = export.main(exporting("--adapters", adapter, "--merge_lora", "true"))
    assert out == tmp_path / "checkpoint-7-merged"
    unmerged, merged, plain = logits(opened(base, adapter)), logits(opened(out)), logits(opened(base))
    assert (merged - unmerged).abs().max() < 1e-5 * unmerged.abs().max()
    assert (unmerged - plain).abs().max() > 1e-2 * plain.abs().max()

    names = {path.name for path in out.iterdir()}
    assert {path.name for path in base.iterdir()} | {"args.json"} == names
    stored = json.loads((out / "args.json").read_text())
    assert stored["dataset"] == ["rows.jsonl"]
    assert stored["adapters"] == []
    assert not list(tmp_path.glob(".writing*"))


def test_merged_directory_loads_in_transformers(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    adapter = write_adapter(base, tmp_path / "checkpoint-7")
    out = export.main(exporting("--adapters", adapter, "--merge_lora", "true"))
    theirs = AutoModelForImageTextToText.from_pretrained(out).eval()
    config = ref.config_of("qwen3_vl")
    with torch.no_grad():
        expected = ref.reference_logits(theirs, config, ref.batch_of(config, SAMPLES))
    assert (logits(opened(base, adapter)) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_base_in_half_precision_is_rounded_once(tmp_path: Path) -> None:
    base = save_checkpoint(tmp_path / "base", "qwen3_vl", dtype=torch.bfloat16)
    adapter = write_adapter(base, tmp_path / "adapter")
    out = export.main(exporting("--adapters", adapter, "--merge_lora", "true"))
    wide = export.main(
        exporting(
            "--adapters", adapter, "--merge_lora", "true", "--torch_dtype", "float32", "--output_dir", tmp_path / "w"
        )
    )
    half, full = hf.Checkpoint(out), hf.Checkpoint(wide)
    assert {entry.dtype for entry in half.entries.values()} == {torch.bfloat16}
    assert {entry.dtype for entry in full.entries.values()} == {torch.float32}
    for name in half.names:
        assert torch.equal(half.read(name), full.read(name).bfloat16()), name
    assert (logits(opened(wide)) - logits(opened(base, adapter))).abs().max() < 1e-4
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"


def test_plain_model_in_another_dtype(base: Path, tmp_path: Path) -> None:
    out = export.main(exporting("--model", base, "--torch_dtype", "bfloat16", "--output_dir", tmp_path / "half"))
    before, after = hf.Checkpoint(base), hf.Checkpoint(out)
    assert before.names == after.names
    assert all(torch.equal(after.read(name), before.read(name).bfloat16()) for name in before.names)
    again = export.main(exporting("--model", base, "--output_dir", tmp_path / "same"))
    assert (again / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_shards(base: Path, tmp_path: Path) -> None:
    out = export.main(exporting("--model", base, "--max_shard_size", "200KB", "--output_dir", tmp_path / "shards"))
    assert len(list(out.glob("*.safetensors"))) > 1
    assert torch.equal(logits(opened(out)), logits(opened(base)))
    assert (out / "tokenizer.json").is_file()


def test_existing_directory(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ("--model", base, "--output_dir", out)
    export.main(exporting(*argv))
    with pytest.raises(UserError, match=f"--output_dir {out}: exists already"):
        export.main(exporting(*argv))
    (out / "infer_result").mkdir()
    (out / "infer_result" / "1.jsonl").write_text("{}")
    (out / "model-00002-of-00002.safetensors").write_text("left over")
    export.main(exporting(*argv, "--exist_ok", "true", "--torch_dtype", "bfloat16"))
    assert (out / "infer_result" / "1.jsonl").is_file()
    assert not (out / "model-00002-of-00002.safetensors").exists()
    assert (
        hf.Checkpoint(out).entries["lm_head.weight" if False else hf.Checkpoint(out).names[0]].dtype == torch.bfloat16
    )

    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="is no exported model"):
        export.main(exporting("--model", base, "--output_dir", tmp_path / "notes", "--exist_ok", "true"))
    with pytest.raises(UserError, match="is what is being exported"):
        export.main(exporting("--model", base, "--output_dir", base, "--exist_ok", "true"))


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def half_written(saving: Saving, out_dir: Path, *args: Any, **options: Any) -> None:
        (out_dir / "model.safetensors").write_bytes(b"half")
        raise failure

    out = tmp_path / "out"
    export.main(exporting("--model", base, "--output_dir", out))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(Saving, "write", half_written)
    expected = UserError if isinstance(failure, OSError) else KeyboardInterrupt
    for target in (tmp_path / "new", out):
        with pytest.raises(expected):
            export.main(exporting("--model", base, "--output_dir", target, "--exist_ok", "true"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_pixel_limits_of_training_go_into_the_processor(base: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    adapter = write_adapter(base, tmp_path / "adapter", max_pixels=5000)
    out = export.main(exporting("--adapters", adapter, "--merge_lora", "true"))
    processor = AutoImageProcessor.from_pretrained(out)
    import numpy as np

    pixels = np.zeros((200, 100, 3), dtype=np.uint8)
    grid = processor(images=[pixels], return_tensors="pt")["image_grid_thw"][0].tolist()
    trained = door.describe(run_of("sft", model=str(base), dataset=("x",), max_pixels=5000).model).geometry
    assert tuple(grid) == trained.grid(200, 100)
    assert tuple(grid) != door.describe(run_of("sft", model=str(base), dataset=("x",)).model).geometry.grid(200, 100)
    assert json.loads((out / "args.json").read_text())["max_pixels"] == 5000
    # Whoever loads the directory by its config alone, without args.json, gets the same.
    (out / "args.json").unlink()
    assert door.describe(run_of("infer", model=str(out)).model).geometry.grid(200, 100) == trained.grid(200, 100)


def test_old_adapter_names(tmp_path: Path) -> None:
    """Adapters made when transformers had ``model.layers`` and ``visual`` at the top of this family."""
    from safetensors.torch import load_file, save_file

    base = save_checkpoint(tmp_path / "base", "qwen2_5_vl")
    adapter = write_adapter(base, tmp_path / "adapter", freeze_vit=False)
    out = export.main(exporting("--adapters", adapter, "--merge_lora", "true"))
    file = adapter / "adapter_model.safetensors"
    tensors = {
        name.replace("model.model.language_model.", "model.model.").replace(
            "model.model.visual.", "model.visual."
        ): tensor
        for name, tensor in load_file(file).items()
    }
    assert any(".visual." in name for name in tensors)
    save_file(tensors, file)
    again = export.main(exporting("--adapters", adapter, "--merge_lora", "true", "--output_dir", tmp_path / "again"))
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_push(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(base, tmp_path / "checkpoint-7")
    (adapter / "optimizer.pt").write_bytes(b"state")
    push = ("--push_to_hub", "true", "--hub_model_id", "me/formulas", "--hub_token", TOKEN)
    with running() as hub:
        assert export.main(exporting("--adapters", adapter, *push), endpoint=hub.url) == adapter
        assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors", "args.json"}
        assert not (tmp_path / "checkpoint-7-merged").exists()
        hub.files.clear()
        out = export.main(exporting("--adapters", adapter, "--merge_lora", "true", *push), endpoint=hub.url)
        assert set(hub.files) == {path.name for path in out.iterdir()}
        assert hub.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
        hub.files.clear()
        assert export.main(exporting("--model", base, *push), endpoint=hub.url) == base
        assert "config.json" in hub.files
    printed = capsys.readouterr()
    assert "pushed to" in printed.out
    assert TOKEN not in printed.out + printed.err
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_dry_run_writes_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export.main(exporting("--model", base, "--output_dir", tmp_path / "out", "--dry_run", "true"))
    assert not out.exists()
    assert f"would write {out}" in capsys.readouterr().out


def test_nothing_to_do(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "a")
    with pytest.raises(UserError, match="nothing to do; add --merge_lora true or --push_to_hub true"):
        export.main(exporting("--adapters", adapter))
    with pytest.raises(UserError, match="one adapter is exported at a time"):
        export.main(exporting("--adapters", adapter, adapter, "--merge_lora", "true"))


def test_wrong_base_is_one_sentence(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(base, tmp_path / "a")
    other = save_checkpoint(tmp_path / "other", "qwen3")
    with pytest.raises(UserError, match="wrong --model"):
        export.main(exporting("--adapters", adapter, "--model", other, "--merge_lora", "true"))


def test_module_is_untouched_after_merge(base: Path, tmp_path: Path) -> None:
    """The merged module is a plain one: what is saved has the names of the base, nothing of an adapter."""
    adapter = write_adapter(base, tmp_path / "a")
    out = export.main(exporting("--adapters", adapter, "--merge_lora", "true"))
    assert hf.Checkpoint(out).names == hf.Checkpoint(base).names
    assert all(type(module) is not nn.ModuleDict or "default" not in module for module in opened(out).modules())


def test_a_merge_holds_some_rows_at_a_time(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes asks for rows of a tensor, writes them and asks for the next; the model never has memory."""
    alive: list[int] = []
    held: list[Any] = []
    sizes: list[int] = []
    read = hf.reader

    def watched(*args: Any) -> Any:
        inner = read(*args)

        def one(name: str, part: Any) -> torch.Tensor:
            value = inner(name, part)
            held.append(weakref.ref(value))
            sizes.append(value.numel())
            alive.append(sum(reference() is not None for reference in held))
            return value

        return one

    monkeypatch.setattr(hf, "reader", watched)
    monkeypatch.setattr(export, "REGION", 256)
    adapter = write_adapter(base, tmp_path / "adapter")
    export.main(exporting("--adapters", adapter, "--merge_lora", "true", "--output_dir", tmp_path / "out"))
    longest = max(entry.shape[-1] for entry in hf.Checkpoint(base).entries.values())
    assert max(sizes) <= max(256, longest)
    assert len(alive) > 100 and max(alive) <= 2 * files.WORKERS
