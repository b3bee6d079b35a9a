"""The toy pair, a cache of it, and a dictionary whose feature 7 is the cause of what differs between its models."""

import pytest
from toy import CACHE, CORPUS, toy_sae, write_toy_pair

from sae_steer.cache import cache_activations
from sae_steer.dictionary import Dictionary
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.texts import GeneratedTexts


@pytest.fixture(scope="session")
def toy_pair(tmp_path_factory):
    return load_pair(write_toy_pair(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="session")
def toy_cache(toy_pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("toy-cache")
    return cache_activations(toy_pair, layers=(1, 2), out=out, settings=CACHE, source=GeneratedTexts(CORPUS))


@pytest.fixture(scope="session")
def toy_dictionary(toy_pair):
    record = {"model": "adhd", "layer": 2, "model_sha256": toy_pair.target.sha256}
    return Dictionary(toy_sae(), "adhd", 2, record, "0" * 64)
