"""From the messages of a request to a question that the engine answers.

A request is outlined first: its texts, and references to images in the order in which they appear, counted before any
of them is looked at. Then the images are found (:mod:`tessera.infer.serve.media`), and the whole becomes a row of the
same form that datasets have, so that renderer, resize and template are those of training and ``tessera infer``.

Text of a client is text. Datasets write ``<image>`` where an image belongs and ``<img>path</img>`` to read a file; in a
request neither may mean anything, so these words are broken by :data:`~tessera.contract.model.SEAM`, which the renderer
takes out again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tessera.contract.model import SEAM
from tessera.data.render import Encoded
from tessera.data.sample import BadRow, Sample
from tessera.data.sample import Message as Turn
from tessera.infer.engine import Question
from tessera.infer.serve import protocol as wire
from tessera.infer.serve.errors import bad
from tessera.infer.serve.media import MOST_FRAMES, BadMedia, Library
from tessera.infer.session import Session

_WORDS = re.compile(r"<(?=(?:image|video|audio|img)>)")


@dataclass(frozen=True, slots=True)
class Reference:
    """An image or frame to be found: what the request says, and in which part it says so."""

    text: str
    param: str

    @property
    def remote(self) -> bool:
        """Whether finding it takes a connection."""
        return self.text[:8].lower().startswith(("http:", "https:"))


@dataclass(slots=True)
class Outline:
    """A conversation without its pixels; ``videos`` are lists of frames with their rates, None where not said."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Reference] = field(default_factory=list)
    videos: list[tuple[list[Reference], float | None]] = field(default_factory=list)

    @property
    def references(self) -> list[Reference]:
        """Every image and frame."""
        return [*self.images, *(frame for frames, _ in self.videos for frame in frames)]


def outline(messages: Sequence[wire.Message], library: Library) -> Outline:
    """What ``messages`` say and show; 400 if it is no conversation that can be answered, or shows too much."""
    out = Outline()
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        turn["content"] = _content(message.content, f"{where}.content", out, library)
        if message.tool_calls:
            if message.role != "assistant":
                raise bad(f"a {message.role} message has no tool_calls", f"{where}.tool_calls")
            turn["tool_calls"] = [call.model_dump(include={"type", "function"}) for call in message.tool_calls]
        elif message.content is None:
            raise bad(f"a {message.role} message needs content", f"{where}.content")
        out.messages.append(turn)
    if messages[-1].role == "assistant":
        raise bad("the last message must not be the assistant's: there is nothing to answer", "messages")
    for kind, count in (("image", len(out.images)), ("video", len(out.videos))):
        if count > library.limits.most[kind]:
            raise bad(f"{count} {kind}s are more than the {library.limits.most[kind]} of a request", "messages")
    return out


def _content(content: str | list[Any] | None, where: str, out: Outline, library: Library) -> str:
    """Text with a tag for every image and video, which are noted in ``out``."""
    if content is None or isinstance(content, str):
        return _quoted(content or "")
    parts = []
    for index, part in enumerate(content):
        param = f"{where}.{index}"
        match part:
            case wire.TextPart():
                parts.append(_quoted(part.text))
            case wire.ImageUrlPart():
                out.images.append(Reference(_url(part.image_url), param))
                parts.append("<image>")
            case wire.ImagePart():
                out.images.append(Reference(part.image, param))
                parts.append("<image>")
            case _:
                out.videos.append(_video(part, param, library))
                parts.append("<video>")
    return "".join(parts)


def _video(part: Any, param: str, library: Library) -> tuple[list[Reference], float | None]:
    try:
        listed = isinstance(part, wire.VideoPart)
        frames = part.video if listed else library.frames(_url(part.video_url))
    except BadMedia as error:
        raise bad(str(error), param) from None
    if len(frames) > MOST_FRAMES:
        raise bad(f"{len(frames)} frames are more than the {MOST_FRAMES} of a video", param)
    return [Reference(frame, param) for frame in frames], part.fps if listed else None


def _url(value: wire.Url | str) -> str:
    return value if isinstance(value, str) else value.url


def _quoted(text: str) -> str:
    return _WORDS.sub("<" + SEAM, text) if "<" in text else text


class Asker:
    """Makes questions for ``session``; a prompt has at most ``context`` - 1 tokens. Methods block, in any thread."""

    def __init__(self, session: Session, context: int) -> None:
        self.context = context
        self._encoder = session.encoder
        template = self._encoder.renderer.template
        probe = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
        user = [{"role": "user", "content": "a"}]
        try:
            self.takes_tools = template.render(user, [probe]) != template.render(user)
        except BadRow:
            self.takes_tools = False
        self.variables = template.variables

    def chat(self, request: wire.ChatRequest, outlined: Outline, found: Sequence[bytes]) -> Question:
        """The question of a conversation; ``found`` are the files of ``outlined.references``, in their order."""
        files = iter(found)
        row: dict[str, Any] = {"messages": outlined.messages, "images": [next(files) for _ in outlined.images]}
        if outlined.videos:
            row["videos"] = [[next(files) for _ in frames] for frames, _ in outlined.videos]
            rates = [rate for _, rate in outlined.videos]
            if any(rates):
                if not all(rates):
                    raise bad("fps must be given for all videos or for none", "messages")
                row["fps"] = rates
        if request.tools and request.tool_choice != "none":
            if not self.takes_tools:
                raise bad("the chat template of this model has no place for tools", "tools", "unsupported_parameter")
            row["tools"] = [tool.model_dump(exclude_none=True) for tool in request.tools]
        if request.chat_template_kwargs:
            row["chat_template_kwargs"] = request.chat_template_kwargs
        return self._question(row)

    def text(self, prompt: str | Sequence[int]) -> Question:
        """The question of a bare text, or of its tokens, that is to be continued."""
        renderer = self._encoder.renderer
        if isinstance(prompt, str):
            ids = list(renderer.tokenizer.encode(prompt).ids)
        else:
            ids = list(prompt)
            known = renderer.tokenizer.get_vocab_size(with_added_tokens=True)
            if not all(0 <= token < known for token in ids):
                raise bad(f"prompt: tokens are numbers from 0 to {known - 1}", "prompt")
        if not ids:
            raise bad("prompt is empty", "prompt")
        pads = set(renderer.geometry.pad_ids.values()) & set(ids)
        if pads:
            raise bad("prompt holds tokens that stand for images; /v1/chat/completions takes images", "prompt")
        self._fits(len(ids), "prompt")
        tokens = np.array(ids, dtype=np.int64)
        encoded = Encoded(tokens, np.zeros(len(ids), dtype=np.float32), ())
        sample = Sample((Turn("user", prompt if isinstance(prompt, str) else renderer.decode(ids)),))
        return Question({}, sample, None, encoded, 0)

    def room(self, question: Question, wanted: int | None, otherwise: int, param: str) -> int:
        """Most tokens of the answer: what the client ``wanted`` (400 if that does not fit), else what there is."""
        prompt = len(question.encoded.tokens)
        if wanted is not None and prompt + wanted > self.context:
            raise bad(
                f"the model has room for {self.context} tokens; the prompt has {prompt} and {param} asks for {wanted} "
                f"more, {prompt + wanted} in all",
                param,
                "context_length_exceeded",
            )
        return min(otherwise, self.context - prompt) if wanted is None else wanted

    def _question(self, row: Mapping[str, Any]) -> Question:
        try:
            sample = self._encoder.sample(row, None, need_answer=False)
            encoded = self._encoder.encoded(sample, prompt=True)
        except BadRow as error:
            raise bad(str(error), "messages") from None
        self._fits(len(encoded.tokens), "messages")
        return Question({}, replace(sample, images=(), videos=()), None, encoded, 0)

    def _fits(self, prompt: int, param: str) -> None:
        if prompt >= self.context:
            raise bad(
                f"the model has room for {self.context} tokens, the prompt alone has {prompt}",
                param,
                "context_length_exceeded",
            )
