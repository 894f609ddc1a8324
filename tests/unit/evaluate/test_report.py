"""The page shows what matters first, needs nothing else, and is safe with whatever a model says."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tessera.evaluate import report, results, runner
from tessera.evaluate.answerer import Ask, Told
from tessera.evaluate.item import Scored
from tessera.evaluate.publish import publish
from tessera.evaluate.runner import Job, Outcome
from tessera.evaluate.summary import screen, summarise
from tests.benchmarks import COLOURS, Rule, colours

ODD = '<script>alert(1)</script> & "more"'


def outcome_of(tmp_path: Path, name: str = "Colours", count: int = 12) -> Outcome:
    job = Job(name, colours(count, tmp_path / "images"), tmp_path, tmp_path / "out" / "m" / name)

    def rule(ask: Ask) -> Told:
        wrong = {1: Told(1, ODD, "stop"), 2: Told(2, error="image file not found: x"), 3: Told(3, "", "stop")}
        return wrong.get(ask.number, Told(ask.number, list(COLOURS)[ask.number % 3], "stop"))

    items = runner.wanted(job)
    with results.Answers(job.directory) as store:
        runner.answer(job, items, Rule(rule), store)
        return runner.judge(job, items, store.reread())


class Tags(HTMLParser):
    """Every tag with its attributes, and whether all of them were closed."""

    VOID = ("meta", "img", "input", "br", "line", "circle", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def page_of(tmp_path: Path, *outcomes: Outcome) -> tuple[str, Tags]:
    publish(tmp_path / "out" / "m", "m", outcomes, {"model": "abc"})
    text = (tmp_path / "out" / "m" / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    return text, tags


def test_errors_come_first_with_pictures_and_what_was_read(tmp_path: Path) -> None:
    text, tags = page_of(tmp_path, outcome_of(tmp_path))
    cards = [attrs for tag, attrs in tags.found if tag == "article"]
    verdicts = [card["data-verdict"] for card in cards]
    assert verdicts == ["wrong"] * 3 + ["right"] * 9
    assert {card["data-part"] for card in cards} == {"picture", "chart"}
    assert sum(card["data-trouble"] == "trouble" for card in cards) == 2
    images = [attrs["src"] for tag, attrs in tags.found if tag == "img"]
    assert len(images) == 12
    assert all(str(source).startswith("data:image/") for source in images)
    assert "images missing or broken" in text
    assert "image file not found: x" in text


def test_the_page_loads_nothing_and_runs_nothing_that_a_model_said(tmp_path: Path) -> None:
    text, tags = page_of(tmp_path, outcome_of(tmp_path))
    assert "alert(1)</script>" not in text
    assert "&lt;script&gt;" in text
    for tag, attrs in tags.found:
        for name in ("src", "href"):
            assert not (attrs.get(name) or "data:").startswith(("http", "//", "file")), (tag, attrs)
    assert len(re.findall("<script>", text)) == 2


def test_every_benchmark_has_its_share_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "CARDS", 10)
    first, second = outcome_of(tmp_path), outcome_of(tmp_path, "More", 9)
    text, tags = page_of(tmp_path, first, second)
    names = [attrs["data-name"] for tag, attrs in tags.found if tag == "article"]
    assert names == ["Colours"] * 5 + ["More"] * 5
    assert "10 of 10" in text
    assert "shown of 21 items" in text


def test_a_picture_that_cannot_be_shown_is_said(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    text, _ = page_of(tmp_path, outcome)
    assert "file not found" in text
    assert report.picture(b"no picture").startswith('<p class="missing">an image')


def test_the_screen_fits_and_says_what_is_wrong(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path)
    text = screen("m", [summarise(outcome)], "out/m")
    assert max(map(len, text.splitlines())) <= 110
    assert "75.00" in text
    assert "Colours: 1 images missing or broken, 1 empty answers" in text


def test_parts_and_a_metric_that_is_no_mean(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path)
    found = summarise(outcome)
    assert [(part.field, part.name, part.n) for part in found.parts] == [
        ("category", "chart", 6),
        ("category", "picture", 6),
    ]
    assert found.is_mean
    squared = replace(
        outcome.job.benchmark,
        aggregate=lambda judged: {"accuracy": (sum(s.score for _, s in judged) / len(judged)) ** 2},
    )
    other = summarise(replace(outcome, job=replace(outcome.job, benchmark=squared), metrics={"accuracy": 0.75**2}))
    assert not other.is_mean
    assert other.interval is not None
    assert other.interval.low < 0.75**2 < other.interval.high


def test_a_score_between_right_and_wrong(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path)
    half = replace(outcome.verdicts[0], scored=Scored(0.5, "reddish", "near"))
    none = replace(outcome.verdicts[4], scored=Scored(None, None))
    text, tags = page_of(tmp_path, replace(outcome, verdicts=[half, none]))
    assert [a["data-verdict"] for tag, a in tags.found if tag == "article"] == ["open", "part"]
    assert "score 0.5" in text
    assert "read as" in text


def test_items_that_stand_or_fall_together_are_one_draw(tmp_path: Path) -> None:
    outcome = outcome_of(tmp_path)
    alone = summarise(outcome)
    pairs = [replace(v, item=replace(v.item, meta={"pair": v.place // 2})) for v in outcome.verdicts]
    benchmark = replace(outcome.job.benchmark, together="pair")
    found = summarise(replace(outcome, job=replace(outcome.job, benchmark=benchmark), verdicts=pairs))
    assert found.value == alone.value
    assert found.is_mean
    assert found.interval is not None
    assert alone.interval is not None
    assert found.interval != alone.interval
    draws = {round(bound * 12, 9) for bound in (found.interval.low, found.interval.high)}
    assert len(draws) == 2


def test_differences_are_marked_only_where_texts_are_alike() -> None:
    assert report.alike("frac a b + c", "frac a b - c")
    assert not report.alike("blue", "It is certainly purple")
    assert not report.alike("red", "rad")
