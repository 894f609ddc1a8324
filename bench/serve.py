"""Serving: ``tessera deploy`` against ``transformers serve`` and ``swift deploy``, the same model and requests.

    python bench/serve.py                      tiny and 60m, 1, 8 and 32 clients; start-up; soak; evaluation

Every server is started as its users start it, on a free port, and asked over HTTP by the same client: threads that send
one streamed chat completion after another, each with an image of its own (224 x 224 JPEG, never sent before) and at
most 32 new tokens. Tokens are counted in the texts that arrive, by the model's own tokenizer, so nobody is believed.
The time to the first token is the median over requests. Servers alternate. ``--soak N`` sends N requests from 16
clients to ours and looks at errors and memory; ``--eval N`` compares ``tessera eval`` over N questions with answering
them one by one with ``transformers.generate``, both as whole commands.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness, rows
from bench.harness import BENCH, Line

TOKENS = 32
CLIENTS = (1, 8, 32)
PER_CLIENT = {1: 8, 8: 3, 32: 2}
IMAGES = count()
START_S = 150.0
"""Seconds after which a server that gives no answer counts as broken."""


@dataclass(frozen=True)
class Peer:
    """A server: its command for a model and a port, and what the model is called in requests."""

    name: str
    command: Callable[[Path, int], list[str]]
    called: Callable[[Path], str]


@dataclass(frozen=True)
class Load:
    """What a number of clients saw: tokens a second of all, the median time to the first token, and errors."""

    speed: float
    first: float
    errors: int


def ours() -> Peer:
    """``tessera deploy``."""

    def command(model: Path, port: int) -> list[str]:
        return [sys.executable, "-m", "tessera", "deploy", "--model", str(model), "--port", str(port),
                "--torch_dtype", "float32", "--stats_interval", "0"]  # fmt: skip

    return Peer("tessera deploy", command, lambda model: model.name)


def transformers_serve(python: str) -> Peer:
    """``transformers serve``."""

    def command(model: Path, port: int) -> list[str]:
        return [python, str(BENCH / "peers" / "transformers_serve.py"), "serve", str(model), "--port", str(port),
                "--host", "127.0.0.1", "--dtype", "float32", "--device", "cpu", "--log-level", "error"]  # fmt: skip

    return Peer("transformers serve", command, str)


def swift_deploy(python: str, batch: int = 1) -> Peer:
    """``swift deploy`` with its transformers engine, which answers ``batch`` requests together (its default is one)."""

    def command(model: Path, port: int) -> list[str]:
        return [python, str(BENCH / "peers" / "swift_deploy.py"), "--model", str(model), "--port", str(port),
                "--host", "127.0.0.1", "--infer_backend", "transformers", "--torch_dtype", "float32",
                "--model_type", "qwen2_5_vl", "--template", "bench_vl", "--attn_impl", "sdpa",
                "--max_batch_size", str(batch), "--served_model_name", "bench", "--verbose", "false",
                "--log_interval", "-1", "--external_plugins", str(BENCH / "peers" / "swift_template.py")]  # fmt: skip

    return Peer("swift deploy" + (f", batches of {batch}" if batch > 1 else ""), command, lambda model: "bench")


def body(model: str) -> bytes:
    """One request: a new image, a question, greedy, streamed."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(next(IMAGES)).integers(0, 256, (14, 14, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((224, 224)).save(stream, "JPEG")
    url = "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Read the line."}]
    return json.dumps({
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS, "temperature": 0,
        "stream": True,
    }).encode()  # fmt: skip


def ask(port: int, data: bytes, timeout: float) -> tuple[float, str]:
    """Seconds until the first text came, and all the text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    started, first, pieces = time.perf_counter(), 0.0, []
    try:
        connection.request("POST", "/v1/chat/completions", data, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise OSError(f"status {answer.status}: {answer.read()[:300]!r}")
        for line in answer:
            if not line.startswith(b"data:") or b"[DONE]" in line:
                continue
            choices = json.loads(line[5:]).get("choices") or [{}]
            piece = (choices[0].get("delta") or {}).get("content")
            if piece:
                first = first or time.perf_counter() - started
                pieces.append(piece)
    finally:
        connection.close()
    return first, "".join(pieces)


def load(port: int, model: str, clients: int, each: int, timeout: float, length: Callable[[str], int]) -> Load:
    """``clients`` threads that send ``each`` requests one after the other."""
    bodies = [[body(model) for _ in range(each)] for _ in range(clients)]
    firsts: list[float] = []
    tokens: list[int] = []
    errors: list[str] = []

    def client(mine: list[bytes]) -> None:
        for data in mine:
            try:
                first, text = ask(port, data, timeout)
                firsts.append(first)
                tokens.append(length(text))
            except (OSError, ValueError, http.client.HTTPException) as error:
                errors.append(str(error))

    threads = [threading.Thread(target=client, args=(mine,)) for mine in bodies]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if not tokens:
        raise harness.BenchError(f"no request was answered: {errors[:1]}")
    return Load(sum(tokens) / seconds, statistics.median(firsts), len(errors))


@contextmanager
def serving(peer: Peer, model: Path, args: argparse.Namespace) -> Iterator[tuple[int, float, subprocess.Popen[bytes]]]:
    """The server's port, the seconds from its start to its first answer, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            peer.command(model, port), stdout=log, stderr=log, env=harness.environment(args.threads, {})
        )
        try:
            yield port, _first_answer(peer, model, port, process, started, args.timeout, log), process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _first_answer(peer: Peer, model: Path, port: int, process: Any, started: float, timeout: float, log: Any) -> float:
    data = body(peer.called(model))
    error = "nothing listens"
    while time.perf_counter() - started < min(timeout, START_S) and process.poll() is None:
        try:
            _, text = ask(port, data, timeout)
            if text:
                return time.perf_counter() - started
            error = "an empty answer"
        except (OSError, http.client.HTTPException) as found:
            error = str(found)
        time.sleep(0.05)
    log.seek(0)
    raise harness.BenchError(f"{peer.name}: {error}\n{log.read().decode(errors='replace')[-3000:]}")


def measured(size: str, peers: Sequence[Peer], args: argparse.Namespace) -> list[Line]:
    """Start-up, speed and time to the first token of all servers with one model."""
    from tokenizers import Tokenizer

    model = rows.model_dir(size)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    length = lambda text: len(tokenizer.encode(text).ids)  # noqa: E731
    starts: dict[str, list[float]] = {peer.name: [] for peer in peers}
    loads: dict[tuple[str, int], list[Load]] = {(peer.name, n): [] for peer in peers for n in args.clients}
    for repeat in range(args.repeats):
        for peer in peers:
            with serving(peer, model, args) as (port, start, _):
                starts[peer.name].append(start)
                load(port, peer.called(model), 2, 1, args.timeout, length)
                for clients in args.clients:
                    found = load(port, peer.called(model), clients, PER_CLIENT.get(clients, 2), args.timeout, length)
                    loads[peer.name, clients].append(found)
                    harness.note(
                        f"  {size} run {repeat + 1} {peer.name}: start {start:.1f} s, {clients} clients "
                        f"{found.speed:.1f} tokens/s, first {found.first:.2f} s, {found.errors} errors"
                    )
    lines = []
    mine = peers[0].name
    for peer in peers[1:]:
        lines.append(Line(f"{size}: first answer", peer.name, starts[mine], starts[peer.name], "s", at_most=0.5))
        for clients in args.clients:
            us, them = loads[mine, clients], loads[peer.name, clients]
            least = {1: 1.5, 32: 4.0}.get(clients)
            most = None if least is None else 1 / least
            failed = sum(one.errors for one in them)
            remark = f"{failed} requests of theirs failed" if failed else ""
            lines.append(
                Line(f"{size}: {clients} clients", peer.name, [x.speed for x in us], [x.speed for x in them],
                     "tokens/s", at_least=least, remark=remark)
            )  # fmt: skip
            lines.append(
                Line(f"{size}: {clients} clients, first token", peer.name, [x.first for x in us],
                     [x.first for x in them], "s", at_most=most)
            )  # fmt: skip
    return lines


def soak(args: argparse.Namespace) -> list[Line]:
    """``args.soak`` requests from 16 clients: no error, and memory at the end as after a third."""
    import psutil

    peer, model = ours(), rows.model_dir("tiny")
    with serving(peer, model, args) as (port, _, process):
        memory = psutil.Process(process.pid)
        errors, held = 0, []
        for _ in range(3):
            errors += load(port, peer.called(model), 16, args.soak // 48 + 1, args.timeout, len).errors
            held.append(memory.memory_info().rss / 2**20)
    harness.note(f"  soak: {errors} errors, {', '.join(f'{value:.0f}' for value in held)} MiB")
    if errors:
        raise harness.BenchError(f"soak: {errors} requests failed")
    return [Line(f"memory after {args.soak} requests", "after a third", held[-1:], held[:1], "MiB", at_most=1.03)]


def evaluation(args: argparse.Namespace, python: str) -> list[Line]:
    """Questions a second of ``tessera eval`` and of ``transformers.generate`` one by one, as whole commands."""
    lines = []
    for size in args.sizes:
        model, file = rows.model_dir(size), rows.rows_file("line", args.eval)
        asked, generated = [], []
        for _ in range(args.repeats):
            with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
                words = [sys.executable, "-m", "tessera", "eval", "--model", model, "--dataset", file]
                words += ["--scorer", "exact", "--max_new_tokens", TOKENS, "--torch_dtype", "float32"]
                asked.append(args.eval / seconds([*words, "--eval_output_dir", scratch], args))
            one_by_one = [python, BENCH / "peers" / "generate_rows.py", model, file, TOKENS]
            generated.append(args.eval / seconds(one_by_one, args))
        what = f"{size}: evaluation of {args.eval} questions"
        lines.append(Line(what, "generate, one by one", asked, generated, "1/s", at_least=5.0))
    return lines


def seconds(command: Sequence[object], args: argparse.Namespace) -> float:
    """What a command takes; BenchError if it fails."""
    words, started = [str(word) for word in command], time.perf_counter()
    environment = harness.environment(args.threads, {})
    done = subprocess.run(words, capture_output=True, text=True, timeout=args.timeout * 10, env=environment)
    if done.returncode:
        raise harness.BenchError(f"{' '.join(words)}: {done.returncode}\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def main() -> int:
    """Measure and report; 0 if every target is met."""
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=sorted(rows.SHAPES), default=["tiny", "60m"])
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--peers", nargs="*", choices=("transformers", "swift"), default=["transformers", "swift"])
    parser.add_argument("--swift_batch", type=int, nargs="+", default=[1, 32], help="its max_batch_size (1, 32)")
    parser.add_argument("--soak", type=int, default=1000, help="requests of the soak, 0 for none (default 1000)")
    parser.add_argument("--eval", type=int, default=500, help="questions of the evaluation, 0 for none (default 500)")
    args = parser.parse_args()
    plain = harness.peer_python("trl", args.trl_python)
    peers = [ours()]
    if "transformers" in args.peers:
        peers.append(transformers_serve(plain))
    if "swift" in args.peers:
        python = harness.peer_python("swift", args.swift_python)
        peers += [swift_deploy(python, batch) for batch in args.swift_batch]
    lines = [line for size in args.sizes for line in measured(size, peers, args)] if len(peers) > 1 else []
    lines += soak(args) if args.soak else []
    lines += evaluation(args, plain) if args.eval else []
    settings = {"sizes": args.sizes, "clients": args.clients, "tokens": TOKENS, "repeats": args.repeats,
                "threads": args.threads}  # fmt: skip
    return harness.report("serve", lines, settings)


if __name__ == "__main__":
    sys.exit(main())
