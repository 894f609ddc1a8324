"""Who holds up whom, from what the ranks say about themselves."""

from __future__ import annotations

import sys
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from tessera.parallel.watchdog import Heartbeat, Report, Watchdog, group_timeout, spans, verdict, whereabouts


def report(rank: int, *, beats: int = 9, step: int = 12, phase: str = "step", collective: str = "") -> Report:
    return Report(rank, f"host{rank}", 5, step, phase, beats, collective, "mesh.py:90 sum" if collective else "")


def test_who_is_behind_is_named() -> None:
    others = [report(rank, collective="all_reduce") for rank in (0, 2, 3)]
    reports = [others[0], report(1, beats=8, phase="data"), *others[1:]]
    assert verdict(reports, [], 1800) == (
        "error: no progress for 1800 s (--ddp_timeout): rank 1 (host host1) has not moved since step 12 (phase: data); "
        "ranks 0, 2-3 wait in all_reduce at mesh.py:90 sum"
    )


def test_among_equals_those_outside_a_collective_are_named() -> None:
    line = verdict([report(0, collective="all_reduce"), report(1, phase="backward")], [], 6)
    assert "rank 1 (host host1) has not moved since step 12 (phase: backward); rank 0 waits in all_reduce" in line


def test_two_different_collectives_are_both_named() -> None:
    line = verdict([report(0, collective="all_reduce"), report(1, collective="broadcast")], [], 6)
    assert line.endswith("rank 0 waits in all_reduce at mesh.py:90 sum; rank 1 waits in broadcast at mesh.py:90 sum")
    line = verdict([report(0, collective="all_reduce"), report(1, beats=7, collective="broadcast")], [], 6)
    assert "rank 1 (host host1) has not moved since step 12 (phase: step, mesh.py:90 sum) in broadcast; rank 0" in line


def test_ranks_that_do_not_answer_are_named() -> None:
    line = verdict([report(0, collective="all_reduce"), report(1, collective="all_reduce"), None], [1], 6)
    assert "rank 1 (host host1) does not respond, last seen at step 12" in line
    assert "rank 2 was never heard of; rank 0 waits in all_reduce" in line


def test_spans() -> None:
    assert spans([3, 0, 1, 2, 7]) == "0-3, 7"


def test_the_process_group_waits_longer() -> None:
    assert all(group_timeout(limit) >= limit + 60 for limit in (1.0, 1800.0, 18_000_000.0))


def test_a_stack_tells_the_collective_and_our_line() -> None:
    scopes: list[dict[str, object]] = [{"__name__": "torch.distributed.c10d"}, {"__name__": "tessera.parallel.mesh"}]
    exec("import sys\ndef all_reduce():\n    return sys._getframe()\n", scopes[0])
    exec(compile("def sum():\n    return inner()\n", "/x/mesh.py", "exec"), scopes[1])
    scopes[1]["inner"] = scopes[0]["all_reduce"]
    frame = eval("sum()", scopes[1])
    assert whereabouts(frame) == ("all_reduce", "mesh.py:2 sum")
    assert whereabouts(sys._getframe()) == ("", "")


def test_a_heart_that_beats_is_left_alone_and_one_that_stops_ends_the_process(
    capfd: pytest.CaptureFixture[str],
) -> None:
    heart, ends = Heartbeat(), list[int]()
    stopped = threading.Event()

    def end(code: int) -> None:
        ends.append(code)
        stopped.set()

    store = HashStore()
    store.set_timeout(timedelta(seconds=5))
    dog = Watchdog(heart, 0, 1, store, 0.6, end)
    thread = threading.Thread(target=dog.watch, args=(stopped, threading.get_ident()))
    thread.start()
    for _ in range(20):
        time.sleep(0.05)
        heart.enter("forward")
    assert not ends
    heart.step, heart.phase = 3, "data"
    thread.join(10)
    assert ends == [1]
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "rank 0 (host " in err and "has not moved since step 3 (phase: data" in err
