"""The report: one file, nothing loaded, everything escaped, what is missing said."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tessera.config.errors import UserError
from tessera.observe.charts import Line, chart
from tessera.observe.facts import RunFacts, TrainedModule
from tessera.observe.gallery import Answer, data_uri, errors_first, exact_match, marked
from tessera.observe.metrics import RunLog
from tessera.observe.report import build, locate

EVIL = "<script>alert('x')</script>"


class Parsed(HTMLParser):
    """Tags, attributes that load something, and the text of a page."""

    VOID = frozenset({"meta", "img", "line", "path", "circle", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "


@pytest.fixture
def run_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "output" / "v0-20260101-000000"
    log = RunLog(path, max_steps=30)
    for step in range(1, 31):
        log.step({"loss": 3.0 / step, "grad_norm": 1.0, "learning_rate": 1e-4, "token_acc": step / 40}, step)
        if step % 10 == 0:
            log.eval({"eval_loss": 3.5 / step, "eval_token_acc": step / 50, "eval_runtime": 0.1}, step)
    log.note("skipped_step", {"reason": "loss is not finite", "loss": float("nan"), "sample_ids": [17]}, 12)
    log.finish({"global_step": 30, "train_runtime": 61.0})
    facts(path)
    write(
        path / "skipped.jsonl",
        [{"dataset": EVIL, "row": i, "reason": f"{i + 9000} tokens are many"} for i in range(60)],
    )
    Image.new("L", (96, 24), 128).save(path / "line.png")
    Image.effect_noise((900, 700), 60).convert("RGB").save(path / "page.jpg")
    answers = [
        answer("41", "42", ["line.png"]),
        answer("7", "7", [str(path / "page.jpg")]),
        answer(EVIL, EVIL + "!", []),
    ]
    answers.append(answer("", "9", ["gone.png", "https://example.org/a.png"]))
    write(path / "checkpoint-30" / "infer_result" / "a.jsonl", answers)
    return path


def facts(run_dir: Path) -> None:
    modules = (TrainedModule("model.layers.*.mlp.up_proj.weight", 2, 123456, 1e-4),)
    flags = {"learning_rate": (1e-3, "flag"), "system": (EVIL, "yaml"), "dataset": (["a", "b"], "flag")}
    RunFacts("models/mine", "tiny", "full", 200000, 123456, modules, 30, flags=flags, memory="~1 MiB").save(run_dir)


def answer(response: str, labels: str | None, images: list[str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"<image>read {EVIL}"}, {"role": "assistant", "content": response}]
    return {"response": response, "labels": labels, "messages": messages, "images": images}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_page_is_self_contained_and_whole(run_dir: Path) -> None:
    target = build(run_dir)
    assert target == run_dir / "report.html"
    page = target.read_text()
    parsed = Parsed(page)
    assert parsed.loads and all(load.startswith("data:image/") for load in parsed.loads)
    assert not re.search(r"url\(|@import|<link|<iframe", page)
    for expected in (
        "mine · sft full",
        "finished",
        "1m 1s",
        "model.layers.*.mlp.up_proj.weight",
        "123.46K",
        "1.00e-04",
    ):
        assert expected in parsed.text, expected
    for expected in ("--learning_rate", "0.001", "yaml", "a b", "loss is not finite", "the first 50 of 60 rows"):
        assert expected in parsed.text, expected
    assert "N tokens are many" in parsed.text
    assert parsed.tags.count("svg") >= 6
    assert sorted(path.name for path in run_dir.glob(".*")) == []


def test_nothing_of_the_user_is_markup(run_dir: Path) -> None:
    page = build(run_dir).read_text()
    assert EVIL not in page
    assert "&lt;script&gt;alert(" in page
    assert Parsed(page).tags.count("script") == 1


def test_images_are_embedded_and_shrunk(run_dir: Path) -> None:
    parsed = Parsed(build(run_dir).read_text())
    assert len(parsed.loads) == 2
    assert max(map(len, parsed.loads)) < 120_000
    assert "gone.png: file not found" in parsed.text
    assert "https://example.org/a.png: not shown, lies on the network" in parsed.text


def test_wrong_answers_come_first(run_dir: Path) -> None:
    page = build(run_dir).read_text()
    kinds = re.findall(r'<article class="card (\w+)"', page)
    assert kinds == ["wrong", "wrong", "wrong", "right"]
    assert "1 of 4 exactly right, 3 wrong" in page
    assert "25.0 %" in page
    assert "4<del>2</del>" in page and "4<ins>1</ins>" in page


def test_missing_pieces_are_said(tmp_path: Path) -> None:
    log = RunLog(tmp_path, max_steps=30)
    log.step({"loss": float("nan")}, 1)
    log.close()
    text = Parsed(build(tmp_path).read_text()).text
    for expected in (
        "not finished: step 1 of 30",
        "No infer_result/*.jsonl",
        "No run_facts.json",
        "No args.json",
        "there is no skipped.jsonl",
        "Nothing was logged",
        "Not logged: gradient norm",
    ):
        assert expected in text, expected


def test_torn_and_foreign_lines(run_dir: Path) -> None:
    with (run_dir / "logging.jsonl").open("a") as file:
        file.write('[1]\n{"loss": 1')
    assert "2 lines of logging.jsonl are not complete" in build(run_dir).read_text()


def test_accuracy_over_time(run_dir: Path) -> None:
    assert "Accuracy over time" not in build(run_dir).read_text()
    write(run_dir / "accuracy.jsonl", [{"seconds": 61.5, "step": 10, "exact_match": 0.5}, {"seconds": "?"}])
    text = Parsed(build(run_dir).read_text()).text
    assert "Accuracy over time" in text and "1m 2s" in text and "0.500" in text


def test_run_may_be_named_in_three_ways(run_dir: Path) -> None:
    newer = run_dir.parent / "v10-20260101-000000"
    assert locate(run_dir) == locate(run_dir / "checkpoint-30") == locate(run_dir.parent) == run_dir
    newer.mkdir()
    assert locate(run_dir.parent) == newer
    os.rmdir(newer)


def test_unknown_places_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        locate(tmp_path / "none")
    with pytest.raises(UserError, match="not a run"):
        locate(tmp_path)


def test_marked_escapes_and_marks() -> None:
    assert marked("a<b", "a>b") == ("a<del>&lt;</del>b", "a<ins>&gt;</ins>b")
    assert marked("840", "8400") == ("840", "840<ins>0</ins>")


def test_right_ones_keep_some_places() -> None:
    answers = [Answer("", "a", "b", ()) for _ in range(100)] + [Answer("", "a", " a\n", ()) for _ in range(100)]
    shown = errors_first(answers, most=60)
    assert [a.right for a in shown] == [False] * 50 + [True] * 10
    assert exact_match(answers) == 0.5
    assert exact_match([Answer("", None, "b", ())]) is None


def test_embedded_images_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (2000, 10), "red").save(tmp_path / "a.png")
    uri = data_uri("a.png", [tmp_path])
    assert data_uri(uri, []).startswith("data:image/png;base64,")
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(OSError, match="cannot identify"):
        data_uri("b.png", [tmp_path])


@pytest.mark.parametrize(
    "points", [[(5, 1.0)], [(1, 2.0), (2, 2.0)], [(1, -1.0), (100000, 3e9)], [(1, 0.0), (2, 1e-12)]]
)
def test_any_curve_can_be_drawn(points: list[tuple[int, float]]) -> None:
    svg = chart("x", [Line("x", points)])
    assert "<svg" in svg and "nan" not in svg
