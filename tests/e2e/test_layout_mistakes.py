"""Layouts that cannot be: one line that names the flag, its value and the way out, exit code 2, before weights load.

Most are refused by arithmetic on flags, before a second process is started; the rest once the model's ``config.json``
is read, in a dry run as in a real one. What goes wrong while ranks run is the matter of ``test_launch.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tessera.checkpoint import open as door
from tessera.config.errors import UserError
from tessera.config.resolve import resolve
from tessera.contract.layout import layout_of_run
from tessera.parallel.mesh import Mesh
from tessera.recipes import supervised
from tests.e2e.command import shell, tessera, works
from tests.models import make_model_dir
from tests.toys import chats, make_images, make_tokenizer_dir, write_rows

TP, CP, PP = "--tensor_model_parallel_size", "--context_parallel_size", "--pipeline_model_parallel_size"
EP, VPP = "--expert_model_parallel_size", "--virtual_pipeline_model_parallel_size"
FIRST, LAST = "--decoder_first_pipeline_num_layers", "--decoder_last_pipeline_num_layers"
STEPS = "--gradient_accumulation_steps"
FULL = ("--train_type", "full")

FLAGS: list[tuple[int, tuple[str, ...], list[str]]] = [
    (2, (TP, "3"), [f"{TP} 3 does not divide the 2 processes", "multiple of 3"]),
    (1, (TP, "2"), [f"{TP} 2 does not divide the 1 process;"]),
    (4, (TP, "2", PP, "3"), [f"{PP} 3 x {TP} 2 = 6 does not divide the 4 processes"]),
    (6, (CP, "4"), [f"{CP} 4 does not divide the 6 processes"]),
    (4, (EP, "3"), [f"{EP} 3 does not divide the 4 ranks", "divisor of 4"]),
    (4, (EP, "2", "--deepspeed", "zero0"), [f"{EP} 2 does not divide the 1 ranks", "zero0"]),
    (4, ("--data_parallel_replicate_size", "3"), ["--data_parallel_replicate_size 3 does not divide the 4", "divisor"]),
    (4, ("--data_parallel_replicate_size", "2", "--deepspeed", "zero0"), ["contradicts --deepspeed zero0"]),
    (2, (TP, "0"), [f"{TP} 0"]),
    (2, (VPP, "2"), [f"{VPP} 2 needs a pipeline", PP]),
    (2, (FIRST, "2"), [f"{FIRST} 2 needs a pipeline"]),
    (2, (LAST, "2"), [f"{LAST} 2 needs a pipeline"]),
    (2, ("--pipeline_schedule", "zero_bubble"), ["--pipeline_schedule zero_bubble needs a pipeline"]),
    (2, (PP, "2", VPP, "2", "--pipeline_schedule", "1f1b"), ["--pipeline_schedule 1f1b", f"{VPP} 2", "interleaved"]),
    (2, (PP, "2", STEPS, "1"), [f"{STEPS} 1: a pipeline of 2 ranks", "use 2"]),
    (2, (PP, "2", VPP, "2", STEPS, "3"), [f"{STEPS} 3: --pipeline_schedule interleaved", "multiple of 2", "use 4"]),
    (2, (PP, "2", "--pipeline_schedule", "zero_bubble", STEPS, "3"), [f"{STEPS} 3", "multiple of 2", "use 4"]),
    (2, (TP, "2", "--quant_method", "bnb"), ["--quant_method bnb does not go with", TP]),
    (2, (TP, "2", *FULL, "--fp8", "true"), ["--fp8 true does not go with", TP]),
    (2, (*FULL, "--optim", "muon"), ["--optim muon", "--deepspeed zero0"]),
    (2, (*FULL, "--optim", "muon", TP, "2"), ["--optim muon", "use --optim adamw_torch_fused"]),
    (2, ("--deepspeed", "zero2", "--fsdp", "fsdp2"), ["--deepspeed zero2 and --fsdp fsdp2 mean the same"]),
]

MODELS: list[tuple[str, dict[str, Any], int, tuple[str, ...], list[str]]] = [
    ("qwen3", {}, 8, (TP, "8"), [f"{TP} 8 does not divide the model's 4 attention heads", "divisor of 4"]),
    ("qwen3", {}, 4, (TP, "4"), [f"{TP} 4 does not divide the model's 2 key/value heads"]),
    ("qwen3", {"vocab_size": 511}, 2, (TP, "2"), [f"{TP} 2 does not divide the model's 511 entries of the vocabulary"]),
    ("qwen3", {"intermediate_size": 129}, 2, (TP, "2"), [f"{TP} 2 does not divide the model's 129 columns of the MLP"]),
    ("qwen3", {}, 8, (CP, "8", "--cp_comm_type", "a2a"), ["--cp_comm_type a2a", f"{CP} 8", "allgather"]),
    ("qwen3", {}, 8, (CP, "4", TP, "2", "--cp_comm_type", "a2a"), ["--cp_comm_type a2a", "2 query and 1 key heads"]),
    ("qwen3", {}, 2, (EP, "2"), [f"{EP} 2: this model has no experts; use 1"]),
    ("qwen3_moe", {}, 3, (EP, "3"), [f"{EP} 3 does not divide the model's 8 experts", "divisor of 8"]),
    ("qwen3", {}, 4, (PP, "4"), [f"{PP}: 3 layers cannot be cut into 4 stages"]),
    ("qwen3", {}, 2, (PP, "2", VPP, "2"), ["3 layers cannot be cut into 4 stages"]),
    ("qwen3", {}, 2, (PP, "2", FIRST, "3"), ["3 layers cannot be cut into 2 stages with 3 layers on the first"]),
    ("qwen3", {}, 2, (PP, "2", FIRST, "1", LAST, "1"), ["3 layers cannot be cut into 2 stages with 1 layers"]),
    ("qwen3_vl", {}, 2, (PP, "2", FIRST, "1"), ["2 deepstack levels", f"{FIRST} 2"]),
    ("llava", {}, 2, (TP, "2"), [f"{TP} 2 needs a model family of our own", "zero3"]),
    ("llava", {}, 2, (PP, "2"), [f"{PP} 2 needs a model family of our own", "zero3"]),
    ("llava", {}, 2, (CP, "2"), [f"{CP} 2 needs a model family of our own", "zero3"]),
    ("llava", {}, 2, (EP, "2"), [f"{EP} 2: this model has no experts"]),
]


def ids(row: tuple[Any, ...]) -> str:
    return "-".join([str(part) for part in row[:-2] if part != {}] + [word.lstrip("-") for word in row[-2]])


@pytest.mark.parametrize(("processes", "flags", "pieces"), FLAGS, ids=map(ids, FLAGS))
def test_flags_that_do_not_go_together(processes: int, flags: tuple[str, ...], pieces: list[str]) -> None:
    done = tessera(
        *("sft", "--model", "org/model", "--dataset", "rows.jsonl", *flags), NPROC_PER_NODE=str(processes)
    )  # nothing is looked up, nothing is started
    assert (done.code, done.out) == (2, "")
    assert not [piece for piece in pieces if piece not in done.error], done.error
    assert done.err.count("\n") == 1


Maker = Callable[..., list[str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """A function from family and sizes to the words that name a model and rows."""
    root = tmp_path_factory.mktemp("layouts")
    rows = write_rows(root / "rows.jsonl", chats(6))
    seen = write_rows(root / "seen.jsonl", chats(6, make_images(root / "images", [(64, 48)])))

    def make(family: str, **sizes: Any) -> list[str]:
        model = root / "-".join([family, *(f"{key}{value}" for key, value in sizes.items())])
        if not model.exists():
            (whole_model if family == "llava" else make_model_dir)(model, family, **sizes)
        return ["--model", str(model), "--dataset", str(seen if family.endswith("vl") else rows)]

    return make


def whole_model(path: Path, name: str) -> None:
    """A model that the fallback runs; its weights are never looked at."""
    from tessera.models.families.fallback import FAMILY

    make_tokenizer_dir(path)
    (path / "config.json").write_text(json.dumps(FAMILY.tiny()))
    processor = {"patch_size": 14, "size": {"height": 28, "width": 28}, "do_center_crop": False}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    make_model_dir(path.with_name("any"), "qwen3")
    (path.with_name("any") / "model.safetensors").rename(path / "model.safetensors")


@pytest.mark.parametrize(("family", "sizes", "processes", "flags", "pieces"), MODELS, ids=map(ids, MODELS))
def test_a_model_that_does_not_go_with_the_layout(
    family: str, sizes: dict[str, Any], processes: int, flags: tuple[str, ...], pieces: list[str], made: Maker
) -> None:
    done = tessera("sft", *made(family, **sizes), *flags, "--dry_run", "true", NPROC_PER_NODE=str(processes))
    assert (done.code, done.out) == (2, "")
    assert not [piece for piece in pieces if piece not in done.error], done.error
    assert len([line for line in done.err.splitlines() if not line.startswith("note: ")]) == 1


def test_a_real_run_is_refused_before_weights_are_read(made: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **more: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(door, "load", never)
    run = resolve(["sft", *made("qwen3"), EP, "2"], {"NPROC_PER_NODE": "2"})
    with pytest.raises(UserError, match="no experts") as refused:
        supervised.build(run, Mesh.planned(layout_of_run(run, 2)))
    assert refused.value.exit_code == 2


@pytest.mark.slow
def test_ranks_that_are_refused_say_so_once(made: Maker, tmp_path: Path) -> None:
    words = " ".join(["tessera sft", *made("qwen3"), EP, "2", "--output_dir", str(tmp_path / "out")])
    done = shell(words, tmp_path, NPROC_PER_NODE="2", OMP_NUM_THREADS="1")
    assert done.code == 2
    assert done.error == f"error: {EP} 2: this model has no experts; use 1"
    assert done.err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (("--sequence_parallel", "true"), "--sequence_parallel has no effect: "),
        (("--cp_comm_type", "a2a"), "--cp_comm_type a2a has no effect: --context_parallel_size is 1"),
        ((PP, "2", "--deepspeed", "zero3"), "--deepspeed zero3: under a pipeline parameters stay gathered"),
    ],
)
def test_what_has_no_effect_is_said_in_one_line(flags: tuple[str, ...], note: str, made: Maker) -> None:
    done = works("sft", *made("qwen3"), *flags, "--dry_run", "true", NPROC_PER_NODE="2")
    assert [line for line in done.err.splitlines() if note in line] == done.err.splitlines()


def test_a_dry_run_shows_the_layout(made: Maker) -> None:
    words = ("sft", *made("qwen3_vl", num_hidden_layers=8), *FULL, "--dry_run", "true")
    done = works(*words, PP, "2", TP, "2", FIRST, "3", NPROC_PER_NODE="8")
    assert "layout    8 processes: pp2 x dp2 x tp2, zero2" in done.out
    [first, last] = [line for line in done.out.splitlines() if line.startswith("stage ")]
    assert first.startswith("stage 0   tower, embedding, layers 0-2; ")
    assert last.startswith("stage 1   layers 3-7, head; ")
    assert all(" trained; a rank needs ~" in line for line in (first, last))
    assert "x 2 ranks)" in done.out  # data ranks
    single = works(*words).out
    assert "\nholds     " in single and "\nlayout " not in single
    parts = works(*words, PP, "2", VPP, "2", NPROC_PER_NODE="2").out
    assert "stage 0   tower, embedding, layers 0-1, 4-5; " in parts
