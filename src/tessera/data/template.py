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
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
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


class Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}``: puts private-use marks around what the block prints."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


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

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, generation_prompt: bool = False
    ) -> str:
        """The conversation as text; ``generation_prompt`` ends it where the assistant is to answer."""
        text = self._render(messages, tools, generation_prompt)
        return _MARKS.sub("", text) if self._marked else text

    def spans(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> tuple[str, list[Span]]:
        """The conversation as text, and one span per assistant message (answer and turn suffix), in order."""
        text = self._render(messages, tools, False)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self._marked:
            text, spans = _unmarked(text)
            if len(spans) != len(answers):
                raise BadRow("the chat template marks another number of {% generation %} blocks than there are answers")
            return text, spans
        return text, self._literal(text, messages, answers) or self._differences(text, messages, answers, tools)

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._tokens,
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
        self, text: str, messages: Sequence[Mapping[str, Any]], answers: Sequence[int], tools: Sequence[Any]
    ) -> list[Span]:
        """Spans as differences of renderings of growing prefixes of the conversation."""
        spans: list[Span] = []
        for index in answers:
            prompt = self.render(messages[:index], tools, generation_prompt=True) if index else ""
            if not text.startswith(prompt):
                raise BadRow("the chat template rewrites earlier turns: mark the answers in it with {% generation %}")
            if index == len(messages) - 1:
                spans.append((len(prompt), len(text)))
                continue
            turn = self.render(messages[: index + 1], tools)
            end = len(turn)
            if not text.startswith(turn):  # the last turn of a conversation is printed differently
                at = text.find(self._suffix, len(prompt)) if self._suffix else -1
                if at < 0:
                    raise BadRow("the chat template hides where an answer ends: mark it with {% generation %}")
                end = at + len(self._suffix)
            spans.append((len(prompt), end))
        return spans


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
