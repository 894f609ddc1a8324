"""NVLM's page of Megatron-LM, step by step, at toy size: converted, combined, trained, spread over stages, asked.

What is different: the program's name, where the models lie, tensor size 2 instead of 8, and how long it trains.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.command import rows_of, run_dir, shell, tessera, works
from tests.models import make_model_dir
from tests.resume.job import tensors
from tests.toys import chats, make_images, write_rows

EXAMPLES = "examples/multimodal"
SHORT = (
    "--tensor_model_parallel_size 2 --micro_batch_size 1 --global_batch_size 4 --train_samples 8 --lr_decay_samples 8"
)
SHORT += " --lr_warmup_samples 0 --log_interval 1 --lr 1e-2 --torch_dtype float32"


def repositories(here: Path) -> None:
    """What lies on a hub: the tower's and the language model's repositories, and one that has all the settings."""
    whole = make_model_dir(here / "NVLM-D-72B", "NVLM_D", num_hidden_layers=4)
    config = json.loads((whole / "config.json").read_text())
    config["vision_config"]["num_dummy_heads"] = 0
    config["llm_config"]["num_hidden_layers"] = 4
    shutil.rmtree(whole)
    (here / "blueprint.json").write_text(json.dumps(config))
    made = make_model_dir(here / "NVLM-D-72B", "NVLM_D")
    (made / "config.json").write_text(json.dumps(config))
    works("compose", "--config", made, "--output_dir", here / "all", "--torch_dtype", "float32")
    held = load_file(here / "all" / "model.safetensors")
    for name, prefix, part in (
        ("InternViT", "vision_model.", config["vision_config"]),
        ("Qwen2-72B-Instruct", "language_model.", config["llm_config"]),
    ):
        (here / name).mkdir()
        own = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
        save_file(own, here / name / "model.safetensors", {"format": "pt"})
        (here / name / "config.json").write_text(json.dumps(part))
    shutil.rmtree(made)
    (here / "all" / "model.safetensors").unlink()
    (here / "all").rename(made)


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.timeout(900)
def test_from_two_repositories_to_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repositories(tmp_path)
    works(
        "megatron", f"{EXAMPLES}/model_converter/internvit_converter.py", "--output-dir", "vit", "--use-te",
        "--tensor-parallel-size", "2", "--model-name", "InternViT",
    )  # fmt: skip
    works(
        "megatron", "tools/checkpoint/convert.py", "--bf16", "--model-type", "GPT", "--loader", "llama_mistral",
        "--saver", "mcore", "--target-tensor-parallel-size", "2", "--checkpoint-type", "hf", "--load-dir",
        "Qwen2-72B-Instruct", "--save-dir", "lm", "--tokenizer-model", "NVLM-D-72B", "--saver-transformer-impl",
        "transformer_engine", "--model-size", "qwen2.5-72Bf",
    )  # fmt: skip
    done = works("megatron", f"{EXAMPLES}/combine_lm_vision_checkpoints.sh", "lm", "vit", "combined", "nvlm")
    assert "of the tower on the first stage" in done.out
    assert {"mp_rank_00", "mp_rank_01"} == {path.name for path in Path("combined").glob("iter_*/mp_rank_*")}

    rows = write_rows("rows.jsonl", chats(12, make_images("images", [(64, 48), (120, 60)])))
    load = "--hf_dir NVLM-D-72B --dataset"
    script = f"{EXAMPLES}/nvlm/pretrain_qwen20_72b_internvit_6b.sh"
    text = f"tessera megatron {script} --load combined {load} {rows} --save pre --nproc_per_node 2 {SHORT}"
    done = shell(text, tmp_path, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err[-3000:]
    pre = run_dir(Path("pre"))
    assert {"mp_rank_00", "mp_rank_01"} == {path.name for path in pre.glob("iter_0000002/mp_rank_*")}
    first = tensors(pre / "checkpoint-2")
    language = load_file("Qwen2-72B-Instruct/model.safetensors")
    for name, value in language.items():  # only the projection was trained
        assert torch.equal(first[f"language_model.{name}"], value.bfloat16().float()), name

    words = ("--tensor-parallel", "2")
    works(
        "megatron", f"{EXAMPLES}/nvlm/pp_checkpoint_converter.py", "--input", pre, "--input-pipeline-parallel", "1",
        "--output", "pp4", "--output-pipeline-parallel", "4", *words,
    )  # fmt: skip
    assert len(list(Path("pp4").glob("iter_*/mp_rank_0[01]_00[0-3]"))) == 8
    script = f"{EXAMPLES}/nvlm/sft_qwen20_72b_internvit_6b.sh"
    text = f"tessera megatron {script} --load pp4 {load} {rows} --save sft --nproc_per_node 8 {SHORT}"
    done = shell(text, tmp_path, OMP_NUM_THREADS="1")
    assert done.code == 0, done.err[-3000:]
    sft = run_dir(Path("sft"))
    assert len([row for row in rows_of(sft / "logging.jsonl") if "loss" in row]) == 2
    works(
        "megatron", f"{EXAMPLES}/nvlm/pp_checkpoint_converter.py", "--input", sft, "--input-pipeline-parallel", "4",
        "--output", "pp1", "--output-pipeline-parallel", "1", *words,
    )  # fmt: skip
    assert {"mp_rank_00", "mp_rank_01"} == {path.name for path in Path("pp1").glob("iter_*/mp_rank_*")}
    works("export", "--mcore_model", "pp1", "--to_hf", "true", "--hf_dir", "NVLM-D-72B", "--output_dir", "hf")
    last, after = tensors(sft / "checkpoint-2"), tensors(Path("hf"))
    assert last.keys() == after.keys() and all(torch.equal(last[name], after[name]) for name in last)

    truths = [{"image_id": Path(path).name, "question_id": at, "question": "What?", "answers": ["a"]}
              for at, path in enumerate(sorted(Path("images").iterdir()))]  # fmt: skip
    Path("truths.json").write_text(json.dumps(truths))
    script = f"{EXAMPLES}/nvlm/run_text_generation_qwen20_72b_internvit_6b.sh"
    asked = ("--input-image-path", "images", "--gt-path", "truths.json", "--task", "TextVQA", "--hf_dir", "NVLM-D-72B")
    works("megatron", script, "--model-path", "pp1", "--output-path", "answers/tiled", "--use-tiling", *asked)
    works("megatron", script, "--model-path", "pp1", "--output-path", "answers/whole", *asked)
    for name in ("tiled", "whole"):
        lines = rows_of(Path(f"answers/{name}-TextVQA-dprank=0-partition=0.jsonl"))
        assert [line["sample_id"] for line in lines] == [0, 1] and all("answer" in line for line in lines)


def test_without_a_projection_training_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    repositories(tmp_path)
    common = ("--to_mcore", "true", "--mcore_format", "torch", "--mcore_dialect", "lm")
    works("export", "--model", "InternViT", *common, "--output_dir", "vit")
    works("export", "--model", "Qwen2-72B-Instruct", *common, "--output_dir", "lm")
    works("export", "--mcore_model", "lm", "--mcore_vision_model", "vit", *common, "--output_dir", "combined")
    done = tessera("infer", "--model", "combined", "--hf_dir", "NVLM-D-72B")
    assert done.code == 1 and "missing: vision_projection." in done.error
    assert tessera("export", "--mcore_model", "combined", "--to_hf", "true", "--output_dir", "x").code == 1
    assert not Path("x").exists()
