"""Text that appears while it is being generated.

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
        return text[len(before) :]

    def finish(self) -> str:
        """What is left when no more tokens come."""
        before, text = self._texts()
        self._window = self._printed = len(self._ids)
        return text[len(before) :]

    def _texts(self) -> tuple[str, str]:
        """Text of the window's printed tokens, and of the whole window."""
        return self._decode(self._ids[self._window : self._printed]), self._decode(self._ids[self._window :])
