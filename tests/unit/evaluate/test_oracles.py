"""Every rule gives the values of the program it is named after, on answers where such programs disagree.

``oracles/*.json`` hold answers and the values that the programs named in ``made_by`` gave for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tessera.evaluate.item import Benchmark, Item, Scored
from tessera.evaluate.scorers import boxes, captions, choice, latex, mathvista, vqa, words, yes_no
from tessera.evaluate.tasks import BENCHMARKS

EXACT = 1e-9
FOLDER = Path(__file__).parent / "oracles"


def cases(name: str, least: int = 14) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["cases"]
    assert len(found) >= least
    return found


def item(gold: Any, row: int = 0, **meta: Any) -> Item:
    return Item(str(row), {}, gold, meta)


def differing(name: str, keys: dict[str, Any]) -> list[str]:
    """The cases of which a rule in ``keys`` (oracle's key -> rule of the case) gives another value."""
    out = []
    for case in cases(name):
        for key, rule in keys.items():
            if case[key] is not None and abs(rule(case) - case[key]) > EXACT:
                out.append(f"{key} {rule(case)} {case}")
    return out


@pytest.mark.parametrize("style", ["vqa", "evalai", "vlmevalkit"])
def test_words_are_normalised_as_each_program_does(style: str) -> None:
    wrong = [(c["text"], words.normal(c["text"], style), c[style]) for c in cases("words")]
    assert [entry for entry in wrong if entry[1] != entry[2]] == []


def test_the_styles_really_differ() -> None:
    found = cases("words")
    assert any(c["vqa"] != c["vlmevalkit"] for c in found) and any(c["vqa"] != c["evalai"] for c in found)


def scored(name: str, key: str = "golds") -> Any:
    found: Benchmark = BENCHMARKS[name]

    def rule(case: dict[str, Any]) -> float:
        gold = case[key] if isinstance(case[key], list) else [case[key]]
        meta = {name: case[name] for name in ("category", "source", "choices", "kind", "precision") if name in case}
        score = found.score(item(gold, **meta), case["answer"]).score
        assert score is not None
        return score

    return rule


@pytest.mark.parametrize("name", ["textvqa@official", "vqav2@official", "textvqa@vlmevalkit", "textvqa@megatron"])
def test_agreement_with_people(name: str) -> None:
    assert differing("vqa", {name: scored(name)}) == []


@pytest.mark.parametrize("name", ["chartqa@official", "chartqa@megatron"])
def test_relaxed_numbers(name: str) -> None:
    assert differing("chartqa", {name: scored(name, "gold")}) == []


@pytest.mark.parametrize("name", ["docvqa@official", "docvqa@megatron"])
def test_edit_similarity(name: str) -> None:
    assert differing("anls", {name: scored(name)}) == []


@pytest.mark.parametrize("name", ["ocrbench@official", "ocrbench@megatron"])
def test_ocr_bench(name: str) -> None:
    assert differing("ocrbench", {name: scored(name)}) == []


def test_ai2d() -> None:
    assert differing("ai2d", {"ai2d@megatron": scored("ai2d@megatron", "gold")}) == []


def test_letters() -> None:
    for case in cases("choices"):
        answer, choices = case["answer"], case["choices"]
        assert choice.inferred(answer, choices) == case["vlmevalkit"], case
        assert choice.letter(answer, choices) == case["official"], case
        found = choice.letter(choice.unwrapped(answer), choices, half_open=True)
        assert (found or next(iter(choices))) == case["megatron"], case


def test_open_answers() -> None:
    wrong = [c for c in cases("mmmu_open") if choice.open_correct(c["answer"], c["golds"]) != c["correct"]]
    assert wrong == []


def test_mmmu_as_vlmevalkit_judges_it() -> None:
    rule = BENCHMARKS["mmmu@vlmevalkit"].score
    got = [rule(item(case["gold"], choices=case["choices"]), case["answer"]) for case in cases("mmmu_vlmevalkit")]
    assert [found.score for found in got] == [case["hit"] for case in cases("mmmu_vlmevalkit")]


def test_mmbench_in_rotations() -> None:
    *rows, last = cases("mmbench")
    found, judged = BENCHMARKS["mmbench@vlmevalkit"], []
    for row in rows:
        choices = {letter: row[letter] for letter in "ABCD" if row[letter] is not None}
        meta = {"choices": choices, "question": row["index"] % 1_000_000, "category": row["category"]}
        asked = item(row["answer"], row["index"], **meta, **{"l2-category": row["l2-category"]})
        judged.append((asked, found.judge(asked, row["prediction"])))
    got = found.aggregate(judged)
    names = {short: name for name, short in last["names"].items()}
    for short, value in last["report"].items():
        key = "accuracy" if short == "Overall" else f"accuracy/{names.get(short, short)}"
        assert got[key] == pytest.approx(value, abs=EXACT), key
    settled = [score.score for score in found.settle(judged)]
    mains = [score for (asked, _), score in zip(judged, settled, strict=True) if int(asked.id) < 1_000_000]
    assert sum(score or 0 for score in mains) / len(mains) == pytest.approx(got["accuracy"], abs=EXACT)


def test_pope() -> None:
    *rows, last = cases("pope")
    got: dict[str, dict[str, float]] = {}
    for dialect in ("vlmevalkit", "official"):
        found = BENCHMARKS[f"pope@{dialect}"]
        judged = []
        for row in rows:
            asked = item(row["answer"], row["index"], category=row["category"])
            judged.append((asked, found.judge(asked, row["prediction"])))
        got[dialect] = found.aggregate(judged)
    for report in last["vlmevalkit"]:
        behind = "" if report["split"] == "Overall" else f"/{report['split']}"
        assert 100 * got["vlmevalkit"][f"f1{behind}"] == pytest.approx(report["Overall"], abs=EXACT)
        assert 100 * got["vlmevalkit"][f"accuracy{behind}"] == pytest.approx(report["acc"], abs=EXACT)
    assert {name: got["official"][name] for name in last["official"]} == pytest.approx(last["official"], abs=EXACT)
    assert [yes_no.said_pope(row["prediction"]).lower() for row in rows] == last["official_items"]


def test_math_vista() -> None:
    for case in cases("mathvista"):
        answer, gold, choices, kind = case["answer"], case["gold"], case["choices"], case["kind"]
        assert mathvista.vlmevalkit(answer, gold, choices, kind)[0] == case["vlmevalkit"], case
        if case["official"] is not None and (answer or not choices):
            got = mathvista.official(answer, gold, choices, kind, case["precision"])[0]
            assert got == case["official"], case
        letter = chr(ord("A") + choices.index(gold)) if choices else gold
        if case["megatron"] is not None:
            assert mathvista.megatron(answer, letter, choices)[0] == case["megatron"], case


def test_boxes() -> None:
    rule = BENCHMARKS["refcoco@vlmevalkit"].score
    for case in cases("refcoco"):
        found = boxes.vlmevalkit_box(case["answer"])
        size = (case["size"][0], case["size"][1])
        shared = 0.0 if found is None else boxes.overlap(boxes.guessed(found, size), tuple(case["gold"]))
        assert shared == pytest.approx(case["iou"], abs=EXACT), case
        assert rule(item(tuple(case["gold"]), size=size), case["answer"]).score == float(case["iou"] >= 0.5)


def test_formulas() -> None:
    *rows, last = cases("latex")
    found = BENCHMARKS["latexocr@im2markup"]
    judged = [(item(row["gold"]), found.score(item(row["gold"]), row["answer"])) for row in rows]
    assert [score.score for _, score in judged] == [float(row["exact"]) for row in rows]
    got = found.aggregate(judged)
    assert got["edit"] == pytest.approx(last["edit"], abs=EXACT)
    assert got["BLEU-4"] == pytest.approx(last["bleu"], abs=EXACT)
    assert round(100 * got["BLEU-4"], 2) == last["perl"]
    assert latex.signs("$$\\frac{a}{b}$$") == latex.signs("\\frac { a } { b }") == ["\\frac", *"{a}{b}"]


def test_words_of_captions() -> None:
    found = cases("caption_words")
    wrong = [case for case in found if " ".join(captions.words(case["caption"])) != case["words"]]
    assert [case for case in wrong if case["everyday"]] == []
    assert len(wrong) <= 0.02 * sum(not case["everyday"] for case in found), wrong


@pytest.mark.parametrize("dialect", ["official", "megatron", "vlmevalkit"])
def test_captions(dialect: str) -> None:
    *rows, last = cases("captions")
    found, report = BENCHMARKS[f"coco@{dialect}"], last[dialect]
    judged = [(item(row["golds"], at), found.score(item(row["golds"]), row["answer"])) for at, row in enumerate(rows)]
    items = report.pop("items")
    assert found.aggregate(judged) == pytest.approx(report, abs=EXACT)
    assert [score.score for score in found.settle(judged)] == pytest.approx(items, abs=EXACT)


def test_a_wrong_rule_would_be_found() -> None:
    assert differing("vqa", {"textvqa@official": scored("textvqa@megatron")})
    assert differing("anls", {"docvqa@megatron": lambda case: vqa.anls(case["answer"], case["golds"])})
    assert Scored(0.0, None, "not parsed: x").unread and not Scored(0.0, "x").unread
