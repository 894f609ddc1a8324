"""Answers that are held to a schema or a pattern, whatever a random model would rather say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve
from tessera.infer.constrain import BadConstraint, Constraint, Grammars
from tessera.infer.request import Finished, Piece, Request
from tessera.infer.sampling import Sampling
from tessera.infer.session import Session
from tests.disk import save_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    base = save_checkpoint(tmp_path_factory.mktemp("models") / "base", "qwen3")
    return Session.open(resolve(["infer", "--model", str(base), "--max_new_tokens", "300"], {}))


def answer(session: Session, *constraints: Constraint | None, **settings: Any) -> list[tuple[str, Finished]]:
    """Answers to as many requests at once."""
    question = session.question({"query": "who is it?"})
    requests = [
        Request(question, constraint=constraint, seed=i, **settings) for i, constraint in enumerate(constraints)
    ]
    texts = {request.id: "" for request in requests}
    ends = {}
    for request in requests:
        made = session.prepare(request)
        session.scheduler.add(request, made.prompt, made.grammar)
    while not session.scheduler.idle:
        for event in session.scheduler.step():
            if isinstance(event, Piece):
                texts[event.request] += event.text
            else:
                assert isinstance(event, Finished), event
                ends[event.request] = event
    return [(texts[request.id], ends[request.id]) for request in requests]


@pytest.mark.parametrize("how", [Sampling(), Sampling(1.5), Sampling(0.9, top_k=20, repetition_penalty=1.2)])
def test_schemas_and_patterns_are_kept(session: Session, how: Sampling) -> None:
    pytest.importorskip("llguidance", reason="constrained output is an extra")
    pattern = "(yes|no), because [a-z ]{5,20}\\."
    schema = Constraint("json_schema", json.dumps(SCHEMA))
    found = answer(session, schema, Constraint("regex", pattern), None, schema, sampling=how)
    for text, end in (found[0], found[3]):
        assert end.reason == "stop"
        person = json.loads(text)
        assert person.keys() == {"name", "age"}
        assert person["name"] in ("ada", "bob")
        assert 0 <= person["age"] <= 120
    assert re.fullmatch(pattern, found[1][0])
    # The one beside them is free, as it is alone.
    [(free, _)] = answer(session, None, sampling=how) if how.greedy else [(found[2][0], None)]
    assert found[2][0] == free


def test_any_object(session: Session) -> None:
    pytest.importorskip("llguidance", reason="constrained output is an extra")
    [(text, end)] = answer(session, Constraint("json_object"), sampling=Sampling(1.0), max_new_tokens=400)
    assert text.lstrip().startswith("{")
    if end.reason == "stop":
        assert isinstance(json.loads(text), dict)


def test_what_is_no_constraint_is_refused(session: Session) -> None:
    pytest.importorskip("llguidance", reason="constrained output is an extra")
    for constraint, message in (
        (Constraint("json_schema", "{"), "not a JSON schema"),
        (Constraint("json_schema", '{"type": "person"}'), "person"),
        (Constraint("regex", "(unclosed"), "regex"),
        (Constraint("xml", ""), "expected one of json_schema, json_object, regex"),
    ):
        with pytest.raises(BadConstraint, match=message):
            answer(session, constraint)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'tessera\[deploy\]'"):
        Grammars(None, 10, frozenset({0})).of(Constraint("json_object"))
