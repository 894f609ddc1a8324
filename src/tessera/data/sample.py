"""Every row format becomes one normal form: a list of messages and the media they mention.

Datasets spell the same conversation in many ways. :func:`normalise` reads each of these rows and returns a
:class:`Sample`; whatever it cannot read raises :class:`BadRow` with the reason, which ends up in ``skipped.jsonl``.

| row | becomes |
|---|---|
| ``{"messages": [{"role": "user", "content": ...}, ...]}`` | as is; system, user, assistant, tool, tool_call |
| ``{"conversations": [{"from": "human", "value": ...}, ...]}`` | ShareGPT: human, gpt, function_call, observation |
| ``{"system": S, "conversation": [{"human": h, "assistant": a}, ...]}`` | system S, then the pairs |
| ``{"instruction": I, "input": X, "output": O}`` | user ``I\\nX`` (or ``I``), assistant O |
| ``{"query": q, "response": r, "history": [[q, r], ...], "system": S}`` | the history, then q and r |
| ``{"problem": p, "solution": s}`` and other spellings | user p, assistant s; see ``QUERY`` and ``RESPONSE`` below |
| ``{"text": t}``, or an assistant message alone | plain text, trained from its second token (pre-training) |
| ``"images": ["a.jpg", {"bytes": ...}, "data:image/..."]`` | one per ``<image>`` tag; missing tags are put in front |
| ``"videos": [["f0.jpg", "f1.jpg"]]``, ``"fps": [2.0]`` | a video as a list of frames, one per ``<video>`` tag |
| content ``[{"type": "text"}, {"type": "image_url"}, {"type": "video"}]`` | OpenAI parts, in place |
| ``"tools"`` with ``tool_calls``, ``tool_use``, ``tool_call`` messages | through the checkpoint's chat template |
| ``"chat_template_kwargs": {...}`` | variables for the checkpoint's chat template |
| message keys ``"loss": bool``, ``"loss_scale": float`` | what this assistant turn counts: 0, 1 or a weight |

Column names are matched without regard to case; ``--columns '{"question": "query"}'`` renames them first. If two
columns could both be the question, the row is refused rather than guessed at.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes ``[offset, offset + size)`` of ``file``: a member of an archive that is read where it lies.

    ``name`` is what the member is called there; it says nothing about the bytes, so equality ignores it.
    """

    file: str
    offset: int
    size: int
    name: str = field(default="", compare=False)


ImageRef = str | bytes | Slice
"""A path, a ``data:`` URI, the bytes of an image file, or where they lie in another file."""

QUERY = ("query", "prompt", "input", "instruction", "question", "problem")
RESPONSE = (
    "response",
    "answer",
    "output",
    "targets",
    "target",
    "answer_key",
    "answers",
    "solution",
    "text",
    "completion",
    "content",
)
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "tool_call": "tool_call",
    "function_call": "tool_call",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "observation": "tool",
    "observations": "tool",
}
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_INLINE = re.compile(r"<img>(.*?)</img>")
_TAG = re.compile(r"<(image|video|audio)>")
_LATER = {
    "objects": "grounding rows (objects) are not supported yet",
    "rejected_response": "a preference row (rejected_response): sft needs plain conversations",
    "rejected_messages": "a preference row (rejected_messages): sft needs plain conversations",
    "audios": "audio files come later",
    "audio": "audio files come later",
}


class BadRow(ValueError):  # noqa: N818 - it names what it is about
    """A row that cannot be trained on; ``str(error)`` is the reason shown to the user."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``role`` is system, user, assistant or tool; ``content`` holds ``<image>`` and ``<video>`` tags.

    ``loss`` is the weight of an assistant turn, None where the run's ``--loss_scale`` decides.
    """

    role: str
    content: str
    loss: float | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation in normal form; ``images`` and ``videos`` are in the order of their tags.

    ``fps`` is the frames per second of each video, empty where the row does not say. ``variables`` are the chat
    template's, for this row.
    """

    messages: tuple[Message, ...]
    images: tuple[ImageRef, ...] = ()
    videos: tuple[tuple[ImageRef, ...], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    fps: tuple[float, ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str | None:
        """The last assistant turn, None if the conversation does not end with one."""
        last = self.messages[-1]
        return last.content if last.role == "assistant" else None

    @property
    def plain(self) -> bool:
        """Whether this is bare text to continue, without any question."""
        return all(message.role == "assistant" for message in self.messages)


def normalise(
    row: Mapping[str, Any],
    columns: Mapping[str, str] | None = None,
    *,
    need_answer: bool = True,
    exact_tags: bool = False,
) -> Sample:
    """The :class:`Sample` in ``row``; BadRow says why there is none. ``need_answer``: it must end with an answer.

    With ``exact_tags`` a row that has tags must have one for every image and video; else missing ones are put in front.
    """
    if not isinstance(row, dict):
        raise BadRow(f"a row must be an object, not {type(row).__name__}")
    fields = _fields(row, columns or {})
    for name, reason in _LATER.items():
        if fields.get(name):
            raise BadRow(reason)
    media = _Media(exact_tags)
    messages = _merged(_messages(fields, media))
    _check(messages, need_answer)
    return media.sample(messages, fields)


def _fields(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row's columns that hold something, lower-cased and renamed."""
    fields: dict[str, Any] = {}
    for name, value in row.items():
        if value is None:
            continue
        name = columns.get(name, name)
        fields.setdefault(name if name.islower() else name.lower(), value)
    return fields


def _messages(fields: dict[str, Any], media: _Media) -> list[Message]:
    """The turns of a row, whichever way it spells them."""
    for name in ("messages", "conversations", "conversation"):
        if name in fields:
            turns = [m for turn in _list(fields[name], name) for m in _turn(_object(turn, name), media)]
            break
    else:
        turns = _columns(fields, media)
    system = fields.get("system", fields.get("system_prompt"))
    if system and (not turns or turns[0].role != "system"):
        turns.insert(0, Message("system", _text(system, "system")))
    return turns


def _columns(fields: dict[str, Any], media: _Media) -> list[Message]:
    """Turns of a row with one column per question and answer."""
    turns: list[Message] = []
    for pair in _list(fields.get("history", []), "history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("history must be a list of [question, answer] pairs")
        turns += [Message("user", _text(pair[0], "history")), Message("assistant", _text(pair[1], "history"))]
    if "instruction" in fields and "input" in fields:
        parts = [_text(fields["instruction"], "instruction"), _text(fields["input"], "input")]
        query: Any = "\n".join(part for part in parts if part)
    else:
        query = _only(fields, QUERY, "question")
    response = _only(fields, RESPONSE, "answer")
    if query is None and response is None:
        raise BadRow(f"no known columns (has {', '.join(sorted(fields)) or 'none'}): name them with --columns")
    if query is not None:
        turns.append(_message("user", query, None, media))
    if response is not None:
        turns.append(_message("assistant", response, None, media))
    return turns


def _only(fields: dict[str, Any], names: Sequence[str], what: str) -> Any:
    """The one column among ``names``; its first, canonical spelling wins over the others."""
    found = [name for name in names if name in fields]
    if not found:
        return None
    if len(found) > 1 and found[0] != names[0]:
        raise BadRow(f"columns {', '.join(found)} could each be the {what}: choose one with --columns")
    return fields[found[0]]


def _turn(turn: Mapping[str, Any], media: _Media) -> list[Message]:
    """The messages of one element of a conversation (a pair makes two, Anthropic tool results make several)."""
    role = turn.get("role", turn.get("from"))
    if role is None:
        human, assistant = turn.get("human", turn.get("user")), turn.get("assistant")
        if human is None or assistant is None:
            raise BadRow("a message has neither role and content, nor human and assistant")
        return [_message("user", human, None, media), _message("assistant", assistant, None, media)]
    known = ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise BadRow(f"unknown role {role!r}")
    content = turn.get("content", turn.get("value"))
    if len(turn) == 2 and known != "tool_call" and isinstance(content, str):  # nothing but role and content
        return [Message(known, media.scan(content))]
    weight = _weight(turn)
    if known == "tool_call":
        return [Message("assistant", "", weight, (_call(_json(content, "tool_call")),))]
    calls = tuple(_call(call) for call in _list(turn.get("tool_calls") or [], "tool_calls"))
    if isinstance(content, list):
        return _parts(known, content, weight, calls, media)
    if content is None:
        if not calls:
            raise BadRow(f"a {known} message has no content")
        content = ""
    return [_message(known, content, weight, media, calls)]


def _parts(
    role: str, parts: list[Any], weight: float | None, calls: tuple[Mapping[str, Any], ...], media: _Media
) -> list[Message]:
    """Messages from a list of OpenAI or Anthropic content parts."""
    text: list[str] = []
    out: list[Message] = []
    for part in parts:
        part = {"type": "text", "text": part} if isinstance(part, str) else _object(part, "content")
        kind = part.get("type")
        if kind == "tool_use":
            calls += (_call({"name": part.get("name"), "arguments": part.get("input")}),)
        elif kind == "tool_result":
            result = part.get("content")
            out.append(Message("tool", result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)))
        elif kind in ("image", "image_url", "video"):
            text.append(media.part(kind, part))
        elif kind == "text" or (kind is None and "text" in part):
            text.append(media.scan(_text(part.get("text"), "text")))
        else:
            raise BadRow(f"unknown content part {kind!r}")
    if text or calls or not out:
        out.append(Message(role, "".join(text), weight, calls))
    return out


def _message(
    role: str, content: Any, loss: float | None, media: _Media, calls: tuple[Mapping[str, Any], ...] = ()
) -> Message:
    return Message(role, media.scan(_text(content, role)), loss, calls)


def _weight(turn: Mapping[str, Any]) -> float | None:
    """Loss weight of a turn from its ``loss_scale`` or ``loss`` key."""
    scale, loss = turn.get("loss_scale"), turn.get("loss")
    if scale is not None:
        if not isinstance(scale, int | float):
            raise BadRow(f"loss_scale must be a number, not {scale!r}")
        return float(scale)
    return None if loss is None else float(bool(loss))


def _call(call: Any) -> Mapping[str, Any]:
    """A tool call in the shape chat templates read: ``{"type": "function", "function": {name, arguments}}``."""
    call = _object(call, "tool call")
    function = _object(call.get("function", call), "tool call")
    if not isinstance(function.get("name"), str):
        raise BadRow("a tool call has no name")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments, "tool call arguments")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _merged(messages: list[Message]) -> list[Message]:
    """``messages`` with tool calls in a row merged into one turn."""
    if not any(message.tool_calls for message in messages):
        return messages
    merged: list[Message] = []
    for message in messages:
        before = merged[-1] if merged else None
        if before and message.tool_calls and before.tool_calls and before.role == message.role == "assistant":
            text = before.content + message.content
            merged[-1] = Message("assistant", text, before.loss, before.tool_calls + message.tool_calls)
        else:
            merged.append(message)
    return merged


def _check(messages: list[Message], need_answer: bool) -> None:
    """BadRow unless ``messages`` are a conversation."""
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise BadRow("a system message must come first, and only once")
    if not roles or roles == ["system"]:
        raise BadRow("no messages")
    if need_answer and "assistant" not in roles:
        raise BadRow("no assistant turn")
    if need_answer and roles[-1] != "assistant":
        raise BadRow("the last message is not from the assistant")


class _Media:
    """Collects the media of one row in the order of their tags; None stands for "the next one of the column"."""

    def __init__(self, exact: bool = False) -> None:
        self.found: dict[str, list[Any]] = {"image": [], "video": []}
        self.exact = exact

    def scan(self, text: str) -> str:
        """Note the tags in ``text``; ``<img>path</img>`` becomes a tag."""
        if "<" not in text:
            return text
        if "<img>" in text:
            parts = _INLINE.split(text)
            for index, part in enumerate(parts):
                if index % 2:
                    self.found["image"].append(part)
                    parts[index] = "<image>"
                else:
                    self._note(part)
            return "".join(parts)
        self._note(text)
        return text

    def _note(self, text: str) -> None:
        for kind in _TAG.findall(text):
            if kind == "audio":
                raise BadRow("audio files come later")
            self.found[kind].append(None)

    def part(self, kind: str, part: Mapping[str, Any]) -> str:
        """The tag of an OpenAI content part, whose source (if it has one) is noted."""
        tag = "video" if kind == "video" else "image"
        source = next((part[key] for key in (kind, "image", "url", "path") if part.get(key) is not None), None)
        if kind == "image_url" and isinstance(source, Mapping):
            source = source.get("url")
        if kind == "image" and source is None and isinstance(part.get("source"), Mapping):
            held = part["source"]
            source = f"data:{held.get('media_type', 'image/png')};base64,{held.get('data', '')}"
        if source is not None:
            source = _video(source) if tag == "video" else _image(source)
        self.found[tag].append(source)
        return f"<{tag}>"

    def sample(self, messages: list[Message], fields: Mapping[str, Any]) -> Sample:
        """The sample, with the row's media columns dealt out to the tags."""
        images = self._dealt("image", _images(fields.get("images", fields.get("image"))), messages)
        videos = self._dealt("video", _videos(fields.get("videos", fields.get("video"))), messages)
        tools = tuple(_object(tool, "tools") for tool in _list(fields["tools"], "tools")) if "tools" in fields else ()
        rates = _fps(fields.get("fps"), len(videos))
        variables = _object(fields.get("chat_template_kwargs", {}), "chat_template_kwargs")
        return Sample(tuple(messages), tuple(images), tuple(videos), tools, rates, variables)

    def _dealt(self, kind: str, column: list[Any], messages: list[Message]) -> list[Any]:
        """One source per tag of ``kind``, in order; tags that are missing are put before the first message."""
        tags = self.found[kind]
        if tags or column:
            spare = len(column) - tags.count(None)
            if spare < 0:
                raise BadRow(f"{tags.count(None)} <{kind}> tags but {len(column)} {kind}s")
            if spare and tags and self.exact:
                raise BadRow(f"{tags.count(None)} <{kind}> tags but {len(column)} {kind}s")
            if spare:
                first = next(i for i, message in enumerate(messages) if message.role != "system")
                head = messages[first]
                messages[first] = Message(head.role, f"<{kind}>" * spare + head.content, head.loss, head.tool_calls)
                tags = [None] * spare + tags
            queue = iter(column)
            return [next(queue) if tag is None else tag for tag in tags]
        return []


def _images(value: Any) -> list[ImageRef]:
    """A media column as a list of images: a path, a list, or ``{bytes, path}`` structs."""
    if value is None:
        return []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, "images")
    return [_image(item) for item in value] if isinstance(value, list) else [_image(value)]


def _image(value: Any) -> ImageRef:
    if isinstance(value, str | bytes | Slice) and value:
        return value
    if isinstance(value, Mapping):
        inner = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(inner, str | bytes):
            return inner
    raise BadRow("an image is neither a path nor bytes")


def _videos(value: Any) -> list[tuple[ImageRef, ...]]:
    """A media column as a list of videos, each a tuple of frames; a flat list of image files is one video."""
    if value is None or value == []:
        return []
    if isinstance(value, list) and all(isinstance(v, str) and v.lower().endswith(FRAME_SUFFIXES) for v in value):
        return [_video(value)]
    return [_video(item) for item in value] if isinstance(value, list) else [_video(value)]


def _video(value: Any) -> tuple[ImageRef, ...]:
    if not isinstance(value, list | tuple):
        raise BadRow("video files come later: give a list of frames")
    if not value:
        raise BadRow("a video has no frames")
    return tuple(_image(frame) for frame in value)


def _fps(value: Any, videos: int) -> tuple[float, ...]:
    """The ``fps`` column: one number, or one per video."""
    if value is None or not videos:
        return ()
    numbers = list(value) if isinstance(value, list | tuple) else [value] * videos
    if len(numbers) != videos:
        raise BadRow(f"{len(numbers)} entries in fps but {videos} videos")
    try:
        rates = tuple(float(number) for number in numbers)
    except (TypeError, ValueError):
        raise BadRow(f"fps must be numbers, not {value!r}") from None
    if not all(0 < rate < float("inf") for rate in rates):
        raise BadRow(f"fps must be positive, not {value!r}")
    return rates


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, what)
    if not isinstance(value, list | tuple):
        raise BadRow(f"{what} must be a list, not {type(value).__name__}")
    return list(value)


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        value = _json(value, what)
    if not isinstance(value, dict):
        raise BadRow(f"{what} must hold objects, not {type(value).__name__}")
    return value


def _json(value: Any, what: str) -> Any:
    """``value`` parsed, if it is JSON or a Python literal in a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise BadRow(f"{what} is neither JSON nor a list: {value[:40]!r}") from None


def _text(value: Any, what: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise BadRow(f"{what} must be text, not {type(value).__name__}")
