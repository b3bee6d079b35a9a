"""Training finds what was planted, keeps its invariants, and repeats to the byte."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_steer.errors import InputError, NotFiniteError
from sae_steer.randomness import generator
from sae_steer.sae.evaluation import evaluate
from sae_steer.sae.log import Quiet, StepFacts, jsonl_log
from sae_steer.sae.schedule import Plateau, codes_a_row, learning_rate
from sae_steer.sae.training import Job, TrainedSAE, Training, train, train_dictionary
from sae_steer.settings import SAESettings
from sae_steer.world import World


class Kept(Quiet):
    def __init__(self) -> None:
        self.facts: list[StepFacts] = []

    def step(self, facts: StepFacts) -> None:
        self.facts.append(facts)


@pytest.fixture(scope="module")
def trained(planted, world: World) -> TrainedSAE:
    settings = SAESettings(d_sae=128, k=8, rows=300_000, batch_size=512, lr=1e-2, precision="float32")
    return train_dictionary(planted, settings, world=world)


def test_a_planted_dictionary_is_recovered(trained: TrainedSAE, planted) -> None:
    cosines = planted.directions @ trained.sae.W_dec.detach().T
    assert float(cosines.max(1).values.mean()) > 0.95


def test_held_out_planted_rows_are_explained(trained: TrainedSAE, planted, world: World) -> None:
    held_out = [planted.batch(step, 1000, 77) for step in range(5)]
    metrics = evaluate(trained.sae, held_out, world)
    assert metrics.fve > 0.9
    assert 0 < metrics.l0 <= 8


def test_decoder_rows_have_norm_one(trained: TrainedSAE) -> None:
    torch.testing.assert_close(trained.sae.W_dec.norm(dim=1), torch.ones(128))


def test_the_same_seed_gives_the_same_weights(planted, short: SAESettings, world: World) -> None:
    first, again = (train_dictionary(planted, short, world=world).sae.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = train_dictionary(planted, replace(short, seed=1), world=world).sae.state_dict()
    assert not torch.equal(first["W_dec"], other["W_dec"])


def test_training_on_larger_rows_gives_the_same_directions(planted, planted_rows, short, world) -> None:
    larger = planted_rows()
    larger.batch = lambda *arguments: 4 * planted.batch(*arguments)
    larger.mean, larger.mean_square = 4 * planted.mean, 16 * planted.mean_square
    small, large = (train_dictionary(rows, short, world=world).sae for rows in (planted, larger))
    assert torch.equal(small.W_dec, large.W_dec)
    assert torch.equal(4 * small.b_dec, large.b_dec)


def test_features_die_and_are_revived_by_the_auxiliary_loss_or_by_being_raised(planted_rows, world: World) -> None:
    rich = planted_rows(features=400, active=4)
    neither = SAESettings(
        d_sae=512,
        k=8,
        rows=300 * 256,
        batch_size=256,
        lr=3e-2,
        aux_k=16,
        aux_coefficient=0.0,
        raise_silent=0.0,
        dead_after_rows=5_000,
        precision="float32",
    )

    def dead(**changes: float) -> float:
        log = Kept()
        train_dictionary(rich, replace(neither, **changes), world=world, log=log)
        return log.facts[-1].dead

    died = dead()
    assert died > 0.2, "nothing died, so nothing was tested"
    assert dead(aux_coefficient=0.25) < 0.7 * died
    assert dead(raise_silent=0.03, raise_after_rows=1_000) < 0.5 * died


def test_the_learning_rate_rises_stays_and_falls_to_nothing() -> None:
    settings = SAESettings(lr=1.0, warmup=0.1, decay=0.25)
    rates = [learning_rate(step / 100, settings) for step in range(101)]
    assert 0 < rates[0] < rates[5] < rates[10] == rates[50] == 1.0
    assert rates[74] == 1.0 > rates[80] > rates[99] > rates[100] == 0


def test_a_loss_that_is_not_finite_names_the_step(planted, planted_rows, short, world, tmp_path: Path) -> None:
    broken = planted_rows()
    broken.batch = lambda step, *rest: planted.batch(step, *rest) * (float("nan") if step == 24 else 1.0)
    path = tmp_path / "state.safetensors"
    with pytest.raises(NotFiniteError, match="loss is nan at step 30; the last good checkpoint is step 20"):
        train_dictionary(broken, short, world=world, checkpoint=path)
    with pytest.raises(NotFiniteError, match="no checkpoint before it"):
        train_dictionary(broken, short, world=world)


def test_rows_that_do_not_differ_are_refused(planted_rows, short: SAESettings, world: World) -> None:
    constant = planted_rows()
    constant.mean_square = 0.0
    with pytest.raises(NotFiniteError, match=r"mean squared distance from their mean is 0\.0"):
        train_dictionary(constant, short, world=world)


def test_fewer_rows_than_a_batch_is_an_error(planted, short: SAESettings, world: World) -> None:
    with pytest.raises(InputError, match="100 rows do not fill a batch of 128"):
        train_dictionary(planted, replace(short, rows=100), world=world)


def test_the_log_file_holds_every_event_and_times_apart(planted, short, world: World, tmp_path) -> None:
    path = tmp_path / "log" / "train.jsonl"
    train_dictionary(planted, short, world=world, log=jsonl_log(path), checkpoint=tmp_path / "state.safetensors")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == [10, 20, 30, 40]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [10, 20, 30, 40]
    assert events[-1].pop("timing")["seconds"] > 0
    assert events[-1] == {"event": "done", "step": 40}


def test_provenance_is_plain_json(trained: TrainedSAE) -> None:
    assert json.loads(json.dumps(trained.provenance))["rows"] == "planted"


def test_bfloat16_products_learn_as_well(planted, short: SAESettings, world: World) -> None:
    settings = replace(short, rows=200 * 128)
    lower = World.local(precision="bfloat16", device="cpu")
    low = train_dictionary(planted, replace(settings, precision="bfloat16"), world=lower).sae
    full = train_dictionary(planted, settings, world=world).sae
    held_out = [planted.batch(0, 2000, 77)]
    difference = evaluate(low, held_out, world).fve - evaluate(full, held_out, world).fve
    assert abs(difference) < 0.02


def test_random_rows_are_reproduced_by_their_generator(planted) -> None:
    assert torch.equal(planted.batch(3, 10, 0), planted.batch(3, 10, 0))
    assert generator(1, 2).initial_seed() != generator(2, 1).initial_seed()


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka", "jumprelu"])
def test_every_architecture_explains_held_out_rows_at_about_k(architecture: str, planted, world: World) -> None:
    settings = SAESettings(
        architecture=architecture, d_sae=128, k=4, rows=150_000, batch_size=512, lr=1e-2, precision="float32"
    )
    trained = train_dictionary(planted, settings, world=world)
    assert trained.sae.config.architecture == "jumprelu"
    metrics = evaluate(trained.sae, [planted.batch(step, 1000, 77) for step in range(5)], world)
    assert metrics.fve > 0.85
    assert metrics.l0 == pytest.approx(4, rel=0.15)


def test_dictionaries_learned_together_end_as_they_would_alone(planted, planted_rows, short, world: World) -> None:
    other = planted_rows(features=40)
    jobs = [
        Job(planted, short),
        Job(planted, replace(short, seed=1)),
        Job(planted, replace(short, k=8, d_sae=64, architecture="batchtopk")),
        Job(other, short),
    ]
    together = train(jobs, world=world)
    for job, trained in zip(jobs, together, strict=True):
        alone = train_dictionary(job.rows, job.settings, world=world).sae.state_dict()
        assert all(torch.equal(alone[name], weight) for name, weight in trained.sae.state_dict().items())


def test_dictionaries_that_read_other_batches_are_not_learned_together(planted, short, world: World) -> None:
    with pytest.raises(InputError, match="share batch_size; run these one after another"):
        Training([Job(planted, short), Job(planted, replace(short, batch_size=64))], world)


def test_k_falls_to_its_value_over_its_warmup() -> None:
    settings = SAESettings(k=10, k_warmup=0.5)
    assert [codes_a_row(progress, settings) for progress in (0.0, 0.25, 0.5, 1.0)] == [40, 25, 10, 10]
    assert codes_a_row(0.0, SAESettings(k=10)) == 10


def test_a_plateau_brings_the_decay_forward() -> None:
    settings = SAESettings(lr=1.0, patience=100 * 2048, decay=0.25)
    watch = Plateau(settings, 1000)
    for step in range(0, 700, 10):
        watch.look(step, min(0.8, step / 100))
        if watch.end:
            break
    assert 150 < step < 500
    assert watch.last == step + 250
    assert learning_rate(watch.progress(step), settings) == 1.0
    assert learning_rate(watch.progress(watch.last), settings) == 0
    never = Plateau(replace(settings, patience=None), 1000)
    never.look(900, 0.0)
    assert never.last == 1000


def test_an_exploding_loss_names_the_step(planted, planted_rows, short, world: World) -> None:
    broken = planted_rows()
    broken.batch = lambda step, *rest: planted.batch(step, *rest) * (1e6 if step == 29 else 1.0)
    with pytest.raises(NotFiniteError, match=r"the loss is .* at step 30"):
        train_dictionary(broken, short, world=world)


def test_the_default_rate_falls_with_the_root_of_the_width() -> None:
    assert SAESettings(d_sae=16384).peak_lr == pytest.approx(SAESettings(d_sae=4096).peak_lr / 2)
    assert SAESettings(lr=0.1, d_sae=16384).peak_lr == 0.1


def test_how_many_features_are_dead_is_not_told_before_any_can_be(planted, short: SAESettings, world: World) -> None:
    log, rows = Kept(), short.rows // 2
    train_dictionary(planted, replace(short, dead_after_rows=rows), world=world, log=log)
    for facts in log.facts:
        assert (facts.dead is None) == (facts.step * short.batch_size <= rows)
    assert {facts.dead is None for facts in log.facts} == {True, False}
