"""``--async_save true``: the checkpoints of a run that waits for them, bit for bit, and nothing less safe."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tessera.config.resolve import resolve
from tessera.contract.layout import layout_of_run
from tessera.parallel import fsdp
from tessera.parallel.mesh import Mesh, world_size
from tessera.parallel.watchdog import group_timeout
from tessera.recipes import supervised
from tests.ranks import run_ranks
from tests.resume.job import assert_identical, make, optimizer, run, start, tensors
from tests.resume.test_resume import steps_logged, wait_for


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_saved_aside_is_saved_waiting(kind: str, tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", kind, "--save_steps", "2", "--save_total_limit", "3"]
    straight = run(argv, tmp_path / "a")
    aside = run(argv, tmp_path / "b", "--async_save", "true")
    found = [sorted(path.name for path in folder.glob("checkpoint-*[0-9]")) for folder in (straight, aside)]
    assert found[0] == found[1] and len(found[0]) >= 3
    for name in found[0]:
        assert_identical(aside, straight, int(name.split("-")[1]))
        files = sorted(path.name for path in (straight / name).iterdir())
        assert files == sorted(path.name for path in (aside / name).iterdir())
        for file in (file for file in files if file.endswith(".safetensors")):
            assert (aside / name / file).read_bytes() == (straight / name / file).read_bytes()


def staged_then_changed(argv: list[str], out: str) -> None:
    """Stage, write at once; change everything a step changes, write again from what was staged."""
    settings = resolve([*argv, "--output_dir", out, "--async_save", "true"], {})
    mesh = Mesh.from_env(layout_of_run(settings, world_size()), timeout_s=group_timeout(60))
    trainer = supervised.build(settings, mesh)
    assert trainer is not None
    for name in ("before", "after"):
        if mesh.is_main:
            (Path(out) / name).mkdir(parents=True, exist_ok=True)
    mesh.barrier()
    write = trainer.stage_checkpoint()
    write(Path(out) / "before")
    mesh.barrier()
    with torch.no_grad():
        held = [*trainer.optimizers.parameters, *trainer.optimizers.state().values()]
        for tensor in held:
            fsdp.local(tensor.detach(), mesh).fill_(7)
        torch.rand(10)
    write(Path(out) / "after")
    mesh.close()


@pytest.mark.parametrize(("ranks", "kind"), [(1, "full"), (2, "full"), (2, "lora")])
def test_what_training_does_meanwhile_is_not_in_it(ranks: int, kind: str, tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", kind, "--gradient_accumulation_steps", "1"]
    run_ranks(staged_then_changed, ranks, argv, str(tmp_path / "out"))
    before, after = tmp_path / "out" / "before", tmp_path / "out" / "after"
    for read in (tensors, optimizer):
        one, two = read(before), read(after)
        assert one and one.keys() == two.keys()
        assert all(torch.equal(two[name], value) for name, value in one.items())
    for rank in range(ranks):
        states: list[Any] = [torch.load(path / "state" / f"rng-{rank}.pt") for path in (before, after)]
        assert torch.equal(states[0]["cpu"], states[1]["cpu"])


@pytest.mark.timeout(300)
def test_killed_while_saving_aside(tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full", "--async_save", "true"]
    straight = run(argv, tmp_path / "a")
    out, log = tmp_path / "b", tmp_path / "log.txt"
    for step in (4, 8):
        more = ["--resume_from_checkpoint", "true"] if list(out.glob("*/checkpoint-*")) else []
        process = start(argv, out, *more, log=log)
        wait_for(lambda step=step: bool(list(out.glob(f"*/.writing-checkpoint-{step}/*"))), process, log)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        for checkpoint in out.glob("*/checkpoint-*"):
            assert json.loads((checkpoint / "trainer_state.json").read_text())["step"] in (4, 8)
    more = ["--resume_from_checkpoint", "true"] if list(out.glob("*/checkpoint-*")) else []
    assert_identical(run(argv, out, *more), straight)


@pytest.mark.timeout(300)
def test_a_signal_is_waited_for_on_two_ranks(tmp_path: Path) -> None:
    argv = [*make(tmp_path, "qwen3"), "--train_type", "full", "--logging_steps", "1", "--async_save", "true"]
    argv += ["--gradient_accumulation_steps", "1"]
    out, log = tmp_path / "b", tmp_path / "log.txt"
    two = {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    process = start(argv, out, log=log, **two)
    wait_for(lambda: steps_logged(out) >= 1, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 128 + signal.SIGTERM, log.read_text()
    saved = sorted(out.glob("*/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert f"saved {saved[-1]}" in log.read_text() and not list(out.glob("*/.writing*"))
    process = start(argv, out, "--resume_from_checkpoint", "true", log=log, **two)
    assert process.wait(150) == 0, log.read_text()
    process = start(argv, tmp_path / "a", log=log, **two)
    assert process.wait(150) == 0, log.read_text()
    [resumed], [straight] = out.glob("v*-*"), (tmp_path / "a").glob("v*-*")
    assert_identical(resumed, straight)
