"""From verdicts to files: predictions, figures, and the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tessera.evaluate import predictions, report, results, summary
from tessera.evaluate.runner import Outcome
from tessera.evaluate.summary import Summary


def publish(directory: Path, name: str, outcomes: Sequence[Outcome], settings: Mapping[str, Any]) -> list[Summary]:
    """Write everything about these benchmarks below ``directory``."""
    summaries = []
    for outcome in outcomes:
        outcome.job.directory.mkdir(parents=True, exist_ok=True)
        predictions.write(outcome)
        found = summary.summarise(outcome)
        results.write_whole(outcome.job.directory / results.SUMMARY, _json(found.to_json()))
        summaries.append(found)
    stored = {found.name: found.to_json() for found in summaries}
    whole = {"model": name, "settings": dict(settings), "benchmarks": stored}
    results.write_whole(directory / results.SUMMARY, _json(whole))
    facts = [(key, json.dumps(value, ensure_ascii=False)) for key, value in settings.items()]
    facts += [(outcome.job.name, str(outcome.job.path)) for outcome in outcomes]
    report.write(directory / report.REPORT, name, outcomes, summaries, facts)
    return summaries


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"
