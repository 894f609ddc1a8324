"""EvalScope measures a served model, as it is: its own questions about images over the OpenAI API, and every score."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("uvicorn", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("prometheus_client", reason="tessera deploy needs the extra `deploy`")

from tests.e2e.server import Running, deployed
from tests.models import make_model_dir
from tests.toys import make_images, write_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("evalscope") is None, reason="evalscope is not installed"),
]
NEW = 12
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "*", "no_proxy": "*"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = make_model_dir(tmp_path_factory.mktemp("evalscope") / "tiny", "qwen2_5_vl")
    with deployed(
        "--model", model, "--torch_dtype", "float32", "--served_model_name", "M", "--api_key", "K"
    ) as running:
        yield running
        assert "Traceback" not in running.output, running.output


def uri(path: str) -> str:
    return "data:image/png;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def answer(server: Running, path: str, text: str) -> str:
    """What the server says to a client of our own."""
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": uri(path)}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": NEW, "temperature": 0}
    return server.send("POST", "/v1/chat/completions", body, {"Authorization": "Bearer K"}).text


def questions(server: Running, images: list[str], folder: Path) -> int:
    """Both benchmarks' files, the model's own answers as truth; how many open questions there are."""
    rows: list[dict[str, Any]] = []
    for index in range(40):
        path, text = images[index % len(images)], f"What is written in picture {index}?"
        truth = answer(server, path, text)
        if any(word.isascii() and word.isalpha() and len(word) > 1 for word in truth.split()):  # something to compare
            parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": path}}]
            rows.append({"messages": [{"role": "user", "content": parts}], "answer": truth})
    rows = rows[:6]
    assert len(rows) == 6
    write_rows(folder / "vqa" / "paths.jsonl", rows)
    inline = json.loads(json.dumps(rows))
    for row in inline:
        row["messages"][0]["content"][1]["image_url"]["url"] = uri(row["messages"][0]["content"][1]["image_url"]["url"])
    write_rows(folder / "vqa" / "inline.jsonl", inline)
    choices = [
        {"question": "<image 1> Which colour?", "options": ["red", "green", "blue"], "image_1": path, "answer": "A"}
        for path in images
    ]
    write_rows(folder / "mcq" / "colour_val.jsonl", choices)
    return len(rows)


@pytest.mark.timeout(420)
def test_its_own_benchmarks(server: Running, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", [(64, 48), (96, 96), (56, 84)], suffix=".png")
    count = questions(server, images, tmp_path)
    arguments = {
        # Its BLEU would fetch data of NLTK's.
        "general_vqa": {
            "local_path": str(tmp_path / "vqa"),
            "metric_list": ["Rouge"],
            "subset_list": ["paths", "inline"],
        },
        "general_vmcq": {"local_path": str(tmp_path / "mcq"), "subset_list": ["colour"]},
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "evalscope.cli.cli", "eval", "--model", "M", "--api-url", f"{server.url}/v1"),
            *("--api-key", "K", "--eval-type", "openai_api", "--datasets", "general_vqa", "general_vmcq"),
            *("--dataset-args", json.dumps(arguments), "--eval-batch-size", "4", "--work-dir", str(tmp_path / "out")),
            *("--generation-config", json.dumps({"max_tokens": NEW, "temperature": 0.0, "seed": 42}), "--no-timestamp"),
        ],
        env={**os.environ, **OFFLINE},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    reports = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "reports" / "M").glob("*.json")}
    assert set(reports) == {"general_vqa", "general_vmcq"}
    scores = {metric["identity"]["name"]: metric for metric in reports["general_vqa"]["metrics"]}
    [rouge] = [metric for name, metric in scores.items() if "rouge" in name.lower()][:1]
    # The model answers EvalScope as it answered us, whether the picture came as a file or inline.
    assert rouge["score"] == pytest.approx(1.0), reports["general_vqa"]
    subsets = {one["name"]: one for group in rouge["categories"] for one in group["subsets"]}
    assert {name: one["num"] for name, one in subsets.items()} == {"paths": count, "inline": count}
    [accuracy] = reports["general_vmcq"]["metrics"]
    assert 0 <= accuracy["score"] <= 1
    assert [one["num"] for group in accuracy["categories"] for one in group["subsets"]] == [len(images)]
