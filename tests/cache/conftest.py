"""One tiny pair and its cache for all tests of caches."""

import shutil
from pathlib import Path

import pytest
from tiny_cache import write
from tiny_pair import write_pair

from sae_steer.pair.model_pair import ModelPair, load_pair


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pairs") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> ModelPair:
    return load_pair(tiny_folder)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory) -> Path:
    """An uninterrupted cache; not to be spoilt."""
    return write(tiny, tmp_path_factory.mktemp("whole") / "cache").folder


@pytest.fixture
def mine(whole, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(whole, tmp_path / "mine"))
