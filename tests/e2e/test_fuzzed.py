"""Requests made up from the server's own description: none breaks it, and every response is as described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("uvicorn", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("prometheus_client", reason="tessera deploy needs the extra `deploy`")
pytest.importorskip("schemathesis", reason="schemathesis is not installed")

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.e2e.server import Running, deployed
from tests.models import make_model_dir

pytestmark = pytest.mark.slow
EXAMPLES = 30
BOUNDED = settings(
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = make_model_dir(tmp_path_factory.mktemp("fuzzed") / "tiny", "qwen2_5_vl")
    with deployed(
        "--model", model, "--torch_dtype", "float32", "--max_new_tokens", "2", "--max_model_len", "96"
    ) as running:
        yield running
        assert "Traceback" not in running.output and "ERROR" not in running.output, running.output


def test_whatever_the_description_allows_or_forbids(server: Running) -> None:
    description = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = set()
    for result in description.get_all_operations():
        operation = result.ok()
        seen.add(operation.path)
        computes = operation.method.upper() == "POST"
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(BOUNDED, max_examples=EXAMPLES if computes else 5)
            def sent(case: Any) -> None:
                # Right fields may still ask for what is not there: a model, an image, settings that clash.
                case.call_and_validate(excluded_checks=[positive_data_acceptance])
                assert server.process.poll() is None, server.output

            try:
                sent()
            except Unsatisfiable:  # nothing can be wrong with a request without parameters
                assert mode is GenerationMode.NEGATIVE and not computes
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= seen
    assert server.chat("hello").status == 200
