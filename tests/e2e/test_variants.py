"""Every way of training that has a flag, and every kind of file, for two steps each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.e2e.command import QUICK, checkpoint, losses, works
from tests.models import make_model_dir
from tests.resume.job import tensors
from tests.toys import chats, make_images, write_rows

FLAGS = {
    "lora": ["--target_modules", "q_proj", "v_proj"],
    "dora": ["--use_dora", "true"],
    "rslora": ["--use_rslora", "true", "--lora_rank", "4", "--lora_bias", "all"],
    "lora+": ["--lorap_lr_ratio", "16"],
    "lora-everywhere": ["--freeze_vit", "false", "--freeze_aligner", "false", "--vit_lr", "1e-5"],
    "saved": ["--modules_to_save", "embed_tokens"],
    "qlora": ["--quant_method", "bnb", "--quant_bits", "4"],
    "qlora-8": ["--quant_method", "bnb", "--quant_bits", "8"],
    "full": ["--train_type", "full", "--freeze_vit", "false", "--freeze_aligner", "false", "--aligner_lr", "1e-3"],
    "muon": ["--train_type", "full", "--optim", "muon"],
    "wsd": ["--lr_scheduler_type", "warmup_stable_decay", "--warmup_steps", "1", "--min_lr", "1e-6"],
    "linear": ["--lr_scheduler_type", "linear", "--optim", "adamw_torch", "--max_grad_norm", "0"],
    "packed": ["--packing", "true", "--packing_length", "256", "--max_length", "256"],
    "bf16": ["--torch_dtype", "bfloat16", "--gradient_checkpointing", "false"],
    "selective": ["--recompute_granularity", "selective", "--recompute_modules", "core_attn", "mlp", "layernorm"],
    "groups": ["--recompute_method", "uniform", "--recompute_num_layers", "2", "--cpu_offloading", "true"],
    "offload": [
        "--deepspeed",
        "zero3_offload",
        "--gradient_checkpointing",
        "false",
        "--activation_cpu_offload",
        "true",
    ],
    "last-round": ["--loss_scale", "last_round", "--truncation_strategy", "right", "--max_length", "64"],
    "pil": ["--image_resize", "pil", "--max_pixels", "4096"],
    "eval": ["--split_dataset_ratio", "0.2", "--eval_steps", "1", "--save_total_limit", "1", "--save_steps", "1"],
}
TEXT = ("qwen2", "qwen3", "llama", "qwen3_moe")
SEEING = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v_moe", "internvl", "internvl_chat", "NVLM_D")
SHORT = ("--max_steps", "2", "--gradient_accumulation_steps", "2", *QUICK)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every family and one dataset with images and one without."""
    root = tmp_path_factory.mktemp("variants")
    for name in (*TEXT, *SEEING):
        make_model_dir(root / name, name)
    make_images(root / "images", [(64, 48), (100, 60)])
    images = [str(path) for path in sorted((root / "images").iterdir())]
    write_rows(root / "seen.jsonl", chats(12, images))
    write_rows(root / "text.jsonl", chats(12))
    return root


def train(shared: Path, out: Path, *more: str | Path, model: str = "qwen3_vl", data: Path | None = None) -> Path:
    """Two steps; the last checkpoint. The loss is a number and the weights are too."""
    rows = data or shared / ("text.jsonl" if model in TEXT else "seen.jsonl")
    verb, *flags = more if more and more[0] == "pt" else ("sft", *more)
    works(verb, "--model", shared / model, "--dataset", rows, *SHORT, "--output_dir", out, *flags)
    found = losses(out)
    assert len(found) == 2 and all(0 < loss < 20 for loss in found)
    last = checkpoint(out)
    assert last.name == "checkpoint-2"
    assert all(torch.isfinite(value).all() for value in tensors(last).values())
    return last


@pytest.mark.parametrize("way", FLAGS)
def test_ways_to_train(shared: Path, tmp_path: Path, way: str) -> None:
    last = train(shared, tmp_path, *FLAGS[way])
    full = "full" in FLAGS[way]
    assert (last / "model.safetensors").exists() == full
    assert (last / "adapter_model.safetensors").exists() != full
    if full:
        before, after = tensors(shared / "qwen3_vl"), tensors(last)
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("model", [*TEXT, *(name for name in SEEING if name != "qwen3_vl")])
def test_families(shared: Path, tmp_path: Path, model: str) -> None:
    train(shared, tmp_path / "lora", model=model)
    last = train(
        shared, tmp_path / "full", "--train_type", "full", "--packing", "true", "--max_length", "256", model=model
    )
    works("infer", "--model", last, "--val_dataset", shared / "text.jsonl", "--max_new_tokens", "2", *QUICK[2:4])


@pytest.mark.parametrize("model", ["qwen3", "qwen3_vl"])
def test_pretraining_on_plain_text(shared: Path, tmp_path: Path, model: str) -> None:
    rows: list[dict[str, object]] = [
        {"text": f"The quick brown fox number {n} jumps over the lazy dog."} for n in range(8)
    ]
    if model == "qwen3_vl":
        image = str(next((shared / "images").iterdir()))
        rows += [
            {"messages": [{"role": "assistant", "content": f"<image>is {n}"}], "images": [image]} for n in range(4)
        ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    train(
        shared,
        tmp_path / "out",
        "pt",
        "--train_type",
        "full",
        "--packing",
        "true",
        "--max_length",
        "128",
        model=model,
        data=data,
    )


def frames(shared: Path, folder: Path) -> Path:
    images = [str(path) for path in sorted((shared / "images").iterdir())]
    turns = [{"role": "user", "content": "<video>What happens?"}, {"role": "assistant", "content": "Colours change."}]
    return write_rows(folder / "rows.jsonl", [{"messages": turns, "videos": [images[:1] * 4]}] * 4)


def as_json(shared: Path, folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(chats(4)))
    return folder / "rows.json"


def as_csv(shared: Path, folder: Path) -> Path:
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "response"])
        writer.writerows([[f'What is "{n}", then?', f"{n}\nof course"] for n in range(4)])
    return folder / "rows.csv"


def as_parquet(shared: Path, folder: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": next((shared / "images").iterdir()).read_bytes(), "path": None}
    columns = {
        "instruction": ["Read."] * 4,
        "input": [""] * 4,
        "output": ["12", "3", "4", "5"],
        "images": [[image]] * 4,
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return folder / "rows.parquet"


def saved(shared: Path, folder: Path) -> Path:
    import datasets

    turns = [{"from": "human", "value": "What is 1 + 1?"}, {"from": "gpt", "value": "2"}]
    datasets.Dataset.from_list([{"conversations": turns}] * 4).save_to_disk(folder / "rows")
    return folder / "rows"


@pytest.mark.parametrize("write", [frames, as_json, as_csv, as_parquet, saved])
def test_kinds_of_files(shared: Path, tmp_path: Path, write: Callable[[Path, Path], Path]) -> None:
    train(shared, tmp_path / "out", data=write(shared, tmp_path))


def test_a_file_of_flags(shared: Path, tmp_path: Path) -> None:
    flags = {
        "model": str(shared / "qwen3"),
        "dataset": [str(shared / "text.jsonl")],
        "output_dir": str(tmp_path / "out"),
    }
    pairs = zip(SHORT[::2], SHORT[1::2], strict=True)
    flags |= {name.removeprefix("--"): value for name, value in pairs}
    (tmp_path / "run.json").write_text(json.dumps(flags))
    works("sft", tmp_path / "run.json", "--lora_rank", "2")
    assert json.loads((checkpoint(tmp_path / "out") / "adapter_config.json").read_text())["r"] == 2
    assert "tokens per row" in works("data", "--model", shared / "qwen3", "--dataset", shared / "text.jsonl").out


def test_long_documents_are_split(shared: Path, tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"word{n}" for n in range(40 + 10 * row))} for row in range(4)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    train(shared, out, "pt", "--truncation_strategy", "split", "--max_length", "32", model="qwen3", data=data)
    assert not (next(out.iterdir()) / "skipped.jsonl").exists()
    pieces = works("data", "--model", shared / "qwen3", "--dataset", data, "--truncation_strategy", "split",
                   "--max_length", "32", "--loss_scale", "all").out  # fmt: skip
    assert "tokens per row: " in pieces and "max 32" in pieces
