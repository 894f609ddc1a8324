"""Which benchmarks are asked: names, where their files are, and how much of each.

Every spelling ends in the same :class:`~tessera.evaluate.runner.Job`::

    --eval_datasets MMMU=MMMU_DEV_VAL.tsv
    --eval_datasets MMMU --local_path MMMU_DEV_VAL.tsv        (or a directory that holds MMMU, MMMU.tsv, ...)
    --eval_datasets MMMU --eval_dataset_args '{"MMMU": {"local_path": "mmmu", "limit": 100}}'
    --eval_datasets MMMU --download true
    --dataset rows.jsonl --scorer exact_match

Nothing is fetched unless ``--download true`` says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tessera.config.errors import UserError
from tessera.config.parse import nearest, usage_error
from tessera.config.run import EvalArgs, Run
from tessera.evaluate import tasks
from tessera.evaluate.files import SUFFIXES
from tessera.evaluate.item import Benchmark
from tessera.evaluate.runner import Job
from tessera.evaluate.tasks.own import find_scorer

ARGS = ("local_path", "limit", "max_new_tokens", "name")
"""What ``--eval_dataset_args`` may say about one benchmark; ``name`` is what it is called in the results."""


def native(run: Run) -> bool:
    """Whether this program evaluates; UserError for a backend that is another one and not offered."""
    if run.evaluate.eval_backend in ("VLMEvalKit", "OpenCompass"):
        raise usage_error(
            f"--eval_backend {run.evaluate.eval_backend}: that program is not started from here; native scores by its "
            "rules and writes predictions.tsv in its columns, and it can ask tessera deploy itself (docs/eval.md)"
        )
    return run.evaluate.eval_backend != "evalscope"


def jobs_of(run: Run, output: Path) -> list[Job]:
    """The benchmarks that ``run`` asks, their results below ``output``; UserError if one is not there."""
    args = run.evaluate
    jobs = [_job(run, spec, output) for spec in args.eval_dataset]
    if run.data.dataset and run.verb == "eval":
        jobs += [_own(run, Path(name).expanduser(), output) for name in run.data.dataset]
    names = [job.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise usage_error(f"--eval_datasets: {twice} is asked twice")
    unused = set(args.eval_dataset_args or {}) - {_split(spec)[0] for spec in args.eval_dataset}
    if unused:
        raise usage_error(f"--eval_dataset_args: {', '.join(sorted(unused))} is not among --eval_datasets")
    return jobs


def _split(spec: str) -> tuple[str, str | None]:
    name, equals, path = spec.partition("=")
    return name, path if equals else None


def _job(run: Run, spec: str, output: Path) -> Job:
    name, path = _split(spec)
    benchmark = find(name)
    more = args_of(run.evaluate, name)
    found = _place(run.evaluate, name, path or more.get("local_path"))
    label = str(more.get("name", name))
    limit = more.get("limit", run.evaluate.eval_limit)
    tokens = more.get("max_new_tokens", run.infer.max_new_tokens)
    return Job(label, benchmark, found, output / label, limit, run.train.seed, tokens)


def find(name: str) -> Benchmark:
    """The benchmark called ``name``; VLMEvalKit's names of its splits (``MMMU_DEV_VAL``) are understood."""
    stem, at, dialect = name.partition("@")
    parts = stem.split("_")
    while len(parts) > 1 and parts[-1].upper() in SPLITS:
        parts.pop()
    return tasks.find("_".join(parts) + at + dialect, "--eval_datasets")


def args_of(args: EvalArgs, name: str) -> dict[str, Any]:
    """What ``--eval_dataset_args`` says about benchmark ``name``; UserError for something it cannot say."""
    found = (args.eval_dataset_args or {}).get(name, {})
    if not isinstance(found, Mapping):
        raise usage_error(f'--eval_dataset_args {name}: expected an object, e.g. {{"local_path": "DIR"}}')
    for key in found:
        if key not in ARGS:
            near = nearest(key, ARGS)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise usage_error(f"--eval_dataset_args {name}: no such setting {key}{hint}; there are {', '.join(ARGS)}")
    for key in ("limit", "max_new_tokens"):
        if key in found and not (isinstance(found[key], int) and found[key] > 0):
            raise usage_error(f"--eval_dataset_args {name}: {key} must be a whole number above 0, not {found[key]!r}")
    return dict(found)


def _place(args: EvalArgs, name: str, named: str | None) -> Path:
    """Where the files of benchmark ``name`` are."""
    if named is not None:
        path = Path(named).expanduser()
        if path.exists():
            return path
        if args.download and re.fullmatch(r"[\w.-]+/[\w.-]+", named):
            return fetched(name, named)
        raise UserError(f"--eval_datasets {name}={named}: no such file or directory")
    if args.local_path is not None:
        return _below(args, name)
    if args.download:
        return fetched(name, REPOSITORIES.get(name.partition("@")[0].lower(), ""))
    raise UserError(
        f"--eval_datasets {name}: where is it? give {name}=PATH (or --local_path); nothing is fetched unless "
        "--download true"
    )


def _below(args: EvalArgs, name: str) -> Path:
    assert args.local_path is not None
    root, short = Path(args.local_path).expanduser(), name.partition("@")[0]
    if not root.exists():
        raise UserError(f"--local_path {args.local_path}: no such file or directory")
    if root.is_dir():
        wanted = {short.lower(), *(f"{short.lower()}{suffix}" for suffix in SUFFIXES)}
        for path in sorted(root.iterdir()):
            if path.name.lower() in wanted:
                return path
    if len(args.eval_dataset) > 1:
        raise UserError(f"--local_path {args.local_path}: holds no {short} (a directory or file of that name)")
    return root


def _own(run: Run, path: Path, output: Path) -> Job:
    assert run.evaluate.scorer is not None, "checked by config.evaluate"
    benchmark = find_scorer(run.evaluate.scorer, "--scorer")
    if not path.exists():
        raise UserError(f"--dataset {path}: no such file or directory")
    limit, tokens = run.evaluate.eval_limit, run.infer.max_new_tokens
    return Job(path.stem, benchmark, path, output / path.stem, limit, run.train.seed, tokens)


SPLITS = ("DEV", "VAL", "TEST", "MINI", "TESTMINI", "VALIDATION", "EN", "CN", "V11")
"""What VLMEvalKit's names end in."""

REPOSITORIES: Mapping[str, str] = {
    "mmmu": "MMMU/MMMU",
    "mathvista": "AI4Math/MathVista",
    "mmbench": "lmms-lab/MMBench",
    "mmstar": "Lin-Chen/MMStar",
    "ai2d": "lmms-lab/ai2d",
    "textvqa": "lmms-lab/textvqa",
    "vqav2": "lmms-lab/VQAv2",
    "chartqa": "lmms-lab/ChartQA",
    "docvqa": "lmms-lab/DocVQA",
    "infovqa": "lmms-lab/DocVQA",
    "ocrbench": "echo840/OCRBench",
    "pope": "lmms-lab/POPE",
    "refcoco": "lmms-lab/RefCOCO",
    "latex_ocr": "linxy/LaTeX_OCR",
}
"""Where benchmarks lie on the Hugging Face hub, for ``--download true``."""


def fetched(name: str, repository: str) -> Path:
    """The directory of a dataset repository, fetched from the hub or from its cache; UserError if it cannot be."""
    if not repository:
        raise UserError(f"--eval_datasets {name}: not known where to fetch it from; give {name}=owner/repository")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("--download true needs huggingface_hub: pip install 'tessera[hub]'") from None
    patterns = ["*.parquet", "*.tsv", "*.jsonl", "*.json", "*.csv", "*.jpg", "*.png"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=patterns))
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        huggingface_hub.errors.HFValidationError,
        OSError,
    ) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"--download true: {repository} cannot be fetched ({first[:200]})") from None
