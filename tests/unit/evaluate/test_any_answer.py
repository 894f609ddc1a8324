"""No answer breaks a rule, however odd or long: a run never ends at row 9,999."""

from __future__ import annotations

import math
import random
import time

import pytest

from tessera.evaluate.item import Benchmark, Item, Scored
from tessera.evaluate.tasks import BENCHMARKS
from tessera.evaluate.tasks.own import SCORERS

ODD = (
    "",
    " ",
    "\n\n\t",
    "\0",
    "\ud800",
    "\u202e\u0661\u0662 \uff15",
    "nan",
    "-inf",
    "1e999",
    "9" * 1500,
    "[1e999, 2, 3, 4]",
    "[nan,nan,nan,nan]",
    "(" * 800,
    "[" * 800,
    "[" + "1" * 800,
    "." * 800,
    "\\frac{" * 300,
    "$$" * 300,
    "a " * 800,
    "a" * 5000,
    "A-" * 800,
    "is " * 600,
    "'" * 800,
    "\N{PILE OF POO}" * 50,
    "ß" * 100,
    "```json\n[{}]\n```",
    "\\answer{",
    "%",
    "--5",
    "1_0",
    "Yes no",
    "(A)(B)(C)",
)
CHOICES = {"A": "a curve", "B": "7", "C": "", "D": "None"}
GOLDS = {"pope": "Yes", "refcoco": (1.0, 2.0, 30.0, 40.0), "refcoco+": (1.0, 2.0, 30.0, 40.0), "mathvista": "14",
         "refcocog": (1.0, 2.0, 30.0, 40.0), "latexocr": "x ^ { 2 }", "mmbench": "A", "mmstar": "A"}  # fmt: skip
ALL = [*BENCHMARKS.values(), *SCORERS.values()]


def items_of(name: str) -> list[Item]:
    """Items as the benchmark makes them: with and without choices, of every kind of number, and a bad row."""
    short = name.partition("@")[0]
    gold: object = GOLDS.get(short, ["14", "a curve"])
    gold = "14" if name == "latex" else "14" if name in ("ai2d@vlmevalkit", "mmmu@vlmevalkit") else gold
    meta = {"size": (640, 480), "question": "Which?\nA. cat\nB. dog", "source": "HME100k", "category": "x"}
    math_vista = short == "mathvista"
    found = [
        Item(
            "0",
            {},
            gold,
            {**meta, "choices": list(CHOICES.values()) if math_vista else CHOICES, "kind": "text", "precision": 0},
        ),
        Item("2", {}, None, {}, "the row cannot be read"),
    ]
    if short not in ("mmbench", "mmstar", "ai2d"):
        empty: object = [] if math_vista else {}
        for kind in ("integer", "float", "list"):
            found.append(Item(kind, {}, gold, {**meta, "choices": empty, "kind": kind, "precision": 2}))
    return found


@pytest.mark.parametrize("found", ALL, ids=lambda found: str(found.name))
def test_any_answer(found: Benchmark) -> None:
    draw, began = random.Random(5), time.perf_counter()
    mixed = ["".join(draw.choice(ODD)[:20] for _ in range(4)) for _ in range(20)]
    judged: list[tuple[Item, Scored]] = []
    for item in items_of(found.name):
        for answer in (*ODD, *mixed):
            scored = found.judge(item, answer)
            assert scored.score is None or (math.isfinite(scored.score) and scored.score >= 0), (answer, scored)
            assert item.problem is None or scored.score == 0
            judged.append((item, scored))
    totals, settled = found.aggregate(judged), found.settle(judged)
    assert all(math.isfinite(value) and value >= 0 for value in totals.values()), totals
    assert found.metric in totals and len(settled) == len(judged)
    assert all(scored.score is not None for scored in settled)
    assert found.metric in found.aggregate([])
    assert time.perf_counter() - began < 20, "an answer takes too long to judge"
