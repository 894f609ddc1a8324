"""The command lines of tessera, the bare loop, TRL and ms-swift for the same training run.

All train every parameter with fused AdamW on float32 weights (autocast as ``dtype`` says), clip at 1.0, keep rows in
file order, log every step, save and evaluate nothing, and switch gradient checkpointing off (which is faster and is
not every tool's default). Only the command line of a tool decides how it runs; nothing in a tool is altered.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.harness import BENCH, Contestant


@dataclass(frozen=True)
class Task:
    """One training run: which model and rows, microbatch, accumulation, steps and autocast dtype."""

    model: Path
    dataset: Path
    batch: int
    accumulation: int
    steps: int
    dtype: str

    @property
    def samples(self) -> int:
        """Rows per optimiser step."""
        return self.batch * self.accumulation


def bare(task: Task, data: str = "ready", stop_after: int | None = None) -> Contestant:
    """The hand-written loop, ``bench/bare.py``, in tessera's environment."""
    parts = [
        sys.executable, BENCH / "bare.py", "--model", task.model, "--dataset", task.dataset, "--batch", task.batch,
        "--accumulation", task.accumulation, "--steps", task.steps, "--data", data, "--dtype", task.dtype,
    ]  # fmt: skip
    return Contestant(f"bare loop (bs {task.batch})", lambda out: [str(p) for p in parts], stop_after=stop_after)


def tessera(
    task: Task, packing_length: int = 0, stop_after: int | None = None, extra: tuple[str, ...] = ()
) -> Contestant:
    """``tessera sft`` from the command line; ``packing_length`` > 0 turns packing on."""
    parts = [
        sys.executable, "-m", "tessera", "sft", *shared_flags(task),
        "--torch_dtype", task.dtype, "--train_type", "full", "--optim", "adamw_torch_fused",
        "--vit_gradient_checkpointing", "false", "--loss_scale", "default", *extra,
    ]  # fmt: skip
    if packing_length:
        at = parts.index("--max_length")
        del parts[at : at + 2]
        parts += ["--packing", "true", "--packing_length", str(packing_length), "--max_length", str(packing_length)]
    name = f"tessera (bs {task.batch}{f', packs of {packing_length}' if packing_length else ''})"
    return Contestant(name, lambda out: [*parts, "--output_dir", str(out)], stop_after=stop_after)


def swift(task: Task, python: str, stop_after: int | None = None, extra: tuple[str, ...] = ()) -> Contestant:
    """``swift sft`` without its launcher process (``bench/peers/swift_sft.py``)."""
    parts = [
        python, BENCH / "peers" / "swift_sft.py", *shared_flags(task),
        "--torch_dtype", "float32", "--tuner_type", "full", "--attn_impl", "sdpa",
        "--bf16", flag(task.dtype == "bfloat16"), "--fp16", "false", "--template", "bench_vl",
        "--model_type", "qwen2_5_vl",
        "--load_from_cache_file", "false", "--external_plugins", BENCH / "peers" / "swift_template.py",
        "--report_to", "none", "--warmup_ratio", "0", "--create_checkpoint_symlink", "false", *extra,
    ]  # fmt: skip
    name = f"ms-swift (bs {task.batch}{', grouped' if extra else ''})"
    return Contestant(name, lambda out: [str(p) for p in (*parts, "--output_dir", out)], stop_after=stop_after)


def trl(task: Task, python: str, stop_after: int | None = None) -> Contestant:
    """TRL's SFTTrainer through ``bench/peers/trl_sft.py``."""
    parts = [
        python, BENCH / "peers" / "trl_sft.py", "--model", task.model, "--dataset", task.dataset, "--batch", task.batch,
        "--accumulation", task.accumulation, "--steps", task.steps, "--dtype", task.dtype,
    ]  # fmt: skip
    return Contestant(
        f"TRL (bs {task.batch})", lambda out: [str(p) for p in (*parts, "--output_dir", out)], stop_after=stop_after
    )


def shared_flags(task: Task) -> list[str]:
    """Flags that tessera and ms-swift spell alike."""
    flags = {
        "model": task.model, "dataset": task.dataset, "freeze_llm": "false",
        "freeze_vit": "false", "freeze_aligner": "false", "per_device_train_batch_size": task.batch,
        "gradient_accumulation_steps": task.accumulation, "max_steps": task.steps, "learning_rate": "1e-5",
        "lr_scheduler_type": "constant", "gradient_checkpointing": "false", "logging_steps": 1, "save_strategy": "no",
        "eval_strategy": "no", "split_dataset_ratio": 0, "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "max_length": 4096, "seed": 0,
    }  # fmt: skip
    if task.steps < 0:
        del flags["max_steps"]
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def flag(value: bool) -> str:
    return "true" if value else "false"
