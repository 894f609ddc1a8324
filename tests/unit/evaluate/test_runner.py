"""Items are asked once, whatever happens in between; what is wrong with one is counted and never stops the others."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tessera.evaluate import predictions, results, runner
from tessera.evaluate.answerer import Ask, Told
from tessera.evaluate.item import Benchmark, Item, Scored
from tessera.evaluate.runner import Job, Outcome
from tessera.evaluate.summary import screen, summarise
from tests.benchmarks import COLOURS, Rule, colours


def right(ask: Ask) -> Told:
    return Told(ask.number, list(COLOURS)[ask.number % 3], "stop", 5, 1)


def job_of(tmp_path: Path, count: int = 12, **changes: object) -> Job:
    job = Job("Colours", colours(count, tmp_path / "images"), tmp_path, tmp_path / "out" / "Colours")
    return replace(job, **changes)  # type: ignore[arg-type]


def run(
    job: Job, rule: Rule, *, rank: int = 0, world: int = 1, memory: dict[str, results.Line] | None = None
) -> Outcome:
    items = runner.wanted(job)
    with results.Answers(job.directory, rank) as store:
        runner.answer(job, items, rule, store, rank=rank, world=world, memory=memory)
        return runner.judge(job, items, store.reread())


def test_every_item_is_asked_once_and_judged_in_order(tmp_path: Path) -> None:
    rule = Rule(right)
    outcome = run(job_of(tmp_path), rule)
    assert sorted(rule.asked) == list(range(12))
    assert [verdict.item.id for verdict in outcome.verdicts] == [f"c{index}" for index in range(12)]
    assert outcome.metrics == {"accuracy": 1.0, "share of empty": 0.0}
    assert outcome.troubles == {}


def test_items_are_read_when_their_turn_comes(tmp_path: Path) -> None:
    read: list[int] = []

    class Lazy(Sequence[Item]):
        held = runner.wanted(job_of(tmp_path, 40))

        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Item:  # type: ignore[override]
            read.append(index)
            return self.held[index]

    def rule(ask: Ask) -> Told:
        assert len(read) <= ask.number + 4, "no more are read than are being answered"
        return right(ask)

    job = job_of(tmp_path, 40)
    with results.Answers(job.directory) as store:
        runner.answer(job, Lazy(), Rule(rule, size=4), store)
    assert read == list(range(40))


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    first = run(job_of(tmp_path), Rule(right))
    again = Rule(right)
    second = run(job_of(tmp_path), again)
    assert again.asked == []
    assert summarise(second) == summarise(first)


def test_a_killed_run_goes_on_where_it_was_even_behind_a_torn_line(tmp_path: Path) -> None:
    whole = run(job_of(tmp_path / "whole"), Rule(right))

    def dies(ask: Ask) -> Told:
        if ask.number == 6:
            raise KeyboardInterrupt
        return right(ask)

    with pytest.raises(KeyboardInterrupt):
        run(job_of(tmp_path), Rule(dies, size=1))
    file = job_of(tmp_path).directory / "answers" / "rank0.jsonl"
    text = file.read_bytes()
    assert text.count(b"\n") == 6
    file.write_bytes(text[:-7])  # the sixth line is torn
    again = Rule(right, size=1)
    outcome = run(job_of(tmp_path), again)
    assert again.asked == [5, 6, 7, 8, 9, 10, 11]
    assert [v.scored for v in outcome.verdicts] == [v.scored for v in whole.verdicts]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_ranks_share_the_items_and_a_smaller_number_of_them_goes_on(tmp_path: Path) -> None:
    job, rules = job_of(tmp_path), [Rule(right) for _ in range(3)]
    for rank, rule in enumerate(rules):
        outcome = run(job, rule, rank=rank, world=3)
    assert [sorted(rule.asked) for rule in rules] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert outcome.metrics["accuracy"] == 1.0
    alone = Rule(right)
    assert run(job, alone).metrics["accuracy"] == 1.0
    assert alone.asked == []


def test_a_limit_asks_the_first_items_and_a_larger_one_only_the_others(tmp_path: Path) -> None:
    few, more = Rule(right), Rule(right)
    outcome = run(job_of(tmp_path, limit=5), few)
    assert (len(outcome.verdicts), outcome.total) == (5, 12)
    assert "5 of 12" in screen("m", [summarise(outcome)], "d")
    run(job_of(tmp_path, limit=9), more)
    assert sorted(few.asked) == list(range(5))
    assert sorted(more.asked) == list(range(5, 9))


def test_another_question_under_the_same_id_is_refused(tmp_path: Path) -> None:
    run(job_of(tmp_path), Rule(right))
    with pytest.raises(UserError, match=r"answer to item c0 of Colours that was another question.*choose another"):
        run(job_of(tmp_path, max_new_tokens=7), Rule(right))


def test_an_image_that_changed_is_another_question(tmp_path: Path) -> None:
    job = job_of(tmp_path, 3)
    items = runner.wanted(job)
    before = runner.question_key(items[0].row, tmp_path, 64)
    assert before == runner.question_key(items[0].row, tmp_path, 64)
    assert before != runner.question_key(items[0].row, tmp_path, 65)
    (tmp_path / "images" / "0.png").write_bytes((tmp_path / "images" / "1.png").read_bytes())
    assert before != runner.question_key(items[0].row, tmp_path, 64)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    results.claim(tmp_path / "m", {"model": "abc", "temperature": 0.0})
    results.claim(tmp_path / "m", {"model": "abc", "temperature": 0.0})
    with pytest.raises(UserError, match=r"temperature 0\.0 there, 0\.5 now\); choose another directory"):
        results.claim(tmp_path / "m", {"model": "abc", "temperature": 0.5})


def test_answers_to_the_same_question_are_remembered_across_benchmarks_and_directories(tmp_path: Path) -> None:
    settings = {"model": "abc"}
    results.claim(tmp_path / "out", settings)
    run(job_of(tmp_path, 6), Rule(right))
    memory = results.remembered(tmp_path, settings)
    assert len(memory) == 3, "three pictures, asked the same"
    assert results.remembered(tmp_path, {"model": "abd"}) == {}
    other = Rule(right)
    outcome = run(job_of(tmp_path, name="Again", directory=tmp_path / "other" / "Again"), other, memory=memory)
    assert other.asked == []
    assert outcome.metrics["accuracy"] == 1.0


BAD = {
    1: Told(1, error="image file not found: 1.png"),
    2: Told(2, "", "stop"),
    3: Told(3, "red", "length"),
    4: Told(4, error="failed: 500 overloaded"),
    5: Told(5, error="refused: 400 too long"),
}


def troubled(benchmark: Benchmark) -> Benchmark:
    """Two of its items are none, and of one the answer cannot be judged."""
    items = list(benchmark.items(Path()))
    items[7] = Item("row 7", {}, None, {}, "not valid JSON")
    items[8] = Item("c8", {**items[8].row, "images": ["/nowhere/x.png"]}, "blue")
    items[9] = replace(items[9], gold=None)

    def score(item: Item, answer: str) -> Scored:
        return Scored(float(answer.lower() == item.gold.lower()), answer or None, "" if answer else "not parsed: empty")

    return replace(benchmark, items=lambda path: items, score=score)


def test_what_is_wrong_is_counted_listed_and_scored_as_no_answer(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    job = replace(job, benchmark=troubled(job.benchmark))
    rule = Rule(lambda ask: BAD.get(ask.number, right(ask)))
    outcome = run(job, rule)
    assert outcome.troubles == {"row": 1, "image": 2, "refused": 1, "failed": 1, "empty": 1, "cut": 1, "unjudged": 1}
    kinds = {verdict.item.id: verdict.troubles for verdict in outcome.verdicts if verdict.troubles}
    assert kinds["row 7"] == ("row",)
    assert kinds["c8"] == ("image",)
    assert outcome.verdicts[9].scored.note.startswith("cannot be judged: AttributeError")
    assert outcome.verdicts[3].scored.score == 1.0, "an answer that was cut off is judged as it is"
    assert outcome.metrics["accuracy"] == pytest.approx(5 / 12)
    text = screen("m", [summarise(outcome)], "d")
    assert "2 images missing or broken" in text
    predictions.write(outcome)
    rows = [json.loads(line) for line in (job.directory / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [verdict.item.id for verdict in outcome.verdicts]
    assert rows[1]["reason"] == "image file not found: 1.png"
    assert rows[1]["answer"] is None
    assert rows[2]["answer"] == ""


def test_what_failed_is_asked_again_and_what_was_answered_is_not(tmp_path: Path) -> None:
    run(job_of(tmp_path), Rule(lambda ask: BAD.get(ask.number, right(ask))))
    again = Rule(right)
    outcome = run(job_of(tmp_path), again)
    assert sorted(again.asked) == [1, 4, 5]
    assert outcome.troubles == {"empty": 1, "cut": 1}


def test_two_items_of_one_name_are_two_items(tmp_path: Path) -> None:
    job = job_of(tmp_path, 3)
    items = [replace(item, id="same") for item in runner.wanted(job)]
    job = replace(job, benchmark=replace(job.benchmark, items=lambda path: items))
    rule = Rule(right)
    assert run(job, rule).metrics["accuracy"] == 1.0
    assert sorted(rule.asked) == [0, 1, 2]


def test_a_seed_is_the_items_own() -> None:
    assert runner.seed_of(42, "c1") == runner.seed_of(42, "c1")
    assert len({runner.seed_of(42, "c1"), runner.seed_of(43, "c1"), runner.seed_of(42, "c2")}) == 3


def test_a_benchmark_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no questions"):
        runner.wanted(job_of(tmp_path, 0))


def test_files_for_other_scorers(tmp_path: Path) -> None:
    job = job_of(tmp_path, 3)
    choices = [
        replace(item, gold="A", meta={"choices": {"A": "red", "B": "green\tish"}, "category": "x"})
        for item in runner.wanted(job)
    ]
    job = replace(job, benchmark=replace(job.benchmark, items=lambda path: choices))
    outcome = run(job, Rule(lambda ask: Told(ask.number, 'B "yes"\nor not', "stop")))
    lines = predictions.tsv(outcome).splitlines()
    assert lines[0].split("\t") == ["index", "question", "answer", "prediction", "A", "B", "category"]
    assert predictions.megatron_row(outcome.verdicts[0]) == {
        "sample_id": "c0",
        "prompt": "Which colour is it? Answer with one word.",
        "text": 'B "yes"\nor not',
        "prediction": 'B "yes"\nor not',
        "answer": "A",
        "index2ans": {"A": "red", "B": "green\tish"},
        "all_choices": ["A", "B"],
        "question_type": "multiple-choice",
    }


def test_nothing_is_half_written(tmp_path: Path) -> None:
    results.write_whole(tmp_path / "a.json", "{}")
    assert os.listdir(tmp_path) == ["a.json"]
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(UserError, match="expected a JSON object"):
        results.read_json(tmp_path / "a.json")
