"""The conversation loop: turns, pictures, commands, errors; without a model."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from tessera.config.errors import UserError
from tessera.infer.chat import HELP, Chat


class Echo:
    """Answers in two pieces and remembers the rows; refuses rows with an image called ``missing``."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def __call__(self, row: dict[str, Any], on_text: Callable[[str], None]) -> str:
        self.rows.append(row)
        if "missing" in row["images"]:
            raise UserError("image file not found: missing")
        text = f"answer {len(row['messages']) // 2}"
        on_text(text[:3])
        on_text(text[3:])
        return text


def talk(lines: str, *, stream: bool = True, types: bool = False) -> tuple[Echo, str, int]:
    reply, sink = Echo(), io.StringIO()
    turns = Chat(reply, io.StringIO(lines), sink, stream=stream, types=types).run()
    return reply, sink.getvalue(), turns


def test_history_grows_and_the_end_of_input_ends() -> None:
    reply, printed, turns = talk("one\n\ntwo\n")
    assert printed == "answer 0\nanswer 1\n"
    assert turns == 2
    assert [message["content"] for message in reply.rows[1]["messages"]] == ["one", "answer 0", "two"]


def test_whole_answers_without_streaming() -> None:
    assert talk("one\n", stream=False)[1] == "answer 0\n"


def test_clear_and_exit() -> None:
    reply, printed, turns = talk("one\nclear\ntwo\nexit\nthree\n")
    assert printed == "answer 0\n(cleared)\nanswer 0\n"
    assert turns == 2
    assert len(reply.rows[1]["messages"]) == 1


def test_tags_ask_for_paths() -> None:
    reply, _, _ = talk("compare <image> with <image>\na.png\nb.png\nand now?\n")
    assert reply.rows[0]["images"] == ["a.png", "b.png"]
    assert reply.rows[0]["messages"][0]["content"] == "compare <image> with <image>"
    assert reply.rows[1]["images"] == ["a.png", "b.png"]


def test_pictures_named_first_belong_to_the_next_question() -> None:
    reply, _, _ = talk("image: a.png\nimage: b.png\nwhat is <image>?\nnext\nimage: c.png\nand this?\n")
    assert reply.rows[0]["images"] == ["a.png", "b.png"]
    assert reply.rows[0]["messages"][0]["content"] == "<image>what is <image>?"
    assert reply.rows[2]["images"] == ["a.png", "b.png", "c.png"]
    assert reply.rows[2]["messages"][-1]["content"] == "<image>and this?"


def test_a_failed_turn_is_forgotten() -> None:
    reply, printed, turns = talk("one\nimage: missing\ntwo\nthree\n")
    assert "error: image file not found: missing\n" in printed
    assert turns == 2
    assert [message["content"] for message in reply.rows[-1]["messages"]] == ["one", "answer 0", "three"]
    assert reply.rows[-1]["images"] == []


def test_input_may_end_before_a_path() -> None:
    assert talk("what is <image>?\n")[2] == 0


def test_prompts_only_for_a_person() -> None:
    _, printed, _ = talk("what is <image>?\na.png\n", types=True)
    assert printed == f"{HELP}\n> path of image 1: answer 0\n> "
