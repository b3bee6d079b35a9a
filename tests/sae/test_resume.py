"""A run that was stopped, however rudely, ends with the bytes of one that was not."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sae_steer
from sae_steer.errors import StaleError, SteerError
from sae_steer.files import read_tensors
from sae_steer.sae import learner
from sae_steer.sae.architectures import LinearSAE, TopKSAE
from sae_steer.sae.kernels import cpu as compiled
from sae_steer.sae.log import Quiet, StepFacts
from sae_steer.sae.rules import RULES
from sae_steer.sae.training import Job, Training, train_dictionary
from sae_steer.settings import SAESettings
from sae_steer.world import World


class StopAt(Quiet):
    """Does something rude after a step, once."""

    def __init__(self, at: int, act) -> None:
        self.at, self.act = at, act

    def step(self, facts: StepFacts) -> None:
        if facts.step == self.at:
            self.act()


def assert_same_weights(one: LinearSAE, other: LinearSAE) -> None:
    theirs = other.state_dict()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, theirs[name]), name


def press_ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def raise_error() -> None:
    raise RuntimeError("killed here")


@pytest.fixture(scope="module")
def uninterrupted(planted, short: SAESettings, world: World) -> TopKSAE:
    return train_dictionary(planted, short, world=world).sae


@pytest.fixture(scope="module", params=RULES)
def each(request, planted, short: SAESettings, world: World) -> tuple[SAESettings, LinearSAE]:
    """The settings of an architecture whose k falls during the run, and the dictionary of a run that was left alone."""
    settings = replace(short, architecture=request.param, k_warmup=0.6, patience=10**6)
    return settings, train_dictionary(planted, settings, world=world).sae


@pytest.mark.parametrize("at", [20, 30])
def test_stopped_and_resumed_equals_uninterrupted(
    at: int, planted, each: tuple[SAESettings, LinearSAE], world: World, tmp_path: Path
) -> None:
    settings, uninterrupted = each
    path = tmp_path / "state.safetensors"
    with pytest.raises(RuntimeError, match="killed here"):
        train_dictionary(planted, settings, world=world, checkpoint=path, log=StopAt(at, raise_error))
    assert read_tensors(path)[1]["step"] == at - 10, "that of the step itself comes after the log"
    assert_same_weights(train_dictionary(planted, settings, world=world, checkpoint=path).sae, uninterrupted)


def test_the_end_of_n_steps_goes_on_to_the_end_of_2n_at_the_precision_of_the_default(
    planted, each: tuple[SAESettings, LinearSAE], tmp_path: Path
) -> None:
    low, path = World.local(precision="bfloat16", device="cpu"), tmp_path / "state.safetensors"
    settings = replace(each[0], precision="bfloat16", checkpoint_every=1000)
    with pytest.raises(KeyboardInterrupt):
        train_dictionary(planted, settings, world=low, checkpoint=path, log=StopAt(20, press_ctrl_c))
    assert read_tensors(path)[1]["step"] == 20
    resumed = train_dictionary(planted, settings, world=low, checkpoint=path).sae
    assert_same_weights(resumed, train_dictionary(planted, settings, world=low).sae)


def test_a_run_that_screens_in_int8_resumes_to_the_same_bytes(planted_rows, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "screening_pays", lambda d_sae, k: True)
    rows, low, path = planted_rows(d_in=256), World.local(precision="bfloat16", device="cpu"), tmp_path / "state"
    settings = SAESettings(d_sae=1024, k=16, rows=30 * 256, batch_size=256, checkpoint_every=10)
    with pytest.raises(RuntimeError, match="killed here"):
        train_dictionary(rows, settings, world=low, checkpoint=path, log=StopAt(20, raise_error))
    resumed = train_dictionary(rows, settings, world=low, checkpoint=path).sae
    assert_same_weights(resumed, train_dictionary(rows, settings, world=low).sae)


def test_int8_is_given_up_where_it_decides_little_and_stays_so_after_a_kill(
    planted, short: SAESettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "screening_pays", lambda d_sae, k: True)
    monkeypatch.setattr(compiled, "SPREAD", 1e6)
    monkeypatch.setattr(learner, "WATCHED", 20)
    low, path = World.local(precision="bfloat16", device="cpu"), tmp_path / "state.safetensors"
    settings = replace(short, precision="bfloat16")
    training = Training([Job(planted, settings)], low)
    for step in range(4):
        assert training.state.learners[0].screens == (step < 3), "a tenth of 20 batches is soon spent"
        training.step([planted.batch(step, 128, 0)])
    with pytest.raises(RuntimeError, match="killed here"):
        train_dictionary(planted, settings, world=low, checkpoint=path, log=StopAt(20, raise_error))
    monkeypatch.setattr(compiled, "SPREAD", 0.0)  # what was given up is not tried again
    resumed = train_dictionary(planted, settings, world=low, checkpoint=path).sae
    monkeypatch.setattr(compiled, "SPREAD", 1e6)
    assert_same_weights(resumed, train_dictionary(planted, settings, world=low).sae)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_wait_for_their_step_and_leave_a_checkpoint(
    number, planted, short: SAESettings, world: World, tmp_path: Path, uninterrupted: TopKSAE
) -> None:
    path = tmp_path / "state.safetensors"
    rare = replace(short, checkpoint_every=1000)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train_dictionary(
            planted, rare, world=world, checkpoint=path, log=StopAt(20, lambda: signal.raise_signal(number))
        )
    assert signal.getsignal(number) is before
    assert read_tensors(path)[1]["step"] == 20
    assert_same_weights(train_dictionary(planted, rare, world=world, checkpoint=path).sae, uninterrupted)


def test_ctrl_c_without_a_checkpoint_still_stops(planted, short: SAESettings, world: World) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_dictionary(planted, short, world=world, log=StopAt(10, press_ctrl_c))


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(
    planted, short: SAESettings, world: World, tmp_path: Path, uninterrupted: TopKSAE, monkeypatch
) -> None:
    path = tmp_path / "state.safetensors"

    def half_written(tensors: dict[str, Tensor], file: Path, facts: dict) -> None:
        Path(file).write_bytes(b"half a checkpoint")
        raise_error()

    def break_saving() -> None:
        monkeypatch.setattr("safetensors.torch.save_file", half_written)

    with pytest.raises(RuntimeError, match="killed here"):
        train_dictionary(planted, short, world=world, checkpoint=path, log=StopAt(30, break_saving))
    monkeypatch.undo()
    assert read_tensors(path)[1]["step"] == 20
    assert_same_weights(train_dictionary(planted, short, world=world, checkpoint=path).sae, uninterrupted)


def test_a_finished_checkpoint_is_the_finished_dictionary(
    planted, short: SAESettings, world: World, tmp_path: Path, uninterrupted: TopKSAE
) -> None:
    path = tmp_path / "state.safetensors"
    train_dictionary(planted, short, world=world, checkpoint=path)
    again = train_dictionary(planted, short, world=world, checkpoint=path, log=StopAt(10, raise_error))
    assert_same_weights(again.sae, uninterrupted)


def test_a_checkpoint_of_another_run_is_refused(planted, planted_rows, short, world, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    train_dictionary(planted, short, world=world, checkpoint=path)
    with pytest.raises(StaleError, match="other settings"):
        train_dictionary(planted, replace(short, lr=2e-2), world=world, checkpoint=path)
    with pytest.raises(StaleError, match="other rows"):
        train_dictionary(planted_rows(fingerprint="else"), short, world=world, checkpoint=path)
    with pytest.raises(StaleError, match="other precision"):
        train_dictionary(planted, short, world=World.local(precision="bfloat16", device="cpu"), checkpoint=path)


def test_a_torn_file_is_named_in_one_line(planted, short: SAESettings, world: World, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"half a checkpoint")
    with pytest.raises(SteerError, match="not a whole checkpoint"):
        train_dictionary(planted, short, world=world, checkpoint=path)


SLOW_RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from conftest import PlantedRows
from sae_steer.world import World
from sae_steer.sae.training import train_dictionary
from sae_steer.settings import SAESettings

rows = PlantedRows()
batch = rows.batch
rows.batch = lambda *arguments: (time.sleep(0.05), batch(*arguments))[1]
world = World.local(precision="float32", device="cpu")
train_dictionary(rows, {settings!r}, world=world, checkpoint=Path({path!r}))
"""


def test_kill_9_then_again_equals_uninterrupted(
    planted, short: SAESettings, world: World, tmp_path: Path, uninterrupted: TopKSAE
) -> None:
    path = tmp_path / "state.safetensors"
    script = SLOW_RUN.format(tests=str(Path(__file__).parent), settings=short, path=str(path))
    root = Path(sae_steer.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(root)})
    try:
        deadline = time.monotonic() + 60
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    assert read_tensors(path)[1]["step"] < 40
    assert_same_weights(train_dictionary(planted, short, world=world, checkpoint=path).sae, uninterrupted)
