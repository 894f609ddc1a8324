"""Answers from a server that speaks OpenAI's protocol: ``tessera deploy``, vLLM, SGLang, or a service.

``--eval_url`` may be the server, its ``/v1`` or the full ``/v1/chat/completions``. Images are read here and sent as
``data:`` URIs, so that the server needs no access to them. ``--concurrency`` requests are under way at a time. What may
pass (429, 5xx, a broken connection) is tried again, later each time; a question that a server refuses for its own sake
(400: too long, too many images) is that item's problem; what is wrong for all of them (401, no such model, nobody
listening) ends the run with one sentence. Answers that are there already stay, so the same command goes on.
"""

from __future__ import annotations

import base64
import http.client
import io
import ipaddress
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.data import media
from tessera.data.encode import located
from tessera.data.sample import BadRow, ImageRef, normalise
from tessera.evaluate.answerer import Ask, Told

TIMES = 6
"""How often a request is made before it counts as failed."""

PATIENCE = 16
"""Requests in a row that may fail on the server's side before the run ends."""

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
FATAL = (401, 402, 403, 404, 405)
KINDS: Mapping[bytes, str] = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png", b"GIF8": "gif"}
_TAG = re.compile(r"<image>")


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask and how: ``model`` by its name there (empty: the only one), ``body`` goes into every request.

    ``timeout_s`` is how long an answer may take, ``pause_s`` the first wait before a request is repeated.
    """

    url: str
    model: str = ""
    api_key: str | None = None
    timeout_s: float = 600.0
    pause_s: float = 1.0

    @property
    def base(self) -> str:
        """The address that ends in ``/v1``."""
        url = self.url.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")
        return url if re.search(r"/v\d+$", url) else f"{url}/v1"

    def opener(self) -> urllib.request.OpenerDirector:
        """What opens its addresses: never through a proxy on this machine."""
        host = urllib.parse.urlsplit(self.url).hostname or ""
        return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if _is_loopback(host) else []))

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> urllib.request.Request:
        """A request for ``base/path``; POST if it has a ``body``."""
        headers = {"Content-Type": "application/json", "User-Agent": "tessera-eval"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(f"{self.base}/{path}", data, headers)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_url(url: str) -> None:
    """UserError unless ``url`` is an address of a server."""
    found = urllib.parse.urlsplit(url)
    if found.scheme not in ("http", "https") or not found.hostname:
        raise UserError(f"--eval_url {url}: expected http://host:port or https://host", exit_code=2)


def served_model(server: Server) -> str:
    """The name of the only model, or the first, that the server offers; UserError if it cannot be asked."""
    try:
        with server.opener().open(server.request("models"), timeout=min(30.0, server.timeout_s)) as answer:
            listed = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise UserError(f"--eval_url {server.url}: {error.code} {_message(error.read())}{_hint(error.code)}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise UserError(f"--eval_url {server.url}: cannot be reached ({_reason(error)})") from None
    names = [str(entry.get("id")) for entry in listed.get("data", []) if isinstance(entry, dict)]
    if not names:
        raise UserError(f"--eval_url {server.url}: names no model; give --model NAME")
    return names[0]


class Remote:
    """Answers from ``server``, ``concurrency`` questions at a time; ``body`` is what every request says of sampling."""

    def __init__(
        self, server: Server, body: Mapping[str, Any], *, concurrency: int = 8, root_image_dir: str | None = None
    ) -> None:
        self._server, self._body, self._concurrency = server, dict(body), concurrency
        self._model = server.model or served_model(server)
        self._root = root_image_dir
        self._opener = server.opener()

    @property
    def settings(self) -> Mapping[str, Any]:
        """Server, model and sampling."""
        return {"url": self._server.base, "model": self._model, **self._body}

    @property
    def notes(self) -> Sequence[str]:
        """Nothing."""
        return ()

    @property
    def model(self) -> str:
        """What the model is called there."""
        return self._model

    def answers(self, asks: Iterable[Ask]) -> Iterator[Told]:
        """Answers as they come; at most ``concurrency`` questions are read ahead of those that are under way."""
        pending: set[Future[Told | _Failed]] = set()
        failures, source = 0, iter(asks)
        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                for ask in source:
                    pending.add(pool.submit(self._answer, ask))
                    if len(pending) < 2 * self._concurrency:
                        continue
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for told in (future.result() for future in done):
                        failures = self._noted(told, failures)
                        yield told if isinstance(told, Told) else told.told
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for told in (future.result() for future in done):
                        failures = self._noted(told, failures)
                        yield told if isinstance(told, Told) else told.told
            finally:
                for future in pending:
                    future.cancel()

    def close(self) -> None:
        """Nothing to give back."""

    def _noted(self, told: Told | _Failed, failures: int) -> int:
        """How many requests in a row have failed now; UserError if they are too many."""
        if isinstance(told, Told):
            return 0
        if failures + 1 >= PATIENCE:
            raise UserError(
                f"--eval_url {self._server.url}: {PATIENCE} requests in a row failed ({told.told.error}); answers so "
                "far are kept, the same command goes on"
            )
        return failures + 1

    def _answer(self, ask: Ask) -> Told | _Failed:
        try:
            messages, tools = chat_messages(ask.row, ask.base, self._root)
        except BadRow as error:
            return Told(ask.number, error=str(error))
        body = {"model": self._model, "messages": messages, "max_tokens": ask.max_new_tokens, "seed": ask.seed}
        body |= self._body | ({"tools": tools} if tools else {})
        failure = ""
        for attempt in range(TIMES):
            if attempt:
                time.sleep(min(60.0, self._server.pause_s * 2 ** (attempt - 1)))
            try:
                with self._opener.open(
                    self._server.request("chat/completions", body), timeout=self._server.timeout_s
                ) as got:
                    return _read(ask.number, got.read())
            except urllib.error.HTTPError as refused:
                failure = f"{refused.code} {_message(refused.read())}"
                if refused.code in FATAL:
                    raise UserError(f"--eval_url {self._server.url}: {failure}{_hint(refused.code)}") from None
                if refused.code not in PASSING:
                    return Told(ask.number, error=f"refused: {failure}")
            except (OSError, http.client.HTTPException) as broken:
                failure = _reason(broken)
            except ValueError as odd:
                return _Failed(Told(ask.number, error=f"failed: {odd}"))
        return _Failed(Told(ask.number, error=f"failed: {failure}"))


@dataclass(frozen=True, slots=True)
class _Failed:
    """An answer that is missing for the server's sake, not for the question's."""

    told: Told


def _read(number: int, data: bytes) -> Told:
    """The answer in a response; ValueError if it holds none."""
    try:
        found = json.loads(data)
        choice, usage = found["choices"][0], found.get("usage") or {}
        text = choice["message"].get("content") or ""
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"not a chat completion: {data[:200].decode('utf-8', 'replace')}") from None
    prompt, completion = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
    return Told(number, str(text), str(choice.get("finish_reason") or ""), prompt, completion)


def _message(data: bytes) -> str:
    """What an error response says, in one line."""
    text = data.decode("utf-8", "replace")
    try:
        found = json.loads(text)
        error = found.get("error", found) if isinstance(found, dict) else found
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        pass
    return " ".join(text.split())[:300]


def _hint(code: int) -> str:
    return {401: "; give --api_key", 403: "; check --api_key", 404: "; check the address and --model"}.get(code, "")


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(cause).split()) or type(cause).__name__


def chat_messages(
    row: Mapping[str, Any], base: Path | None, root: str | None = None
) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """A dataset row as OpenAI messages, images in place as ``data:`` URIs, and its tools; BadRow if it cannot be."""
    sample = normalise(row, need_answer=False)
    if sample.videos:
        raise BadRow("videos cannot be sent to a server")
    images = iter([located(image, base, root) for image in sample.images])
    messages: list[dict[str, Any]] = []
    last = sample.messages[:-1] if sample.answer is not None else sample.messages
    for message in last:
        pieces, parts = _TAG.split(message.content), []
        for index, piece in enumerate(pieces):
            if index:
                parts.append({"type": "image_url", "image_url": {"url": data_uri(next(images))}})
            if piece:
                parts.append({"type": "text", "text": piece})
        content: Any = message.content if len(pieces) == 1 else parts
        turn = {"role": message.role, "content": content}
        messages.append(turn | ({"tool_calls": list(message.tool_calls)} if message.tool_calls else {}))
    return messages, list(sample.tools)


def data_uri(source: ImageRef) -> str:
    """An image as a ``data:`` URI, its bytes as they are where every server reads that kind; BadRow if it is none."""
    media.probe(source)
    data = media.load(source)
    kind = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    if kind is None and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        from PIL import Image

        out = io.BytesIO()
        Image.fromarray(media.decode(source)).save(out, "PNG")
        data, kind = out.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
