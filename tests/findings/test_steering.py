"""Text is steered by the edit alone: same noise, same text where the edit does nothing."""

import json

import pytest
import torch
from click.testing import CliRunner
from toy import CAUSE, INTERVENE

from sae_steer.cli import main
from sae_steer.errors import InputError
from sae_steer.findings.steering import steer
from sae_steer.settings import SteerSettings
from sae_steer.study.of_pair import bench_of, find_direction

TITLES = ["Clean the kitchen", "Water the plants", "Pay the bills", "Feed the cat"]
SETTINGS = SteerSettings(max_tokens=60)


@pytest.fixture(scope="module")
def arms(toy_pair, toy_cache, toy_dictionary):
    """The planted cause, made ready, by variant."""
    bench = bench_of(toy_pair, toy_dictionary, toy_cache, toy_cache.target_tokens(toy_pair), INTERVENE)
    return {arm.variant.name: arm for arm in bench.arms(find_direction(bench, toy_dictionary, CAUSE))}


def test_dose_zero_writes_the_same_text_at_no_cost(toy_pair, arms):
    for row in steer(toy_pair, arms["subtract"], TITLES, dose=0.0, settings=SETTINGS):
        assert row.plain == row.steered
        assert row.kl == pytest.approx(0.0, abs=1e-9)
        assert row.plain_loss == pytest.approx(row.steered_loss, abs=1e-9)


def test_taking_the_cause_away_begins_fewer_target_steps_and_giving_it_begins_more(toy_pair, toy_cache, arms):
    target = set(toy_cache.target_tokens(toy_pair).ids)

    def begun(name: str) -> list[int]:
        rows = steer(toy_pair, arms[name], TITLES * 50, dose=1.0, settings=SteerSettings(max_tokens=1))
        texts = [[row.plain.text for row in rows], [row.steered.text for row in rows]]
        return [sum(toy_pair.tokenizer.encode(text)[0] in target for text in side) for side in texts]

    plain, steered = begun("subtract")
    assert steered < plain
    plain, steered = begun("inject")
    assert steered > plain


def test_the_cost_is_what_two_full_passes_say(toy_pair, arms):
    arm = arms["subtract"]
    (row,) = steer(toy_pair, arm, TITLES[:1], dose=1.0, settings=SETTINGS)
    tokenizer, model = toy_pair.tokenizer, toy_pair.target.model
    begun = tokenizer.encode_prompt(TITLES[0])
    ids = torch.tensor([begun + tokenizer.encode(row.plain.text)])
    delimiters = torch.tensor([tokenizer.token_id(token) for token in toy_pair.onsets.tokens])

    def push(module, inputs, resid):
        at = torch.isin(ids, delimiters)[..., None]
        return resid - at * arm.direction.s * arm.direction.unit

    def nats():
        with torch.no_grad():
            return model(ids)[0, len(begun) - 1 : -1].double().log_softmax(-1)

    plain = nats()
    hook = model.resid_post(arm.layer).register_forward_hook(push)
    pushed = nats()
    hook.remove()
    following = ids[0, len(begun) :, None]
    assert row.plain_loss == pytest.approx(float(-plain.gather(1, following).mean()), rel=1e-5)
    assert row.steered_loss == pytest.approx(float(-pushed.gather(1, following).mean()), rel=1e-5)
    assert row.kl == pytest.approx(float((plain.exp() * (plain - pushed)).sum(1).mean()), rel=1e-4)


def test_the_same_seed_writes_the_same_texts_and_another_seed_others(toy_pair, arms):
    first, again = (steer(toy_pair, arms["subtract"], TITLES, dose=1.0, settings=SETTINGS) for _ in range(2))
    other = steer(toy_pair, arms["subtract"], TITLES, dose=1.0, settings=SteerSettings(max_tokens=60, seed=1))
    assert first == again
    assert [row.plain.text for row in first] != [row.plain.text for row in other]


@pytest.mark.parametrize("prompt", ["", "  ", "kitchen " * 600])
def test_a_prompt_that_cannot_be_continued_is_refused(toy_pair, arms, prompt):
    with pytest.raises(InputError, match="the prompt"):
        steer(toy_pair, arms["subtract"], [prompt], dose=1.0, settings=SETTINGS)


def test_the_command_prints_both_texts_and_json(cache, dictionary, tmp_path):
    from sae_steer.sae.saelens.files import save_sae

    save_sae(dictionary.sae, tmp_path / "sae", metadata=dictionary.record)
    command = ["steer", "Clean the kitchen", "--direction", "mean-difference", "--max-tokens", "40"]
    command += ["--cache", str(cache.folder), "--sae", str(tmp_path / "sae")]
    printed = CliRunner().invoke(main, command)
    assert printed.exit_code == 0, printed.output
    assert "steps are target steps" in printed.stdout
    (row,) = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert row["model"] == "adhd"
    assert row["plain"]["steps"]
