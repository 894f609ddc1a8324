"""Output that must fit a JSON schema or a pattern.

Before each token the grammar says which tokens can still lead to an allowed text; all others are out. The work is done
by the ``llguidance`` library (extra ``deploy``), which knows the checkpoint's tokenizer as bytes, so a token may end in
the middle of a number or of a character. When nothing can follow, only tokens that end the answer are left.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from tessera.config.errors import UserError
from tessera.infer.sampling import Allows

KINDS = ("json_schema", "json_object", "regex")
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""Between the parts of a JSON text: enough to indent, but not for ever."""

_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must be: ``kind`` is ``json_schema``, ``json_object`` or ``regex``.

    ``text`` is the schema as JSON text or the pattern, and empty for ``json_object``.
    """

    kind: str
    text: str = ""


class BadConstraint(UserError):  # noqa: N818
    """A schema or pattern that is none, or that nobody here can follow."""


class Grammars:
    """Makes constraints usable with one tokenizer; the library is imported when it is first needed. Thread-safe."""

    def __init__(self, tokenizer: Any, vocabulary: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary, self._stop_ids = tokenizer, vocabulary, stop_ids
        self._prepared: Any = None
        self._known: OrderedDict[Constraint, Fits] = OrderedDict()
        self._lock = Lock()

    def of(self, constraint: Constraint) -> Allows:
        """``constraint`` at its beginning; BadConstraint if it cannot be followed, UserError without the library."""
        with self._lock:
            if constraint in self._known:
                self._known.move_to_end(constraint)
                return self._known[constraint].copy()
            tokens = self._tokens()
        made = Fits(_matcher(tokens, constraint), self._stop_ids)
        with self._lock:
            self._known[constraint] = made
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return made.copy()

    def _tokens(self) -> Any:
        if self._prepared is None:
            llguidance = _library()
            self._prepared = llguidance.LLTokenizer(
                self._tokenizer.to_str(), n_vocab=self._vocabulary, eos_token=sorted(self._stop_ids)
            )
        return self._prepared


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError("constrained output needs llguidance: pip install 'tessera[deploy]'") from error
    return llguidance


def _matcher(tokens: Any, constraint: Constraint) -> Any:
    matching = _library().LLMatcher
    if constraint.kind == "regex":
        grammar = matching.grammar_from_regex(constraint.text)
    elif constraint.kind in ("json_schema", "json_object"):
        try:
            schema = json.loads(constraint.text) if constraint.kind == "json_schema" else {"type": "object"}
            grammar = matching.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})
        except (ValueError, TypeError) as error:
            raise BadConstraint(f"not a JSON schema: {error}") from None
    else:
        raise BadConstraint(f"a constraint of kind {constraint.kind!r}: expected one of {', '.join(KINDS)}")
    made = matching(tokens, grammar, log_level=0)
    if made.is_error():
        raise BadConstraint(f"{constraint.kind}: {made.get_error().strip().splitlines()[0]}")
    return made


class Fits:
    """An answer that is being held to a grammar."""

    def __init__(self, matcher: Any, stop_ids: frozenset[int]) -> None:
        self._matcher, self._stop_ids = matcher, stop_ids

    def mask(self, size: int) -> np.ndarray:
        """``[size] bool``: the tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.zeros(size, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[:size].astype(bool)
        allowed[: len(known)] = known
        return allowed

    def take(self, token: int) -> None:
        """Note the token that came."""
        if token not in self._stop_ids and not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} does not fit the grammar: {self._matcher.get_error()}")

    def copy(self) -> Fits:
        """Another at the same place."""
        return Fits(self._matcher.deep_copy(), self._stop_ids)
