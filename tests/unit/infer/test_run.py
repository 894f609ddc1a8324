"""``infer`` over a dataset and in conversation, with tiny random models on disk."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.config.errors import UserError
from tessera.config.resolve import resolve, run_of
from tessera.config.run import Run
from tessera.infer.results import RULE, exact_match, read_results
from tessera.infer.run import main
from tests.disk import save_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3_vl")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows: images of several sizes, text only, several turns, an extra column; no two questions alike."""
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for index in range(12):
        row: dict[str, Any] = {"level": index % 3}
        question = f"question number {index}" + " please" * (index % 5)
        if index % 2 == 0:
            size = (40 + 8 * index, 64)
            Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
            row["images"] = [f"{index}.png"]
            question = f"<image>{question}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"answer {index}"}]
        if index == 5:
            turns = [*turns, {"role": "user", "content": "and again"}, {"role": "assistant", "content": "again"}]
        rows.append({"messages": turns, **row})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def infer(model: Path, lines: str = "", **flags: Any) -> tuple[Path | None, str]:
    sink = io.StringIO()
    run = run_of("infer", model=str(model), **{"max_new_tokens": 6, **flags})
    return main(run, source=io.StringIO(lines), sink=sink), sink.getvalue()


def test_over_a_dataset(model: Path, dataset: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "results.jsonl"
    path, printed = infer(model, val_dataset=(str(dataset),), result_path=str(target), max_batch_size=4)
    assert path == target
    rows = read_results(target)
    asked = [json.loads(line) for line in dataset.read_text().splitlines()]
    assert [row["labels"] for row in rows] == [row["messages"][-1]["content"] for row in asked]
    assert [row["level"] for row in rows] == [row["level"] for row in asked]
    assert list(rows[0]) == ["response", "labels", "logprobs", "messages", "images", "level"]
    assert rows[0]["messages"][-1] == {"role": "assistant", "content": rows[0]["response"]}
    assert rows[0]["messages"][0] == asked[0]["messages"][0]
    assert Path(rows[0]["images"][0]).name == "0.png"
    assert len(rows[5]["messages"]) == 4

    blocks = printed.split(f"\n{RULE}\n")
    assert blocks[0].startswith("[QUERY] question number 0\n[LABELS] answer 0\n[RESPONSE] ")
    assert len(blocks) == 13
    closing = ast.literal_eval(blocks[-1].splitlines()[0])
    assert list(closing) == [
        "num_prompt_tokens", "num_generated_tokens", "num_samples", "runtime", "samples/s", "tokens/s", "exact_match"
    ]  # fmt: skip
    assert closing["num_samples"] == 12
    assert closing["exact_match"] == exact_match(rows) == 0.0


def test_answers_do_not_depend_on_batches_or_streaming(model: Path, dataset: Path, tmp_path: Path) -> None:
    found: dict[str, tuple[Any, list[str]]] = {}
    for name, flags in {
        "alone": {"max_batch_size": 1},
        "together": {"max_batch_size": 5},
        "streamed": {"max_batch_size": 5, "stream": True},
    }.items():
        path, printed = infer(model, val_dataset=(str(dataset),), result_path=str(tmp_path / name), **flags)
        assert path is not None
        shown = printed.rpartition(RULE)[0]
        found[name] = (read_results(path), shown.splitlines())
    assert found["alone"] == found["together"] == found["streamed"]

    for flags in ({"max_batch_size": 1}, {"max_batch_size": 7}):
        name = f"sampled{flags['max_batch_size']}"
        path, _ = infer(model, dataset=(str(dataset),), result_path=str(tmp_path / name), temperature=1.0, **flags)
        found[name] = (read_results(tmp_path / name), [])
    assert found["sampled1"] == found["sampled7"]
    assert found["sampled1"][0] != found["alone"][0]


def test_results_are_never_overwritten(model: Path, dataset: Path, tmp_path: Path) -> None:
    here = save_checkpoint(tmp_path / "tiny", "qwen3")
    text = tmp_path / "text.jsonl"
    text.write_text('{"query": "a", "response": "b"}\n')
    paths = [infer(here, val_dataset=(str(text),))[0] for _ in range(3)]
    assert len(set(paths)) == 3
    assert all(path is not None and path.parent == here / "infer_result" for path in paths)
    with pytest.raises(UserError, match="exists already; results are never overwritten"):
        infer(here, val_dataset=(str(text),), result_path=str(paths[0]))


def test_bad_rows_are_skipped_and_counted(model: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes((dataset.parent / "0.png").read_bytes()[:200])
    good = {"query": "fine", "response": "yes"}
    bad: list[dict[str, Any]] = [
        {"query": "<image>gone", "images": ["nowhere.png"]},
        {"query": "<image>cut", "images": [str(tmp_path / "cut.png")]},
        {"text": "no question"},
        {"query": "long " * 1000},
    ]
    rows = [good, bad[0], bad[1], good, bad[2], bad[3], good]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for stream in (False, True):
        target = tmp_path / f"{stream}.jsonl"
        _, printed = infer(model, val_dataset=(str(path),), result_path=str(target), stream=stream, max_batch_size=3)
        assert [row["labels"] for row in read_results(target)] == ["yes"] * 3
        assert printed.count(RULE) == printed.count("[QUERY]") == 3
        assert "skipped 4 rows" in printed
        assert "'num_skipped': 4" in printed
    with pytest.raises(UserError, match="--strict true: row 1 of"):
        infer(model, val_dataset=(str(path),), result_path=str(tmp_path / "strict.jsonl"), strict=True)


def test_rows_without_labels(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    out, printed = infer(model, val_dataset=(str(path),), result_path=str(tmp_path / "out.jsonl"))
    assert out is not None
    assert read_results(out)[0]["labels"] is None
    assert "[LABELS]" not in printed
    assert "exact_match" not in printed


def test_first_rows_only(model: Path, dataset: Path, tmp_path: Path) -> None:
    out, _ = infer(model, val_dataset=(str(dataset),), result_path=str(tmp_path / "o.jsonl"), val_dataset_sample=3)
    assert out is not None
    assert len(read_results(out)) == 3


def test_conversation(model: Path, dataset: Path) -> None:
    picture = dataset.parent / "0.png"
    lines = f"what is <image>?\n{picture}\nand now?\nimage: nowhere.png\nthis?\nclear\nhello\nexit\n"
    path, printed = infer(model, lines)
    assert path is None
    assert "error: image file not found: nowhere.png" in printed
    assert "(cleared)" in printed
    _, whole = infer(model, lines, stream=False)
    assert whole == printed


def test_default_limit_is_said(model: Path, tmp_path: Path) -> None:
    sink = io.StringIO()
    main(run_of("infer", model=str(model)), source=io.StringIO(""), sink=sink)
    assert "note: answers end after 2048 tokens at the latest; --max_new_tokens sets another limit" in sink.getvalue()


def test_dry_run_loads_nothing(model: Path, dataset: Path, tmp_path: Path) -> None:
    path, printed = infer(model, val_dataset=(str(dataset),), result_path=str(tmp_path / "o.jsonl"), dry_run=True)
    assert "would answer 12 rows" in printed
    assert path is not None
    assert not path.exists()


def resolved(*argv: str, **env: str) -> Run:
    return resolve(["infer", *argv], env)


def test_load_data_args_finds_the_validation_rows_of_training(dataset: Path, tmp_path: Path) -> None:
    """The same rows as ``val_dataset.jsonl`` of the run, from args.json alone."""
    from tessera.checkpoint import open as door
    from tessera.data.corpus import prepare
    from tessera.data.render import Renderer

    here = save_checkpoint(tmp_path / "tiny", "qwen3_vl")
    flags = {"dataset": (f"{dataset}#10",), "split_dataset_ratio": 0.4, "data_seed": 7}
    training = run_of("sft", model=str(here), **flags)
    (here / "args.json").write_text(json.dumps(training.to_json()))
    source = door.describe(training.model)
    prepare(training.data, Renderer(here, source.geometry), source.geometry, tmp_path / "run")
    held = [json.loads(line) for line in (tmp_path / "run" / "val_dataset.jsonl").read_text().splitlines()]
    assert len(held) == 4

    run = resolved("--model", str(here), "--load_data_args", "true", "--max_new_tokens", "3")
    out = main(run, sink=io.StringIO())
    assert out is not None
    answered = read_results(out)
    assert [row["messages"][:-1] for row in answered] == [row["messages"][:-1] for row in held]
    assert [row["labels"] for row in answered] == [row["messages"][-1]["content"] for row in held]
    assert [row.get("images") for row in answered] == [row.get("images") for row in held]


def test_load_data_args_of_an_adapter(dataset: Path, tmp_path: Path) -> None:
    """Base model, dataset and pixel limits all come from the adapter's directory, and so do the results."""
    from tessera import adapt
    from tessera.checkpoint import open as door

    base = save_checkpoint(tmp_path / "base", "qwen3_vl")
    adapter = tmp_path / "v0-20260101-000000" / "checkpoint-3"
    training = run_of("sft", model=str(base), val_dataset=(str(dataset),), dataset=(str(dataset),), max_pixels=4096)
    source = door.describe(training.model)
    module = door.load(source, dtype=torch.float32, device=torch.device("cpu"))
    adaptation = adapt.apply(module, training.adapt, source.plan, seed=1)
    adapt.save_adapter(adapt.adapter_tensors(module, adaptation), adaptation, adapter, base_model=str(base))
    (adapter / "args.json").write_text(json.dumps(training.to_json()))
    run = resolved("--adapters", str(adapter), "--load_data_args", "true", "--max_new_tokens", "3")
    out = main(run, sink=io.StringIO())
    assert out is not None
    assert out.parent == adapter / "infer_result"
    assert len(read_results(out)) == 12
    # A fresh adapter changes nothing.
    asked = ("--model", str(base), "--val_dataset", str(dataset), "--max_new_tokens", "3")
    same = main(resolved(*asked, MAX_PIXELS="4096"), sink=io.StringIO())
    assert same is not None
    assert read_results(same) == read_results(out)


def test_load_data_args_without_any(model: Path) -> None:
    with pytest.raises(UserError, match="--load_data_args true"):
        main(resolved("--model", str(model), "--load_data_args", "true"), sink=io.StringIO())


def test_pixel_limits_of_training_hold_and_a_difference_is_reported(dataset: Path, tmp_path: Path) -> None:
    from tessera.checkpoint import open as door

    here = save_checkpoint(tmp_path / "tiny", "qwen3_vl")
    training = run_of("sft", model=str(here), dataset=(str(dataset),), max_pixels=4096)
    (here / "args.json").write_text(json.dumps(training.to_json()))
    as_trained = resolved("--model", str(here))
    assert door.describe(as_trained.model).geometry.grid(200, 200) == (1, 4, 4)
    assert not as_trained.notes
    other = resolved("--model", str(here), MAX_PIXELS="16384")
    assert door.describe(other.model).geometry.grid(200, 200) == (1, 8, 8)
    assert [note for note in other.notes if "differs from training's (4096" in note]
