"""How every benchmark measures: whole commands, started one after another in alternation, timed from outside.

A tool is run as its users run it, as a process. Each one reports its loss after every optimiser step
(``logging_steps 1``), and the harness stamps the arrival of every such line with the same clock. The first stamp is
the time to the first step; the later ones give the steady state, without the start. Nothing inside a tool is trusted
to time itself. Contestants alternate (A B C A B C ...), so that a slow minute of a shared machine hits all of them,
and the figure is the ratio of medians, with the smallest and largest ratio of neighbouring runs beside it.

Results are printed as one table and written to ``bench/results/<name>.json`` with the machine's description.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
CACHE = BENCH / ".cache"
STEP = re.compile(r"[{,\s][\"']?loss[\"']?\s*[:=]\s*[\"']?[-+]?[\d.]")
TOKENS = re.compile(r"[\"']tokens[\"']\s*:\s*(\d+)")
PEERS = {
    "trl": ("trl==1.16.0", "transformers==5.23.0", "pillow", "peft"),
    "swift": ("ms-swift==4.6.0", "qwen_vl_utils==0.0.14", "av", "msgspec"),
}
AUTO = "autocast dtype; auto (default): float32 where the CPU has no bfloat16 arithmetic"
TORCH, TORCHVISION = "torch==2.13.0", "torchvision==0.28.0"


@dataclass
class Trace:
    """One finished process: seconds after its start at which each step line arrived, and what it used."""

    stamps: list[float]
    tokens: list[int]
    wall: float
    peak_rss_gib: float
    cpu_s: float
    output: str = field(repr=False, default="")

    @property
    def first_step(self) -> float:
        return self.stamps[0]

    def steady(self, skip: int) -> float:
        """Seconds per step after the first ``skip`` steps."""
        assert len(self.stamps) > skip + 1, f"{len(self.stamps)} steps reported, more than {skip + 1} are needed"
        return (self.stamps[-1] - self.stamps[skip]) / (len(self.stamps) - 1 - skip)


@dataclass(frozen=True)
class Contestant:
    """A named command; ``command`` is called before every run with a fresh output directory."""

    name: str
    command: Callable[[Path], Sequence[str]]
    env: Mapping[str, str] = field(default_factory=dict)
    stop_after: int | None = None


class BenchError(RuntimeError):
    """A contestant did not run; the message holds the end of what it printed."""


def environment(threads: int, extra: Mapping[str, str]) -> dict[str, str]:
    """The same environment for everybody: thread count, no network, line-wise output."""
    keep = {
        name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ
    }
    fixed = {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "src"))), "HF_HOME": str(CACHE / "hf"),
        "MODELSCOPE_CACHE": str(CACHE / "modelscope"),
    }  # fmt: skip
    return {**keep, **fixed, **extra}


def run(contestant: Contestant, threads: int, timeout: float, step: re.Pattern[str] = STEP) -> Trace:
    """Run one contestant to its end (or to ``stop_after`` step lines) and time its lines from outside."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        out_dir = Path(scratch) / "out"
        command = [str(part) for part in contestant.command(out_dir)]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=scratch, text=True, errors="replace",
            env=environment(threads, contestant.env),
        )  # fmt: skip
        watchdog = threading.Timer(timeout, process.kill)
        watchdog.start()
        assert process.stdout is not None
        stamps, tokens, lines = follow(process.stdout, started, step, contestant.stop_after)
        if contestant.stop_after is not None and len(stamps) >= contestant.stop_after:
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.stdout.close()
        process.returncode = os.waitstatus_to_exitcode(status)
        watchdog.cancel()
    output = "".join(lines)
    if not stamps or (process.returncode != 0 and contestant.stop_after is None):
        raise BenchError(f"{contestant.name} ended with {process.returncode}: {' '.join(command)}\n{output[-3000:]}")
    return Trace(stamps, tokens, wall, usage.ru_maxrss / 2**20, usage.ru_utime + usage.ru_stime, output)


def follow(
    stream: IO[str], started: float, step: re.Pattern[str], stop_after: int | None
) -> tuple[list[float], list[int], list[str]]:
    """Read lines as they arrive; (stamps of step lines, their ``tokens`` fields, all lines)."""
    stamps: list[float] = []
    tokens: list[int] = []
    lines: list[str] = []
    for text in stream:
        lines.append(text)
        if is_step(text, step):
            stamps.append(time.perf_counter() - started)
            found = TOKENS.search(text)
            if found:
                tokens.append(int(found.group(1)))
            if stop_after is not None and len(stamps) >= stop_after:
                break
    return stamps, tokens, lines


def is_step(text: str, step: re.Pattern[str] = STEP) -> bool:
    """Whether a line of output reports an optimiser step."""
    return step.search(text) is not None and "eval_loss" not in text and "train_loss" not in text


def alternate(contestants: Sequence[Contestant], repeats: int, threads: int, timeout: float) -> dict[str, list[Trace]]:
    """Every contestant ``repeats`` times, in alternation; one line per run on stderr."""
    traces: dict[str, list[Trace]] = {contestant.name: [] for contestant in contestants}
    for repeat in range(repeats):
        for contestant in contestants:
            trace = run(contestant, threads, timeout)
            traces[contestant.name].append(trace)
            note(f"  run {repeat + 1}/{repeats} {contestant.name}: {len(trace.stamps)} steps in {trace.wall:.1f} s")
    return traces


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Line:
    """One row of the result table: ``ours`` against ``theirs`` (per run, same order) and the target for the ratio."""

    what: str
    against: str
    ours: Sequence[float]
    theirs: Sequence[float]
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    remark: str = ""

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.theirs)

    @property
    def met(self) -> bool:
        return (self.at_least is None or self.ratio >= self.at_least) and (
            self.at_most is None or self.ratio <= self.at_most
        )

    def as_dict(self) -> dict[str, Any]:
        pairs = [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=False)]
        return {
            "what": self.what, "against": self.against, "unit": self.unit, "ratio": round(self.ratio, 4),
            "ratio_range": [round(min(pairs), 4), round(max(pairs), 4)], "ours": [round(x, 5) for x in self.ours],
            "theirs": [round(x, 5) for x in self.theirs], "at_least": self.at_least, "at_most": self.at_most,
            "met": self.met, "remark": self.remark,
        }  # fmt: skip


def report(name: str, lines: Sequence[Line], settings: Mapping[str, Any]) -> int:
    """Print the table, write ``bench/results/<name>.json``; 0 if every target is met."""
    print(
        f"\n{'benchmark':<34} {'against':<22} {'ours':>10} {'theirs':>10} {'ratio':>7} {'range':>15} {'target':>8}  met"
    )
    for line in lines:
        row = line.as_dict()
        target = (
            f">={line.at_least:g}"
            if line.at_least is not None
            else f"<={line.at_most:.3g}"
            if line.at_most is not None
            else "-"
        )
        low, high = row["ratio_range"]
        ours, theirs = statistics.median(line.ours), statistics.median(line.theirs)
        print(
            f"{line.what:<34} {line.against:<22} {ours:>10.3f} {theirs:>10.3f} {line.ratio:>7.3f} "
            f"{f'{low:.3f}..{high:.3f}':>15} {target:>8}  {'yes' if line.met else 'NO '}  [{line.unit}]"
        )
    save(name, [line.as_dict() for line in lines], settings)
    return 0 if all(line.met for line in lines) else 1


def save(name: str, results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Write ``bench/results/<name>.json`` with the command, the date and the machine."""
    RESULTS.mkdir(exist_ok=True)
    words = [f'"{word}"' if " " in word else word for word in public(sys.argv[1:])]
    command = " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *words])
    result = {
        "benchmark": name, "command": command, "date": time.strftime("%Y-%m-%d"), "machine": machine(),
        "settings": dict(settings), "results": [dict(row) for row in results],
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: bench/results/{name}.json")


def public(arguments: Sequence[str]) -> list[str]:
    """The arguments without paths to interpreters, which mean nothing on another machine."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and not argument.startswith(("--trl_python", "--swift_python")):
            kept.append(argument)
        skip = argument in ("--trl_python", "--swift_python")
    return kept


def machine() -> dict[str, Any]:
    """Processor, cores, memory, load and versions; no names or paths."""
    from importlib.metadata import version

    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        "",
    )
    return {
        "cpu": model, "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_1min_at_end": os.getloadavg()[0], "native_bf16": native_bf16(), "python": platform.python_version(),
        "torch": version("torch"), "transformers": version("transformers"),
        "peers": {k: v[0] for k, v in PEERS.items()},
    }  # fmt: skip


def native_bf16() -> bool:
    """Whether this processor multiplies bfloat16 (else autocast is tens of times slower than float32)."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def dtype_for(choice: str) -> str:
    """``auto`` is bfloat16 where the processor has it, float32 elsewhere; the same for every contestant."""
    return ("bfloat16" if native_bf16() else "float32") if choice == "auto" else choice


def peer_python(peer: str, given: str | None) -> str:
    """The interpreter of a peer's environment: as given, or made under ``bench/.cache`` (torch first and alone)."""
    if given:
        return given
    folder = CACHE / f"venv-{peer}"
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        note(f"setting up {peer} in bench/.cache/venv-{peer} (once; several minutes)")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for packages in ((TORCH,), PEERS[peer], ("--no-deps", TORCHVISION)):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "done").touch()
    return str(python)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments common to all benchmarks."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=3, help="runs of each contestant, alternating (default 3)")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="OMP threads, the same for everybody")
    made.add_argument("--timeout", type=float, default=900.0, help="seconds after which a run counts as failed")
    made.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help=AUTO)
    made.add_argument("--trl_python", help="interpreter that has trl (default: make bench/.cache/venv-trl)")
    made.add_argument("--swift_python", help="interpreter that has ms-swift (default: make bench/.cache/venv-swift)")
    return made
