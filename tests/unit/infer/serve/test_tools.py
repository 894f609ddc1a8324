"""Calls in what a model says: the same whether it comes whole or letter by letter."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("pydantic", reason="tessera deploy needs the extra `deploy`")

from tessera.infer.serve.tools import Call, ToolReader, call_of

ONE = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
TWO = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
F, G = ("f", '{"x": 1}'), ("g", "{}")


def read(pieces: list[str], **how: bool) -> list[str | tuple[str, str]]:
    """Texts joined, calls as (name, arguments)."""
    reader = ToolReader(**how)
    said = [part for piece in pieces for part in reader.push(piece)] + reader.finish()
    out: list[str | tuple[str, str]] = []
    for part in said:
        if isinstance(part, Call):
            out.append((part.name, part.arguments))
        elif out and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    return out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hello", ["hello"]),
        ("", []),
        ("  spaced \n", ["  spaced \n"]),
        (ONE, [F]),
        (ONE + "\n" + TWO + "\n", [F, G]),
        ("look:\n\n" + ONE, ["look:", F]),
        (ONE + " done.", [F, " done."]),
        ("a <tool_cal b", ["a <tool_cal b"]),
        ("a < b <tool", ["a < b <tool"]),
        ('<tool_call>{"name": "f", "arguments": {"x": 1}}', [F]),
        ("<tool_call>nonsense</tool_call>", ["<tool_call>nonsense</tool_call>"]),
        ("<tool_call>nonsense", ["<tool_call>nonsense"]),
        ('<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
        ("<tool_call>[1]</tool_call> x", ["<tool_call>[1]</tool_call> x"]),
        ("</tool_call> " + TWO, ["</tool_call>", G]),
    ],
)
def test_whole_and_letter_by_letter(text: str, expected: list[str | tuple[str, str]]) -> None:
    assert read([text]) == expected
    assert read(list(text)) == expected
    assert read([text[at : at + 7] for at in range(0, len(text), 7)]) == expected


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = ToolReader()
    assert reader.push("a <b> ") == ["a <b>"]
    assert reader.push("<too") == []
    assert reader.push("th") == [" <tooth"]


def test_a_bare_call() -> None:
    assert read(['{"name": "f", ', '"arguments": {"x": 1}}'], bare=True) == [F]
    assert read(["sorry"], bare=True) == ["sorry"]


def test_spellings_of_a_call() -> None:
    for text in ('{"name": "f", "parameters": {"x": 1}}', json.dumps({"name": "f", "arguments": '{"x": 1}'})):
        found = call_of(text)
        assert found is not None and (found.name, found.arguments) == F
    assert call_of("[" * 100_000) is None
    assert call_of('{"name": "f", "arguments": 3}') is None
    first, second = call_of('{"name": "f"}'), call_of('{"name": "f"}')
    assert first is not None and second is not None and first.id != second.id
