"""Every command that computes says at which precision, in one line on stderr, and holds to what was begun."""

import click
import pytest
from click.testing import CliRunner, Result
from toy import write_toy_pair

from sae_steer.capability import Capability, assumed
from sae_steer.cli import main
from sae_steer.records import read_json

AMX = Capability(frozenset({"avx2", "avx512", "avx512_bf16", "amx_bf16"}))
HASWELL = Capability(frozenset({"avx2"}))
CACHE = (
    "cache",
    "--pair",
    "toy",
    "--train-plans",
    "12",
    "--scan-plans",
    "8",
    "--tune-plans",
    "4",
    "--confirm-plans",
    "4",
)
LEARN = ("train-sae", "--pair", "toy", "--k", "4", "--d-sae", "32", "--rows", "1024", "--batch-size", "256")
COMPUTING = ("run", "cache", "train-sae", "train-pair", "selftest")


def steer(machine: Capability, *arguments: str) -> Result:
    with assumed(machine):
        return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An empty folder to be in, with the toy pair."""
    monkeypatch.chdir(tmp_path)
    return write_toy_pair(tmp_path / "toy")


@pytest.mark.parametrize("command", COMPUTING)
def test_every_command_that_chooses_takes_a_precision_and_leaves_it_to_the_machine(command):
    (option,) = [option for option in main.commands[command].params if option.name == "precision"]
    assert option.default == "auto"
    assert isinstance(option.type, click.Choice)
    assert tuple(option.type.choices) == ("auto", "float32", "bfloat16")


@pytest.mark.parametrize(
    ("machine", "line"),
    [
        (AMX, "precision bfloat16, by what this machine has (AMX)"),
        (HASWELL, "precision float32, by what this machine has (AVX2)"),
    ],
)
def test_the_decision_is_one_line_on_stderr(toy, machine, line):
    said = steer(machine, *CACHE)
    assert said.exit_code == 0, said.output
    assert [one for one in said.stderr.splitlines() if "precision" in one] == [line]
    assert said.stdout.strip() == "activations/toy"
    assert read_json(toy.parent / "activations/toy/manifest.json")["computed"]["precision"] == line.split()[1].strip(
        ","
    )


def test_what_was_made_on_another_machine_is_found_and_named_or_refused(toy):
    assert steer(AMX, *CACHE).exit_code == 0
    found = steer(HASWELL, *CACHE)
    assert found.exit_code == 0
    assert "precision bfloat16, as the cache in activations/toy was begun (AVX2); bfloat16 is emulated" in found.stderr
    refused = steer(HASWELL, *CACHE, "--precision", "float32")
    assert refused.exit_code == 1
    assert "begun at bfloat16, and --precision float32 was asked; leave --precision out" in refused.stderr
    learned = steer(HASWELL, *LEARN)
    assert learned.exit_code == 0, learned.output
    assert "precision float32, by what this machine has (AVX2)" in learned.stderr
    again = steer(AMX, *LEARN)
    assert (
        "precision float32, as the dictionary in runs/toy/saes/adhd_L2_hook_resid_post_k4_d32 was begun" in again.stderr
    )
