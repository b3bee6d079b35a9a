"""Training a decoder: pure in the step, exact across stops, loud when it breaks."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_steer.errors import NotFiniteError, StaleError
from sae_steer.files import read_tensors
from sae_steer.model.batching import bucket, pad
from sae_steer.model.decoder import Decoder
from sae_steer.model.training import TrainingState, held_out_loss, schedule, train
from sae_steer.randomness import generator
from sae_steer.settings import DecoderSettings, PairTrainingSettings
from sae_steer.world import World

PAD = 40
SHAPE = DecoderSettings(n_layers=2, n_heads=2, n_kv_heads=2, d_model=16, d_head=8, d_mlp=24, d_vocab=41)
SETTINGS = PairTrainingSettings(tokens_per_batch=128, checkpoint_every=4, lr=1e-2)
STEPS = 12
WORLDS = {precision: World.local(precision=precision, device="cpu") for precision in ("float32", "bfloat16")}
WORLD = WORLDS["float32"]


def texts(count: int = 60) -> list[list[int]]:
    """Counting upwards from a random start: something to learn."""
    drawn = torch.randint(0, 30, (count,), generator=generator(1)).tolist()
    return [[(start + i) % 40 for i in range(3 + (7 * number) % 20)] for number, start in enumerate(drawn)]


BATCHES = bucket(texts(), tokens_per_batch=128, pad_id=PAD, seed=0)


def start(settings: PairTrainingSettings = SETTINGS, world: World = WORLD) -> TrainingState:
    return TrainingState.fresh(SHAPE, settings, stream=0, world=world)


def run(state: TrainingState, path, *, stop: int = STEPS, settings=SETTINGS, world=WORLD, on_step=None) -> Decoder:
    told = {} if on_step is None else {"on_step": on_step}
    train(
        state, lambda step: BATCHES[step % len(BATCHES)], settings,
        pad_id=PAD, stop=stop, steps=STEPS, world=world, checkpoint=path, identity={"run": "a", "lr": settings.lr},
        held_out=BATCHES[:2], **told,
    )  # fmt: skip
    return state.model


def resume(path, identity: dict | None = None, settings=SETTINGS, world=WORLD) -> TrainingState:
    state = start(settings, world)
    state.load(path, identity or {"run": "a", "lr": settings.lr})
    return state


def assert_same_weights(one: Decoder, other: Decoder) -> None:
    theirs = other.state_dict()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def test_training_lowers_the_loss(tmp_path):
    state = start()
    before = held_out_loss(state.model, BATCHES, PAD, WORLD)
    run(state, tmp_path / "state")
    assert held_out_loss(state.model, BATCHES, PAD, WORLD) < before - 0.3
    assert state.log[-1]["loss"] < state.log[0]["loss"]


@pytest.mark.parametrize("precision", WORLDS)
def test_trained_twice_the_bytes_are_the_same(tmp_path, precision):
    for name in ("one", "two"):
        run(start(world=WORLDS[precision]), tmp_path / name, world=WORLDS[precision])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_another_seed_gives_other_weights():
    one, other = start(), start(replace(SETTINGS, seed=1))
    assert not torch.equal(one.model.embed_tokens.weight, other.model.embed_tokens.weight)


@pytest.mark.parametrize("precision", WORLDS)
@pytest.mark.parametrize("stopped_at", [4, 6, 11])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stopped_at, precision):
    world = WORLDS[precision]
    whole = run(start(world=world), tmp_path / "whole", world=world)

    def kill(done, total, note=""):
        if done == stopped_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(start(world=world), tmp_path / "parts", world=world, on_step=kill)
    state = resume(tmp_path / "parts", world=world)
    assert state.step == stopped_at // 4 * 4
    assert_same_weights(run(state, tmp_path / "parts", world=world), whole)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_the_log_survives_a_stop(tmp_path):
    whole, halves = start(), start()
    run(whole, tmp_path / "whole")
    run(halves, tmp_path / "halves", stop=8)
    rest = resume(tmp_path / "halves")
    run(rest, tmp_path / "halves")
    assert rest.log == whole.log
    assert [entry["step"] for entry in whole.log] == [4, 8, 12]


def test_a_finished_run_trains_no_further(tmp_path):
    run(start(), tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    run(resume(tmp_path / "state"), tmp_path / "state", on_step=lambda *told: pytest.fail("a step was made"))
    assert (tmp_path / "state").read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path):
    run(start(), tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(StaleError, match="run with other lr;"):
        resume(tmp_path / "state", settings=replace(SETTINGS, lr=2e-2))
    with pytest.raises(StaleError, match="run with other run;"):
        resume(tmp_path / "state", {"run": "b", "lr": SETTINGS.lr})
    assert (tmp_path / "state").read_bytes() == before


def test_a_loss_that_leaves_the_numbers_is_named_and_the_last_good_checkpoint_stays(tmp_path):
    run(start(), tmp_path / "state", stop=4)
    before = (tmp_path / "state").read_bytes()
    state = resume(tmp_path / "state")
    state.model.norm.weight.data[0] = math.inf
    with pytest.raises(NotFiniteError, match=r"between steps 4 and 8; .* lower --lr \(it was 0.01\)"):
        run(state, tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before


def test_weights_broken_by_the_last_step_before_a_checkpoint_are_noticed(tmp_path):
    def spoil(done: float, total: float, note: str = "") -> None:
        if done == 3:
            for group in state.optimiser.state.values():
                group["exp_avg"].fill_(math.nan)

    state = start()
    with pytest.raises(NotFiniteError, match="between steps 0 and 4"):
        run(state, tmp_path / "state", on_step=spoil)
    assert not (tmp_path / "state").exists()


def test_the_loss_is_the_mean_over_real_tokens_however_batches_were_cut():
    model, rows = start().model, texts(20)
    cuts = [bucket(rows, tokens_per_batch=size, pad_id=PAD, seed=0) for size in (32, 200)]
    one, other = (held_out_loss(model, batches, PAD, WORLD) for batches in cuts)
    by_hand = torch.cat([_losses(model, row) for row in rows]).mean()
    assert one == pytest.approx(other, rel=1e-5)
    assert one == pytest.approx(float(by_hand), rel=1e-5)


@torch.no_grad()
def _losses(model: Decoder, row: list[int]) -> Tensor:
    tokens = torch.tensor([row])
    return cross_entropy(model(tokens)[0, :-1], tokens[0, 1:], reduction="none")


def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth():
    rates = [schedule(step / 1000, 0.02) for step in range(1000)]
    assert 0 < rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    peak = rates.index(max(rates))
    assert abs(peak - 20) <= 1
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert schedule(1.0, 0.02) == pytest.approx(0.1)


def test_batches_keep_every_text_once(tmp_path):
    rows = texts(150)
    batches = bucket(rows, tokens_per_batch=128, pad_id=PAD, seed=0, chunk=64)
    found = [[token for token in row if token != PAD] for batch in batches for row in batch.tolist()]
    assert sorted(found) == sorted(rows)
    assert all(batch.numel() <= 128 for batch in batches)


def test_the_order_of_batches_is_the_seeds():
    one, same, other = (bucket(texts(), tokens_per_batch=128, pad_id=PAD, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_text_longer_than_a_batch_is_a_batch_of_its_own():
    batches = bucket([[1] * 300, [2] * 3], tokens_per_batch=128, pad_id=PAD, seed=0)
    assert sorted(tuple(batch.shape) for batch in batches) == [(1, 3), (1, 300)]


def test_padding_stands_on_the_right():
    assert pad([[1], [2, 3]], PAD).tolist() == [[1, PAD], [2, 3]]


def test_a_checkpoint_holds_no_pickle(tmp_path):
    run(start(), tmp_path / "state", stop=4)
    tensors, facts = read_tensors(tmp_path / "state")
    assert facts["step"] == 4
    assert {name.split(".")[0] for name in tensors} == {"model", "step", "exp_avg", "exp_avg_sq"}
