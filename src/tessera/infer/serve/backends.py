"""Another engine's own server, started with our flags.

``--infer_backend vllm`` and ``sglang`` run the OpenAI server that comes with those engines on the same directory: here
is only the table of what our flags are called there. The process is replaced, so signals and the exit code are theirs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.run import Run
from tessera.config.serving import named

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM can be told to make room for."""


def start(run: Run) -> None:
    """Become the server of ``run``'s backend; UserError if it is not installed. Returns only from a dry run."""
    backend = run.deploy.infer_backend
    if run.model.model is None:
        raise UserError(f"--infer_backend {backend} needs --model DIR")
    path = door.locate(run.model.model)
    words = {"vllm": vllm_words, "sglang": sglang_words}[backend](run, str(path))
    program = {"vllm": _vllm, "sglang": _sglang}[backend]()
    if program is None:
        raise UserError(
            f"--infer_backend {backend}: {backend} is not installed here; install it, or leave the flag out for "
            "tessera's own engine"
        )
    command = [*program, *words]
    shown = ["***" if before == "--api-key" else word for before, word in zip(["", *command], command, strict=False)]
    print(f"{'would run' if run.dry_run else 'run'}: {shlex.join(shown)}", flush=True)
    if not run.dry_run:
        os.execv(command[0], command)


def vllm_words(run: Run, path: str) -> list[str]:
    """The command line of ``vllm``. The key goes by its environment variable (config/serving.py)."""
    asked = run.deploy
    words = ["serve", path, *_common(run)]
    names = [run.deploy.served_model_name or Path(path).name]
    words += _given(
        {
            "--max-model-len": asked.max_model_len,
            "--gpu-memory-utilization": asked.gpu_memory_utilization,
            "--max-logprobs": asked.max_logprobs if _chosen(run, "max_logprobs") else None,
            "--max-num-seqs": asked.max_num_seqs if _chosen(run, "max_num_seqs") else None,
            "--tensor-parallel-size": asked.tensor_parallel_size if asked.tensor_parallel_size > 1 else None,
            "--dtype": run.model.torch_dtype,
            "--limit-mm-per-prompt": _json(asked.limit_mm_per_prompt),
            "--mm-processor-kwargs": _json(_pixels(run)),
            "--allowed-local-media-path": asked.allowed_media_dir,
            "--override-generation-config": _json(_generation(run)),
        }
    )
    if asked.allowed_media_domains:
        words += ["--allowed-media-domains", *asked.allowed_media_domains]
    adapters = [named(word) for word in run.model.adapters]
    if adapters:
        rank = max(_rank(adapter) for _, adapter in adapters)
        room = next((size for size in RANKS if size >= rank), RANKS[-1])
        own = names[0]
        modules = [f"{name or own}={adapter}" for name, adapter in adapters]
        if any(not name for name, _ in adapters):
            names = [f"{own}-base"]  # the adapter is what is asked for by the model's name
        words += ["--enable-lora", "--max-lora-rank", str(room), "--lora-modules", *modules]
    return [*words, "--served-model-name", *names]


def sglang_words(run: Run, path: str) -> list[str]:
    """The command line of ``sglang.launch_server``."""
    asked = run.deploy
    refused = {
        "--allowed_media_dir": asked.allowed_media_dir,
        "--allowed_media_domains": asked.allowed_media_domains,
        "--max_new_tokens": run.infer.max_new_tokens,
        "--max_logprobs": asked.max_logprobs if _chosen(run, "max_logprobs") else None,
    }
    for name, value in refused.items():
        if value:
            raise UserError(f"{name}: sglang's server has no such limit; leave it out, or use another --infer_backend")
    words = ["--model-path", path, *_common(run)]
    own = asked.served_model_name or Path(path).name
    if any(not named(word)[0] for word in run.model.adapters):
        raise UserError("--adapters DIR: sglang serves adapters beside their model; write NAME=DIR")
    words += ["--served-model-name", own]
    words += _given(
        {
            "--context-length": asked.max_model_len,
            "--mem-fraction-static": asked.gpu_memory_utilization,
            "--max-running-requests": asked.max_num_seqs if _chosen(run, "max_num_seqs") else None,
            "--tp-size": asked.tensor_parallel_size if asked.tensor_parallel_size > 1 else None,
            "--dtype": run.model.torch_dtype,
            "--limit-mm-data-per-request": _json(asked.limit_mm_per_prompt),
            "--mm-process-config": _json({"image": pixels} if (pixels := _pixels(run)) else None),
            "--api-key": asked.api_key,
        }
    )
    adapters = [named(word) for word in run.model.adapters]
    if adapters:
        modules = [f"{name}={adapter}" for name, adapter in adapters]
        words += ["--enable-lora", "--lora-paths", *modules]
    return words


def _common(run: Run) -> list[str]:
    asked = run.deploy
    words = ["--host", asked.host, "--port", str(asked.port)]
    return words + _given({"--ssl-keyfile": asked.ssl_keyfile, "--ssl-certfile": asked.ssl_certfile})


def _given(words: Mapping[str, Any]) -> list[str]:
    """Flags with their values, those without a value left out."""
    return [text for name, value in words.items() if value is not None for text in (name, str(value))]


def _chosen(run: Run, name: str) -> bool:
    return run.provenance[name] != "default"


def _json(value: Mapping[str, Any] | None) -> str | None:
    return json.dumps(dict(value)) if value else None


def _pixels(run: Run) -> dict[str, int]:
    """The pixel limits of training, as image processors call them."""
    limits = {"min_pixels": run.model.min_pixels, "max_pixels": run.model.max_pixels}
    return {name: limit for name, limit in limits.items() if limit is not None}


def _generation(run: Run) -> dict[str, Any]:
    """What an answer is like if its request does not say."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = run.values()
    return {name: values[name] for name in names if values[name] is not None}


def _rank(adapter: str) -> int:
    return int(door.read_json(Path(adapter) / "adapter_config.json").get("r") or 16)


def _vllm() -> list[str] | None:
    return _program("vllm") or _module("vllm", "vllm.entrypoints.cli.main")


def _sglang() -> list[str] | None:
    return _module("sglang", "sglang.launch_server")


def _program(name: str) -> list[str] | None:
    """The program of that name beside this Python, or on the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    return None if found is None else [found]


def _module(package: str, module: str) -> list[str] | None:
    return [sys.executable, "-m", module] if importlib.util.find_spec(package) is not None else None
