"""One answer in the making: from chosen tokens to the pieces of text that its listener hears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tessera.infer.detokenise import StopTexts, Stream
from tessera.infer.limits import Limits
from tessera.infer.request import Event, Finished, Piece, Request
from tessera.infer.sampling import Chosen, Draws, TokenLogprob

Decode = Callable[[Sequence[int]], str]
"""Text of token ids, without special tokens."""


class Choice:
    """Choice ``index`` of a request, of at most ``room`` tokens.

    ``tokens`` are those of its text, ``last`` is the newest of all and ``count`` their number; ``reason`` is why it
    ends.
    """

    def __init__(self, request: Request, index: int, draws: Draws, room: int, decode: Decode, stream: Stream) -> None:
        self.request = request
        self.index = index
        self.draws = draws
        self.room = room
        self.tokens: list[int] = []
        self.last = -1
        self.count = 0
        self.reason: str | None = None
        self._end: Chosen | None = None
        self._decode = decode
        # Without stops and without a listener in between, the text is made once, at the end.
        self._whole = not request.stream and not request.stop
        self._stream = stream
        self._stops = StopTexts(request.stop)
        self._text: list[str] = []
        self._told = 0
        self._logprobs: list[TokenLogprob] = []

    def take(self, chosen: Chosen, limits: Limits) -> Iterator[Piece]:
        """Note the next token; ``reason`` is set if it is the last."""
        self.last = chosen.token
        self.count += 1
        if chosen.token in limits.stop_ids:
            self._end, self.reason = chosen, "stop"
            return
        self.tokens.append(chosen.token)
        if chosen.logprob is not None:
            self._logprobs.append(chosen.logprob)
        if not self._whole:
            text = self._stops.push(self._stream.push(chosen.token))
            if text:
                self._text.append(text)
            if self._stops.found is not None:
                self.reason = "stop"
        if self.reason is None and self.count >= self.room:
            self.reason = "length"
        if self._text and self.request.stream and self.reason is None:
            yield self._piece()

    def finish(self, reason: str, prompt_tokens: int, cached_tokens: int) -> Iterator[Event]:
        """What is left to tell, and the end."""
        if self._whole:
            self._text.append(self._decode(tuple(self.tokens)))
        else:
            self._text.append(self._stops.push(self._stream.finish()))
            self._text.append(self._stops.finish())
        if self._told < len(self.tokens) or any(self._text):
            yield self._piece()
        end = self._end
        yield Finished(
            self.request.id,
            self.index,
            "stop" if self._stops.found is not None else reason,
            prompt_tokens,
            self.count,
            cached_tokens,
            None if end is None else end.token,
            None if end is None else end.logprob,
            self._stops.found,
        )

    def _piece(self) -> Piece:
        tokens, logprobs = tuple(self.tokens[self._told :]), tuple(self._logprobs)
        piece = Piece(self.request.id, self.index, "".join(self._text), tokens, logprobs)
        self._text, self._told, self._logprobs = [], len(self.tokens), []
        return piece
