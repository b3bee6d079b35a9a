"""Sizes no machine can hold or end are refused before anything is written; what could run is not."""

import re
from pathlib import Path

import pytest
import torch
from tiny_pair import shrink_training

from sae_steer import budget
from sae_steer.cache import cache_activations
from sae_steer.dictionary import train_sae
from sae_steer.errors import InputError
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.pair.training import train_pair
from sae_steer.settings import CorpusSettings, PairTrainingSettings, SAESettings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"d_sae": 10**10},
            r"learning 1 of up to 10,000,000,000 features .* needs 4.* GB at least, and .* with --d-sae",
        ),
        ({"rows": 10**13}, "from 10,000,000,000,000 rows would take .* days at the very best; .* --rows"),
        ({"rows": 10**12, "batch_size": 2**36}, "needs .* GB at least"),
    ],
)
def test_a_dictionary_too_large_is_refused_before_its_folder_is_made(toy_cache, tmp_path, change, told):
    with pytest.raises(InputError, match=told):
        train_sae(toy_cache, model="adhd", layer=2, out=tmp_path / "sae", settings=SAESettings(**change))
    assert not (tmp_path / "sae").exists()


def test_a_corpus_too_large_is_refused_before_its_folder_is_made(toy_pair, tmp_path):
    source = GeneratedTexts(CorpusSettings(train_plans=10**13))
    assert source.count == 2 * (10**13 + 1_900)
    with pytest.raises(InputError, match=r"needs .* of disk, and .* are free; ask for fewer plans"):
        cache_activations(toy_pair, out=tmp_path / "cache", source=source)
    assert not (tmp_path / "cache").exists()


def test_more_tokens_than_a_model_can_be_trained_on_are_refused(tmp_path, monkeypatch):
    shrink_training(monkeypatch)
    with pytest.raises(
        InputError, match=r"training on 1,000,000,000,000,000 tokens a model would take .* with --tokens"
    ):
        train_pair(tmp_path / "pair", PairTrainingSettings(preset="tiny", tokens=10**15))
    assert not (tmp_path / "pair").exists()


def test_what_the_studies_of_this_repository_ask_for_is_far_below_the_bounds(tmp_path):
    budget.dictionaries([(2_304, 65_536)], 200_000_000, 4_096).check(torch.device("cpu"), tmp_path)
    budget.streams(2 * 20_000, 2 * 2 * 512).check(CPU, tmp_path)
    budget.models(23_000_000, 200_000_000).check(CPU, tmp_path)


def test_the_memory_of_the_machine_is_what_the_system_says():
    kilobytes = re.search(r"MemTotal: *(\d+)", Path("/proc/meminfo").read_text())[1]
    assert budget._memory(CPU) == pytest.approx(int(kilobytes) * 1024, rel=0.1)
