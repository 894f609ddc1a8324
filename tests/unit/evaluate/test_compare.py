"""Two evaluations are compared over the items that both have; what cannot be compared is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tessera.evaluate import comparison, results, runner
from tessera.evaluate.answerer import Ask, Told
from tessera.evaluate.compare import compare, screen
from tessera.evaluate.publish import publish
from tessera.evaluate.runner import Job
from tests.benchmarks import COLOURS, Rule, colours


def evaluated(tmp_path: Path, name: str, right: Callable[[int], bool], count: int = 30) -> Path:
    directory = tmp_path / "out" / name
    job = Job("Colours", colours(count, tmp_path / "images"), tmp_path, directory / "Colours")

    def rule(ask: Ask) -> Told:
        return Told(ask.number, list(COLOURS)[ask.number % 3] if right(ask.number) else "purple", "stop")

    items = runner.wanted(job)
    with results.Answers(job.directory) as store:
        runner.answer(job, items, Rule(rule), store)
        publish(directory, name, [runner.judge(job, items, store.reread())], {"model": name})
    return directory


def test_difference_test_and_changed_items(tmp_path: Path) -> None:
    first = evaluated(tmp_path, "a", lambda n: n % 2 == 0)
    second = evaluated(tmp_path, "b", lambda n: (n % 2 == 0 and n != 4) or n > 19)
    [found] = compare(first, second)
    assert (found.test.n, found.test.better, found.test.worse) == (30, 5, 1)
    assert found.test.difference == pytest.approx(4 / 30)
    assert found.test.exact
    assert found.changed == ["c4", "c21", "c23", "c25", "c27", "c29"]
    text = screen([found], first, second)
    assert "+13.33" in text
    assert "McNemar, exact" in text
    [back] = compare(second, first)
    assert back.test.difference == -found.test.difference
    assert back.test.p == found.test.p


def test_the_page_shows_the_items_that_changed_worse_first(tmp_path: Path) -> None:
    first = evaluated(tmp_path, "a", lambda n: n < 10)
    second = evaluated(tmp_path, "b", lambda n: 2 < n < 15)
    path = comparison.main(first, second, tmp_path / "cmp")
    assert path is not None
    text = path.read_text()
    assert text.count("became worse</span>") == 3
    assert text.count("became better</span>") == 5
    assert text.index("became worse</span>") < text.index("became better</span>")
    assert text.count('<img src="data:') == 8


def test_only_common_items_count(tmp_path: Path) -> None:
    first = evaluated(tmp_path, "a", lambda n: True, 12)
    second = evaluated(tmp_path, "b", lambda n: n != 3, 20)
    [found] = compare(first, second)
    assert (found.test.n, found.test.worse) == (12, 1)
    assert "8 items are in one of the two only" in screen([found], first, second)


def test_a_benchmark_or_its_predictions_may_be_named(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path, "a", lambda n: True, 4), evaluated(tmp_path, "b", lambda n: False, 4)
    for place in ("Colours", "Colours/predictions.jsonl"):
        [found] = compare(first / place, second)
        assert found.test.difference == -1.0


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    first, second = evaluated(tmp_path, "a", lambda n: True, 4), evaluated(tmp_path, "b", lambda n: False, 4)
    with pytest.raises(UserError, match=r"--compare .*nowhere: no such directory"):
        compare(first, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no predictions\.jsonl"):
        compare(tmp_path / "images", second)
    stored = second / "Colours" / "summary.json"
    summary = json.loads(stored.read_text())
    stored.write_text(json.dumps({**summary, "benchmark": "colours@other"}))
    with pytest.raises(UserError, match=r"Colours was scored as colours@test in .* and as colours@other"):
        compare(first, second)
    stored.write_text(json.dumps({**summary, "name": "Else"}))
    with pytest.raises(UserError, match=r"no common items \(there Colours; here Else\)"):
        compare(first, second)
    stored.unlink()
    with pytest.raises(UserError, match=r"has no summary\.json; run its tessera eval to the end"):
        compare(first, second)
    stored.write_text(json.dumps(summary))
    (second / "Colours" / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="not a file of predictions"):
        compare(first, second)
