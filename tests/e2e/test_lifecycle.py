"""Train an adapter, export, infer: the merged directory answers as the adapter did, here and in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.e2e.command import QUICK, checkpoint, rows_of, run_dir, works
from tests.models import make_model_dir
from tests.toys import chats, make_images, write_rows

SPLIT = ("--split_dataset_ratio", "0.3", "--max_steps", "4", "--gradient_accumulation_steps", "2")


def answers(path: Path) -> list[str]:
    return [row["response"] for row in rows_of(path)]


def test_the_merged_model_answers_as_the_adapter(tmp_path: Path) -> None:
    model = make_model_dir(tmp_path / "model", "qwen3_vl")
    rows = write_rows(tmp_path / "rows.jsonl", chats(20, make_images(tmp_path / "images", [(64, 48), (100, 60)])))
    train = ("sft", "--model", model, "--dataset", rows, *SPLIT, "--learning_rate", "1e-2", *QUICK)
    works(*train, "--output_dir", tmp_path / "out", "--freeze_vit", "false", "--freeze_aligner", "false")
    adapter = checkpoint(tmp_path / "out")

    asked = ("--load_data_args", "true", "--temperature", "0", "--max_new_tokens", "8", "--torch_dtype", "float32")
    works("infer", "--model", model, *asked[2:], "--val_dataset", rows, "--result_path", tmp_path / "base.jsonl")
    works("infer", "--adapters", adapter, *asked, "--result_path", tmp_path / "adapter.jsonl")
    done = works("export", "--adapters", adapter, "--merge_lora", "true", "--output_dir", tmp_path / "merged")
    assert "exported to" in done.out
    works("infer", "--model", tmp_path / "merged", *asked, "--result_path", tmp_path / "merged.jsonl", "--stream", "1")

    found = rows_of(tmp_path / "adapter.jsonl")
    held = rows_of(run_dir(tmp_path / "out") / "val_dataset.jsonl")
    assert [row["labels"] for row in found] == [row["messages"][-1]["content"] for row in held]
    assert len(found) == 6
    assert answers(tmp_path / "merged.jsonl") == answers(tmp_path / "adapter.jsonl")
    before = {row["messages"][0]["content"]: row["response"] for row in rows_of(tmp_path / "base.jsonl")}
    assert any(before[row["messages"][0]["content"]] != row["response"] for row in found)  # something was learnt

    from transformers import AutoModelForImageTextToText, AutoTokenizer

    theirs, loading = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = next(row for row in found if not row.get("images"))
    prompt = tokenizer.apply_chat_template(text["messages"][:-1], add_generation_prompt=True, tokenize=False)
    tokens = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        out = theirs.generate(**tokens, max_new_tokens=8, do_sample=False)
    reply = tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply == text["response"]

    page = works("report", run_dir(tmp_path / "out")).out.strip().removeprefix("report: ")
    assert "Predictions on validation data" in Path(page).read_text()


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    """The files that docs/observing.md and docs/checkpoints.md list are there, and no others."""
    model = make_model_dir(tmp_path / "model", "qwen3")
    rows = write_rows(tmp_path / "rows.jsonl", [*chats(20), {"messages": []}])
    flags = ("--split_dataset_ratio", "0.2", "--max_steps", "2", "--save_steps", "1", "--eval_steps", "1")
    works("sft", "--model", model, "--dataset", rows, *flags, *QUICK[2:], "--output_dir", tmp_path / "out")
    run = run_dir(tmp_path / "out")
    found = {path.relative_to(run).parts[0] for path in run.rglob("*") if path.is_file()}
    pages = Path(__file__).parents[2] / "docs"
    listed = (pages / "observing.md").read_text() + (pages / "checkpoints.md").read_text()
    assert found == {
        *("args.json", "logging.jsonl", "run_facts.json", "skipped.jsonl", "val_dataset.jsonl", "images", "runs"),
        *("checkpoint-1", "checkpoint-2"),
    }
    named = {
        f"`{name.replace('-1', '-N').replace('-2', '-N')}{'/' if (run / name).is_dir() else ''}`" for name in found
    }
    assert not [name for name in named if name not in listed]
    inner = {path.name for path in (run / "checkpoint-2").iterdir()}
    assert not [name for name in inner if f"`{name}" not in listed]
    assert json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["step"] == 2
