"""``--eval_backend evalscope``: EvalScope's own evaluation, in its own process, against a server of ours.

    tessera eval --model DIR --eval_backend evalscope --eval_datasets general_vmcq=mcq/ --eval_dataset_args '{...}'

The server is ``tessera deploy`` on a free port of this machine, started for the occasion, unless ``--eval_url`` names
one. What EvalScope reads and prints is its own business; its reports are gathered into one ``summary.json``.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.evaluate.remote import Server, served_model
from tessera.evaluate.results import SUMMARY, write_whole
from tessera.evaluate.server import NAME, deployed


def main(run: Run) -> Path | None:
    """Run EvalScope on the data sets of ``run``; the directory of its results, None for a dry run."""
    if importlib.util.find_spec("evalscope") is None:
        raise UserError("--eval_backend evalscope: not installed; pip install evalscope (or use --eval_backend native)")
    if run.data.dataset:
        raise UserError("--dataset is scored by --eval_backend native; evalscope takes --eval_datasets general_vqa=DIR")
    output = Path(run.evaluate.eval_output_dir).expanduser() / "evalscope"
    if run.dry_run:
        print(shown(command(run, Server(run.evaluate.eval_url or "http://127.0.0.1:0"), output)))
        return None
    with server_of(run) as server:
        words = command(run, server, output)
        print(f"run sh: `{shown(words)}`", flush=True)
        # Through stdin: what is on a command line can be read by everybody on the machine.
        code = subprocess.run([sys.executable, "-c", _MAIN], input=json.dumps(words), text=True).returncode
    if code:
        raise UserError(f"evalscope ended with exit code {code}; its messages are above")
    return gathered(output, {spec.partition("=")[0] for spec in run.evaluate.eval_dataset})


_MAIN = "import json, sys; sys.argv = json.load(sys.stdin); from evalscope.cli.cli import run_cmd; sys.exit(run_cmd())"


def shown(words: list[str]) -> str:
    """The command line without the key."""
    after = words.index("--api-key") + 1
    return shlex.join([*words[:after], "***", *words[after + 1 :]])


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
    if args.eval_url is None:
        with deployed(run) as server:
            yield server
    else:
        found = Server(args.eval_url, run.model.model or "", run.deploy.api_key)
        yield Server(args.eval_url, found.model or served_model(found), run.deploy.api_key)


def gathered(output: Path, names: Collection[str]) -> Path:
    """Write EvalScope's reports on the data sets ``names`` into one ``summary.json`` and print them; ``output``."""
    found: dict[str, Any] = {}
    for path in sorted(output.glob("reports/**/*.json")):
        if path.stem not in names:  # an earlier evaluation's
            continue
        told = json.loads(path.read_text(encoding="utf-8"))
        for metric in told.get("metrics", []):
            identity = metric.get("identity") or {}
            # ROUGE alone has nine: what tells them apart are the dimensions.
            which = [str(identity.get("name") or metric.get("name") or "score")]
            which += [str(value) for value in (identity.get("dimensions") or {}).values()]
            found.setdefault(path.stem, {})[" ".join(which)] = metric.get("score")
    if not found:
        raise UserError(f"evalscope wrote no report below {output}; its messages are above")
    write_whole(output / SUMMARY, json.dumps({"backend": "evalscope", "benchmarks": found}, indent=1) + "\n")
    for name, metrics in found.items():
        for metric, score in metrics.items():
            print(f"{name}  {metric}  {score}", flush=True)
    print(output / SUMMARY, flush=True)
    return output
