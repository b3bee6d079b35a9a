"""Folders of dictionaries: one writer each, whole or gone on with, and what was changed in them is found."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pair import write_pair

from sae_steer import learning
from sae_steer.cache import ActivationCache, cache_activations
from sae_steer.dictionary import Wanted, load_dictionary, train_sae, train_saes
from sae_steer.errors import InputError, NotFiniteError, SteerError
from sae_steer.outputs import writing
from sae_steer.pair.model_pair import load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.sae.log import Quiet, StepFacts
from sae_steer.sae.saelens.files import identity, load_sae
from sae_steer.settings import CacheSettings, CorpusSettings, SAESettings

SETTINGS = SAESettings(d_sae=32, k=4, rows=24 * 64, batch_size=64, dead_after_rows=500, aux_k=8, checkpoint_every=6)
FEW = CorpusSettings(train_plans=12, scan_plans=6, tune_plans=2, confirm_plans=2)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ActivationCache:
    pair = load_pair(write_pair(tmp_path_factory.mktemp("pairs") / "tiny"))
    settings = CacheSettings(rows_per_shard=1_500)
    return cache_activations(
        pair,
        out=tmp_path_factory.mktemp("caches") / "small",
        layers=(2,),
        settings=settings,
        source=GeneratedTexts(FEW),
    )


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saes") / "whole"
    train_sae(small, model="adhd", layer=2, out=folder, settings=SETTINGS)
    return folder


@pytest.fixture
def mine(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "mine"))


class Steps(Quiet):
    """Keeps which steps were made, and is killed, as it were, after one of them."""

    def __init__(self, until: int = 10**9) -> None:
        self.until, self.made = until, []

    def checkpoint(self, step: int, path: Path) -> None:
        if step >= self.until:
            raise KeyboardInterrupt

    def step(self, facts: StepFacts) -> None:
        self.made.append(facts.step)


def refusal(act, kind: type[SteerError] = InputError) -> str:
    with pytest.raises(kind) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_second_training_in_the_folder_is_refused_before_it_starts(small, tmp_path):
    class Second(Quiet):
        told = ""

        def step(self, facts: StepFacts) -> None:
            import threading

            def other():
                Second.told = refusal(
                    lambda: train_sae(small, model="adhd", layer=2, out=tmp_path, settings=replace(SETTINGS, lr=1e-4)),
                    SteerError,
                )

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    made = train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS, log=Second())
    assert Second.told == f"another process is writing into {tmp_path}; wait for it, or use another --out"
    assert made.record["provenance"]["settings"]["lr"] is None


def test_somebody_elses_dictionary_is_not_replaced(small, whole, tmp_path):
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / name).write_text("{}")
    told = refusal(lambda: train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS))
    assert "was not made by sae-steer" in told
    train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS, force=True)
    assert (tmp_path / "cfg.json.old").read_text() == (tmp_path / "sae_weights.safetensors.old").read_text() == "{}"
    assert (tmp_path / "cfg.json").read_bytes() == (whole / "cfg.json").read_bytes()


def change(folder: Path, how, *, sealed: bool = True) -> None:
    facts = json.loads((folder / "cfg.json").read_text())
    how(facts)
    if not sealed:
        del facts["metadata"]["sae_steer"]["seal"]
    (folder / "cfg.json").write_text(json.dumps(facts))


def test_a_changed_config_is_found_and_without_its_seal_it_is_another_dictionary(mine):
    before = load_dictionary(mine).sha256
    assert before == identity(mine)
    change(mine, lambda facts: facts.update(k=16))
    assert "cfg.json was changed" in refusal(lambda: load_dictionary(mine))
    change(mine, lambda facts: None, sealed=False)
    changed = load_dictionary(mine)
    assert changed.sae.config.k == 16
    assert changed.sha256 != before
    change(mine, lambda facts: facts.update(k=4))
    assert load_dictionary(mine).sha256 == before


@pytest.mark.parametrize("where", [0.3, 0.6, 0.9])
def test_flipped_weights_are_found_by_whatever_loads_them(mine, where):
    path = mine / "sae_weights.safetensors"
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 1
    path.write_bytes(content)
    assert "does not have the checksum" in refusal(lambda: load_sae(mine))


def test_weights_that_are_not_finite_are_found_in_a_dictionary_made_elsewhere_too(mine):
    weights = load_file(mine / "sae_weights.safetensors")
    weights["W_dec"][3, 2] = torch.nan
    save_file(weights, mine / "sae_weights.safetensors")
    change(mine, lambda facts: facts["metadata"].pop("sae_steer"), sealed=True)
    assert "W_dec of the dictionary" in refusal(lambda: load_sae(mine), NotFiniteError)


@pytest.mark.parametrize("key", ["model", "layer", "model_sha256"])
@pytest.mark.parametrize("value", [[], "../..", None, -1, True])
def test_a_record_of_another_shape_is_one_line(mine, key, value):
    if (key, value) == ("model_sha256", "../.."):
        pytest.skip("a hash may be any string; it will not be the model's")
    change(mine, lambda facts: facts["metadata"]["sae_steer"].update({key: value}), sealed=False)
    assert key in refusal(lambda: load_dictionary(mine))


def test_a_forced_training_that_was_cut_off_is_gone_on_with(small, mine, whole):
    with pytest.raises(KeyboardInterrupt):
        train_sae(small, model="adhd", layer=2, out=mine, settings=SETTINGS, force=True, log=Steps(until=12))
    log = Steps()
    train_sae(small, model="adhd", layer=2, out=mine, settings=SETTINGS, force=True, log=log)
    assert min(log.made) > 12
    assert (mine / "cfg.json").read_bytes() == (whole / "cfg.json").read_bytes()
    log = Steps()
    train_sae(small, model="adhd", layer=2, out=mine, settings=SETTINGS, force=True, log=log)
    assert min(log.made) <= 10, "a run that came to its end is not gone on with"


def test_several_killed_between_their_records_are_stored_and_not_learned_again(small, tmp_path, monkeypatch):
    wanted = [Wanted("adhd", replace(SETTINGS, seed=seed), tmp_path / f"s{seed}") for seed in range(3)]
    alone = [
        train_sae(small, model="adhd", layer=2, out=tmp_path / f"alone{seed}", settings=one.settings)
        for seed, one in enumerate(wanted)
    ]
    stored, store = [], learning._store

    def killed_at_the_second(cache, one, *rest):
        if len(stored) == 1:
            raise KeyboardInterrupt
        stored.append(one.out.name)
        store(cache, one, *rest)

    monkeypatch.setattr(learning, "_store", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_saes(small, wanted, layer=2)
    monkeypatch.setattr(learning, "_store", store)
    log = Steps()
    learned = train_saes(small, wanted, layer=2, log=log)
    assert log.made == []
    assert not list(tmp_path.glob("s*/training/state.safetensors"))
    for one, other in zip(learned, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.sae.parameters(), other.sae.parameters(), strict=True))


def test_what_a_kill_left_unfinished_is_swept_with_the_next_run(small, mine, whole):
    for name in (".cfg.json.abc.tmp", "training/.state.safetensors.x1.tmp"):
        (mine / name).write_text("half")
    (mine / "training.json").unlink()
    train_sae(small, model="adhd", layer=2, out=mine, settings=SETTINGS)
    assert not list(mine.rglob(".*.tmp"))
    assert (mine / "training.json").read_bytes() == (whole / "training.json").read_bytes()


def test_a_log_that_is_a_link_is_not_written_through(small, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("content")
    (tmp_path / "out" / "training").mkdir(parents=True)
    (tmp_path / "out" / "training" / "log.jsonl").symlink_to(precious)
    refusal(lambda: train_sae(small, model="adhd", layer=2, out=tmp_path / "out", settings=SETTINGS), SteerError)
    with writing(tmp_path / "out", ["training/log.jsonl"], force=True):
        pass
    assert precious.read_text() == "content"


@pytest.mark.parametrize("where", np.linspace(0.1, 0.95, 10).tolist())
def test_a_flipped_checkpoint_is_found(small, tmp_path, where):
    with pytest.raises(KeyboardInterrupt):
        train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS, log=Steps(until=12))
    path = tmp_path / "training" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[int(len(content) * where)] ^= 4
    path.write_bytes(content)
    told = refusal(lambda: train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS), SteerError)
    assert f"{path} is" in told
    assert "delete it to start anew" in told


def test_a_kill_after_the_last_record_leaves_nothing_for_ever(small, tmp_path, monkeypatch):
    wanted = [Wanted("adhd", replace(SETTINGS, seed=seed), tmp_path / f"s{seed}") for seed in range(2)]

    def killed(wanted):
        raise KeyboardInterrupt

    unlink = Path.unlink
    monkeypatch.setattr(
        Path,
        "unlink",
        lambda path, **known: killed(path) if path.name == "state.safetensors" else unlink(path, **known),
    )
    with pytest.raises(KeyboardInterrupt):
        train_saes(small, wanted, layer=2)
    monkeypatch.undo()
    assert (tmp_path / "s0" / "training" / "state.safetensors").is_file()
    (tmp_path / "s1" / ".cfg.json.x.tmp").write_text("half")
    train_saes(small, wanted[1:], layer=2)
    assert (tmp_path / "s0" / "training" / "state.safetensors").is_file(), "another run may still need it"
    train_saes(small, wanted, layer=2)
    assert not list(tmp_path.rglob("state.safetensors"))
    assert not list(tmp_path.rglob(".*.tmp"))
