"""Data speed: JPEG rows to Batch, and planning lengths from headers; per core, in this process.

    python bench/data.py

**Rows to Batch** (>= 0.8x per core). Ours is everything between a row and a Batch ready for the model: read, decode,
resize, patchify, render the chat template, tokenise, positions, tower indices, collate; once inline and once through
the default thread pool. The yardstick is one loop with only the two unavoidable steps: decode (simplejpeg where it is
installed, as tessera does, else PIL) and torch's antialiased uint8 resize to the same size. Both are images per CPU
second of the whole process, so a pool gains nothing by using a second core. Photographs of 450 and 1000 px a side,
resized to 448 and 1008.

**Planning** (>= 200x). Ours plans the lengths of 10,000 rows, each with a JPEG file of its own (1 MP; hard links to a
few files, so the page cache holds them). A full encode is measured on a sample of the same rows and multiplied up:
the cheapest there is, tessera's own (decode, resize, patchify, tokenise), and transformers' (PIL processor). CPU
seconds per row on both sides.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import harness, rows
from bench.harness import Line


def main() -> int:
    """Measure and report; 0 if every target is met."""
    parser = harness.parser(__doc__)
    parser.add_argument("--images", type=int, default=64, help="photographs of each size (default 64)")
    parser.add_argument("--passes", type=int, default=3, help="times a run goes over them (default 3)")
    parser.add_argument("--plan_rows", type=int, default=10000, help="rows to plan (default 10,000)")
    parser.add_argument("--sample", type=int, default=48, help="rows that are fully encoded (default 48)")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    lines = []
    for kind, label in (("photo448", "448 px"), ("photo1mp", "1 MP")):
        path = rows.rows_file(kind, args.images)
        corpus = planned(path)
        images = [row["images"][0] for row in rows.read(path)]
        speed = interleaved(rates(corpus, images, args.passes), args.repeats)
        for name in ("inline", "pool"):
            what = f"JPEG rows to Batch, {label}, {name}"
            lines.append(
                Line(what, "decode + resize alone", speed[name], speed["yardstick"], "img/cpu-s", at_least=0.8)
            )
    lines += planning(args.plan_rows, args.sample, args.images, args.repeats)
    kept = ("repeats", "images", "passes", "plan_rows", "sample")
    return harness.report("data", lines, {name: getattr(args, name) for name in kept})


def rates(corpus: Any, images: list[str], passes: int) -> dict[str, Callable[[], float]]:
    """The three measurements of one size, by name; each returns images per CPU second."""
    count = len(images) * passes
    return {
        "yardstick": lambda: per_cpu_second(lambda: decode_and_resize(images, passes), count),
        "inline": lambda: per_cpu_second(lambda: batches(corpus, passes, 0), count),
        "pool": lambda: per_cpu_second(lambda: batches(corpus, passes, None), count),
    }


def planning(count: int, sample: int, images: int, repeats: int) -> list[Line]:
    """Planning against full encodes; rows per CPU second."""
    from bench.bare import Encoder

    path = rows.linked(rows.rows_file("photo1mp", images), count)
    corpus, encoder = planned(path), Encoder(rows.model_dir("10m"))
    raw = rows.read(path)[:sample]
    speed = interleaved(
        {
            "plan": lambda: per_cpu_second(lambda: planned(path), count),
            "own": lambda: per_cpu_second(lambda: [full_encode(corpus, index) for index in range(sample)], sample),
            "transformers": lambda: per_cpu_second(lambda: [encoder.row(row) for row in raw], sample),
        },
        repeats,
    )
    remark = f"full encode measured on {sample} of the {count} rows and extrapolated per row"
    what = f"planning {count} rows of 1 MP"
    return [
        Line(what, "own full encode", speed["plan"], speed["own"], "rows/cpu-s", at_least=200, remark=remark),
        Line(
            what,
            "transformers' encode",
            speed["plan"],
            speed["transformers"],
            "rows/cpu-s",
            at_least=200,
            remark=remark,
        ),
    ]


def planned(path: Path) -> Any:
    """The planned corpus of a file, as ``tessera sft`` makes it."""
    from tessera.checkpoint.open import describe
    from tessera.config.resolve import resolve
    from tessera.data.corpus import prepare
    from tessera.data.render import Renderer

    flags = ["sft", "--model", str(rows.model_dir("10m")), "--dataset", str(path), "--dataset_shuffle", "false"]
    run = resolve(flags, {})
    source = describe(run.model)
    renderer = Renderer(source.path, source.geometry, run.data.system, run.data.loss_scale)
    corpus, _ = prepare(run.data, renderer, source.geometry)
    return corpus


def batches(corpus: Any, epochs: int, threads: int | None) -> int:
    """Every row ``epochs`` times as Batches of 8 through the loader; how many Batches."""
    from tessera.data.loader import Loader

    loader = Loader(corpus, units_per_batch=8, threads=threads, shuffle=False, epochs=epochs)
    return sum(len(step.batches) for step in loader)


def full_encode(corpus: Any, index: int) -> Any:
    """Everything that one row needs, pixels included."""
    import numpy as np

    encoded = corpus.encoded(index)
    out = np.empty((int(corpus.patches[index]), corpus.encoder.patch_width([encoded])), np.uint8)
    corpus.encoder.pixels(encoded, out)
    return out


def decode_and_resize(images: list[str], passes: int) -> None:
    """The physical limit: decode and resize alone, nothing kept."""
    import numpy as np
    import torch
    from torch.nn.functional import interpolate

    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        decode_jpeg = None
    for _ in range(passes):
        for name in images:
            data = Path(name).read_bytes()
            pixels = pil_decode(data) if decode_jpeg is None else decode_jpeg(data, colorspace="RGB")
            size = [round(side / 28) * 28 for side in pixels.shape[:2]]
            image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
            interpolate(image, size, mode="bicubic", antialias=True)


def pil_decode(data: bytes) -> Any:
    import io

    import numpy as np
    from PIL import Image

    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def per_cpu_second(work: Callable[[], Any], items: int) -> float:
    """Items per second of processor time (all threads of this process together)."""
    started = time.process_time()
    work()
    return items / (time.process_time() - started)


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each measurement once to warm up, then ``repeats`` times in alternation."""
    for measure in runs.values():
        measure()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, measure in runs.items():
            found[name].append(measure())
    return found


if __name__ == "__main__":
    sys.exit(main())
