"""Text that appears while it is being generated, up to where it is told to stop.

Tokens need not end where characters end: an emoji may be spread over four. The tokens of a byte-level vocabulary are
bytes, which Python's incremental decoder turns into text (:class:`Spelled`). Of other vocabularies one only knows what
a list of tokens decodes to (:class:`Detokeniser`). Text that ends in replacement characters is then held back until a
whole character follows, and each step decodes only a short window, the tokens whose text was printed last (they decide
about a leading space) and the new ones::

    ids      ... | window: printed last | new
    text           before               | before + delta     print delta
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 64
"""Tokens after which text without a single whole character is shown as it is, so that no window grows for ever."""


class Stream(Protocol):
    """Turns ids that arrive one by one into pieces of text that join to what all of them decode to."""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        ...

    def finish(self) -> str:
        """What is left when no more tokens come."""
        ...


def _characters() -> dict[str, int]:
    """The bytes that the printable characters of a byte-level vocabulary stand for."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class Spelling:
    """The bytes of the tokens of a byte-level ``tokenizer``; special tokens have none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._known: dict[int, bytes] = {token: b"" for token, text in added.items() if text.special}
        self._characters = _characters()

    def __call__(self, token: int) -> bytes:
        known = self._known.get(token)
        if known is None:
            text = self._tokenizer.id_to_token(token) or ""
            bytes_ = [self._characters.get(character, -1) for character in text]
            # An added token is text already if it is not written in these characters.
            known = self._known[token] = text.encode() if -1 in bytes_ else bytes(bytes_)
        return known

    @staticmethod
    def fits(tokenizer: Any) -> bool:
        """Whether the tokens of ``tokenizer`` are bytes in this notation, and nothing else is done to them."""
        decoder = tokenizer.decoder
        return decoder is not None and json.loads(decoder.__getstate__()).get("type") == "ByteLevel"


def streams(tokenizer: Any, decode: Callable[[Sequence[int]], str]) -> Callable[[], Stream]:
    """Makes a stream per answer, the quickest that is exact for ``tokenizer``, whose ``decode`` is given."""
    if Spelling.fits(tokenizer):
        return partial(Spelled, Spelling(tokenizer))
    return partial(Detokeniser, decode)


class Spelled:
    """A stream of tokens that are bytes."""

    def __init__(self, spelling: Callable[[int], bytes]) -> None:
        self._spelling = spelling
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that ``token`` completes."""
        return self._decoder.decode(self._spelling(token))

    def finish(self) -> str:
        """An unfinished character, as a replacement character."""
        return self._decoder.decode(b"", final=True)


class Detokeniser:
    """Turns ids that arrive one by one into pieces of text that join to ``decode`` of all of them."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._window = 0
        self._printed = 0
        self._before = ""

    def push(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._text(self._window, len(self._ids))
        new = text[len(self._before) :]
        if text.endswith(_INCOMPLETE) and len(self._ids) - self._printed < _LONGEST:
            certain = new.rstrip(_INCOMPLETE)
            self._before += certain
            return certain
        # After invalid bytes the window starts anew: what follows must not be decoded together with them.
        self._window = len(self._ids) if text.endswith(_INCOMPLETE) else self._printed
        self._printed = len(self._ids)
        self._before = self._text(self._window, self._printed)
        return new

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self._printed == len(self._ids):
            return ""
        text = self._text(self._window, len(self._ids))
        self._window = self._printed = len(self._ids)
        before, self._before = self._before, ""
        return text[len(before) :]

    def _text(self, start: int, end: int) -> str:
        return self._decode(tuple(self._ids[start:end])) if end > start else ""


class StopTexts:
    """Passes text on until one of ``stops`` appears in it, across however many pieces.

    Text that may be the beginning of a stop is held back until that is decided. ``found`` is the stop that ended it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """What of the text so far is certain; nothing more once a stop was found."""
        if self.found is not None or not piece:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        places = [(place, stop) for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            first, self.found = min(places, key=lambda pair: (pair[0], -len(pair[1])))
            self._held = ""
            return text[:first]
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """What was held back for a stop that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with (and is longer than)."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
