"""A pair folder of two random models, to be spoilt, and the pair in it."""

from pathlib import Path

import pytest
from tiny_pair import write_pair

from sae_steer.pair.model_pair import ModelPair, load_pair


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_pair(tmp_path / "mine")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> ModelPair:
    return load_pair(write_pair(tmp_path_factory.mktemp("pairs") / "tiny"))
