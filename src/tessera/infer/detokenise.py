"""Text that appears while it is being generated, up to where it is told to stop.

Tokens of a byte-level vocabulary need not end where characters end: an emoji may be spread over four tokens. Decoding
them one by one would print replacement characters, so the newest tokens are held back until their text no longer ends
in the middle of a character. Each step decodes only a short window, the tokens whose text was printed last (they
decide about a leading space) and the new ones::

    ids      ... | window: printed last | new
    text           before               | before + delta     print delta
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_LONGEST = 8
"""More tokens than any character is spread over: beyond that the bytes are simply invalid, and are shown as such."""


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
        before, text = self._texts()
        unfinished = text.endswith(_INCOMPLETE)
        if unfinished and len(self._ids) - self._printed < _LONGEST:
            return ""
        # After invalid bytes the window starts anew: what follows must not be decoded together with them.
        self._window = len(self._ids) if unfinished else self._printed
        self._printed = len(self._ids)
        self._before = self._text(self._window, self._printed)
        return text[len(before) :]

    def finish(self) -> str:
        """What is left when no more tokens come."""
        if self._printed == len(self._ids):
            return ""
        before, text = self._texts()
        self._window = self._printed = len(self._ids)
        self._before = ""
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """Text of the window's printed tokens, and of the whole window."""
        return self._before, self._text(self._window, len(self._ids))

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
