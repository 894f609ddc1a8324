"""From what the engine tells to what OpenAI's API says, whole or as a stream of chunks.

A *writer* knows one route's words: :class:`ChatWriter` and :class:`TextWriter`. Events of all choices pass through
:meth:`take`, which gives back the chunks they make; at the end :meth:`whole` has the same answer in one piece. Both are
made from the same parts, so a stream and a whole answer cannot differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from tessera.infer.engine import Event, Finished, Piece, TokenLogprob
from tessera.infer.serve.tools import Call, Said, ToolReader

Decode = Callable[[Sequence[int]], str]
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(slots=True)
class _Choice:
    """What one choice has said so far."""

    reader: ToolReader | None = None
    text: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    length: int = 0
    end: str | None = None


class Vocabulary:
    """Single tokens as text and as bytes."""

    def __init__(self, decode: Decode, name: Callable[[int], str | None]) -> None:
        self._decode = decode
        self._name = name
        self._bytes = _byte_alphabet()

    def text(self, token: int) -> str:
        """The text of ``token`` on its own."""
        return self._decode([token])

    def bytes(self, token: int) -> list[int] | None:
        """Its bytes; None if it is part of a character and the vocabulary does not say which."""
        text = self.text(token)
        if _UNFINISHED not in text:
            return list(text.encode())
        name = self._name(token) or ""
        known = [self._bytes.get(character) for character in name]
        return None if not known or None in known else [byte for byte in known if byte is not None]


class Writer:
    """What both routes share: counting, and the order of things."""

    name: str
    chunk: str
    """The word for ``object`` in a whole answer, and in a chunk of a stream."""

    def __init__(self, model: str, *, prefix: str, choices: int, include_usage: bool, vocabulary: Vocabulary) -> None:
        self.head = {"id": f"{prefix}-{uuid4().hex}", "created": int(time.time()), "model": model}
        self.prompt_tokens = self.completion_tokens = self.cached_tokens = 0
        self._include_usage = include_usage
        self._vocabulary = vocabulary
        self._choices = [_Choice() for _ in range(choices)]

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def take(self, event: Event, base: int = 0) -> list[dict[str, Any]]:
        """Note a piece or an end; the chunks it makes. ``base`` is the place of its request's first choice."""
        if isinstance(event, Piece):
            return self._piece(base + event.choice, event)
        assert isinstance(event, Finished)
        if event.choice == 0:  # choices of one prompt share it
            self.prompt_tokens += event.prompt_tokens
            self.cached_tokens += event.cached_tokens
        self.completion_tokens += event.completion_tokens
        return self._finished(base + event.choice, event)

    def closing(self) -> list[dict[str, Any]]:
        """Chunks behind the last token."""
        return [self._chunk([]) | {"usage": self.usage()}] if self._include_usage else []

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(index, choice) for index, choice in enumerate(self._choices)]
        return {**self.head, "object": self.name, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._include_usage else {}
        return {**self.head, "object": self.chunk, "choices": choices, **usage}

    def _piece(self, index: int, event: Piece) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _finished(self, index: int, event: Finished) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        raise NotImplementedError


class ChatWriter(Writer):
    """Answers of ``/v1/chat/completions``; ``readers`` make one per choice where the model may call tools."""

    name, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, *, readers: Callable[[], ToolReader] | None, logprobs: bool, **common: Any) -> None:
        super().__init__(model, prefix="chatcmpl", **common)
        self._logprobs = logprobs
        if readers is not None:
            for choice in self._choices:
                choice.reader = readers()

    def opening(self) -> list[dict[str, Any]]:
        """A chunk per choice that says who speaks."""
        start = {"role": "assistant", "content": ""}
        return [self._delta(index, start) for index in range(len(self._choices))]

    def _piece(self, index: int, event: Piece) -> list[dict[str, Any]]:
        choice = self._choices[index]
        content = [self._logprob(entry) for entry in event.logprobs]
        choice.logprobs += content
        said: list[Said] = [event.text] if event.text else []
        if choice.reader is not None:
            said = choice.reader.push(event.text)
        return self._said(index, said, content)

    def _finished(self, index: int, event: Finished) -> list[dict[str, Any]]:
        choice = self._choices[index]
        chunks = self._said(index, choice.reader.finish(), []) if choice.reader is not None else []
        choice.end = "tool_calls" if choice.calls and event.reason == "stop" else event.reason
        return [*chunks, self._delta(index, {}, end=choice.end)]

    def _said(self, index: int, said: Sequence[Said], content: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Chunks of text and calls; log-probabilities go with the first."""
        choice = self._choices[index]
        deltas: list[dict[str, Any]] = []
        for part in said:
            if isinstance(part, Call):
                deltas.append({"tool_calls": [{"index": len(choice.calls), **part.to_json()}]})
                choice.calls.append(part)
            else:
                deltas.append({"content": part})
                choice.text.append(part)
        if content and not deltas:
            deltas.append({})
        return [self._delta(index, delta, content if not place else []) for place, delta in enumerate(deltas)]

    def _delta(
        self, index: int, delta: dict[str, Any], content: list[dict[str, Any]] | None = None, end: str | None = None
    ) -> dict[str, Any]:
        logprobs = {"content": content} if content else None
        return self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": end}])

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if choice.calls:
            message |= {"content": text or None, "tool_calls": [call.to_json() for call in choice.calls]}
        logprobs = {"content": choice.logprobs} if self._logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.end}

    def _logprob(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in entry.top]
        return {**self._named(entry.token, entry.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        words = self._vocabulary
        return {"token": words.text(token), "logprob": _finite(logprob), "bytes": words.bytes(token)}


class TextWriter(Writer):
    """Answers of ``/v1/completions``."""

    name, chunk = "text_completion", "text_completion"

    def __init__(self, model: str, *, alternatives: int | None, **common: Any) -> None:
        super().__init__(model, prefix="cmpl", **common)
        self._alternatives = alternatives

    def _piece(self, index: int, event: Piece) -> list[dict[str, Any]]:
        choice = self._choices[index]
        entries = [self._entry(choice, entry) for entry in event.logprobs]
        choice.logprobs += entries
        if event.text:
            choice.text.append(event.text)
        if not event.text and not entries:
            return []
        return [self._part(index, event.text, entries, None)]

    def _finished(self, index: int, event: Finished) -> list[dict[str, Any]]:
        self._choices[index].end = event.reason
        return [self._part(index, "", [], event.reason)]

    def _part(self, index: int, text: str, entries: list[dict[str, Any]], end: str | None) -> dict[str, Any]:
        logprobs = _columns(entries) if entries else None
        return self._chunk([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": end}])

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = None if self._alternatives is None else _columns(choice.logprobs)
        return {"index": index, "text": "".join(choice.text), "logprobs": logprobs, "finish_reason": choice.end}

    def _entry(self, choice: _Choice, entry: TokenLogprob) -> dict[str, Any]:
        text, words = self._vocabulary.text(entry.token), self._vocabulary
        top = {words.text(token): _finite(logprob) for token, logprob in entry.top}
        place, choice.length = choice.length, choice.length + len(text)
        top.setdefault(text, _finite(entry.logprob))
        return {
            "tokens": text,
            "token_logprobs": _finite(entry.logprob),
            "top_logprobs": top if self._alternatives else None,
            "text_offset": place,
        }


def _columns(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns: dict[str, Any] = {
        name: [entry[name] for entry in entries] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }
    if not any(columns["top_logprobs"]):
        columns["top_logprobs"] = None
    return columns


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what is impossible."""
    return max(logprob, -9999.0)


def _byte_alphabet() -> dict[str, int]:
    """Characters of a byte-level vocabulary -> the byte each stands for: printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
