"""What a run is, as far as it is known before its first step.

One value, :class:`RunFacts`, filled in by the recipe. It is printed as the one screen before step 1 and stored as
``run_facts.json`` in the run directory, from which the report is made; so screen and report cannot disagree.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

FACTS_FILE = "run_facts.json"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "numpy", "pillow")


@dataclass(frozen=True, slots=True)
class TrainedModule:
    """One row of the table of what is trained: a name ``pattern``, its tensors, their parameters, its peak lr."""

    pattern: str
    tensors: int
    parameters: int
    lr: float


@dataclass(frozen=True, slots=True)
class RunFacts:
    """See the module docstring.

    ``tokens_per_step`` is the mean over an epoch and all ranks, ``samples_per_step`` likewise; ``memory`` the line
    of :class:`~tessera.observe.cost.MemoryEstimate`. ``flags`` maps every flag that is not at its default to
    (value, where it came from).
    """

    model: str
    family: str
    train_type: str
    parameters: int
    trainable: int
    modules: tuple[TrainedModule, ...]
    steps: int
    epochs: float = 0.0
    train_samples: int = 0
    val_samples: int = 0
    skipped_samples: int = 0
    tokens_per_step: float = 0.0
    samples_per_step: float = 0.0
    layout: str = ""
    batch: str = ""
    dtype: str = ""
    optimizer: str = ""
    memory: str = ""
    output: str = ""
    verb: str = "sft"
    hardware: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, tuple[Any, str]] = field(default_factory=dict)

    def save(self, run_dir: Path) -> None:
        """Write ``run_facts.json`` into ``run_dir``."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1, default=str)
        (run_dir / FACTS_FILE).write_text(text + "\n", encoding="utf-8")


def load_facts(run_dir: Path) -> RunFacts | None:
    """The facts stored in ``run_dir``, None if there are none (or they are not a complete JSON object)."""
    path = run_dir / FACTS_FILE
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    known = {f.name for f in fields(RunFacts)}
    values = {key: value for key, value in raw.items() if key in known}
    values["modules"] = tuple(TrainedModule(**row) for row in values.get("modules", ()))
    values["flags"] = {key: tuple(pair) for key, pair in values.get("flags", {}).items()}
    return RunFacts(**values)


def hardware() -> str:
    """This machine in a few words: GPUs if torch sees any, else the CPU, its cores and the memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {affinity} cores, {memory:.0f} GiB"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter for reproducing a run; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("tessera", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
