"""The one screen before step 1: what is about to be trained, on what, for how long, in how much memory.

Everything a person checks before leaving a run alone, and nothing else: no model repr, no dump of arguments (those lie
in ``args.json``). At most 30 lines of 100 columns, aligned.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tessera.observe.cost import human_count
from tessera.observe.facts import RunFacts, TrainedModule

WIDTH = 100
MODULE_ROWS = 12


def summary_screen(facts: RunFacts) -> str:
    """The screen as text, without a trailing newline."""
    rows = [(name, value) for name, value in _facts(facts) if value]
    label = max(len(name) for name, _ in rows) + 2
    lines = [f"tessera {facts.verb} ".ljust(WIDTH, "─")]
    for name, value in rows:
        lines += _wrapped(name.ljust(label), value)
    lines += ["", *_table(facts.modules), "─" * WIDTH]
    return "\n".join(lines)


def _facts(facts: RunFacts) -> list[tuple[str, str]]:
    share = 100 * facts.trainable / max(1, facts.parameters)
    data = f"{facts.train_samples:,} training samples" if facts.train_samples else ""
    data += f", {facts.val_samples:,} for validation" if data and facts.val_samples else ""
    data += f", {facts.skipped_samples:,} skipped (skipped.jsonl)" if data and facts.skipped_samples else ""
    step = f"{facts.tokens_per_step:,.0f} tokens" if facts.tokens_per_step else ""
    step += f" in {facts.samples_per_step:,.1f} samples" if step and facts.samples_per_step else ""
    step += f" ({facts.batch})" if step and facts.batch else facts.batch
    steps = f"{facts.steps:,}" + (f" ({facts.epochs:g} epochs)" if facts.epochs else "")
    return [
        ("model", f"{facts.model} ({facts.family})" if facts.family else facts.model),
        ("train", ", ".join(part for part in (facts.train_type, facts.dtype, facts.optimizer) if part)),
        (
            "parameters",
            f"{human_count(facts.parameters)}, of which {human_count(facts.trainable)} trained ({share:.2f} %)",
        ),
        ("layout", facts.layout),
        ("data", data),
        ("per step", step),
        ("steps", steps),
        ("memory", facts.memory),
        ("hardware", facts.hardware),
        ("output", facts.output),
    ]


def _wrapped(label: str, value: str) -> list[str]:
    """``value`` after ``label``, on two lines at most, cut at spaces."""
    room = WIDTH - len(label)
    if len(value) <= room:
        return [label + value]
    cut = value.rfind(" ", 0, room + 1)
    head, tail = (value[:cut], value[cut + 1 :]) if cut > room // 2 else (value[:room], value[room:])
    return [label + head, " " * len(label) + _shortened(tail, room)]


def _shortened(text: str, room: int) -> str:
    """``text`` in at most ``room`` columns; what is left out is in the middle."""
    if len(text) <= room:
        return text
    half = (room - 1) // 2
    return text[: room - 1 - half] + "…" + text[len(text) - half :]


def _pattern(text: str, room: int) -> str:
    """A name pattern in at most ``room`` columns: ``{q_proj,k_proj}`` becomes ``{q,k}_proj``, then the front goes."""
    text = re.sub(r"\{([^{}]*)\}", lambda braces: _factored(braces[1].split(",")), text)
    while len(text) > room and "." in text.removeprefix("…."):
        text = "…." + text.removeprefix("….").partition(".")[2]
    return _shortened(text, room)


def _factored(names: Sequence[str]) -> str:
    """``{...}`` of these names, with what several of them end in written once."""
    groups: dict[str, list[str]] = {}
    for name in names:
        stem, _, ending = name.rpartition("_")
        groups.setdefault(ending, []).append(stem)
    parts = []
    for ending, stems in groups.items():
        whole = [f"{stem}_{ending}" if stem else ending for stem in stems]
        parts.append(f"{{{','.join(stems)}}}_{ending}" if len(stems) > 1 and all(stems) else ",".join(whole))
    return parts[0] if len(parts) == 1 and parts[0].startswith("{") else f"{{{','.join(parts)}}}"


def _table(modules: Sequence[TrainedModule]) -> list[str]:
    shown = list(modules[:MODULE_ROWS])
    name_room = WIDTH - 40
    body = [
        (_pattern(row.pattern, name_room), f"{row.tensors:,}", human_count(row.parameters), f"{row.lr:.2e}")
        for row in shown
    ]
    head = ("trained modules", "tensors", "parameters", "lr")
    name = max([len(head[0]), *(len(row[0]) for row in body)])
    lines = [f"{a:<{name}}  {b:>9}  {c:>11}  {d:>10}" for a, b, c, d in (head, *body)]
    rest = modules[MODULE_ROWS:]
    if rest:
        total = human_count(sum(row.parameters for row in rest))
        lines.append(f"… and {len(rest)} more rows, {total} parameters (all of them: run_facts.json)")
    return lines
