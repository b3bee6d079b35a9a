"""A cache of few texts that takes a second, and what tests of caches ask again and again."""

from pathlib import Path

import pytest

from sae_steer.cache import ActivationCache, cache_activations
from sae_steer.errors import SteerError
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.settings import CacheSettings, CorpusSettings

FEW = CorpusSettings(train_plans=16, scan_plans=8, tune_plans=4, confirm_plans=6)
SETTINGS = CacheSettings(rows_per_shard=600, tokens_per_batch=2_048, precision="float32")


def write(pair: ModelPair, out: Path, **changes) -> ActivationCache:
    wanted = {"layers": (0, 2), "settings": SETTINGS, "source": GeneratedTexts(FEW), **changes}
    return cache_activations(pair, out=out, **wanted)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".sae_steer"}


def refusal(kind: type[SteerError], act) -> str:
    with pytest.raises(kind) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)
