"""A conversation at the terminal, or with whatever is piped into it.

One line is one turn. Pictures come in either way::

    > What is in <image>?            every tag asks for a path on the next line
    > image: photo.jpg               or name the pictures first; they belong to the next question
    > What is this?
    > clear                          forget the conversation
    > exit                           (or the end of the input)

A turn that fails, because a picture is missing or the prompt no longer fits, is reported in one line and forgotten; the
conversation goes on from where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from tessera.config.errors import UserError

HELP = "one line is one question; `image: PATH` adds a picture, `clear` starts anew, `exit` ends"
_TAG = "<image>"


class Reply(Protocol):
    """Answers ``row`` (``messages`` and ``images``), handing on pieces of text as they come; UserError if it cannot."""

    def __call__(self, row: dict[str, Any], on_text: Callable[[str], None]) -> str: ...


@dataclass(slots=True)
class History:
    """The conversation so far, in the form of a dataset row."""

    messages: list[dict[str, str]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)

    def asked(self, text: str, images: Sequence[str]) -> History:
        """This conversation with one more question; pictures without a tag go in front of its text."""
        missing = len(images) - text.count(_TAG)
        content = _TAG * max(0, missing) + text
        return History([*self.messages, {"role": "user", "content": content}], [*self.images, *images])

    def row(self) -> dict[str, Any]:
        """As a dataset row without an answer."""
        return {"messages": list(self.messages), "images": list(self.images)}


class Chat:
    """Reads turns from ``source`` until it ends and writes answers to ``sink``; prompts only if a person ``types``."""

    def __init__(self, reply: Reply, source: TextIO, sink: TextIO, *, stream: bool, types: bool) -> None:
        self._reply = reply
        self._source = source
        self._sink = sink
        self._stream = stream
        self._types = types

    def run(self) -> int:
        """Talk until the end; the number of answered turns."""
        history, turns = History(), 0
        waiting: list[str] = []
        if self._types:
            self._say(HELP + "\n")
        while (line := self._read("> ")) is not None:
            word = line.strip()
            if word in ("exit", "quit"):
                break
            if word == "clear":
                history, waiting = History(), []
                self._say("(cleared)\n")
            elif word.startswith("image:"):
                waiting.append(word.removeprefix("image:").strip())
            elif word:
                images = self._pictures(word, waiting)
                if images is None:
                    break
                answered = self._turn(history.asked(word, images))
                turns += answered is not None
                history, waiting = answered or history, []
        return turns

    def _pictures(self, text: str, waiting: list[str]) -> list[str] | None:
        """Paths for the tags of ``text``; None if the input ends before they are named."""
        images = list(waiting)
        while len(images) < text.count(_TAG):
            line = self._read(f"path of image {len(images) + 1}: ")
            if line is None:
                return None
            images.append(line.strip().removeprefix("image:").strip())
        return images

    def _turn(self, history: History) -> History | None:
        """``history`` with its answer, which has been shown; None if there is none."""
        try:
            text = self._reply(history.row(), self._say if self._stream else lambda piece: None)
        except UserError as error:
            self._say(f"error: {error}\n")
            return None
        self._say("\n" if self._stream else text + "\n")
        history.messages.append({"role": "assistant", "content": text})
        return history

    def _read(self, prompt: str) -> str | None:
        if self._types:
            self._say(prompt)
        line = self._source.readline()
        return line if line else None

    def _say(self, text: str) -> None:
        self._sink.write(text)
        self._sink.flush()
