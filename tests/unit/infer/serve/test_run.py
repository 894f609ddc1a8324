"""What ``tessera deploy`` makes of its command line, and what it refuses before anything is loaded."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tessera.config.resolve import resolve
from tessera.infer.serve import run as deploy
from tests.disk import save_checkpoint
from tests.e2e.command import tessera


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny", "qwen3_vl")


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    return tmp_path / "checkpoint-5"


def test_names_of_models(model: Path, adapter: Path) -> None:
    def models(*words: str) -> tuple[dict[str, str | None], dict[str, str]]:
        return deploy.models_of(resolve(["deploy", *words], {}))

    path = str(adapter)
    assert models("--model", str(model)) == ({"tiny": None}, {})
    assert models("--model", str(model), "--served_model_name", "x") == ({"x": None}, {})
    assert models("--model", str(model), "--adapters", f"a={path}", f"b={path}") == (
        {"tiny": None, "a": "a", "b": "b"},
        {"a": path, "b": path},
    )
    assert models("--adapters", path) == ({"checkpoint-5": "checkpoint-5"}, {"checkpoint-5": path})
    assert models("--adapters", path, f"a={path}", "--served_model_name", "x") == (
        {"x": "x", "a": "a"},
        {"x": path, "a": path},
    )
    with pytest.raises(UserError, match="--adapters tiny=.*what the model itself is called"):
        models("--model", str(model), "--adapters", f"tiny={path}")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--adapters a={a} a={a}", "two are called a"),
        ("--adapters {a} {a}", "only one may be without a name"),
        ("--adapters a=/nowhere", "--adapters /nowhere: no such directory"),
        ("--model {m} --tensor_parallel_size 2", "one device"),
        ("--model {m} --ssl_keyfile x", "also needs --ssl_certfile"),
        ("--model {m} --ssl_keyfile x --ssl_certfile y", "--ssl_keyfile x: no such file"),
        ("--model {m} --allowed_media_dir /nowhere", "no such directory"),
        ("--model {m} --limit_mm_per_prompt '{{\"audio\": 1}}'", "allowed are image, video"),
        ("--model {m} --limit_mm_per_prompt '{{\"image\": -1}}'", "whole number >= 0"),
        ("--model {m} --infer_backend llama", "allowed are tessera"),
        ("--model {m} --port 70000", "<= 65535"),
        ("--model {m} --api_key ''", "it is empty"),
        ("--model {m} --prot 1", "nearest: --port"),
        ("--model {m} --max_model_len 10000000", "the model has room for"),
        ("--host 127.0.0.1", "--model or --adapters is required"),
        ("--model {m} --host no.such.host.invalid", "--host no.such.host.invalid"),
    ],
)
def test_mistakes(model: Path, adapter: Path, words: str, why: str) -> None:
    import shlex

    pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
    done = tessera("deploy", *shlex.split(words.format(m=model, a=adapter)))
    assert done.code in (1, 2) and why in done.error


def test_without_its_packages_it_says_what_to_install(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "NEEDED", ("fastapi_of_tomorrow",))
    done = tessera("deploy", "--model", model)
    assert done.error == "error: tessera deploy needs fastapi_of_tomorrow: pip install 'tessera[deploy]'"


def test_a_dry_run_says_what_would_be_served(model: Path, adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
    done = tessera(
        "deploy", "--model", model, "--adapters", f"math={adapter}", "--port", "9000", "--api_key", "secret",
        "--allowed_media_dir", tmp_path, "--dry_run", "true",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "would serve tiny, math at http://127.0.0.1:9000/v1" in done.out
    assert "key        asked for" in done.out and "secret" not in done.out + done.err


def test_the_key_is_stored_and_shown_nowhere(model: Path) -> None:
    words = ["deploy", "--model", str(model), "--api_key", "uno", "--api_key", "dos"]
    run = resolve(words, {"TESSERA_API_KEY": "tres"})
    assert run.deploy.api_key == "dos"
    assert not any(key in text for key in ("uno", "dos", "tres") for text in run.notes)
    assert "dos" not in run.describe() and "dos" not in json.dumps(run.to_json()) and "tres" not in str(run.to_json())
    assert resolve(words[:3], {"TESSERA_API_KEY": "tres"}).deploy.api_key == "tres"


def test_old_and_new_spellings(model: Path) -> None:
    line = (
        "--vllm_max_model_len 64 --max_batch_size 4 --log_interval 5 --vllm_gpu_memory_utilization 0.5 --verbose true "
        "--infer_backend pt"
    )
    run = resolve(["deploy", "--model", str(model), *line.split()], {})
    assert (run.deploy.max_model_len, run.deploy.max_num_seqs, run.deploy.stats_interval) == (64, 4, 5)
    assert run.deploy.infer_backend == "tessera"
    told = "\n".join(run.notes)
    assert all(word in told for word in ("--gpu_memory_utilization has no effect", "--verbose", "tessera's own"))


def test_settings_of_training_hold(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "checkpoint-7"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    stored = {"max_pixels": 3136, "system": "be brief", "tessera_version": "0", "model": str(model)}
    (adapter / "args.json").write_text(json.dumps(stored))
    run = resolve(["deploy", "--adapters", f"a={adapter}"], {})
    assert (run.model.model, run.model.max_pixels, run.data.system) == (str(model), 3136, "be brief")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_the_next_free_port(taken: int) -> None:
    with deploy.listen("127.0.0.1", taken) as found:
        assert taken < found.getsockname()[1] < taken + deploy.PORTS
    with pytest.raises(UserError, match="--host 192.0.2.1"):
        deploy.listen("192.0.2.1", 9000)


def test_settings_of_a_request_go_before_those_of_the_server(model: Path) -> None:
    run = resolve(["deploy", "--model", str(model), "--temperature", "0.3", "--min_p", "0.1"], {})
    file = {"do_sample": True, "temperature": 0.7, "top_k": 5}
    own = deploy.sampling_of(run, file, {})
    assert (own.temperature, own.top_k, own.min_p) == (0.3, 5, 0.1)
    asked = deploy.sampling_of(run, file, {"temperature": 0.0, "top_k": 2, "min_p": 0.2, "presence_penalty": 1.0})
    assert (asked.temperature, asked.top_k, asked.min_p, asked.presence_penalty) == (0.0, 2, 0.2, 1.0)
    plain = resolve(["deploy", "--model", str(model)], {})
    assert deploy.sampling_of(plain, {}, {}).greedy
    assert deploy.sampling_of(plain, {}, {"temperature": 5e-324}).greedy
    assert deploy.sampling_of(plain, {}, {"top_p": 0.5}).temperature == 1.0


@pytest.mark.parametrize("verb", ["deploy", "infer"])
def test_a_run_is_its_newest_checkpoint(model: Path, tmp_path: Path, verb: str) -> None:
    for step in (5, 20, 10):
        (tmp_path / "adapters" / f"checkpoint-{step}").mkdir(parents=True)
        config = tmp_path / "adapters" / f"checkpoint-{step}" / "adapter_config.json"
        config.write_text(json.dumps({"base_model_name_or_path": str(model)}))
        (tmp_path / "full" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "full" / f"checkpoint-{step}" / "config.json").write_text("{}")
    run = resolve([verb, "--model", str(tmp_path / "adapters")], {})
    assert run.model.model == str(model)
    assert run.model.adapters == (str(tmp_path / "adapters" / "checkpoint-20"),)
    assert any("the newest checkpoint of this run" in note for note in run.notes)
    assert resolve([verb, "--model", str(tmp_path / "full")], {}).model.model == str(tmp_path / "full/checkpoint-20")
