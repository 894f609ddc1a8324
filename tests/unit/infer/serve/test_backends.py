"""Other engines' servers get our flags in their words; a fake of each writes down what it was told."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.config.resolve import resolve
from tessera.infer.serve.backends import sglang_words, vllm_words
from tests.disk import save_checkpoint
from tests.e2e.command import tessera

DOCUMENT = (
    "--infer_backend {backend} --gpu_memory_utilization 0.9 --max_model_len 8192 --max_new_tokens 2048"
    ' --limit_mm_per_prompt \'{{"image": 5, "video": 2}}\' --served_model_name VL'
)
RECORD = """#!{python}
import json, os, sys
json.dump({{"argv": sys.argv[1:], "key": os.environ.get("VLLM_API_KEY")}}, open({path!r}, "w"))
sys.exit(7)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3_vl")


def adapter(folder: Path, model: Path, rank: int) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model), "r": rank}))
    return folder


def given(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_the_words_of_vllm(model: Path, tmp_path: Path) -> None:
    line = DOCUMENT.format(backend="vllm") + f" --port 9 --torch_dtype bfloat16 --allowed_media_dir {tmp_path}"
    run = resolve(["deploy", "--model", str(model), *shlex.split(line)], {"MAX_PIXELS": "1003520"})
    words = vllm_words(run, str(model))
    assert words[:2] == ["serve", str(model)]
    for flag, value in {
        "--host": "127.0.0.1", "--port": "9", "--gpu-memory-utilization": "0.9", "--max-model-len": "8192",
        "--dtype": "bfloat16", "--limit-mm-per-prompt": '{"image": 5, "video": 2}', "--served-model-name": "VL",
        "--mm-processor-kwargs": '{"max_pixels": 1003520}', "--allowed-local-media-path": str(tmp_path),
        "--override-generation-config": '{"max_new_tokens": 2048}',
    }.items():  # fmt: skip
        assert given(words, flag) == value
    assert not {"--max-num-seqs", "--tensor-parallel-size", "--api-key", "--enable-lora"} & set(words)


def test_adapters_of_vllm(model: Path, tmp_path: Path) -> None:
    small, large = adapter(tmp_path / "a", model, 8), adapter(tmp_path / "b", model, 24)
    words = ["deploy", "--model", str(model), "--infer_backend", "vllm", "--tensor_parallel_size", "2", "--adapters"]
    out = vllm_words(resolve([*words, f"a={small}", f"b={large}"], {}), str(model))
    assert given(out, "--max-lora-rank") == "32" and given(out, "--tensor-parallel-size") == "2"
    at = out.index("--lora-modules")
    assert out[at + 1 : at + 3] == [f"a={small}", f"b={large}"]
    assert given(out, "--served-model-name") == "tiny"
    own = vllm_words(resolve([*words, str(small)], {}), str(model))
    assert given(own, "--lora-modules") == f"tiny={small}" and given(own, "--served-model-name") == "tiny-base"


def test_the_words_of_sglang(model: Path, tmp_path: Path) -> None:
    line = DOCUMENT.format(backend="sglang").replace(" --max_new_tokens 2048", "") + " --api_key k --max_num_seqs 3"
    run = resolve(["deploy", "--model", str(model), *shlex.split(line)], {"MAX_PIXELS": "9408"})
    words = sglang_words(run, str(model))
    for flag, value in {
        "--model-path": str(model), "--mem-fraction-static": "0.9", "--context-length": "8192", "--api-key": "k",
        "--limit-mm-data-per-request": '{"image": 5, "video": 2}', "--max-running-requests": "3",
        "--mm-process-config": '{"image": {"max_pixels": 9408}}',
    }.items():  # fmt: skip
        assert given(words, flag) == value
    done = tessera("deploy", "--model", model, *shlex.split(DOCUMENT.format(backend="sglang")))
    assert "--max_new_tokens: sglang's server has no such limit" in done.error


@pytest.mark.parametrize("backend", ["vllm", "sglang"])
def test_what_is_not_installed(model: Path, backend: str, tmp_path: Path) -> None:
    done = tessera("deploy", "--model", model, "--infer_backend", backend, PATH=str(tmp_path))
    if done.code:  # where it is installed, it would have started
        assert f"--infer_backend {backend}: {backend} is not installed here" in done.error


def test_vllm_takes_our_place(model: Path, tmp_path: Path) -> None:
    """A program called vllm gets the words, the key in its environment, and the last say about the exit code."""
    program, record = tmp_path / "bin" / "vllm", tmp_path / "told.json"
    program.parent.mkdir()
    program.write_text(RECORD.format(python=sys.executable, path=str(record)))
    program.chmod(0o755)
    command = [sys.executable, "-m", "tessera", "deploy", "--model", str(model), "--api_key", "secret"]
    env = {**os.environ, "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, *shlex.split(DOCUMENT.format(backend="vllm"))], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr
    told = json.loads(record.read_text())
    assert told["argv"][:2] == ["serve", str(model)] and told["key"] == "secret"
    assert "secret" not in done.stdout + done.stderr + str(told["argv"])
    assert f"run: {program} serve" in done.stdout


def test_sglang_is_a_module(model: Path, tmp_path: Path) -> None:
    package, record = tmp_path / "lib" / "sglang", tmp_path / "told.json"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(RECORD.format(python=sys.executable, path=str(record)))
    command = [sys.executable, "-m", "tessera", "deploy", "--model", str(model), "--infer_backend", "sglang"]
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--api_key", "secret"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert given(json.loads(record.read_text())["argv"], "--model-path") == str(model)
    assert "secret" not in done.stdout + done.stderr
