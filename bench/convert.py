"""Conversion speed against ``cp`` of the same bytes to the same disk (>= 0.7x), and its memory (<= 2 GB at any size).

    python bench/convert.py --sizes 2 4 8

A synthetic language model of so many gigabytes (random bytes in bfloat16, layers of 4096 x 12288) is converted from
safetensors to ``torch_dist``, back, and from one tensor rank to eight in Megatron's per-rank format; and an adapter of
rank 8 beside every linear layer is merged into it. Each conversion is
a process of its own, which says how long the conversion took once its libraries were imported; its peak memory is the
kernel's own figure (``ru_maxrss``). ``cp`` copies the same input. Both end when the output is on the disk (fsync of
every file). They alternate; the input is in the page cache for both, as far as memory allows (nothing is dropped).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness
from bench.harness import Line

GB = 10**9
HIDDEN, INNER, VOCAB = 4096, 12288, 32768
WORKS = ("HF -> torch_dist", "torch_dist -> HF", "TP1 -> TP8", "merge LoRA")
LIMIT_GB = 2.0


def main() -> int:
    """Measure and report; 0 if every target is met."""
    parser = harness.parser(__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[2, 4, 8], help="gigabytes (default 2 4 8)")
    parser.add_argument(
        "--disk", type=Path, default=harness.CACHE, help="where files are written (default bench/.cache)"
    )
    parser.add_argument("--only", nargs="+", choices=WORKS, default=WORKS, help="which of them (default: all)")
    parser.add_argument("--child", nargs=3, metavar=("WORK", "FROM", "TO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]), Path(args.child[2]))
    lines = []
    args.disk.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        with tempfile.TemporaryDirectory(prefix="convert-", dir=args.disk) as folder:
            lines += measured(Path(folder), size, args)
    settings = {"sizes": args.sizes, "repeats": args.repeats, "threads": args.threads, "cache": "warm where it fits"}
    return harness.report("convert", lines, settings)


def measured(folder: Path, size: float, args: argparse.Namespace) -> list[Line]:
    """The conversions of a model of ``size`` gigabytes, each against copies of its input."""
    places = (folder / "hf", folder / "torch_dist", folder / "tp1", folder / "hf")
    inputs = dict(zip(WORKS, places, strict=True))
    make_model(inputs[WORKS[0]], size)
    make_adapter(inputs[WORKS[0]], folder / "adapter")
    repeats, threads = args.repeats, args.threads
    for made, work in (("HF -> torch_dist", WORKS[1]), ("TP1", WORKS[2])):
        if work in args.only:
            run(made, inputs[WORKS[0]], inputs[work], threads)
    lines = []
    for work in args.only:
        ours, theirs, peaks = [], [], []
        amount = sum(file.stat().st_size for file in inputs[work].rglob("*") if file.is_file()) / GB
        for _ in range(repeats):
            seconds, peak = run(work, inputs[work], folder / "out", threads)
            shutil.rmtree(folder / "out")
            ours.append(amount / seconds)
            peaks.append(peak)
            theirs.append(amount / copied(inputs[work], folder / "out"))
            shutil.rmtree(folder / "out")
        lines.append(Line(f"{work}, {size:g} GB", "cp + fsync", ours, theirs, "GB/s", at_least=0.7))
        lines.append(Line(f"peak RSS of it, {size:g} GB", "2 GB", peaks, [LIMIT_GB] * repeats, "GB", at_most=1.0))
    return lines


def run(work: str, source: Path, out: Path, threads: int) -> tuple[float, float]:
    """Seconds and peak gigabytes of one conversion in a process of its own."""
    command = [sys.executable, __file__, "--child", work, str(source), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=harness.environment(threads, {}))
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise harness.BenchError(f"{work}: exit code {process.returncode}")
    return float(printed.split()[-1]), usage.ru_maxrss * 1024 / GB


def copied(source: Path, out: Path) -> float:
    """Seconds of ``cp -r`` and flushing what it wrote."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    for file in out.rglob("*"):
        if file.is_file():
            flush(file)
    return time.perf_counter() - started


def flush(file: Path) -> None:
    """Wait until a file is on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def child(work: str, source: Path, out: Path) -> int:
    """One conversion; prints its seconds."""
    if work == WORKS[3]:
        return merge(source, out)
    from tessera.models.families import family_of
    from tessera.weights.hf import Checkpoint
    from tessera.weights.megatron import convert
    from tessera.weights.megatron.checkpoint import locate
    from tessera.weights.megatron.ranks import Ranks

    config = json.loads((source / "config.json").read_text())
    family = family_of(config)
    started = time.perf_counter()
    out.mkdir()
    if work == WORKS[1]:
        found = convert.from_megatron(locate(source).assembled(family, config))
        convert.to_hf(found, family, config, out, layout=source)
        for file in out.iterdir():
            flush(file)
    elif work == WORKS[2]:
        options = convert.Options(dialect="lm", format=convert.LEGACY, ranks=Ranks(tp=8))
        convert.reshard(locate(source).assembled(family, config), family, config, out, options)
    else:
        kind = convert.LEGACY if work == "TP1" else convert.TORCH_DIST
        checkpoint = Checkpoint(source)
        options = convert.Options(dialect="lm", format=kind)
        convert.to_megatron(convert.from_hf(checkpoint, family, config), family, config, out, options)
        convert.write_side_files(checkpoint, out)
    print(time.perf_counter() - started)
    return 0


def merge(source: Path, out: Path) -> int:
    """Merge the adapter beside ``source`` into it; prints the seconds."""
    import peft  # noqa: F401 (imported before the clock starts, as everything else is)

    from tessera.config.resolve import resolve
    from tessera.recipes import export

    adapter = source.parent / "adapter"
    words = ["--model", source, "--adapters", adapter, "--merge_lora", "true", "--output_dir", out]
    run = resolve(["export", *map(str, words)], {})
    started = time.perf_counter()
    export.write(run)
    print(time.perf_counter() - started)
    return 0


def make_adapter(model: Path, folder: Path) -> None:
    """An adapter of rank 8 beside every linear layer of the language model in ``model``, as peft writes it."""
    import torch
    from safetensors.torch import save_file

    from tessera.weights.hf import Checkpoint

    folder.mkdir()
    tensors = {}
    for name, entry in Checkpoint(model).entries.items():
        if ".layers." in name and len(entry.shape) == 2:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = 1e-3 * torch.randn(8, entry.shape[1])
            tensors[f"{stem}.lora_B.weight"] = 1e-3 * torch.randn(entry.shape[0], 8)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make_model(folder: Path, size: float) -> None:
    """A language model directory of about ``size`` gigabytes; its values are random bytes."""
    from tessera.models.families import family_of
    from tessera.weights.hf import shapes_of

    folder.mkdir()
    layers = max(1, round((size * GB / 2 - 2 * VOCAB * HIDDEN) / (HIDDEN * (2 * HIDDEN + 2 * 1024 + 3 * INNER))))
    config = {
        **family_of({"model_type": "qwen3"}).tiny(), "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": VOCAB, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    import torch

    with torch.device("meta"):
        shapes = shapes_of(family_of(config).build(config))
    write_random(folder / "model.safetensors", shapes)


def write_random(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bfloat16 tensors of these shapes, of random bytes."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * product(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = os.urandom(64 * 2**20)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for start in range(0, at, len(block)):
            stream.write(block[: min(len(block), at - start)])


def product(shape: Sequence[int]) -> int:
    """Elements of a shape."""
    count = 1
    for extent in shape:
        count *= extent
    return count


if __name__ == "__main__":
    sys.exit(main())
