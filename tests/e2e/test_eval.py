"""``tessera eval`` as a user runs it: a tiny model, a file of one's own, a benchmark as published, and a server."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import COLOURS, colour_rows, picture, server
from tests.e2e.command import QUICK, rows_of, run_dir, tessera, works
from tests.models import make_model_dir

ROWS = 12
SHORT = ("--max_new_tokens", "6", "--torch_dtype", "float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, rows of one's own, and TextVQA as VLMEvalKit publishes it."""
    root = tmp_path_factory.mktemp("eval")
    make_model_dir(root / "base", "qwen3_vl")
    make_model_dir(root / "tuned", "qwen3_vl", seed=1)
    colour_rows(root, ROWS)
    lines = ["index\timage\tquestion\tanswer\tsplit"]
    for index in range(5):
        data = picture(root / "tsv" / f"{index}.jpg", list(COLOURS)[index % 3], (320, 240)).read_bytes()
        image = base64.b64encode(data).decode() if index < 4 else "0"
        lines.append(f"{index}\t{image}\twhat colour {index}?\t['red', 'red', 'blue']\tval")
    (root / "TextVQA_VAL.tsv").write_text("\n".join(lines) + "\n")
    return root


def own(place: Path, out: Path, *more: str | Path, model: str = "base") -> tuple[str | Path, ...]:
    rows = ("--dataset", place / "rows.jsonl", "--scorer", "contains")
    return ("eval", "--model", place / model, *rows, *SHORT, "--eval_output_dir", out, *more)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_file_of_ones_own_and_a_published_benchmark(place: Path, tmp_path: Path) -> None:
    done = works(*own(place, tmp_path, "--eval_datasets", f"TextVQA_VAL={place / 'TextVQA_VAL.tsv'}"))
    home = tmp_path / "base"
    summary = read(home / "summary.json")
    assert set(summary["benchmarks"]) == {"rows", "TextVQA_VAL"}
    assert summary["benchmarks"]["TextVQA_VAL"]["benchmark"].startswith("textvqa@")
    assert summary["benchmarks"]["rows"]["n"] == ROWS
    assert not {"row", "image"} & set(summary["benchmarks"]["TextVQA_VAL"]["troubles"])
    for name, count in (("rows", ROWS), ("TextVQA_VAL", 5)):
        rows = rows_of(home / name / "predictions.jsonl")
        assert len(rows) == count
        assert {"id", "question", "gold", "answer", "parsed", "score", "note"} <= set(rows[0])
    assert "<article" in (home / "report.html").read_text()
    assert "TextVQA_VAL  textvqa@" in done.out
    assert "95 %" in done.out


def test_answers_are_those_of_inference(place: Path, tmp_path: Path) -> None:
    works(*own(place, tmp_path))
    works("infer", "--model", place / "base", "--val_dataset", place / "rows.jsonl", "--temperature", "0",
          *SHORT, "--result_path", tmp_path / "infer.jsonl")  # fmt: skip
    said = [row["response"] for row in rows_of(tmp_path / "infer.jsonl")]
    assert [row["answer"] for row in rows_of(tmp_path / "base" / "rows" / "predictions.jsonl")] == said


def test_two_ranks_are_one(place: Path, tmp_path: Path) -> None:
    works(*own(place, tmp_path / "one"))
    done = subprocess.run(
        [sys.executable, "-m", "tessera", *map(str, own(place, tmp_path / "two", "--nproc_per_node", "2"))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "two/base/rows/answers").iterdir()) == [
        "rank0.jsonl",
        "rank1.jsonl",
    ]
    for name in ("summary.json", "rows/summary.json", "rows/predictions.jsonl", "rows/predictions.tsv"):
        assert (tmp_path / "two/base" / name).read_text() == (tmp_path / "one/base" / name).read_text()
    again = works(*own(place, tmp_path / "two"))
    assert f"rows: {ROWS} questions, 0 asked, {ROWS} answered before" in again.out


@pytest.mark.timeout(120)
def test_killed_in_the_middle(place: Path, tmp_path: Path) -> None:
    rows = colour_rows(tmp_path / "many", 40)
    flags = ["--model", place / "base", "--dataset", rows, "--scorer", "contains", "--max_new_tokens", "24",
             "--torch_dtype", "float32", "--max_batch_size", "2"]  # fmt: skip
    works("eval", *flags, "--eval_output_dir", tmp_path / "whole")
    words = [sys.executable, "-m", "tessera", "eval", *map(str, flags), "--eval_output_dir", str(tmp_path / "cut")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    answers = tmp_path / "cut" / "base" / "rows" / "answers" / "rank0.jsonl"
    while process.poll() is None and not (answers.exists() and answers.read_bytes().count(b"\n") > 5):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = answers.read_bytes().count(b"\n")
    assert 5 < before < 40, "the kill came in the middle"
    assert not (tmp_path / "cut" / "base" / "summary.json").exists()
    done = works("eval", *flags, "--eval_output_dir", tmp_path / "cut")
    assert f"{40 - before} asked, {before} answered before" in done.out
    for name in ("summary.json", "rows/predictions.jsonl"):
        assert (tmp_path / "cut/base" / name).read_text() == (tmp_path / "whole/base" / name).read_text()


def test_bad_rows_are_counted_listed_and_stop_nothing(place: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in colour_rows(tmp_path, 8).read_text().splitlines()]
    rows[1]["images"] = ["images/nowhere.png"]
    (tmp_path / "images" / "2.png").write_bytes(b"no picture")
    (tmp_path / "images" / "3.png").write_bytes(b"")
    rows[4] = {"something": "else"}
    rows[5]["messages"].pop()
    lines = [json.dumps(row) for row in rows]
    lines[6] = "{not json"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    done = works("eval", "--model", place / "base", "--dataset", tmp_path / "rows.jsonl", "--scorer", "exact", *SHORT,
                 "--eval_output_dir", tmp_path / "out")  # fmt: skip
    found = rows_of(tmp_path / "out/base/rows/predictions.jsonl")
    assert [sorted(set(row["troubles"]) & {"row", "image"}) for row in found] == [
        [], ["image"], ["image"], ["image"], ["row"], ["row"], ["row"], [],
    ]  # fmt: skip
    assert all(row["score"] == 0 and row["reason"] for row in found if {"row", "image"} & set(row["troubles"]))
    assert "3 questions that cannot be asked, 3 images missing or broken" in done.out
    assert read(tmp_path / "out/base/summary.json")["benchmarks"]["rows"]["n"] == 8
    assert "nowhere.png" in (tmp_path / "out/base/report.html").read_text()


def test_a_server_is_asked_and_sees(place: Path, tmp_path: Path) -> None:
    with server() as (url, requests):
        flags = ["--eval_url", url, "--dataset", place / "rows.jsonl", "--scorer", "exact", "--concurrency", "3"]
        works("eval", *flags, "--api_key", "secret", "--eval_output_dir", tmp_path)
        assert len(requests) == ROWS
        assert {request["key"] for request in requests} == {"Bearer secret"}
        assert {request["body"]["temperature"] for request in requests} == {0.0}
        summary = read(tmp_path / "seer" / "summary.json")
        assert summary["benchmarks"]["rows"]["value"] == 1.0
        works("eval", *flags, "--eval_output_dir", tmp_path)
        assert len(requests) == ROWS, "every answer was there"
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"secret" not in path.read_bytes(), path


def test_comparison_of_two_models(place: Path, tmp_path: Path) -> None:
    for model in ("base", "tuned"):
        works(*own(place, tmp_path, model=model))
    done = works("eval", "--compare", tmp_path / "base", tmp_path / "tuned", "--eval_output_dir", tmp_path)
    assert "McNemar, exact" in done.out
    assert (tmp_path / "compare.html").exists()
    done = tessera("eval", "--compare", tmp_path / "base")
    assert done.code == 2
    assert "takes two directories" in done.error


def test_answer_files_of_inference_are_scored(place: Path, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "7.jpg", "red")
    picture(tmp_path / "images" / "8.jpg", "blue")
    truths = [{"image_id": i, "question_id": i, "question": "colour?", "answers": ["red"] * 10} for i in (7, 8)]
    (tmp_path / "gt.json").write_text(json.dumps({"data": truths}))
    for part in ("0", "1"):
        works("infer", "--model", place / "base", "--task", "TextVQA", "--input_image_path", tmp_path / "images",
              "--gt_path", tmp_path / "gt.json", "--output_path", tmp_path / "ans" / "vlm", "--num_partitions", "2",
              "--partition_id", part, *SHORT)  # fmt: skip
    for given in (tmp_path / "ans", tmp_path / "ans" / "vlm"):
        out = tmp_path / f"out-{given.name}"
        done = works("eval", "--input_path", given, "--eval_output_dir", out)
        assert "textvqa@megatron" in done.out
        found = rows_of(out / given.name / "TextVQA" / "predictions.jsonl")
        assert [row["id"] for row in found] == ["7", "8"]
    done = works("megatron", "examples/multimodal/evaluate_textvqa.py", "--input-path", tmp_path / "ans" / "vlm",
                 "--eval_output_dir", tmp_path / "script")  # fmt: skip
    assert f"runs: tessera eval --input_path {tmp_path / 'ans' / 'vlm'} --task TextVQA" in done.out
    name = "vlm/TextVQA/predictions.jsonl"
    assert rows_of(tmp_path / "script" / name) == rows_of(tmp_path / "out-vlm" / name)
    one = next((tmp_path / "ans").glob("*partition=0.jsonl"))
    works("eval", "--input_path", one, "--task", "TextVQA", "--eval_output_dir", tmp_path / "one")
    done = tessera("eval", "--input_path", tmp_path / "ans", "--task", "MMMU")
    assert "holds no answers (NAME-MMMU-dprank=0-partition=0.jsonl)" in done.error


def test_what_another_scorer_reads_is_what_was_said(place: Path, tmp_path: Path) -> None:
    works("eval", "--model", place / "base", "--eval_datasets", f"TextVQA={place / 'TextVQA_VAL.tsv'}", *SHORT,
          "--eval_output_dir", tmp_path)  # fmt: skip
    works("eval", "--input_path", tmp_path / "base/TextVQA/predictions-megatron.jsonl", "--task", "TextVQA",
          "--eval_output_dir", tmp_path / "again")  # fmt: skip
    rows = rows_of(tmp_path / "again/predictions-megatron/TextVQA/predictions.jsonl")
    assert [row["answer"] for row in rows] == [
        row["answer"].strip() for row in rows_of(tmp_path / "base/TextVQA/predictions.jsonl")
    ]


MISTAKES = [
    (["--eval_datasets", "MMUM=x.tsv"], "--eval_datasets MMUM: unknown; did you mean mmmu"),
    (["--eval_datasets", "MMMU"], "--eval_datasets MMMU: where is it? give MMMU=PATH"),
    (["--eval_datasets", "MMMU=nowhere.tsv"], "--eval_datasets MMMU=nowhere.tsv: no such file or directory"),
    (["--eval_datasets", "MMMU={tsv}", "MMMU={tsv}"], "MMMU is asked twice"),
    (["--eval_datasets", "ChartQA={tsv}", "--eval_dataset_args", '{"MMMU": {}}'], "MMMU is not among --eval_datasets"),
    (["--eval_datasets", "MMMU={tsv}", "--eval_dataset_args", '{"MMMU": {"limt": 3}}'], "nearest: limit"),
    (["--dataset", "{tsv}"], "how is it scored? give --scorer NAME"),
    (["--dataset", "rows.jsonl", "--scorer", "exat"], "--scorer exat: unknown; did you mean exact"),
    (["--eval_datasets", "MMMU={tsv}", "--eval_backend", "VLMEvalKit"], "that program is not started from here"),
    (["--eval_datasets", "MMMU={tsv}", "--eval_generation_config", '{"num_beams": 4}'], "num_beams: not offered"),
    ([], "--eval_datasets NAME=PATH is required"),
]


@pytest.mark.parametrize(("flags", "said"), MISTAKES, ids=[" ".join(flags)[:40] for flags, _ in MISTAKES])
def test_mistakes_are_told_before_the_model_is_read(place: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    (tmp_path / "m").mkdir()
    words = [word.replace("{tsv}", str(place / "TextVQA_VAL.tsv")) for word in flags]
    done = tessera("eval", "--model", tmp_path / "m", *words, "--eval_output_dir", tmp_path / "out")
    assert said in done.error
    assert not (tmp_path / "out").exists()


def test_a_dry_run_reads_no_weights(place: Path, tmp_path: Path) -> None:
    done = works(*own(place, tmp_path, "--dry_run", "true", "--eval_limit", "5"))
    assert f"would ask 5 of {ROWS} questions of rows" in done.out
    assert list(tmp_path.iterdir()) == []


def test_places_of_benchmarks(place: Path, tmp_path: Path) -> None:
    args = json.dumps({"TextVQA": {"local_path": str(place / "TextVQA_VAL.tsv"), "limit": 2, "name": "few"}})
    base = ("eval", "--model", place / "base", *SHORT, "--dry_run", "true")
    done = works(*base, "--eval_dataset", "TextVQA", "--eval_dataset_args", args)
    assert "would ask 2 of 5 questions of few" in done.out
    (tmp_path / "textvqa.tsv").write_text((place / "TextVQA_VAL.tsv").read_text())
    done = works(*base, "--eval_dataset", "TextVQA", "--local_path", tmp_path, "--eval_backend", "Native")
    assert "would ask 5 of 5 questions of TextVQA" in done.out


def test_evalscope_is_asked_for_by_name_where_it_is_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    done = tessera("eval", "--model", place / "base", "--eval_datasets", "general_vqa=x", "--eval_backend", "evalscope")
    assert "--eval_backend evalscope: not installed; pip install evalscope" in done.error


def trained(place: Path, out: Path, *more: str | Path) -> list[dict[str, Any]]:
    """Three full steps that ask a benchmark at every one of them; the log of the run."""
    works("sft", "--model", place / "base", "--dataset", place / "rows.jsonl", *QUICK, "--train_type", "full",
          "--learning_rate", "1e-3", "--max_steps", "3", "--gradient_accumulation_steps", "2", "--save_steps", "3",
          "--output_dir", out, *more)  # fmt: skip
    return rows_of(run_dir(out) / "logging.jsonl")


def asking(place: Path) -> tuple[str | Path, ...]:
    generation = json.dumps({"max_new_tokens": 6})
    return ("--eval_dataset", f"TextVQA={place / 'TextVQA_VAL.tsv'}", "--eval_limit", "4", "--eval_steps", "1",
            "--eval_generation_config", generation)  # fmt: skip


def test_benchmarks_while_training(place: Path, tmp_path: Path) -> None:
    log = trained(place, tmp_path / "a", *asking(place))
    found = [row["eval_TextVQA"] for row in log if "eval_TextVQA" in row]
    assert len(found) == 3
    home = run_dir(tmp_path / "a")
    asked = rows_of(home / "eval/step-3/TextVQA/predictions.jsonl")
    works("eval", "--model", home / "checkpoint-3", "--eval_datasets", f"TextVQA={place / 'TextVQA_VAL.tsv'}", *SHORT,
          "--eval_limit", "4", "--eval_output_dir", tmp_path / "out")  # fmt: skip
    [after] = (tmp_path / "out").iterdir()
    assert rows_of(after / "TextVQA/predictions.jsonl") == asked, "the live model answers as its checkpoint does"
    assert asked != rows_of(home / "eval/step-1/TextVQA/predictions.jsonl"), "and not as two steps before"
    plain = trained(place, tmp_path / "b")
    kept = ("loss", "grad_norm", "token_acc")
    assert [[row[k] for k in kept] for row in log if "loss" in row] == [
        [row[k] for k in kept] for row in plain if "loss" in row
    ], "training does not notice"


@pytest.mark.parametrize("way", ["lora", "qlora"])
def test_benchmarks_while_training_an_adapter(place: Path, tmp_path: Path, way: str) -> None:
    quantised = ("--quant_method", "bnb") if way == "qlora" else ()
    steps = ("--max_steps", "2", "--gradient_accumulation_steps", "1", "--learning_rate", "1e-2")
    rows = ("--dataset", place / "rows.jsonl", "--output_dir", tmp_path)
    works("sft", "--model", place / "base", *rows, *QUICK, *steps, *asking(place), *quantised)
    home = run_dir(tmp_path)
    asked = rows_of(home / "eval/step-2/TextVQA/predictions.jsonl")
    benchmark = f"TextVQA={place / 'TextVQA_VAL.tsv'}"
    works("eval", "--adapters", home / "checkpoint-2", *SHORT, "--eval_datasets", benchmark, "--eval_limit", "4",
          "--eval_output_dir", tmp_path / "out")  # fmt: skip
    [after] = (tmp_path / "out").iterdir()
    assert [row["answer"] for row in rows_of(after / "TextVQA/predictions.jsonl")] == [row["answer"] for row in asked]


@pytest.mark.slow
def test_benchmarks_on_sharded_ranks(place: Path, tmp_path: Path) -> None:
    words = ["sft", "--model", place / "base", "--dataset", place / "rows.jsonl", *QUICK, "--train_type", "full",
             "--max_steps", "2", "--gradient_accumulation_steps", "1", "--deepspeed", "zero3", "--nproc_per_node", "2",
             "--output_dir", tmp_path / "run", *asking(place)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tessera", *map(str, words)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    home = run_dir(tmp_path / "run")
    asked = rows_of(home / "eval/step-2/TextVQA/predictions.jsonl")
    assert [row["row"] for row in asked] == [0, 1, 2, 3]
    works("eval", "--model", home / "checkpoint-2", "--eval_datasets", f"TextVQA={place / 'TextVQA_VAL.tsv'}", *SHORT,
          "--eval_limit", "4", "--eval_output_dir", tmp_path / "out")  # fmt: skip
    [after] = (tmp_path / "out").iterdir()
    assert [row["answer"] for row in rows_of(after / "TextVQA/predictions.jsonl")] == [row["answer"] for row in asked]


def test_benchmarks_that_cannot_be_asked_are_refused_before_training(place: Path, tmp_path: Path) -> None:
    flags = ("--dataset", place / "rows.jsonl", "--output_dir", tmp_path / "out", "--dry_run", "true")
    done = tessera("sft", "--model", place / "base", *flags, *asking(place), "--tensor_model_parallel_size", "2",
                   "--nproc_per_node", "2")  # fmt: skip
    assert "is divided by --tensor_model_parallel_size 2 cannot generate while it trains" in done.error
    done = tessera("sft", "--model", place / "base", *flags, "--eval_dataset", "TextVQA=nowhere.tsv")
    assert "TextVQA=nowhere.tsv: no such file or directory" in done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_evalscope_evaluates_against_a_server(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("evalscope", reason="another project's program; pip install evalscope")
    rows = []
    for index in range(4):
        colour = list(COLOURS)[index % 3]
        url = {"url": str(picture(tmp_path / "img" / f"{index}.png", colour))}
        parts = [{"type": "text", "text": "Which colour?"}, {"type": "image_url", "image_url": url}]
        rows.append({"messages": [{"role": "user", "content": parts}], "answer": colour})
    (tmp_path / "vqa").mkdir()
    (tmp_path / "vqa" / "colour.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = json.dumps({"general_vqa": {"metric_list": ["Rouge"], "subset_list": ["colour"]}})
    with server() as (url, requests):
        words = ["eval", "--eval_url", url, "--api_key", "secret", "--eval_backend", "evalscope", "--eval_datasets",
                 f"general_vqa={tmp_path / 'vqa'}", "--eval_dataset_args", args, "--eval_limit", "3",
                 "--eval_output_dir", tmp_path / "out"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "tessera", *map(str, words)],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"},
        )
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout
    assert [request["key"] for request in requests] == ["Bearer secret"] * 3
    scores = read(tmp_path / "out/evalscope/summary.json")["benchmarks"]["general_vqa"]
    assert scores["rouge f1 l"] == 1.0
