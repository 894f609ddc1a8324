"""``--eval_backend evalscope``: EvalScope's own evaluation, in its own process, against a server of ours.

    tessera eval --model DIR --eval_backend evalscope --eval_datasets general_vmcq=mcq/ --eval_dataset_args '{...}'

The server is ``tessera deploy`` on a free port of this machine, started for the occasion, unless ``--eval_url`` names
one. What EvalScope reads and prints is its own business; its reports are gathered into one ``summary.json``.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.evaluate.remote import Server, served_model
from tessera.evaluate.results import SUMMARY, write_whole

START_S = 600.0
"""Most seconds until the server must answer."""

NAME = "tessera-eval"


def main(run: Run) -> Path | None:
    """Run EvalScope on the data sets of ``run``; the directory of its results, None for a dry run."""
    if importlib.util.find_spec("evalscope") is None:
        raise UserError("--eval_backend evalscope: not installed; pip install evalscope (or use --eval_backend native)")
    if run.data.dataset:
        raise UserError("--dataset is scored by --eval_backend native; evalscope takes --eval_datasets general_vqa=DIR")
    output = Path(run.evaluate.eval_output_dir).expanduser() / "evalscope"
    if run.dry_run:
        print(shlex.join(command(run, Server(run.evaluate.eval_url or "http://127.0.0.1:0"), output)))
        return None
    with server_of(run) as server:
        words = command(run, server, output)
        print(f"run sh: `{shlex.join(words[2:])}`", flush=True)
        code = subprocess.run([sys.executable, "-c", _MAIN, *words[1:]]).returncode
    if code:
        raise UserError(f"evalscope ended with exit code {code}; its messages are above")
    return gathered(output)


_MAIN = "import sys; from evalscope.cli.cli import run_cmd; sys.argv[0] = 'evalscope'; sys.exit(run_cmd())"


def command(run: Run, server: Server, output: Path) -> list[str]:
    """The words of the command line of EvalScope, the program first."""
    args, infer = run.evaluate, run.infer
    names = [spec.partition("=")[0] for spec in args.eval_dataset]
    more: dict[str, Any] = {name: dict((args.eval_dataset_args or {}).get(name, {})) for name in names}
    for spec in args.eval_dataset:
        name, equals, path = spec.partition("=")
        if equals:
            more[name]["local_path"] = str(Path(path).expanduser().resolve())
    generation = dict(args.eval_generation_config or {})
    given = {"max_tokens": infer.max_new_tokens, "temperature": infer.temperature, "top_p": infer.top_p}
    generation |= {name: value for name, value in given.items() if value is not None}
    generation.setdefault("temperature", 0.0)
    generation.setdefault("seed", run.train.seed)
    words = ["evalscope", "eval", "--model", server.model or NAME, "--api-url", server.base]
    words += ["--api-key", server.api_key or "EMPTY", "--eval-type", "openai_api", "--datasets", *names]
    words += ["--dataset-args", json.dumps(more), "--generation-config", json.dumps(generation)]
    words += ["--eval-batch-size", str(args.concurrency), "--work-dir", str(output), "--no-timestamp"]
    return [*words, *(["--limit", str(args.eval_limit)] if args.eval_limit else [])]


@contextmanager
def server_of(run: Run) -> Iterator[Server]:
    """The server of ``--eval_url``, or one of our own that ends with the block."""
    args = run.evaluate
    if args.eval_url is not None:
        found = Server(args.eval_url, run.model.model or "", args.api_key)
        yield Server(args.eval_url, found.model or served_model(found), args.api_key)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tessera", "deploy", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--served_model_name", NAME]
    words += ["--model", str(run.model.model)] if run.model.model and not run.model.adapters else []
    words += ["--adapters", *run.model.adapters] if run.model.adapters else []
    for name in ("max_pixels", "torch_dtype", "max_length", "system"):
        value = run.values()[name]
        if value is not None and run.provenance[name] in ("flag", "yaml", "env"):
            words += [f"--{name}", str(value)]
    process = subprocess.Popen(words)
    server = Server(f"http://127.0.0.1:{port}", NAME)
    try:
        _await(process, server)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _await(process: subprocess.Popen[bytes], server: Server) -> None:
    """Wait until ``server`` answers; UserError if its process ends or takes too long."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"--eval_backend evalscope: tessera deploy ended with exit code {process.returncode}")
        try:
            with server.opener().open(server.request("models"), timeout=5):
                return
        except urllib.error.HTTPError as error:
            raise UserError(f"--eval_backend evalscope: tessera deploy answers {error.code}") from None
        except OSError:
            time.sleep(0.3)
    raise UserError(f"--eval_backend evalscope: tessera deploy did not answer within {START_S:g} seconds")


def gathered(output: Path) -> Path:
    """Write EvalScope's reports into one ``summary.json`` below ``output`` and print them; ``output``."""
    found: dict[str, Any] = {}
    for path in sorted(output.glob("reports/**/*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        for metric in told.get("metrics", []):
            identity = metric.get("identity") or {}
            name = str(identity.get("name") or metric.get("name") or "score")
            found.setdefault(path.stem, {})[name] = metric.get("score")
    if not found:
        raise UserError(f"evalscope wrote no report below {output}; its messages are above")
    write_whole(output / SUMMARY, json.dumps({"backend": "evalscope", "benchmarks": found}, indent=1) + "\n")
    for name, metrics in found.items():
        for metric, score in metrics.items():
            print(f"{re.sub(r'_', ' ', name)}  {metric}  {score}", flush=True)
    print(output / SUMMARY, flush=True)
    return output
