"""SAELens architectures through SAELens's own trainer, on our rows: round trips, exact resume, clear refusals."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_steer.errors import InputError, StaleError
from sae_steer.sae.evaluation import evaluate
from sae_steer.sae.log import Quiet, StepFacts
from sae_steer.sae.saelens.adapter import SAELensDictionary, sae_lens
from sae_steer.sae.saelens.files import load_sae, read_metadata, save_sae
from sae_steer.sae.saelens.training import parse_architecture, saelens_architectures, train_saelens
from sae_steer.settings import SAESettings
from sae_steer.world import World

ARCHITECTURES = (
    "abstopk", "batchtopk", "gated", "jumprelu", "matching_pursuit", "matryoshka_batchtopk", "standard", "topk",
)  # fmt: skip
OPTIONS = {
    "standard": {"l1_coefficient": 0.05},
    "gated": {"l1_coefficient": 0.05},
    "matching_pursuit": {"max_iterations": 4},
}
SAVED_AS = {"batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}


@pytest.fixture(scope="module", autouse=True)
def quietly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens()
        yield


def train(planted, settings: SAESettings, architecture: str, world: World, **more) -> SAELensDictionary:
    return train_saelens(planted, settings, architecture, options=OPTIONS.get(architecture), world=world, **more)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_training_architecture_learns_and_is_read_by_saelens_to_the_same_numbers(
    architecture: str, planted, short: SAESettings, world: World, tmp_path: Path
) -> None:
    x = planted.batch(10**5, 500, 0)
    learned = train(planted, short, architecture, world)
    save_sae(learned, tmp_path, metadata={"seed": 0})
    theirs = sae_lens().SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == SAVED_AS.get(architecture, architecture)
    torch.testing.assert_close(theirs(x), learned(x))
    torch.testing.assert_close(load_sae(tmp_path)(x), learned(x), rtol=1e-4, atol=1e-4)
    assert read_metadata(tmp_path) == {"seed": 0}
    untrained = train(planted, replace(short, rows=short.batch_size, lr=1e-12), architecture, world)
    before, after = (evaluate(sae, [x], world).fve for sae in (untrained, learned))
    assert after > before + 0.1


def test_no_architecture_of_saelens_is_left_out() -> None:
    assert saelens_architectures() == ARCHITECTURES


class StopAt(Quiet):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, facts: StepFacts) -> None:
        if facts.step == self.at:
            raise RuntimeError("killed here")


@pytest.mark.parametrize("architecture", ["gated", "batchtopk"])
def test_stopped_and_resumed_equals_uninterrupted(
    architecture: str, planted, short: SAESettings, world: World, tmp_path: Path
) -> None:
    whole = train(planted, short, architecture, world)
    path = tmp_path / "state.safetensors"
    with pytest.raises(RuntimeError, match="killed here"):
        train(planted, short, architecture, world, checkpoint=path, log=StopAt(20))
    resumed = train(planted, short, architecture, world, checkpoint=path)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    with pytest.raises(StaleError, match="other settings or rows"):
        train(planted, replace(short, seed=1), architecture, world, checkpoint=path)


def test_the_seed_decides_and_torchs_global_generator_is_left_alone(planted, short, world: World) -> None:
    brief = replace(short, rows=2 * short.batch_size)
    before = torch.random.get_rng_state()
    first, again = (train(planted, brief, "standard", world).state_dict()["W_dec"] for _ in range(2))
    other = train(planted, replace(brief, seed=1), "standard", world).state_dict()["W_dec"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_saelens_does_not_know_is_told_in_one_line(planted, short, world: World) -> None:
    with pytest.raises(InputError, match=r"trains no architecture 'gatd'; it trains .*gated"):
        train_saelens(planted, short, "gatd", world=world)
    with pytest.raises(InputError, match=r"gated has no option 'l0'; it has .*l1_coefficient"):
        train_saelens(planted, short, "gated", options={"l0": 1}, world=world)


def test_options_of_an_architecture_are_read_from_its_name() -> None:
    assert parse_architecture("saelens:gated,l1_coefficient=2.5") == ("gated", {"l1_coefficient": 2.5})
    assert parse_architecture("saelens:topk") == ("topk", {})
    with pytest.raises(InputError, match="has an option 'l1'; write NAME=NUMBER"):
        parse_architecture("saelens:gated,l1")


def test_a_saved_dictionary_says_how_it_was_trained(planted, short, world: World, tmp_path: Path) -> None:
    brief = replace(short, rows=2 * short.batch_size)
    save_sae(train(planted, brief, "gated", world), tmp_path, metadata={})
    facts = json.loads((tmp_path / "cfg.json").read_text())
    assert facts["metadata"]["training_architecture"] == "gated"
    assert facts["metadata"]["training_architecture_details"]["l1_coefficient"] == 0.05
