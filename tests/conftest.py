"""Two small studies for all tests: the embedded pair with a cache, a dictionary and its scan; the toy pair, whose cause
is known, with the same."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see sae_steer/cli/__init__.py
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers of two threads each would wait for one another

import pytest
import toy

from sae_steer.cache import cache_activations
from sae_steer.dictionary import Dictionary, train_sae
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.scan import scan_features
from sae_steer.settings import CacheSettings, CorpusSettings, SAESettings

CORPUS = CorpusSettings(train_plans=120, scan_plans=80, tune_plans=40, confirm_plans=80)
CACHE = CacheSettings(rows_per_shard=4_096, precision="float32")
SAE = SAESettings(d_sae=256, k=16, rows=60_000, batch_size=1_024, dead_after_rows=20_000, checkpoint_every=20)


@pytest.fixture(scope="session")
def pair():
    """The embedded pair."""
    return load_pair("small")


@pytest.fixture(scope="session")
def cache(pair, tmp_path_factory):
    """A finished cache of layers 1 and 2."""
    out = tmp_path_factory.mktemp("study") / "cache"
    return cache_activations(pair, layers=(1, 2), out=out, settings=CACHE, source=GeneratedTexts(CORPUS))


@pytest.fixture(scope="session")
def dictionary(cache, tmp_path_factory):
    """A dictionary of the target model's stream after block 2."""
    return train_sae(cache, model="adhd", layer=2, out=tmp_path_factory.mktemp("sae") / "adhd", settings=SAE)


@pytest.fixture(scope="session")
def scan(cache, dictionary):
    """That dictionary's scan."""
    return scan_features(cache, dictionary)


@pytest.fixture(scope="session")
def toy_pair(tmp_path_factory):
    """A pair whose models differ in one planted cause."""
    return load_pair(toy.write_toy_pair(tmp_path_factory.mktemp("toy")))


@pytest.fixture(scope="session")
def toy_cache(toy_pair, tmp_path_factory):
    """A finished cache of it."""
    out = tmp_path_factory.mktemp("toy-cache")
    return cache_activations(toy_pair, layers=(1, 2), out=out, settings=toy.CACHE, source=GeneratedTexts(toy.CORPUS))


@pytest.fixture(scope="session")
def toy_dictionary(toy_pair):
    """A dictionary whose feature 7 is the cause."""
    record = {"model": "adhd", "layer": 2, "model_sha256": toy_pair.target.sha256}
    return Dictionary(toy.toy_sae(), "adhd", 2, record, "0" * 64)
