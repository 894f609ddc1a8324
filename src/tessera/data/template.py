"""The checkpoint's own chat template, and where the answers are in what it prints.

A chat template is a jinja program that turns messages into one string. Training needs one thing more: which characters
of the string the model has to produce. There are three ways to know, tried in this order:

1. The template says so: ``{% generation %}`` blocks (transformers' convention) are the answers.
2. Most templates print a turn as header + content + suffix. Both are learned once from a probe; then one rendering is
   enough, as long as every answer is found literally between them.
3. Otherwise answer ``i`` is what the rendering of ``messages[:i + 1]`` adds to the generation prompt of
   ``messages[:i]``; every prefix is compared, so a template that rewrites earlier turns is refused, not mislabelled.

The suffix belongs to the answer: a model that is never shown ``<|im_end|>`` as a target never stops. Rendering uses
the same sandboxed environment as transformers and is safe in several threads.

Running a jinja program for every row is most of what planning costs. Many templates only ever *print* the contents: for
those, what surrounds them depends on the roles alone. Whether a template is of that kind is not guessed: it is rendered
once per sequence of roles with contents that refuse to be looked at (:data:`Opaque`), and if it neither looks nor
alters them, the text around them is kept as a *skeleton* for all rows with these roles. Else every row is rendered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from tessera.data.sample import BadRow

Span = tuple[int, int]
"""First character of an answer, and the one behind it."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""For checkpoints that have ChatML's tokens but no template."""

_OPEN, _CLOSE = "\U000f0010", "\U000f0011"  # private-use characters around {% generation %} blocks
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
_PROBE = "tessera-probe"
_MARK = "Aß&\U000f0012"
_UNTRACKED = (  # ways for text to lose the class that watches it, or for a rendering to depend on more than its input
    jinja2.nodes.Macro,
    jinja2.nodes.FilterBlock,
    jinja2.nodes.AssignBlock,
    jinja2.nodes.Concat,
    jinja2.nodes.Include,
    jinja2.nodes.Import,
    jinja2.nodes.FromImport,
)


class Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: puts private-use marks around what the block prints."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class Inspected(Exception):  # noqa: N818 - a signal, not an error
    """A template looked at a message's content instead of only printing it."""


def _inspect(*_: Any, **__: Any) -> Any:
    raise Inspected


_PRINTING = ("__new__", "__init__", "__str__", "__getattribute__", "__setattr__", "__delattr__", "__init_subclass__")
Opaque: Any = type(
    "Opaque",
    (str,),
    {name: _inspect for name in dir(str) if callable(vars(str).get(name)) and name not in _PRINTING}
    | {
        "__add__": lambda self, other: Opaque(str.__add__(self, other)),
        "__radd__": lambda self, other: Opaque(str.__add__(other, self)),
    },
)
"""Text that can be printed and joined to other text; everything else, even asking for its length, raises Inspected."""

Skeleton = list[tuple[tuple[str | int, ...], int | None]]
"""Pieces made of literal text and, as integers, the messages whose content stands there."""

NOTHING: Mapping[str, Any] = MappingProxyType({})
Piece = tuple[str, int | None]
"""Text, and the ordinal of the answer it belongs to (None outside answers)."""


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class ChatTemplate:
    """A compiled chat template; ``tokens`` are the special tokens it may mention (``bos_token`` ...)."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self._template = environment.from_string(source)
        self._tokens = dict(tokens)
        self._marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._header, self._suffix = self._probe()
        program = environment.parse(source)
        self.variables = frozenset(jinja2.meta.find_undeclared_variables(program))
        """Names that the template asks for."""
        tracked = "strftime_now" not in source and all(program.find(kind) is None for kind in _UNTRACKED)
        self._skeleton = lru_cache(maxsize=256)(self._make_skeleton if tracked else _no_skeleton)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] = (),
        variables: Mapping[str, Any] = NOTHING,
        *,
        generation_prompt: bool = False,
    ) -> str:
        """The conversation as text; ``generation_prompt`` ends it where the assistant is to answer.

        ``variables`` are further ones that the template may ask for.
        """
        text = self._render(messages, tools, variables, generation_prompt)
        return _MARKS.sub("", text) if self._marked else text

    def pieces(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), variables: Mapping[str, Any] = NOTHING
    ) -> list[Piece]:
        """The conversation as text, cut where answers begin and end."""
        # Messages of role and content, nothing else.
        plain = not tools and not variables and all(len(message) == 2 for message in messages)
        skeleton = self._skeleton(tuple(message["role"] for message in messages)) if plain else None
        if skeleton is None:
            return _cut(*self.spans(messages, tools, variables))
        contents = [message["content"] for message in messages]
        return [
            ("".join(part if isinstance(part, str) else contents[part] for part in parts), answer)
            for parts, answer in skeleton
        ]

    def spans(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), variables: Mapping[str, Any] = NOTHING
    ) -> tuple[str, list[Span]]:
        """The conversation as text, and one span per assistant message (answer and turn suffix), in order."""
        text = self._render(messages, tools, variables, False)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self._marked:
            text, spans = _unmarked(text)
            if len(spans) != len(answers):
                raise BadRow("the chat template marks another number of {% generation %} blocks than there are answers")
            return text, spans
        found = self._literal(text, messages, answers)
        return text, found or self._differences(text, messages, answers, tools, variables)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any],
        variables: Mapping[str, Any],
        generation_prompt: bool,
    ) -> str:
        own = {"messages", "tools", "documents", "add_generation_prompt", *self._tokens} & variables.keys()
        if own:
            raise BadRow(f"chat_template_kwargs may not set {', '.join(sorted(own))}")
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._tokens,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadRow(f"the chat template refuses the conversation: {error}") from None

    def _probe(self) -> tuple[str, str]:
        """Header and suffix of an assistant turn; no header if there is more to a turn than these and its content."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}
        try:
            before, prompt = self.render([user]), self.render([user], generation_prompt=True)
            whole = self.render([user, answer])
        except BadRow:
            return "", ""
        suffix = whole.rpartition(_PROBE)[2] if _PROBE in whole else ""
        simple = prompt.startswith(before) and whole == prompt + _PROBE + suffix
        return prompt[len(before) :] if simple else "", suffix

    def _literal(self, text: str, messages: Sequence[Mapping[str, Any]], answers: Sequence[int]) -> list[Span]:
        """Spans found as header + content + suffix; empty if the template is not that simple for this row."""
        if not self._header or text.count(self._header) != len(answers):
            return []
        spans, cursor = [], 0
        for index in answers:
            if messages[index].get("tool_calls"):
                return []
            turn = self._header + messages[index]["content"] + self._suffix
            at = text.find(turn, cursor)
            if at < 0:
                return []
            cursor = at + len(turn)
            spans.append((at + len(self._header), cursor))
        return spans

    def _differences(
        self,
        text: str,
        messages: Sequence[Mapping[str, Any]],
        answers: Sequence[int],
        tools: Sequence[Any],
        variables: Mapping[str, Any],
    ) -> list[Span]:
        """Spans as differences of renderings of growing prefixes of the conversation."""
        spans: list[Span] = []
        for index in answers:
            prompt = self.render(messages[:index], tools, variables, generation_prompt=True) if index else ""
            if not text.startswith(prompt):
                raise BadRow("the chat template rewrites earlier turns: mark the answers in it with {% generation %}")
            if index == len(messages) - 1:
                spans.append((len(prompt), len(text)))
                continue
            turn = self.render(messages[: index + 1], tools, variables)
            end = len(turn)
            if not text.startswith(turn):  # the last turn of a conversation is printed differently
                at = text.find(self._suffix, len(prompt)) if self._suffix else -1
                if at < 0:
                    raise BadRow("the chat template hides where an answer ends: mark it with {% generation %}")
                end = at + len(self._suffix)
            spans.append((len(prompt), end))
        return spans

    def _make_skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """What the template prints around the contents of messages with these roles; None if it depends on them."""
        # Contents that no trimming, escaping or change of case would leave as they are, each with a number of its own.
        markers = [f" \n<{_MARK}\"'\\{number}\t " for number in range(len(roles))]
        watched = [{"role": role, "content": Opaque(text)} for role, text in zip(roles, markers, strict=True)]
        plain = [{"role": role, "content": text} for role, text in zip(roles, markers, strict=True)]
        try:
            text = self.render(watched)
            whole, spans = self.spans(plain)
        except (Inspected, BadRow):
            return None
        numbers = {marker: number for number, marker in enumerate(markers)}
        split = re.compile("(" + "|".join(re.escape(marker) for marker in markers) + ")")
        skeleton: Skeleton = []
        for piece, answer in _cut(whole, spans):
            skeleton.append((tuple(numbers.get(part, part) for part in split.split(piece) if part), answer))
        printed = [part for parts, _ in skeleton for part in parts]
        intact = text == whole and all(printed.count(number) == 1 for number in range(len(roles)))
        return skeleton if intact and _MARK not in "".join(part for part in printed if isinstance(part, str)) else None


def _no_skeleton(roles: tuple[str, ...]) -> Skeleton | None:
    """For templates that cannot be watched."""
    return None


def _cut(text: str, spans: Sequence[Span]) -> list[Piece]:
    """``text`` in pieces, none of them empty, cut at the borders of ``spans``."""
    pieces: list[Piece] = []
    done = 0
    for answer, (start, end) in enumerate(spans):
        pieces += [(text[done:start], None), (text[start:end], answer)]
        done = end
    return [piece for piece in [*pieces, (text[done:], None)] if piece[0]]


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """``text`` without its marks, and the spans they enclosed."""
    parts: list[str] = []
    spans: list[Span] = []
    length = start = 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece == _OPEN:
            start = length
        elif piece == _CLOSE:
            spans.append((start, length))
        else:
            parts.append(piece)
            length += len(piece)
    return "".join(parts), spans
