"""A composed model goes all the way: put together, its aligner trained, then everything, then asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.command import QUICK, checkpoint, losses, script, shell, works
from tests.e2e.test_documents import STAGE
from tests.models import make_model_dir
from tests.resume.job import tensors
from tests.toys import chats, make_images, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed model that no published family is, and rows with images."""
    root = tmp_path_factory.mktemp("composed")
    make_model_dir(root / "vlm", "qwen2_5_vl", dtype=torch.bfloat16, seed=1)
    make_model_dir(root / "llm", "qwen3", dtype=torch.bfloat16, hidden_size=96, seed=2)
    words = ["--vision", root / "vlm", "--llm", root / "llm", "--output_dir", root / "new_vl_model"]
    done = works("compose", *words)
    assert "transformers cannot express it" in done.out and done.err == ""
    write_rows(root / "xxx" / "rows.jsonl", chats(12, make_images(root / "images", [(64, 48), (100, 60)])))
    return root


def test_two_stages_and_an_answer(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Document 003, steps 1 to 3: the commands of its two stages as they are, for one process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "xxx").symlink_to(place / "xxx")
    alone = {"NPROC_PER_NODE=8": "NPROC_PER_NODE=1", "$WORLD_SIZE": "1", "$RANK": "0"}

    def stage(model: Path, output: str, freeze: str) -> Path:
        text = STAGE.format(model=model.name, freeze=freeze).replace("/path/to", str(model.parent))
        for there, here in {**alone, "output_dir output": f"output_dir {output}"}.items():
            text = text.replace(there, here)
        done = script(text, "--max_steps", "2", "--report_to", "none", "--learning_rate", "1e-2")
        assert done.code == 0, done.err
        return checkpoint(tmp_path / output)

    first = stage(place / "new_vl_model", "one", "true")
    before, after = tensors(place / "new_vl_model"), tensors(first)
    assert before.keys() == after.keys()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved and all("merger" in name for name in moved)

    second = stage(first, "two", "false")
    after = tensors(second)
    assert before.keys() == after.keys() and all(value.isfinite().all() for value in after.values())
    words = ["--val_dataset", place / "xxx" / "rows.jsonl", "--val_dataset_sample", "3", "--max_new_tokens", "4"]
    assert works("infer", "--model", second, *words).out.count("[RESPONSE]") == 3


def test_saved_untrained_it_is_the_same(place: Path, tmp_path: Path) -> None:
    works("export", "--model", place / "new_vl_model", "--output_dir", tmp_path / "out")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (place / "new_vl_model" / name).read_bytes()


def test_tensor_ranks_train_it_as_one_process_does(place: Path, tmp_path: Path) -> None:
    words = ["--model", place / "new_vl_model", "--dataset", place / "xxx" / "rows.jsonl", "--train_type", "full"]
    words += ["--freeze_vit", "false", "--freeze_aligner", "false", "--gradient_accumulation_steps", "2"]
    words += ["--max_steps", "2", "--learning_rate", "1e-3", *QUICK]
    works("sft", *words, "--output_dir", tmp_path / "one")
    line = " ".join(map(str, ["tessera sft", *words, "--output_dir", tmp_path / "two"]))
    done = shell(f"{line} --tensor_model_parallel_size 2", tmp_path, NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert done.code == 0, done.err
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
