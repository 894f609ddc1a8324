"""Every row format, and every way a row can be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from tessera.data.corpus import plain_row
from tessera.data.sample import BadRow, Message, normalise

ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def turns(row: dict[str, Any], **kwargs: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in normalise(row, **kwargs).messages]


QA = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "system", "content": "s"}, ASK, SAY]}, [("system", "s"), *QA]),
        ({"messages": ['{"role": "user", "content": "q"}', '{"role": "assistant", "content": "a"}']}, QA),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, QA),
        ({"system": "s", "conversation": [{"human": "q", "assistant": "a"}] * 2}, [("system", "s"), *QA, *QA]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, QA),
        ({"system": "s", "instruction": "i", "input": "x", "output": "a"}, [("system", "s"), ("user", "i\nx"), QA[1]]),
        ({"instruction": "i", "input": "", "output": "a"}, [("user", "i"), QA[1]]),
        ({"query": "q", "response": "a", "history": [["q", "a"]]}, QA * 2),
        ({"query": "q", "response": "a", "history": "[['q', 'a']]"}, QA * 2),
        ({"problem": "q", "solution": "a"}, QA),
        ({"Question": "q", "Answer": "a", "unknown": 3}, QA),
        ({"query": "q", "input": "x", "response": "a"}, QA),
        ({"question": "q", "answer": 42}, [("user", "q"), ("assistant", "42")]),
        ({"text": "t"}, [("assistant", "t")]),
        ({"messages": [SAY]}, [("assistant", "a")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, SAY]}, QA),
        ({"messages": [ASK, SAY], "system": None, "images": None, "tools": None}, QA),
    ],
)
def test_formats(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert turns(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": []}, "no messages"),
        ({"messages": [ASK]}, "no assistant turn"),
        ({"messages": [ASK, SAY, ASK]}, "last message is not from the assistant"),
        ({"messages": [{"role": "robot", "content": "x"}, SAY]}, "unknown role 'robot'"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "has no content"),
        ({"messages": [ASK, {"role": "system", "content": "s"}, SAY]}, "system message must come first"),
        ({"messages": [{"role": "user", "content": {"a": 1}}, SAY]}, "user must be text"),
        ({"messages": 7}, "messages must be a list"),
        ({"messages": "nonsense"}, "neither JSON nor a list"),
        ({"messages": ["x", SAY]}, "neither JSON nor a list"),
        ({"question": "q", "input": "x", "answer": "a"}, "question: choose one with --columns"),
        ({"a": 1}, "no known columns"),
        ({}, "no known columns"),
        ({"messages": [{"role": "user", "content": "<image>q"}, SAY]}, "1 <image> tags but 0 images"),
        ({"messages": [ASK, SAY], "images": [7]}, "neither a path nor bytes"),
        ({"messages": [ASK, SAY], "videos": ["a.mp4"]}, "video files come later"),
        ({"messages": [ASK, SAY], "audios": ["a.wav"]}, "audio files come later"),
        ({"messages": [ASK, SAY], "objects": {"ref": ["x"]}}, "grounding"),
        ({"messages": [ASK, SAY], "rejected_response": "r"}, "preference row"),
        ({"messages": [ASK, {**SAY, "loss_scale": "x"}]}, "loss_scale must be a number"),
        ({"query": "q", "response": ["a"]}, "must be text"),
    ],
)
def test_bad_rows_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        normalise(row)


def test_columns_rename_before_anything_else() -> None:
    row = {"frage": "q", "input": "noise", "antwort": "a"}
    assert turns(row, columns={"frage": "query", "antwort": "response"}) == QA


def test_prompts_need_no_answer_if_none_is_wanted() -> None:
    sample = normalise({"messages": [ASK]}, need_answer=False)
    assert sample.answer is None
    assert normalise({"messages": [ASK, SAY]}).answer == "a"


def test_images_go_to_their_tags() -> None:
    row = {"messages": [{"role": "user", "content": "a<image>b<image>"}, SAY], "images": ["1.png", {"path": "2.png"}]}
    assert normalise(row).images == ("1.png", "2.png")
    row = {"messages": [{"role": "system", "content": "s"}, ASK, SAY], "image": {"bytes": b"x", "path": None}}
    sample = normalise(row)
    assert sample.images == (b"x",)
    assert sample.messages[1].content == "<image>q"
    row = {"messages": [{"role": "user", "content": "x<image>"}, SAY], "images": '["1.png", "2.png"]'}
    sample = normalise(row)
    assert sample.messages[0].content == "<image>x<image>"
    assert sample.images == ("1.png", "2.png")


def test_inline_and_openai_images_keep_their_place() -> None:
    parts = [
        {"type": "image"},
        {"type": "text", "text": "mid"},
        {"type": "image_url", "image_url": {"url": "inline.png"}},
        {"type": "image", "image": "other.png"},
    ]
    sample = normalise({"messages": [{"role": "user", "content": parts}, SAY], "images": ["column.png"]})
    assert sample.messages[0].content == "<image>mid<image><image>"
    assert sample.images == ("column.png", "inline.png", "other.png")
    sample = normalise({"query": "<img>a.png</img>what? <image>", "response": "a", "images": ["b.png"]})
    assert sample.messages[0].content == "<image>what? <image>"
    assert sample.images == ("a.png", "b.png")


def test_videos_are_lists_of_frames() -> None:
    frames = ["f0.jpg", "f1.jpg"]
    for column in (frames, [frames]):
        sample = normalise({"messages": [{"role": "user", "content": "<video>q"}, SAY], "videos": column})
        assert sample.videos == (("f0.jpg", "f1.jpg"),)
    sample = normalise({"messages": [{"role": "user", "content": [{"type": "video", "video": frames}]}, SAY]})
    assert sample.messages[0].content == "<video>"


def test_loss_keys() -> None:
    messages = [ASK, {**SAY, "loss": False}, ASK, {**SAY, "loss_scale": 2.0}, ASK, {**SAY, "loss": True}, ASK, SAY]
    sample = normalise({"messages": messages})
    assert [m.loss for m in sample.messages if m.role == "assistant"] == [0.0, 2.0, 1.0, None]


def test_tools_in_three_dialects() -> None:
    function = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    own = [ASK, {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'}]
    openai = [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
    ]
    anthropic = [ASK, {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"x": 1}}]}]
    for start in (own, openai, anthropic):
        messages = normalise(
            {"messages": [*start, {"role": "tool", "content": "ok"}, SAY], "tools": '[{"name": "f"}]'}
        ).messages
        assert messages[1] == Message("assistant", "", None, (function,))
        assert messages[2] == Message("tool", "ok")
    merged = normalise({"messages": [ASK, own[1], own[1], {"role": "tool_response", "content": "ok"}, SAY]})
    assert [len(m.tool_calls) for m in merged.messages] == [0, 2, 0, 0]


def test_normal_form_reads_back() -> None:
    row = {
        "messages": [{"role": "user", "content": "<image>q"}, {**SAY, "loss": False}, ASK, SAY],
        "images": [{"bytes": b"\x00\xff", "path": None}],
        "tools": [{"name": "f"}],
    }
    sample = normalise(row)
    again = normalise(plain_row(sample))
    assert again.messages == sample.messages
    assert again.tools == sample.tools
    assert str(again.images[0]).startswith("data:image")
