"""Conversions from and to Megatron: how often they read, what lies beside the weights, and adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tessera.adapt import lora
from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.resolve import resolve, run_of
from tessera.config.run import Run
from tessera.recipes import export
from tessera.weights.megatron import checkpoint
from tests.models import make_model_dir
from tests.unit.recipes.test_export import write_adapter

LIMIT = 20_000
"""Pixels, of an image that has more."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, the same for Megatron, and an adapter in peft's format and in Megatron's."""
    here = tmp_path_factory.mktemp("made")
    model = make_model_dir(here / "model", "qwen2_5_vl")
    adapter = write_adapter(model, here / "adapter")
    converted("--model", model, "--to_mcore", "true", "--output_dir", here / "mcore")
    words = ("--to_mcore", "true", "--merge_lora", "false", "--output_dir", here / "theirs")
    converted("--model", model, "--adapters", adapter, *words)
    return here


def converting(*words: str | Path) -> Run:
    return resolve(["export", *map(str, words)], {})


def converted(*words: str | Path) -> Path:
    return export.main(converting(*words))


def grid(model: Path, **limits: Any) -> tuple[int, ...]:
    """Of an image of 300 x 200, to whoever reads the directory without ``args.json``."""
    (model / "args.json").unlink(missing_ok=True)
    return tuple(door.describe(run_of("infer", model=str(model), **limits).model).geometry.grid(300, 200))


def test_limits_go_into_the_processor_both_ways(made: Path, tmp_path: Path) -> None:
    limited = grid(made / "model", max_pixels=LIMIT)
    assert limited != grid(made / "model")
    more = ("--max_pixels", str(LIMIT))
    there = converted("--model", made / "model", "--to_mcore", "true", *more, "--output_dir", tmp_path / "there")
    back = converted("--mcore_model", made / "mcore", "--to_hf", "true", *more, "--output_dir", tmp_path / "back")
    again = converted("--mcore_model", made / "mcore", "--to_mcore", "true", *more, "--output_dir", tmp_path / "again")
    assert [grid(out) for out in (there, back, again)] == [limited] * 3


@pytest.mark.parametrize("target", ["--to_hf", "--to_mcore"])
def test_a_megatron_checkpoint_is_read_once(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    read: list[Path] = []
    real = checkpoint.assemble

    def assemble(found: Any, *args: Any) -> Any:
        read.append(found.path)
        return real(found, *args)

    monkeypatch.setattr(checkpoint, "assemble", assemble)
    converted("--mcore_model", made / "mcore", target, "true", "--output_dir", tmp_path / "out")
    assert read == [made / "mcore" / "iter_0000001"]


@pytest.mark.parametrize("adapter", ["adapter", "theirs"])
@pytest.mark.parametrize("model", ["model", "mcore"])
def test_a_merge_is_the_one_of_export(made: Path, tmp_path: Path, model: str, adapter: str) -> None:
    words = ("--model", made / "model", "--adapters", made / "adapter", "--merge_lora", "true")
    expected = converted(*words, "--output_dir", tmp_path / "expected")
    kind = "--adapters" if adapter == "adapter" else "--mcore_adapters"
    source = ("--mcore_model" if model == "mcore" else "--model", made / model, kind, made / adapter)
    compared = ("--test_convert_precision", "true")
    files = sorted(path.name for path in expected.iterdir())
    if (model, adapter) != ("model", "adapter"):  # that is no conversion
        out = converted(*source, "--to_hf", "true", *compared, "--output_dir", tmp_path / "hf")
        assert sorted(path.name for path in out.iterdir()) == files
        assert same(out, expected)
    mcore = converted(*source, "--to_mcore", "true", *compared, "--output_dir", tmp_path / "mcore")
    assert not list(mcore.glob(".*"))
    assert same(converted("--mcore_model", mcore, "--to_hf", "true", "--output_dir", tmp_path / "back"), expected)


def same(one: Path, two: Path) -> bool:
    first, second = door.Checkpoint(one), door.Checkpoint(two)
    return set(first.names) == set(second.names) and all(
        torch.equal(first.read(name), second.read(name)) for name in first.names
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--model", "model", "--adapters", "adapter", "--to_mcore", "true"),
        ("--model", "model", "--mcore_adapters", "theirs", "--to_hf", "true"),
        ("--mcore_model", "mcore", "--mcore_adapters", "theirs", "--to_mcore", "true"),
    ],
    ids=["to_mcore", "to_hf", "again"],
)
@pytest.mark.parametrize("wrong", ["left out", "twice"])
def test_a_wrong_merge_is_found(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], wrong: str
) -> None:
    real = lora.merged_weight

    def merged(layer: Any, weight: torch.Tensor, *rows: slice) -> torch.Tensor:
        return weight.float() if wrong == "left out" else real(layer, real(layer, weight, *rows), *rows)

    monkeypatch.setattr(lora, "merged_weight", merged)
    words = tuple(str(made / word) if not word.startswith("--") and word != "true" else word for word in words)
    out = ("--output_dir", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"first differs from .* in model\.language_model\.layers\.0: relative drift"):
        converted(*words, "--test_convert_precision", "true", *out)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_merges_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "fill", lambda *_: pytest.fail("merged"))
    words = ("--model", made / "model", "--adapters", made / "adapter", "--to_mcore", "true", "--dry_run", "true")
    converted(*words, "--output_dir", tmp_path / "out")
    with pytest.raises(UserError, match="--target_tensor_parallel_size 3: does not divide"):
        converted(*words, "--target_tensor_parallel_size", "3", "--output_dir", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_kept_in_either_format(made: Path, tmp_path: Path) -> None:
    kept = ("--model", made / "model", "--merge_lora", "false")
    back = converted(*kept, "--mcore_adapters", made / "theirs", "--to_hf", "true", "--output_dir", tmp_path / "back")
    ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (made / "adapter", back))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert door.read_json(back / "adapter_config.json")["base_model_name_or_path"] == str(made / "model")
    flags = ("--mcore_format", "torch_dist", "--target_tensor_parallel_size", "2")
    again = converted(
        *kept, "--mcore_adapters", made / "theirs", "--to_mcore", "true", *flags, "--output_dir", tmp_path / "again"
    )
    assert {path.name for path in again.iterdir()} >= {"iter_0000001", "adapter_config.json", "args.json"}
    no = ("--to_hf", "true", "--output_dir", tmp_path / "no", "--adapters", made / "adapter")
    with pytest.raises(UserError, match="is in peft's format already"):
        converted("--mcore_model", made / "mcore", "--merge_lora", "false", *no)
    with pytest.raises(UserError, match="one adapter is exported at a time"):
        converted("--model", made / "model", "--mcore_adapters", made / "theirs", *no)
    assert not (tmp_path / "no").exists()


def test_types_of_the_original_are_narrower(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a conversion says that it rounded is expected to drift."""
    half = make_model_dir(tmp_path / "half", "qwen2_5_vl", dtype=torch.bfloat16)
    mcore = shutil.copytree(made / "mcore", tmp_path / "mcore")
    (mcore / "hf_layout.json").unlink()
    words = ("--mcore_model", mcore, "--hf_dir", half, "--to_hf", "true", "--test_convert_precision", "true")
    out = converted(*words, "--output_dir", tmp_path / "out")
    assert json.loads((out / "config.json").read_text()) == json.loads((half / "config.json").read_text())
    shown = capsys.readouterr().out
    assert "rounded to the type" in shown and "precision  equal within 5e-02" in shown
