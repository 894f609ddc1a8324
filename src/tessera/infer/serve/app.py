"""The routes.

``/v1/chat/completions`` goes through three places, none of which blocks the loop::

    loop      check the fields, outline the messages, find images that lie elsewhere
    threads   read and judge images, render the prompt, tokenise it
    engine    prefill and decode; its events come back to the loop (desk.py) and become words (answers.py)

A stream's status line is sent with its first event, not before: what is found wrong with an image when its pixels are
needed is still an error with the right status.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from tessera import __version__
from tessera.infer.engine import Constraint, Question, Request, Sampling
from tessera.infer.serve import protocol as wire
from tessera.infer.serve import replies
from tessera.infer.serve.answers import ChatWriter, TextWriter, Vocabulary, Writer
from tessera.infer.serve.asking import Asker, Outline, Reference, outline
from tessera.infer.serve.desk import Desk, Gone, Hearing, Presence, refusal
from tessera.infer.serve.errors import ApiError, bad
from tessera.infer.serve.media import BadMedia, Library
from tessera.infer.serve.metrics import CONTENT_TYPE
from tessera.infer.serve.pages import DOCS, PAGE
from tessera.infer.serve.pages import headers as page_headers
from tessera.infer.serve.tools import ToolReader, forced

FETCH_S = 30.0
"""How long all images of a request may take together."""

PREPARING, FETCHING = 4, 16
"""Threads that render prompts and read images, and threads that wait for other servers."""

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": replies.ErrorReply, "description": "the request is not answered, and why"},
    "5XX": {"model": replies.ErrorReply, "description": "the server cannot answer"},
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


@dataclass(frozen=True)
class Served:
    """What is served: ``models`` are the names requests may use, each with its adapter (None: the model as opened).

    ``sampling`` makes settings from what a request says, server's and model's defaults filled in; ``max_new_tokens``
    is what an answer has at most if its request does not say, None where the server's command line does not.
    """

    models: Mapping[str, str | None]
    root: str
    created: int
    sampling: Callable[[Mapping[str, Any]], Sampling]
    max_new_tokens: int | None
    open_ended: int
    max_logprobs: int
    vocabulary: Vocabulary

    @property
    def first(self) -> str:
        """The model of a request that names none."""
        return next(iter(self.models))

    def named(self, model: str | None) -> tuple[str, str | None]:
        """The name and adapter of ``model``; 404 if there is no such model."""
        name = self.first if model is None else model
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name[:200]!r} here; there are {known}", "model", "model_not_found")
        return name, self.models[name]


Prepared = tuple[Writer, list[Request]]
"""Who writes an answer, and what the engine is asked for it."""


class Service:
    """Answers requests of both routes."""

    def __init__(self, served: Served, desk: Desk, asker: Asker, library: Library) -> None:
        self.served, self.desk, self.asker, self.library = served, desk, asker, library
        self._preparing = ThreadPoolExecutor(PREPARING, thread_name_prefix="prepare")
        self._fetching = ThreadPoolExecutor(FETCHING, thread_name_prefix="fetch")

    def close(self) -> None:
        """End the threads."""
        self._preparing.shutdown(wait=False, cancel_futures=True)
        self._fetching.shutdown(wait=False, cancel_futures=True)

    async def chat(self, asked: wire.ChatRequest) -> Prepared:
        """The request to the engine that ``asked`` is, and who writes its answer."""
        model, adapter = self._checked(asked)
        constraint, bare = _constraint(asked)
        outlined = outline(asked.messages, self.library)
        found = await self._found(outlined)
        question = await self._run(self.asker.chat, asked, outlined, found)
        calls = bool(asked.tools) and asked.tool_choice != "none"
        writer = ChatWriter(
            model,
            readers=(lambda: ToolReader(bare=bare)) if calls else None,
            logprobs=bool(asked.logprobs),
            choices=asked.n or 1,
            include_usage=asked.include_usage,
            vocabulary=self.served.vocabulary,
        )
        return writer, [self._request(asked, question, adapter, self.served.open_ended, constraint)]

    async def text(self, asked: wire.CompletionRequest) -> Prepared:
        """The requests to the engine, one per prompt, and who writes their answers."""
        model, adapter = self._checked(asked)
        prompts = _prompts(asked.prompt)
        questions = [await self._run(self.asker.text, prompt) for prompt in prompts]
        writer = TextWriter(
            model,
            alternatives=asked.logprobs,
            choices=len(prompts) * (asked.n or 1),
            include_usage=asked.include_usage,
            vocabulary=self.served.vocabulary,
        )
        return writer, [self._request(asked, question, adapter, 16, None) for question in questions]

    def _checked(self, asked: wire.Settings) -> tuple[str, str | None]:
        asked.consistent()
        wanted = asked.alternatives
        if wanted is not None and wanted > self.served.max_logprobs:
            param = "top_logprobs" if isinstance(asked, wire.ChatRequest) else "logprobs"
            raise bad(f"{param}: at most {self.served.max_logprobs} on this server", param)
        return self.served.named(asked.model)

    def _request(
        self,
        asked: wire.Settings,
        question: Question,
        adapter: str | None,
        otherwise: int,
        constraint: Constraint | None,
    ) -> Request:
        given = asked.model_dump(
            include={"temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
                     "repetition_penalty"}, exclude_none=True,
        )  # fmt: skip
        param = "max_tokens" if asked.max_tokens is not None else "max_completion_tokens"
        limit = self.asker.room(question, asked.limit, self.served.max_new_tokens or otherwise, param)
        return Request(
            question=question,
            sampling=self.served.sampling(given),
            seed=secrets.randbits(63) if asked.seed is None else asked.seed % 2**63,
            max_new_tokens=limit,
            stop=asked.stops,
            n=asked.n or 1,
            logprobs=asked.alternatives,
            adapter=adapter,
            constraint=constraint,
            stream=bool(asked.stream),
        )

    async def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work, *args)

    async def _found(self, outlined: Outline) -> list[bytes]:
        """The files of every image and frame, each looked at."""
        references = outlined.references
        if not references:
            return []
        near = [one for one in references if not one.remote]
        far = [one for one in references if one.remote]
        loop = asyncio.get_running_loop()
        fetched = [loop.run_in_executor(self._fetching, _read, self.library, one) for one in far]
        try:
            read = iter(await self._run(_read_all, self.library, near) if near else ())
            late = iter(await asyncio.wait_for(asyncio.gather(*fetched), FETCH_S) if fetched else ())
        except asyncio.TimeoutError:
            raise bad(f"the images took longer than {FETCH_S:g} s to fetch", far[0].param) from None
        finally:
            for future in fetched:
                future.cancel()
        return [next(late if one.remote else read) for one in references]


def make_app(service: Service) -> FastAPI:
    """The routes of ``service`` and their description."""
    app = FastAPI(
        title="tessera",
        version=__version__,
        description="Vision-language models over OpenAI's API.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    _answers(app, service)
    _facts(app, service)
    return app


def _answers(app: FastAPI, service: Service) -> None:
    """The routes that compute."""
    described = {200: {"content": _STREAM, "description": "the answer; with stream: true as events"}, **ERRORS}

    @app.post("/v1/chat/completions", response_model=replies.ChatReply, responses=described, tags=["answers"])
    async def chat(asked: wire.ChatRequest, http: HttpRequest) -> Response:
        """Answer a conversation of text and images."""
        return await _answered(service, lambda: service.chat(asked), asked, http)

    @app.post("/v1/completions", response_model=replies.CompletionReply, responses=described, tags=["answers"])
    async def completions(asked: wire.CompletionRequest, http: HttpRequest) -> Response:
        """Continue a text."""
        return await _answered(service, lambda: service.text(asked), asked, http)


def _facts(app: FastAPI, service: Service) -> None:
    """The routes that tell."""
    served, desk = service.served, service.desk

    def described(name: str) -> dict[str, Any]:
        adapter = served.models[name]
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "tessera",
            "root": served.root,
            "parent": served.first if adapter is not None and name != served.first else None,
            "max_model_len": service.asker.context,
        }

    @app.get("/v1/models", response_model=replies.Models, responses=ERRORS, tags=["models"])
    async def models() -> Response:
        """The models that requests may name."""
        return JSONResponse({"object": "list", "data": [described(name) for name in served.models]})

    @app.get("/v1/models/{name:path}", response_model=replies.Model, responses=ERRORS, tags=["models"])
    async def model(name: str) -> Response:
        """One model."""
        return JSONResponse(described(served.named(name)[0]))

    @app.get("/health", response_model=replies.Health, responses={503: {"model": replies.Health}}, tags=["server"])
    async def health() -> Response:
        """Whether requests are taken."""
        return JSONResponse({"status": desk.status}, 200 if desk.status == "ok" else 503)

    @app.get("/ping", response_model=replies.Health, responses={503: {"model": replies.Health}}, tags=["server"])
    async def ping() -> Response:
        """The same."""
        return await health()

    @app.get(
        "/metrics", tags=["server"], response_class=Response, responses={200: {"content": {"text/plain": {}}}, **ERRORS}
    )
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(desk.metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE, headers=page_headers(PAGE))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(DOCS, headers=page_headers(DOCS))


async def _answered(
    service: Service, prepare: Callable[[], Awaitable[Prepared]], asked: wire.Settings, http: HttpRequest
) -> Response:
    """The response to ``asked``: one JSON object, or a stream of them."""

    hearings: list[Hearing] = []

    async def begin() -> tuple[Writer, Hearing, int]:
        service.desk.admit()
        writer, requests = await prepare()
        hearings.append(service.desk.submit(requests))
        return writer, hearings[0], requests[0].n

    ignored, presence = _ignored(asked, service.asker.variables), Presence(http.receive)
    headers = {"Warning": f'299 tessera "ignored: {", ".join(ignored)}"'} if ignored else {}
    response: Response | None = None
    try:
        writer, hearing, each = await presence.unless_gone(begin())
        if not asked.stream:
            return JSONResponse(await presence.unless_gone(_whole(writer, hearing, each)), headers=headers)
        events = _chunks(writer, hearing, each)
        response = EventStream(await presence.unless_gone(anext(events)), events, presence, headers)
        return response
    except Gone:
        for left in hearings:
            left.cancel()
        return Response(status_code=499)  # nobody reads it
    finally:
        if response is None:
            presence.close()


async def _whole(writer: Writer, hearing: Hearing, each: int) -> dict[str, Any]:
    async with aclosing(hearing.events()) as events:
        async for place, event in events:
            writer.take(event, place * each)
    return writer.whole()


async def _chunks(writer: Writer, hearing: Hearing, each: int) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a stream; the first only when the engine has begun to answer."""
    opening: list[dict[str, Any]] | None = writer.opening()
    async with aclosing(hearing.events()) as events:
        async for place, event in events:
            made = writer.take(event, place * each)
            for chunk in [*(opening or ()), *made]:
                yield chunk
            opening = None
    for chunk in writer.closing():
        yield chunk


class EventStream(Response):
    """Server-sent events; ends ``chunks`` as soon as the client leaves."""

    def __init__(
        self, first: Any, chunks: AsyncGenerator[dict[str, Any], None], presence: Presence, headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-store"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._first, self._chunks, self._presence = first, chunks, presence

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        async with aclosing(self._chunks):
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._presence.unless_gone(self._send(send))
            except Gone:
                return
            finally:
                self._presence.close()

    async def _send(self, send: Any) -> None:
        async def event(text: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

        try:
            await event(_json(self._first))
            async for chunk in self._chunks:
                await event(_json(chunk))
            await event("[DONE]")
        except ApiError as error:
            await event(_json(error.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _read(library: Library, reference: Reference) -> bytes:
    try:
        return library.image(reference.text)
    except BadMedia as error:
        raise bad(str(error), reference.param, "invalid_image") from None


def _read_all(library: Library, references: Sequence[Reference]) -> list[bytes]:
    return [_read(library, reference) for reference in references]


def _constraint(asked: wire.ChatRequest) -> tuple[Constraint | None, bool]:
    """What restricts the answer, and whether that makes it one call of a tool."""
    wanted = forced(asked.tools or (), asked.tool_choice)
    form = asked.response_format
    if form is None or isinstance(form, wire.TextFormat):
        return wanted, wanted is not None
    if asked.tools and asked.tool_choice != "none":
        raise bad("response_format does not go with tools", "response_format")
    if isinstance(form, wire.ObjectFormat):
        return Constraint("json_object"), False
    return Constraint("json_schema", json.dumps(form.json_schema.schema_)), False


def _prompts(prompt: str | list[Any]) -> list[Any]:
    """The prompts of a request, each text or tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad("prompt is empty", "prompt")
    if all(isinstance(item, int) for item in prompt):
        return [prompt]
    if len(prompt) > wire.MAX_CHOICES:
        raise bad(f"{len(prompt)} prompts are more than the {wire.MAX_CHOICES} of a request", "prompt")
    return prompt


def _ignored(asked: wire.Settings, variables: Collection[str]) -> list[str]:
    """Names of fields that mean nothing here, fit for a header; ``variables`` mean something to the template."""
    names = [*asked.unknown()]
    if isinstance(asked, wire.ChatRequest):
        names += [f"messages.{name}" for message in asked.messages for name in message.unknown()]
        names += [f"chat_template_kwargs.{name}" for name in asked.chat_template_kwargs or () if name not in variables]
    return [quote(name[:64], safe=" []{}", errors="replace") for name in dict.fromkeys(names)][:20]


async def _failed(http: HttpRequest, error: Exception) -> Response:
    told = refusal(error)
    return JSONResponse(told.body, told.status, headers=told.headers)


async def _http(http: HttpRequest, error: Exception) -> Response:
    """What the framework itself refuses: an unknown path, a wrong method, a body that is no JSON."""
    assert isinstance(error, HTTPException)
    words = {404: f"there is no {http.url.path[:200]} here", 405: f"{http.url.path[:200]} does not take {http.method}"}
    message = words.get(error.status_code, "the request could not be read")
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)


async def _invalid(http: HttpRequest, error: Exception) -> Response:
    """400 for a request whose fields are wrong; the values themselves are not repeated."""
    assert isinstance(error, RequestValidationError)
    places = [(_place(one, error.body), one) for one in error.errors()]
    # Of the ways in which a union may fail, the one that got furthest is what was meant.
    place, found = max(places, key=lambda pair: (len(pair[0]), not pair[1]["type"].endswith("_type")))
    if found["type"] == "json_invalid" or not place:
        return JSONResponse(bad("the request must be a JSON object, sent as application/json").body, 400)
    param = ".".join(place)
    return JSONResponse(bad(f"{param}: {found['msg']}"[:500], param).body, 400)


def _place(error: Mapping[str, Any], body: Any) -> list[str]:
    """The fields and indices of an error's location, without the names of union members in between."""
    parts, place, at = list(error["loc"][1:]), [], body
    for number, part in enumerate(parts):
        inside = part in at if isinstance(at, dict) else isinstance(at, list) and isinstance(part, int)
        if inside:
            at = at[part]
        if inside or (error["type"] == "missing" and number == len(parts) - 1):
            place.append(str(part))
    return place
