"""A pair in the making: same seed, same bytes; however often it is stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_pair import shrink_training
from transformers import AutoModelForCausalLM

from sae_steer.capability import Capability, assumed
from sae_steer.errors import InputError, StaleError
from sae_steer.pair import training
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.training import train_pair
from sae_steer.settings import PairTrainingSettings
from sae_steer.world import World

SETTINGS = PairTrainingSettings(preset="tiny", tokens=12_000, tokens_per_batch=1_024, checkpoint_every=3)
WORLD = World.local(precision="float32", device="cpu")
WEIGHTS = ("standard/model.safetensors", "adhd/model.safetensors")
FILES = (*WEIGHTS, "standard/config.json", "adhd/config.json", "tokenizer.json", "pair.toml", "training.json")


class Calls:
    """Collects progress; at a call of the given number it does something rude."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.stop_at = stop_at

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self.notes.append(note.split(":")[0])
        if len(self.notes) == self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    shrink_training(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The pair of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_training(patch)
        folder = tmp_path_factory.mktemp("pairs") / "mine"
        train_pair(folder, SETTINGS, world=WORLD)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_a_trained_pair_loads_and_its_models_differ(whole):
    pair = load_pair(whole)
    assert (pair.reference.name, pair.target.name, pair.context) == ("standard", "adhd", 512)
    assert pair.reference.sha256 != pair.target.sha256
    assert pair.tokenizer.n_vocab == pair.target.model.shape.d_vocab == 405
    assert len(pair.phrases) >= 60


@torch.no_grad()
@pytest.mark.parametrize("name", ["standard", "adhd"])
def test_transformers_loads_the_folders_as_they_are(whole, name):
    theirs = AutoModelForCausalLM.from_pretrained(whole / name, dtype=torch.float32)
    pair, tokens = load_pair(whole), torch.arange(60)[None]
    torch.testing.assert_close(pair.model(name).model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert theirs.config.pad_token_id == pair.tokenizer.pad_id


def test_the_record_says_what_was_made(whole):
    record = json.loads((whole / "training.json").read_text())
    assert record["provenance"]["settings"]["precision"] == "float32"
    assert record["parameters"] == load_pair(whole).target.model.n_parameters
    assert set(record["log"]) == {"common", "standard", "adhd"}
    last = {name: entries[-1]["step"] for name, entries in record["log"].items()}
    assert last["common"] < last["standard"]
    for name, entries in record["log"].items():
        assert entries[-1]["held_out_loss"] < 6.0, name
        assert [entry["step"] for entry in entries] == sorted({entry["step"] for entry in entries})


def test_trained_twice_the_files_are_the_same(whole, tmp_path):
    train_pair(tmp_path, SETTINGS, world=WORLD)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("stop_at", [2, 9, 17])
def test_stopped_and_repeated_equals_uninterrupted(whole, tmp_path, stop_at):
    stopped, repeated = Calls(stop_at), Calls()
    with pytest.raises(KeyboardInterrupt):
        train_pair(tmp_path, SETTINGS, world=WORLD, on_step=stopped)
    train_pair(tmp_path, SETTINGS, world=WORLD, on_step=repeated)
    assert contents(tmp_path) == contents(whole)
    if stop_at == 2:
        assert set(repeated.notes) == {"common", "standard", "adhd"}
    else:
        assert "common" not in repeated.notes, "finished steps are not made again"


KILLED = """
import sys, time
from pathlib import Path
import pytest, torch
sys.path.insert(0, {tests!r})
from tiny_pair import shrink_training
shrink_training(pytest.MonkeyPatch())
from sae_steer.pair.training import train_pair
from sae_steer.world import World
from sae_steer.settings import PairTrainingSettings
torch.set_num_threads({threads})
train_pair(Path({folder!r}), {settings!r}, world=World.local(precision="float32", device="cpu"),
           on_step=lambda *told: time.sleep(0.02))
"""


def test_kill_9_then_again_equals_uninterrupted(whole, tmp_path):
    script = KILLED.format(
        tests=str(Path(__file__).parents[1]), threads=torch.get_num_threads(), folder=str(tmp_path), settings=SETTINGS
    )
    root = str(Path(training.__file__).parents[2])
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": root})
    try:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (tmp_path / "training" / "standard.safetensors").exists():
                break
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "training.json").exists()
    train_pair(tmp_path, SETTINGS, world=WORLD)
    assert contents(tmp_path) == contents(whole)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_finished_pair_is_reused(whole):
    before = contents(whole)
    again = train_pair(whole, SETTINGS, world=WORLD, on_step=lambda *told: pytest.fail("a step was made"))
    assert again.sha256 == load_pair(whole).sha256
    assert contents(whole) == before


def test_other_settings_are_refused_and_nothing_is_touched(whole):
    before = contents(whole)
    with pytest.raises(StaleError, match=r"lr: 0\.003, now 0\.001"):
        train_pair(whole, replace(SETTINGS, lr=1e-3), world=WORLD)
    with pytest.raises(StaleError, match="was begun at float32, and --precision bfloat16 was asked"):
        train_pair(whole, SETTINGS, world=World.local(precision="bfloat16", device="cpu"))
    assert contents(whole) == before


def test_a_finished_pair_is_found_again_on_a_machine_that_would_have_trained_it_otherwise(whole):
    with assumed(Capability(frozenset({"avx2", "amx_bf16"}))):
        world = World.local(device="cpu")
        again = train_pair(whole, SETTINGS, world=world, on_step=lambda *told: pytest.fail("a step was made"))
    assert world.precision == "bfloat16"
    assert again.sha256 == load_pair(whole).sha256


def test_a_run_begun_with_other_settings_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_pair(tmp_path, SETTINGS, world=WORLD, on_step=Calls(9))
    with pytest.raises(StaleError, match="other seed"):
        train_pair(tmp_path, replace(SETTINGS, seed=1), world=WORLD)


def test_a_forced_run_that_is_stopped_leaves_no_record_of_the_pair_it_replaces(whole, tmp_path):
    train_pair(tmp_path, replace(SETTINGS, tokens=4_000), world=WORLD)
    with pytest.raises(KeyboardInterrupt):
        train_pair(tmp_path, SETTINGS, world=WORLD, force=True, on_step=Calls(9))
    with pytest.raises(InputError, match="no pair"):
        load_pair(tmp_path)
    train_pair(tmp_path, SETTINGS, world=WORLD)
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize("init", ["shared", "separate"])
def test_models_of_a_shared_start_are_one_model_until_their_own_texts_come(tmp_path, monkeypatch, init):
    monkeypatch.setattr(training, "_own_batches", lambda *arguments: ())
    train_pair(tmp_path, replace(SETTINGS, init=init), world=WORLD)
    one, other = ((tmp_path / name).read_bytes() for name in WEIGHTS)
    assert (one == other) == (init == "shared")


def test_separate_starts_share_nothing(tmp_path):
    pair = train_pair(tmp_path, replace(SETTINGS, init="separate", tokens=4_000), world=WORLD)
    assert not (tmp_path / "training" / "common.safetensors").exists()
    one, other = (load_file(tmp_path / name)["model.embed_tokens.weight"].float() for name in WEIGHTS)
    assert torch.cosine_similarity(one, other).abs().mean() < 0.5
    assert set(json.loads((tmp_path / "training.json").read_text())["log"]) == {"standard", "adhd"}
    assert pair.reference.model.shape == pair.target.model.shape


def test_an_unknown_preset_is_named(tmp_path):
    with pytest.raises(InputError, match="no preset 'huge'; there are small, interpgpt-23m, tiny"):
        train_pair(tmp_path, replace(SETTINGS, preset="huge"), world=WORLD)
    assert not list(tmp_path.iterdir())
