"""Small benchmarks, and things that answer them: by rule in this process, or as a server that sees the pictures."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tessera.evaluate.answerer import Ask, Told
from tessera.evaluate.item import Benchmark, Item, Scored, mean

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}
KINDS = ("picture", "chart", "scan")
QUESTION = "Which colour is it? Answer with one word."


def picture(path: Path, colour: str, size: tuple[int, int] = (64, 48)) -> Path:
    """A picture of one colour."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, COLOURS[colour]).save(path)
    return path


def colour_rows(directory: Path, count: int) -> Path:
    """``rows.jsonl``: questions about the colours of pictures beside it, with the answers."""
    rows = []
    for index in range(count):
        colour = list(COLOURS)[index % 3]
        name = f"images/{index}.png"
        picture(directory / name, colour, (64 + 16 * (index % 3), 48))
        asked = f"<image>{index}: {QUESTION}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
        rows.append({"id": f"c{index}", "messages": turns, "images": [name], "category": KINDS[index % 2]})
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def colours(count: int, directory: Path, *, score: Callable[[Item, str], Scored] | None = None) -> Benchmark:
    """The same as a benchmark in memory; every ``items`` makes its pictures anew in ``directory``."""

    def item(index: int) -> Item:
        colour = list(COLOURS)[index % 3]
        path = picture(directory / f"{index}.png", colour)
        row = {"messages": [{"role": "user", "content": f"<image>{QUESTION}"}], "images": [str(path)]}
        return Item(f"c{index}", row, colour, {"category": KINDS[index % 2], "place": index})

    def judged(item: Item, answer: str) -> Scored:
        return Scored(
            float(answer.strip().lower() == item.gold), answer.strip().lower() or None, "" if answer else "not parsed"
        )

    return Benchmark("colours@test", lambda path: [item(index) for index in range(count)], score or judged, _metrics)


def _metrics(judged: Sequence[tuple[Item, Scored]]) -> dict[str, float]:
    return {"accuracy": mean(judged), "share of empty": sum(not scored.parsed for _, scored in judged) / len(judged)}


class Rule:
    """Answers by rule, ``size`` questions at a time; ``asked`` are the numbers of those it was asked."""

    def __init__(self, rule: Callable[[Ask], Told], settings: Mapping[str, Any] | None = None, size: int = 4) -> None:
        self.rule, self.size = rule, size
        self.settings = dict(settings or {"model": "rule"})
        self.asked: list[int] = []

    def answers(self, asks: Iterable[Ask]) -> Iterator[Told]:
        held: list[Ask] = []
        for ask in asks:
            held.append(ask)
            if len(held) == self.size:
                yield from self._told(held)
                held = []
        yield from self._told(held)

    def close(self) -> None:
        pass

    def _told(self, asks: Sequence[Ask]) -> Iterator[Told]:
        for ask in reversed(asks):  # in whatever order they are ready
            self.asked.append(ask.number)
            yield self.rule(ask)


def seen(data: bytes) -> str:
    """The name of the colour that a picture mostly is."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        pixel = image.convert("RGB").getpixel((5, 5))
    assert isinstance(pixel, tuple)
    return min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], pixel, strict=True)))


@contextmanager
def server(
    reply: Callable[[dict[str, Any], int], tuple[int, Any]] | None = None, *, port: int = 0
) -> Iterator[tuple[str, list[Any]]]:
    """A server that looks at the pictures it gets and says their colour: (address, the requests it was sent).

    ``reply(body, number)`` may answer request ``number`` with another status and object instead.
    """
    requests: list[Any] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "seer", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                requests.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
                number = len(requests)
            status, found = (reply or (lambda body, number: (200, None)))(body, number)
            self._send(status, completion(body) if found is None else found)

        def _send(self, status: int, found: Any) -> None:
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_address[1]}", requests
    finally:
        found.shutdown()
        found.server_close()
        thread.join(5)


def completion(body: Mapping[str, Any]) -> dict[str, Any]:
    """The chat completion that names the colour of the first picture of a request."""
    parts = [part for turn in body["messages"] if isinstance(turn["content"], list) for part in turn["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    text = seen(base64.b64decode(urls[0].partition(",")[2])) if urls else "nothing"
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    head = {"id": "c", "object": "chat.completion", "created": 1, "model": body["model"]}
    return {**head, "choices": [choice], "usage": usage}
