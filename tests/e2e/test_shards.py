"""From downloaded data to a training on shards, as a user types it; and what happens where something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.command import QUICK, rows_of, run_dir, tessera, works
from tests.models import make_model_dir
from tests.shards import FIELD_MAP, make_shards, turns
from tests.toys import chat, make_images, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("shards") / "model", "qwen3_vl")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def llava(root: Path, count: int = 12) -> Path:
    images = make_images(root / "images", [(64, 48 + 8 * (i % 3)) for i in range(count)])
    rows = [
        {"id": f"{i:04d}", "image": f"images/{Path(p).name}", "conversations": turns(i)} for i, p in enumerate(images)
    ]
    (root / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))
    return root


def files(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*"))


def train(model: Path, out: Path, *words: str | Path) -> Path:
    steps = ("--num_train_epochs", "1", "--gradient_accumulation_steps", "2", "--max_length", "512")
    works("sft", "--model", model, *words, *steps, "--train_type", "full", *QUICK, "--output_dir", out)
    return run_dir(out)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows_of(run / "logging.jsonl") if "loss" in row]


def test_convert_prepare_train(model: Path, tmp_path: Path) -> None:
    root = llava(tmp_path / "LLaVA-Pretrain")
    done = works("data", "convert", "llava", root, "--max_samples_per_tar", "3")
    assert f"12 samples in 4 shards: {root / 'wds'}" in done.out
    split = ("--split", "3,1,0", "--sample_type", "VQASample", "--field_map", json.dumps(FIELD_MAP))
    done = works("data", "prepare", root / "wds", *split)
    assert "train 3 shards with 9 samples, val 1 shards with 3 samples" in done.out
    shown = works("data", "--model", model, "--dataset", root / "wds", "--val_dataset", root / "wds").out
    assert f"train  {root / 'wds'}: 9 rows used of 9 (messages 9)" in shown
    assert f"val  {root / 'wds'}:val: 3 rows used of 3" in shown

    # The same rows as jsonl give the same training, to the last digit.
    images = sorted((root / "images").iterdir())
    rows = [chat("", f"number {i}", [str(images[i])]) for i in range(9)]
    for i, row in enumerate(rows):
        row["messages"][0]["content"] = turns(i)[0]["value"]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    from_shards = train(model, tmp_path / "a", "--dataset", root / "wds", "--val_dataset", root / "wds")
    from_lines = train(model, tmp_path / "b", "--dataset", path)
    assert len(losses(from_shards)) == 5
    assert losses(from_shards) == losses(from_lines)
    assert not (from_shards / "skipped.jsonl").exists()


def test_a_run_goes_on_over_a_truncated_shard(model: Path, tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "wds")
    works(
        "data",
        "prepare",
        folder,
        "--split",
        "1,0,0",
        "--sample_type",
        "VQASample",
        "--field_map",
        json.dumps(FIELD_MAP),
    )
    shard = folder / "pretrain-2.tar"
    shard.write_bytes(shard.read_bytes()[:1200])
    run = train(model, tmp_path / "out", "--dataset", folder, "--max_skip_ratio", "0.3")
    entries = rows_of(run / "skipped.jsonl")
    assert [(entry["row"], entry["place"]) for entry in entries] == [
        (6, "pretrain-2.tar: 00006"),
        (7, "pretrain-2.tar: 00007"),
        (8, "pretrain-2.tar: 00008"),
    ]
    assert all("truncated" in entry["reason"] for entry in entries)
    assert len(losses(run)) == 5
    done = tessera("sft", "--model", model, "--dataset", folder, *QUICK, "--output_dir", tmp_path / "b")
    assert done.code == 1
    assert "3 of 12 rows" in done.error
    assert "--max_skip_ratio 0.1: 3x the shard ends at byte" in done.error


def test_convert_and_prepare_at_once_or_not_at_all(tmp_path: Path) -> None:
    root = llava(tmp_path / "root")
    before = files(tmp_path)
    for words, code, reason in (
        (("--split", "9,1"), 1, "--split 9,1: expected three shares"),
        (("--split", "9,1,0"), 1, "1 shard cannot be divided so, train would be empty"),
        (("--max_samples_per_tar", "0"), 2, "--max_samples_per_tar 0: expected a whole number >= 1"),
    ):
        done = tessera("data", "convert", "llava", root, *words)
        assert done.code == code
        assert reason in done.error
        assert files(tmp_path) == before
    works("data", "convert", "llava", root, "--split", "3,1,0", "--max_samples_per_tar", "3")
    written = files(root / "wds")
    assert ".nv-meta/index.sqlite" in written
    done = tessera("data", "convert", "llava", root)
    assert (done.code, f"{root / 'wds'} exists already; choose another OUT or add --exist_ok true" in done.error) == (
        1,
        True,
    )
    (root / "wds" / "notes.txt").write_text("mine")
    works("data", "convert", "llava", root, "--exist_ok", "true")
    assert files(root / "wds") == ["notes.txt", "pretrain-0.tar"]  # what was not made here stays
    works("data", "convert", "llava", root / "blip_laion_cc_sbu_558k.json", tmp_path / "elsewhere")
    assert files(tmp_path / "elsewhere") == ["pretrain-0.tar"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["elsewhere", "root"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = llava(tmp_path / "root")
    before = files(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tarfile.TarFile.addfile", full)
    done = tessera("data", "convert", "llava", root)
    assert (done.code, "writing failed: No space left on device" in done.error) == (1, True)
    assert files(tmp_path) == before


def test_entries_left_out_are_listed_and_too_many_stop_it(tmp_path: Path) -> None:
    root = llava(tmp_path / "root")
    lost = sorted((root / "images").iterdir())[4]
    lost.unlink()
    done = works("data", "convert", "llava", root)
    assert "left out 1 of 12 entries" in done.out
    [entry] = rows_of(root / "wds" / "skipped.jsonl")
    assert (entry["row"], entry["reason"]) == (4, f"image file not found: {lost}")
    shutil.rmtree(root / "wds")
    done = tessera("data", "convert", "llava", root, "--max_skip_ratio", "0.05")
    assert "1 of 12 entries" in done.error
    done = tessera("data", "convert", "llava", root, "--strict", "true")
    assert "--strict true: entry 4 of" in done.error
    shutil.rmtree(root / "images")
    assert "no entry could be converted: 12x image file not found" in tessera("data", "convert", "llava", root).error
    assert not (root / "wds").exists()


def test_prepare_fails_with_a_code(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = make_shards(tmp_path / "wds", 2, 1)
    for words, code, reason in (
        ((tmp_path / "empty", "--split", "1,0,0"), 1, "no .tar file in it"),
        ((tmp_path / "nowhere", "--split", "1,0,0"), 1, "no such directory"),
        ((folder,), 2, "--split is required, e.g. --split 9,1,0"),
        ((folder, "--split", "a,b,c"), 1, "expected three shares"),
        ((folder, folder), 2, "expected one directory"),
    ):
        done = tessera("data", "prepare", *words)
        assert (done.code, reason in done.error) == (code, True), done.err


def test_lint_stats_show(model: Path, tmp_path: Path) -> None:
    images = make_images(tmp_path / "img", [(64, 48), (80, 56)])
    rows = [chat("q", "a", images[:1]), chat("<b>bold</b>", "x" * 3000), chat("q<image>", "a") | {"images": images}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    good = write_rows(tmp_path / "good.jsonl", rows[:2])
    assert "2 rows checked, 0 wrong" in works("data", "lint", good).out
    done = tessera("data", "lint", path)
    assert done.code == 1
    assert f"{path}: row 2: 1 <image> tags but 2 images" in done.out
    assert "1 of 3 rows are wrong" in done.error
    done = tessera("data", "lint", path, good, "--json", "--model", model, "--max_length", "200")
    assert done.code == 1
    found = json.loads(done.out)
    assert (found["rows"], found["wrong"]) == (5, 3)
    assert {(entry["dataset"], entry["row"]) for entry in found["issues"]} == {
        (str(path), 1),
        (str(path), 2),
        (str(good), 1),
    }
    counted = json.loads(works("data", "stats", path, "--json", "true", "--model", model).out)
    assert counted["sizes"]["turns"]["sum"] == 4
    assert "tokens" in counted["sizes"]
    out = tmp_path / "page"
    works("data", "show", path, "--output_dir", out, "--model", model)
    page = (out / "samples.html").read_text()
    assert page.count('<img src="data:image/') == 1 + 2
    assert "&lt;b&gt;bold" in page
    assert "tokens" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "characters" in (works("data", "show", path, "--output_dir", out) and (out / "samples.html").read_text())
    assert [file.name for file in out.iterdir()] == ["samples.html"]


def test_data_alone_still_shows_and_writes_where_it_is_told(model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [chat("q", "a"), {"x": 1}])
    before = files(tmp_path)
    assert "skipped  1 rows" in works("data", "--model", model, "--dataset", path).out
    assert files(tmp_path) == before
    works("data", "--model", model, "--dataset", path, "--output_dir", tmp_path / "out")
    assert [entry["row"] for entry in rows_of(tmp_path / "out" / "skipped.jsonl")] == [1]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("lnit", "x"), "tessera data lnit: no such task; nearest: lint"),
        (("convert", "coco", "x"), "expected llava|sharegpt|messages SRC [OUT], got coco x"),
        (("convert", "llava"), "expected llava|sharegpt|messages SRC [OUT]"),
        (("lint",), "tessera data: --dataset is required"),
        (("lint", "x.jsonl", "--split_ratio", "1,0,0", "--sampel_type", "y"), "nearest: --sample_type"),
    ],
)
def test_wrong_words_are_told(words: tuple[str, ...], reason: str) -> None:
    done = tessera("data", *words)
    assert done.code == 2
    assert reason in done.error
