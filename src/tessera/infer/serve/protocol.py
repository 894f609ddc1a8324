"""Requests as OpenAI's API has them: the fields, their bounds, and what is refused by name.

Three kinds of fields arrive. Known ones are checked here, strictly: ``"5"`` is no number. Ones that would change the
answer but are not offered (:data:`REFUSED`) are an error that names them, unless their value asks for nothing. Others
are unknown; they are ignored and named in a ``Warning`` header, since clients of every server send fields of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from tessera.infer.serve.errors import bad

MAX_CHOICES = 16
"""Most answers to one request (``n``)."""

MAX_STOPS = 16

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "bad_words": ([],),
    "beam_width": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that other servers honour and this one does not, each with the values that ask for nothing (as None does)."""

SILENT = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"})
"""Fields about the account of the client, which change no answer anywhere."""


def _plain(value: Any) -> Any:
    """``value`` if it is text that can be encoded throughout; half of a surrogate pair cannot."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except (UnicodeEncodeError, RecursionError):
        raise ValueError("holds text that is not valid Unicode") from None
    return value


Text = Annotated[str, AfterValidator(_plain)]
Name = Annotated[str, Field(min_length=1), AfterValidator(_plain)]
Object = Annotated[dict[str, Any], AfterValidator(_plain)]


class Wire(BaseModel):
    """Strict about the fields it knows, and keeps the names of the others."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    def unknown(self) -> Iterator[str]:
        """Names of the fields that mean nothing here."""
        return iter(self.model_extra or {})


class TextPart(Wire):
    """Text."""

    type: Literal["text"]
    text: Text


class Url(Wire):
    """Where an image is: a data URI, an http(s) URL, or a path below the server's media directory."""

    url: Text
    detail: str | None = None


class ImageUrlPart(Wire):
    """An image as OpenAI writes it."""

    type: Literal["image_url"]
    image_url: Url | Text


class ImagePart(Wire):
    """An image, in short."""

    type: Literal["image"]
    image: Text


class VideoUrlPart(Wire):
    """A video whose frames are joined by commas in a data:video/jpeg;base64 URI."""

    type: Literal["video_url"]
    video_url: Url | Text


class VideoPart(Wire):
    """A video as a list of frames, each given like an image."""

    type: Literal["video"]
    video: list[Text] = Field(min_length=1)
    fps: float | None = Field(None, gt=0, le=1000)


Part = Annotated[TextPart | ImageUrlPart | ImagePart | VideoUrlPart | VideoPart, Field(discriminator="type")]


class CalledFunction(Wire):
    """The name of a called function and its arguments as JSON text."""

    name: Name
    arguments: Text


class ToolCall(Wire):
    """A call of a tool that the model made earlier."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Wire):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Wire):
    """A function the model may call; ``parameters`` is a JSON schema."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")
    description: Text | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Wire):
    """A tool the model may use."""

    type: Literal["function"]
    function: Function


class FunctionName(Wire):
    """A function by its name."""

    name: Text


class NamedTool(Wire):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


class Schema(Wire):
    """A JSON schema with its name."""

    model_config = ConfigDict(populate_by_name=True, protected_namespaces=())

    name: str | None = None
    schema_: Object = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Wire):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Wire):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: Schema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(Wire):
    """``include_usage``: a last event tells the number of tokens."""

    include_usage: bool | None = None


Stop = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_plain)]


class Settings(Wire):
    """What both routes share."""

    model: Text | None = Field(None, description="which of /v1/models; the first if not given")
    max_tokens: int | None = Field(None, ge=1, le=2**31)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer, None if the client does not say."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """For how many alternatives per token log-probabilities are wanted; None for none, not even the token's own."""
        return None

    def consistent(self) -> None:
        """400 for fields that are not offered, or do not go together."""
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED and value is not None and value not in REFUSED[name]:
                raise bad(f"{name} is not supported by this server", name, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad("stream_options is only for stream: true", "stream_options")

    def unknown(self) -> Iterator[str]:
        """Names of the fields that mean nothing here."""
        return (name for name in super().unknown() if name not in REFUSED and name not in SILENT)


class ChatRequest(Settings):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Object | None = Field(None, description="variables for the model's chat template")

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer, None if the client does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """For how many alternatives per token log-probabilities are wanted; None for none."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def consistent(self) -> None:
        """400 for fields that are not offered, or do not go together."""
        super().consistent()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise bad("max_tokens and max_completion_tokens differ; send one of them", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise bad("tool_choice needs tools", "tool_choice")
        if self.parallel_tool_calls is False and self.tools:
            raise bad("parallel_tool_calls: false is not supported by this server", "parallel_tool_calls")


class CompletionRequest(Settings):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def alternatives(self) -> int | None:
        """For how many alternatives per token log-probabilities are wanted; None for none."""
        return self.logprobs
