"""Pushing to a hub: what goes up, and one line for every way it can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tessera.weights.hub import push
from tests.stubhub import TOKEN, StubHub, running


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with running() as server:
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint-3"
    (path / "infer_result").mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"\x00\x01weights")
    (path / "args.json").write_text('{"hub_token": null}')
    (path / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (path / "optimizer.pt").write_bytes(b"large")
    (path / "trainer_state.json").write_text("{}")
    (path / "infer_result" / "1.jsonl").write_text("{}")
    return path


def test_push_uploads_what_a_reader_needs(hub: StubHub, adapter: Path) -> None:
    url = push(adapter, "me/formulas", token=TOKEN, private=True, endpoint=hub.url)
    assert url.endswith("/me/formulas")
    assert hub.created["visibility"] == "private"
    assert hub.created["name"] == "formulas"
    assert set(hub.files) == {"adapter_config.json", "adapter_model.safetensors", "args.json", "README.md"}
    assert hub.files["adapter_model.safetensors"] == b"\x00\x01weights"


def test_token_is_in_no_output(hub: StubHub, adapter: Path, capfd: pytest.CaptureFixture[str]) -> None:
    push(adapter, "me/formulas", token=TOKEN, endpoint=hub.url)
    hub.fail_commit = 400
    with pytest.raises(UserError, match="the hub answered 400") as refused:
        push(adapter, "me/formulas", token=TOKEN, endpoint=hub.url)
    captured = capfd.readouterr()
    assert TOKEN not in captured.out + captured.err + str(refused.value)
    assert not any(TOKEN.encode() in content for content in hub.files.values())


def test_bad_token_is_one_line(hub: StubHub, adapter: Path) -> None:
    with pytest.raises(UserError, match=r"--hub_token: the hub does not know this token \(401\)") as error:
        push(adapter, "me/formulas", token="hf_wrong", endpoint=hub.url)
    assert "\n" not in str(error.value)
    assert "hf_wrong" not in str(error.value)


def test_foreign_namespace(hub: StubHub, adapter: Path) -> None:
    with pytest.raises(UserError, match=r"--hub_model_id you/formulas: this token may not write there \(403\)"):
        push(adapter, "you/formulas", token=TOKEN, endpoint=hub.url)


@pytest.mark.parametrize("repo_id", ["formulas", "a/b/c", "a b/c", ""])
def test_bad_repository_name(adapter: Path, repo_id: str) -> None:
    with pytest.raises(UserError, match="--hub_model_id"):
        push(adapter, repo_id, token=TOKEN, endpoint="http://127.0.0.1:9")


def test_no_network(adapter: Path) -> None:
    with pytest.raises(UserError, match="cannot be reached") as error:
        push(adapter, "me/formulas", token=TOKEN, endpoint="http://127.0.0.1:9")
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
