"""The README's worked example: a pair of another domain goes from texts to a scan by commands alone, without code."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from other_domain import DISHES, HABITS, write_recipe_pair

from sae_steer.cache import ActivationCache
from sae_steer.cli import main
from sae_steer.pair.model_pair import load_pair


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the pair and its texts, and everything the commands made of them."""
    folder = tmp_path_factory.mktemp("kitchen")
    write_recipe_pair(folder / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in (
            "info recipes --texts recipes.jsonl",
            "cache --pair recipes --layer 1 --texts recipes.jsonl",
            "train-sae --pair recipes --layer 1 --d-sae 96 --k 6 --rows 60000 --batch-size 512",
            "scan --pair recipes --layer 1 --sae runs/recipes/saes/tuned_L1_hook_resid_post_k6_d96",
            "layers --pair recipes",
        ):
            result = CliRunner().invoke(main, command.split())
            assert result.exit_code == 0, result.output
    return folder


def test_onsets_are_the_numbered_lines_and_target_steps_the_phrases(workplace):
    pair = load_pair(workplace / "recipes")
    lines = [json.loads(line) for line in (workplace / "recipes.jsonl").read_text().splitlines()]
    for text in ActivationCache.open(workplace / "activations" / "recipes").texts("scan"):
        read = pair.tokenizer.decode(text.token.tolist())
        assert read == "<s>" + lines[text.prompt]["text"]
        steps = [line.partition(") ")[2] for line in read.splitlines()[1:]]
        assert text.is_onset.sum() == len(steps)
        assert text.next_is_target[text.is_onset].tolist() == [step in HABITS for step in steps]


def test_the_task_field_is_the_cluster(workplace):
    cache = ActivationCache.open(workplace / "activations" / "recipes")
    tasks = {split: set(cache.labels(split)["task"].tolist()) for split in ("train", "scan", "tune", "confirm")}
    assert sum(map(len, tasks.values())) == len(set.union(*tasks.values())) == len(DISHES)
    assert cache.variants == ("base", "tuned")


def test_the_scan_finds_features_of_the_tuned_model(workplace):
    record = json.loads((workplace / "runs" / "recipes" / "scan" / "feature_diff.json").read_text())
    cache = ActivationCache.open(workplace / "activations" / "recipes")
    labels = cache.labels("scan")
    assert record["onsets"] == int((labels["is_onset"].astype(bool) & (labels["text_variant"] == 1)).sum())
    assert record["primary_count"] > 0
    assert record["top"][0]["target_rate"] > 10 * record["top"][0]["reference_rate"]


def test_the_tuned_model_alone_expects_the_habits(workplace):
    curves = json.loads((workplace / "runs" / "recipes" / "layers" / "layers.json").read_text())["curves"]
    last = {curve["model"]: curve["layers"][-1]["mean"] for curve in curves if curve["rendering"] == "tuned"}
    assert last["tuned"] > 0.25
    assert last["base"] < 0.05
    assert np.isfinite(list(last.values())).all()


def test_info_counts_what_the_pair_finds_in_the_texts(workplace):
    command = ["info", str(workplace / "recipes"), "--texts", str(workplace / "recipes.jsonl")]
    told = CliRunner().invoke(main, command).output
    cache = ActivationCache.open(workplace / "activations" / "recipes")
    for split in ("train", "scan", "tune", "confirm"):
        labels = cache.labels(split)
        words = next(line for line in told.splitlines() if line.strip().startswith(split)).replace(",", "").split()
        texts, tasks, onsets, targets = (int(words[at]) for at in (1, 4, 6, 8))
        assert texts == len(np.unique(labels["prompt"]))
        assert tasks == len(np.unique(labels["task"]))
        assert onsets == labels["is_onset"].sum()
        assert targets == labels["next_is_target"].sum()
