"""A server without a model, for every test of the routes."""

from __future__ import annotations

import pytest

from tessera.data.encode import Encoder
from tests.serving import Server, make_encoder


@pytest.fixture(scope="package")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """What turns rows into prompts."""
    return make_encoder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def server(encoder: Encoder) -> Server:
    """A server that says Hello."""
    return Server(encoder)
