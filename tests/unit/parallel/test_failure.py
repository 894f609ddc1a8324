"""Which errors are first failures, and which only notice somebody else's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tessera.config.errors import UserError
from tessera.parallel.failure import Failure, diagnose, read, record


@pytest.mark.parametrize(
    "text",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3215",
        "NCCL error ... ncclRemoteError: A call failed possibly due to a network error or a remote process exiting",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
)
def test_a_peer_that_vanished_is_nobody_s_defect(text: str) -> None:
    found = diagnose(RuntimeError(text), 3)
    assert (found.kind, found.code) == ("lost", 1)
    assert found.text.startswith("error: rank 3 lost the connection to another rank: ") and "\n" not in found.text
    wrapped = UserError("could not join")
    wrapped.__cause__ = RuntimeError(text)
    assert diagnose(wrapped, 3).kind == "lost"


def test_mistakes_and_defects() -> None:
    assert diagnose(UserError("a\n b", exit_code=2), 0) == Failure("user", "error: a b", 2)
    assert diagnose(UserError("a"), 1).text == "error: rank 1: a"
    try:
        raise KeyError("x")
    except KeyError as error:
        found = diagnose(error, 1)
    assert found.kind == "bug" and found.text.startswith("Traceback")
    assert found.summary == "rank 1 failed: KeyError: 'x'"


def test_a_failure_reaches_the_launcher(tmp_path: Path) -> None:
    found = Failure("bug", "Traceback ...\nerror: rank 1 failed: x", 1)
    assert read(tmp_path / "rank1.json") is None
    record(found, tmp_path / "rank1.json")
    assert read(tmp_path / "rank1.json") == found
