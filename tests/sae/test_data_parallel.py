"""Two processes learn what one learns, and a GPU learns what a CPU learns."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sae_steer
from sae_steer.sae import learner
from sae_steer.sae.rules import RULES
from sae_steer.sae.training import Job, train, train_dictionary
from sae_steer.settings import SAESettings
from sae_steer.world import World

TWO = """
import sys
sys.path.insert(0, {tests!r})
import torch
from safetensors.torch import save_file
from conftest import PlantedRows
from sae_steer.world import joined
from sae_steer.sae.training import Job, train
from sae_steer.settings import SAESettings

torch.set_num_threads(1)
with joined(precision="float32", device="cpu") as world:
    rows = PlantedRows()
    learned = train([Job(rows, settings) for settings in {settings!r}], world=world)
    if world.is_first:
        save_file({{f"{{i}}.{{n}}": w for i, d in enumerate(learned) for n, w in d.sae.state_dict().items()}}, {out!r})
"""


def test_two_processes_learn_what_one_learns(planted, short: SAESettings, world: World, tmp_path: Path) -> None:
    settings = [replace(short, architecture=architecture) for architecture in RULES]
    script, out = tmp_path / "two.py", tmp_path / "two.safetensors"
    script.write_text(TWO.format(tests=str(Path(__file__).parent), settings=settings, out=str(out)))
    root = Path(sae_steer.__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    two = load_file(out)
    one = train([Job(planted, each) for each in settings], world=world)
    for number, trained in enumerate(one):
        for name, weight in trained.sae.state_dict().items():
            torch.testing.assert_close(two[f"{number}.{name}"], weight, rtol=0, atol=1e-6)


def on_a_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")(test))


@on_a_gpu
@pytest.mark.parametrize("architecture", RULES)
def test_a_gpu_learns_what_a_cpu_learns(
    architecture: str, planted, short: SAESettings, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner, "LOOK_EVERY", 1)  # a CPU looks for dead features at every step
    settings = replace(short, architecture=architecture)
    cpu = train_dictionary(planted, settings, world=world).sae.state_dict()
    gpu = train_dictionary(planted, settings, world=World.local(precision="float32", device="cuda")).sae.state_dict()
    for name, weight in cpu.items():
        torch.testing.assert_close(gpu[name].cpu(), weight, rtol=1e-3, atol=1e-4)


@on_a_gpu
@pytest.mark.parametrize("architecture", RULES)
def test_on_a_gpu_too_the_same_seed_gives_the_same_bytes(architecture: str, planted, short: SAESettings) -> None:
    settings, low = replace(short, architecture=architecture, precision="bfloat16"), World.local(device="cuda")
    first, again = (train_dictionary(planted, settings, world=low).sae.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@on_a_gpu
def test_a_step_captured_as_a_graph_is_that_step(planted, short: SAESettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, gpu = replace(short, dead_after_rows=10**9, k_warmup=0.5), World.local(device="cuda")
    graphs = train_dictionary(planted, settings, world=gpu).sae.state_dict()
    met = []
    monkeypatch.setattr(learner.Captured, "of", lambda function, x: met.append(x) or function)
    plain = train_dictionary(planted, settings, world=gpu).sae.state_dict()
    assert len(met) == 1, "once k has fallen"
    assert all(torch.equal(graphs[name], plain[name]) for name in graphs)
