"""Tokens per second, share of the peak arithmetic (MFU) and peak memory of one GPU, beside transformers' Trainer.

    python bench/mfu.py                                  needs an NVIDIA GPU
    python bench/mfu.py --size tiny --device cpu         a smoke run: it shows that everything runs, and no speed

The model has the shape of Qwen2.5-VL-7B with random weights; the tower is frozen, rows of 8,192 tokens are packed from
conversations about one 448 px image each. Trained are all of the decoder (``full``) or adapters of rank 16 (``lora``),
with and without compiled layers. The peer gets the same conversations, one at a time, accumulated to the same tokens.

Convention: useful arithmetic over the peak of dense bfloat16 (``--peak``), recomputation not counted. A matrix of N
elements costs 2N per row forward, 2N for the gradient of its input and 2N for its own: 6N for ``full``, 4N for
``lora``, 2N in the frozen tower. The head counts for supervised rows only. Attention counts the (query, key) pairs its
mask lets through, 4 operations each per channel forward and twice that backward; the tower forward only. Tower and
decoder are given apart: their shares of the same time add up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness

PEAK = 989e12
"""Dense bfloat16 operations per second of an H200."""

SEVEN = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
SEVEN_TOWER = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config_of(size: str) -> dict[str, Any]:
    """The family's tiny model, or the 7B shape."""
    from tessera.models.families import family_of

    config = family_of({"model_type": "qwen2_5_vl"}).tiny()
    if size == "7b":
        text = config.get("text_config", config)
        text.update(SEVEN)
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
        config["vision_config"] = {**config["vision_config"], **SEVEN_TOWER, "patch_size": 14, "window_size": 112}
    return config


def rows_of(config: dict[str, Any], size: str, count: int) -> list[list[Any]]:
    """``count`` rows, each a list of batches of one conversation; equal lengths, so that all rows are one size."""
    from tests.parity.reference import batch_of

    side, text, total = (32, 226, 8192) if size == "7b" else (4, 12, 64)
    sample = [16, (1, side, side), text]
    each = 16 + side * side // 4 + text
    return [[batch_of(config, [sample], seed=1000 * row + i) for i in range(total // each)] for row in range(count)]


def operations(config: Any, tower: Any, row: Sequence[Any], model: Any, train_type: str) -> tuple[float, float]:
    """Useful operations of one row: (decoder with head, tower); see the module docstring."""
    per = 6 if train_type == "full" else 4
    linear = sum(p.numel() for n, p in model.decoder.named_parameters() if p.dim() == 2 and "embed" not in n)
    tokens = sum(batch.num_tokens for batch in row)
    supervised = sum(batch.supervised.numel() for batch in row)
    pairs = sum(n * (n + 1) // 2 for batch in row for n in batch.segments.lengths)
    decoder = per * linear * tokens + per * config.hidden * config.vocab * supervised
    decoder += 12 * config.layers * config.heads * config.head_dim * pairs
    blocks = sum(p.numel() for p in tower.blocks.parameters() if p.dim() == 2)
    patches = sum(t * h * w for batch in row for t, h, w in batch.media.sizes)
    full = sum(t * (h * w) ** 2 for batch in row for t, h, w in batch.media.sizes)
    windows = sum(n * n for batch in row for n in batch.media.tower_segments["cu_window_seqlens"].lengths)
    whole = len(tower.config.whole)
    seen = whole * full + (tower.config.depth - whole) * windows
    return float(decoder), float(2 * blocks * patches + 4 * tower.config.hidden * seen)


def ours(args: argparse.Namespace, train_type: str, compiled: bool) -> dict[str, Any]:
    """tessera's own step over packed rows."""
    import torch

    from tessera import adapt
    from tessera.config.resolve import run_of
    from tessera.models.families import family_of
    from tessera.models.init import init_weights
    from tessera.objectives.lm import NextToken
    from tessera.parallel.mesh import Mesh
    from tessera.train.optim import Optimizers
    from tessera.train.schedule import Schedule
    from tessera.train.step import Engine, train_step
    from tests.invariance.test_step import join

    config, mesh = config_of(args.size), Mesh.single()
    family = family_of(config)
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    with torch.device(mesh.device):
        model: Any = family.build(config)
    init_weights(model, config, 0)
    plan = family.plan(config)
    flags = {"train_type": train_type, "freeze_vit": True, "freeze_aligner": True, "lora_rank": 16}
    run = run_of("sft", model=".", dataset=("unused",), max_steps=args.steps, **flags)
    adaptation = adapt.apply(model, run.adapt, plan, seed=0)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    model.set_recompute(plan, decoder=True, tower=False)
    model.train()
    rows = rows_of(config, args.size, args.steps)
    useful = operations(model.decoder.config, model.visual, rows[0], model, train_type)
    if compiled:
        for layer in model.decoder.layers.values():
            layer.compile()
    groups = adapt.param_groups(model, run.train, adaptation)
    optimizers = Optimizers(model, groups, run.train, Schedule("constant", args.steps, 0), mesh)
    engine = Engine(model, NextToken(), mesh, dtype)
    batches = [join(config, row) for row in rows]

    def step(number: int) -> None:
        train_step(engine, optimizers, [batches[number]], max_grad_norm=1.0)

    return measured(step, args, batches[0].num_tokens, useful)


def theirs(args: argparse.Namespace, train_type: str) -> dict[str, Any]:
    """transformers' Trainer (with peft for ``lora``) over the same conversations."""
    import tempfile

    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

    from tests.parity.reference import media_arguments

    config, device = config_of(args.size), args.device
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    model.model.visual.requires_grad_(requires_grad=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if train_type == "lora":
        from peft import LoraConfig, get_peft_model

        model.enable_input_require_grads()
        kept = r".*language_model.*\.(" + "|".join(TARGETS) + ")"
        model = get_peft_model(model, LoraConfig(r=16, target_modules=kept))
    rows = rows_of(config, args.size, args.steps)
    items = []
    for batch in (batch for row in rows for batch in row):
        labels = torch.cat([torch.tensor([-100]), batch.targets[:-1]])
        labels[1:][batch.loss_weight[:-1] == 0] = -100
        items.append({"input_ids": batch.tokens, "labels": labels, **media_arguments(config, batch)[0]})
    stamps: list[float] = []

    class Stamp(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            finish(device)
            stamps.append(time.perf_counter())

    def collate(part: list[dict[str, Any]]) -> dict[str, Any]:
        (item,) = part
        whole = ("pixel_values", "image_grid_thw")
        return {name: value if name in whole else value.reshape(1, -1) for name, value in item.items()}

    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            out, per_device_train_batch_size=1, gradient_accumulation_steps=len(rows[0]), max_steps=args.steps,
            bf16=device == "cuda", use_cpu=device == "cpu", report_to=[], save_strategy="no", logging_strategy="no",
            remove_unused_columns=False, optim="adamw_torch_fused", disable_tqdm=True, gradient_checkpointing=True,
        )  # fmt: skip
        Trainer(model, settings, collate, items, callbacks=[Stamp()]).train()
    each = [after - before for before, after in zip(stamps[args.skip - 1 :], stamps[args.skip :], strict=False)]
    tokens = sum(batch.num_tokens for batch in rows[0])
    return {"tokens_per_s": tokens / statistics.median(each), "step_s": each, "peak_gib": peak_gib(device)}


def measured(step: Callable[[int], None], args: argparse.Namespace, tokens: int, useful: tuple[float, float]) -> Any:
    """Median step time after ``--skip`` steps, and what follows from it."""
    each = []
    for number in range(args.steps):
        finish(args.device)
        started = time.perf_counter()
        step(number)
        finish(args.device)
        each.append(time.perf_counter() - started)
    second = statistics.median(each[args.skip :])
    shares = {name: work / second / args.peak for name, work in zip(("mfu_decoder", "mfu_tower"), useful, strict=True)}
    return {"tokens_per_s": tokens / second, "step_s": each, "peak_gib": peak_gib(args.device), **shares}


def finish(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def peak_gib(device: str) -> float:
    """Most memory allocated since the last call (GPU), or resident so far."""
    import torch

    from tessera.observe.metrics import peak_memory_gib

    found = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else peak_memory_gib()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def main() -> int:
    """Measure and report; 2 where there is no GPU and none was waived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("7b", "tiny"), default="7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=4, help="steps before the measurement")
    parser.add_argument("--peak", type=float, default=PEAK, help="operations per second that count as 1.0")
    parser.add_argument("--compile", choices=("both", "no"), default="both")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench/mfu.py: no NVIDIA GPU here; --size tiny --device cpu is a smoke run", file=sys.stderr)
        return 2
    rows = []
    for train_type in ("full", "lora"):
        runs: dict[str, Callable[[], dict[str, Any]]] = {"tessera": lambda t=train_type: ours(args, t, False)}
        if args.compile == "both":
            runs["tessera, compiled"] = lambda t=train_type: ours(args, t, True)
        runs["Trainer"] = lambda t=train_type: theirs(args, t)
        for name, run in runs.items():
            found = run()
            rows.append({"what": train_type, "who": name, **found})
            figures = ", ".join(f"{key} {value:.4g}" for key, value in found.items() if isinstance(value, float))
            print(f"{train_type:<6}{name:<18}{figures}", flush=True)
    if args.device == "cuda":
        harness.save("mfu", rows, {"size": args.size, "steps": args.steps, "skip": args.skip, "peak": args.peak})
    return 0


if __name__ == "__main__":
    sys.exit(main())
