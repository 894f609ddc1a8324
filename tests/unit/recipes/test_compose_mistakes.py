"""``tessera compose``: one clear line for every mistake, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tessera.config.errors import UserError
from tests.models import make_model_dir
from tests.unit.recipes.conftest import FAMILIES
from tests.unit.recipes.test_compose import config_of, run, text_logits


def damaged(models: Path, place: Path, name: str, change: Any) -> Path:
    shutil.copytree(models / name, place)
    state = load_file(place / "model.safetensors")
    change(state)
    save_file(state, place / "model.safetensors", {"format": "pt"})
    return place


DAMAGES = [
    (lambda state: state.pop("model.layers.1.self_attn.q_norm.weight"), "1 missing: model.layers.1.self_attn.q_norm"),
    (lambda state: state.update(extra=torch.ones(1)), "1 unexpected: extra"),
    (lambda state: state.update({"model.norm.weight": torch.ones(3)}), "1 of another shape: model.norm.weight"),
    (lambda state: state.pop("lm_head.weight"), "1 missing: lm_head.weight"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_every_source_tensor_is_accounted_for(models: Path, tmp_path: Path, change: Any, message: str) -> None:
    language = damaged(models, tmp_path / "llm", "qwen3", change)
    with pytest.raises(UserError, match=message) as caught:
        run("--vision", models / "qwen2_5_vl", "--llm", language, "--output_dir", tmp_path / "out")
    assert f"--llm {language}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_differs_is_refused(models: Path, tmp_path: Path) -> None:
    def untie(state: dict[str, Tensor]) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1

    language = damaged(models, tmp_path / "llm", "qwen2", untie)
    with pytest.raises(UserError, match="ties the head to the embedding but lm_head.weight differs"):
        run("--vision", models / "qwen2_5_vl", "--llm", language, "--output_dir", tmp_path / "out")
    same = damaged(
        models,
        tmp_path / "same",
        "qwen2",
        lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}),
    )
    out = run("--vision", models / "qwen2_5_vl", "--llm", same, "--output_dir", tmp_path / "out")
    assert "left out: a copy of model.embed_tokens.weight" in (out / "README.md").read_text()
    assert torch.equal(text_logits(out), text_logits(same))


def test_an_aligner_of_another_size_is_refused(models: Path, tmp_path: Path) -> None:
    wide = make_model_dir(tmp_path / "wide", "qwen3", hidden_size=96)
    with pytest.raises(UserError) as caught:
        run(
            *("--vision", models / "qwen2_5_vl", "--llm", wide, "--aligner", models / "qwen2_5_vl"),
            *("--output_dir", tmp_path / "out"),
        )
    assert f"--aligner {models / 'qwen2_5_vl'}: model.visual.merger.mlp.2.weight is [64, 128]" in str(caught.value)
    assert "needs [96, 128]; --aligner init makes a new one" in str(caught.value)
    out = run("--vision", models / "qwen2_5_vl", "--llm", wide, "--output_dir", tmp_path / "out")
    assert torch.equal(text_logits(out), text_logits(wide))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vision", "{qwen3}", "--llm", "{qwen3}"], "no vision tower"),
        (["--vision", "{glm4v_moe}", "--llm", "{qwen3}"], "the tower of model_type 'glm4v_moe' cannot be taken"),
        (["--vision", "{qwen3_vl}", "--llm", "{glm4v_moe}"], "the language model of 'glm4v_moe' cannot be taken"),
        (["--vision", "{qwen3_vl}", "--llm", "{mamba}"], "model_type 'mamba' is not supported"),
        (["--vision", "{qwen3_vl}", "--llm", "/not/there"], "--llm /not/there: no such directory"),
        (["--vision", "/not/there", "--llm", "{qwen3}"], "--vision /not/there: no such directory"),
        (["--vision", "{qwen3_vl}", "--llm", "{qwen3}", "--aligner", "/no"], "--aligner /no: no such directory"),
        (["--vision", "{qwen3_vl}", "--llm", "{qwen3}", "--aligner", "{qwen3}"], "no vision tower"),
        (["--vision", "{qwen3_vl}"], "--llm is required"),
        ([], "--vision and --llm are required"),
        (["--vision", "{qwen3_vl}", "--config", "{qwen3}"], "--config makes a model of random weights"),
        (["--config", "/not/there"], "--config /not/there: no such file"),
        (["--vision", "{empty}", "--llm", "{qwen3}"], "expected model.safetensors"),
        (["--vision", "{qwen3_vl}", "--llm", "{wordless}"], "tokenizer.json: no such file"),
    ],
)
def test_mistakes(models: Path, tmp_path: Path, words: list[str], message: str) -> None:
    places = {name: models / name for name in FAMILIES} | {n: tmp_path / n for n in ("mamba", "empty", "wordless")}
    if "{glm4v_moe}" in words:
        places["glm4v_moe"] = make_model_dir(tmp_path / "glm4v_moe", "glm4v_moe")
    for name, source in (("mamba", "qwen3"), ("empty", "qwen3_vl"), ("wordless", "qwen3")):
        shutil.copytree(models / source, places[name])
    (places["mamba"] / "config.json").write_text('{"model_type": "mamba"}')
    (places["empty"] / "model.safetensors").unlink()
    (places["wordless"] / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=message):
        run(*(word.format(**places) for word in words), "--output_dir", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_what_is_there_already(models: Path, tmp_path: Path) -> None:
    words = ["--vision", models / "qwen3_vl", "--llm", models / "qwen3"]
    with pytest.raises(UserError, match="--output_dir is required"):
        run(*words)
    out = run(*words, "--output_dir", tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        run(*words, "--output_dir", out)
    run(*words[:2], "--llm", models / "llama", "--output_dir", out, "--exist_ok", "true")
    assert config_of(out)["model_type"] == "composite" and (out / "notes.txt").read_text() == "mine"
    assert "llama" in (out / "README.md").read_text()
    with pytest.raises(UserError, match="is one of the parts"):
        run(*words, "--output_dir", models / "qwen3", "--exist_ok", "true")


def test_a_full_disk_leaves_nothing(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = [0], os.pwrite

    def limited(descriptor: int, data: Any, offset: int) -> int:
        written[0] += len(data)
        if written[0] > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(UserError, match="writing failed: No space left on device"):
        run("--vision", models / "qwen3_vl", "--llm", models / "qwen3", "--output_dir", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_truncated_part_is_named(models: Path, tmp_path: Path) -> None:
    language = tmp_path / "llm"
    shutil.copytree(models / "qwen3", language)
    file = language / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is cut short"):
        run("--vision", models / "qwen3_vl", "--llm", language, "--output_dir", tmp_path / "out")
