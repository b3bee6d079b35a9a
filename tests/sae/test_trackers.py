"""TensorBoard and Weights & Biases are told what the other logs are, and are asked for or not there at all."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae_steer.errors import InputError, SteerError
from sae_steer.sae.log import Log, StepFacts
from sae_steer.sae.trackers import TRACKERS, tracker


def facts(step: int, name: str = "", loss: float = 0.25, dead: float | None = 0.125) -> StepFacts:
    return StepFacts(name=name, step=step, steps=40, loss=loss, fve=1 - loss, dead=dead, lr=0.5)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(told.step, told.value) for told in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_is_told_every_step_and_dictionary(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log = tracker("tensorboard", tmp_path, "run", {})
    assert isinstance(log, Log)
    for step in (10, 20):
        log.step(facts(step, "one"))
        log.step(facts(step, "two", loss=0.75))
    log.done(20)
    found = scalars(tmp_path / "tensorboard")
    assert set(found) == {f"{name}/{figure}" for name in ("one", "two") for figure in ("loss", "fve", "dead", "lr")}
    assert found["one/loss"] == [(10, 0.25), (20, 0.25)]
    assert found["two/fve"] == [(10, 0.25), (20, 0.25)]
    assert found["one/dead"][0] == (10, 0.125)


def test_what_a_checkpoint_has_seen_is_on_disk_and_a_resumed_run_tells_each_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    killed = tracker("tensorboard", tmp_path, "run", {})
    for step in (10, 20, 30):
        killed.step(facts(step))
    killed.checkpoint(30, tmp_path / "state.safetensors")
    assert len(scalars(tmp_path / "tensorboard")["loss"]) == 3
    resumed = tracker("tensorboard", tmp_path, "run", {})
    for step in (20, 30, 40):
        resumed.step(facts(step, loss=0.5))
    resumed.done(40)
    assert scalars(tmp_path / "tensorboard")["loss"] == [(10, 0.25), (20, 0.5), (30, 0.5), (40, 0.5)]


def test_a_share_of_dead_features_that_cannot_be_known_yet_is_told_to_no_log(tmp_path: Path, capsys) -> None:
    pytest.importorskip("tensorboard")
    from sae_steer.terminal import Bar, TrainingBar

    log = tracker("tensorboard", tmp_path, "run", {})
    for step, dead in ((10, None), (20, 0.5)):
        log.step(facts(step, dead=dead))
    log.done(20)
    assert scalars(tmp_path / "tensorboard")["dead"] == [(20, 0.5)]
    TrainingBar(Bar("train-sae")).step(facts(40, dead=None))
    assert "dead not known yet" in capsys.readouterr().err


class FakeRun:
    def __init__(self, **asked) -> None:
        self.asked, self.told, self.ended = asked, [], False

    def log(self, figures: dict, step: int) -> None:
        self.told.append((step, figures))

    def finish(self) -> None:
        self.ended = True


class FakeError(Exception):
    pass


def fake(monkeypatch, init) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict, Error=FakeError))


def test_wandb_is_told_the_settings_and_every_step(tmp_path: Path, monkeypatch) -> None:
    started = []
    fake(monkeypatch, lambda **asked: started.append(FakeRun(**asked)) or started[-1])
    log = tracker("wandb", tmp_path / "training", "adhd", {"adhd": {"k": 40}})
    assert isinstance(log, Log)
    log.step(facts(10))
    log.checkpoint(10, tmp_path)
    (run,) = started
    assert not run.ended
    log.done(10)
    assert run.ended
    assert run.told == [(10, {"loss": 0.25, "fve": 0.75, "dead": 0.125, "lr": 0.5})]
    assert run.asked["config"] == {"adhd": {"k": 40}}
    assert (run.asked["project"], run.asked["name"]) == ("sae_steer", "adhd")
    assert Path(run.asked["dir"]).is_dir()


def test_a_wandb_that_does_not_start_is_told_in_one_line(tmp_path: Path, monkeypatch) -> None:
    def refuse(**asked):
        raise FakeError("no API key")

    fake(monkeypatch, refuse)
    with pytest.raises(SteerError, match="no API key; run `wandb login`, or set WANDB_MODE=offline"):
        tracker("wandb", tmp_path, "adhd", {})


def test_the_real_wandb_writes_an_offline_run(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = tracker("wandb", tmp_path, "adhd", {"adhd": {"k": 40}})
    log.step(facts(10))
    log.step(facts(20))
    log.done(20)
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 30  # its service writes in a process of its own
    while b"0.75" not in stored.read_bytes() and time.monotonic() < end:
        time.sleep(0.1)
    assert b"0.75" in stored.read_bytes()


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_package_that_is_not_here_is_named_with_how_to_get_it(kind: str, tmp_path: Path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(InputError, match=f"needs the package {kind}, which is not here; pip install {kind}"):
        tracker(kind, tmp_path, "run", {})


def test_a_log_that_there_is_none_of(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no log 'mlflow'; choose one of tensorboard, wandb"):
        tracker("mlflow", tmp_path, "run", {})


def test_neither_is_imported_before_it_is_asked_for() -> None:
    code = "import sys, sae_steer.sae.trackers\nprint([n for n in ('tensorboard', 'wandb') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
