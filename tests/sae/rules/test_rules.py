"""A rule is found by its name, takes its own knobs and no others, and says what it is stored as."""

import pytest
import torch

from sae_steer.errors import InputError
from sae_steer.sae.rules import RULES, rule_of
from sae_steer.sae.rules.jumprelu import JumpReLU
from sae_steer.sae.rules.matryoshka import Matryoshka
from sae_steer.sae.training import train_dictionary
from sae_steer.settings import SAESettings
from sae_steer.world import World


@pytest.mark.parametrize("name", RULES)
def test_every_rule_stands_in_the_file_of_its_name(name: str) -> None:
    rule = rule_of(name)
    assert type(rule).__module__ == f"sae_steer.sae.rules.{name}"
    sae = rule.stored(8, 24, 3)
    assert sae.W_enc.shape == (8, 24)
    assert rule.prefixes(24)[-1] == 24


def test_a_rule_takes_its_own_knobs() -> None:
    assert rule_of("jumprelu,bandwidth=0.2,sparsity=3") == JumpReLU(bandwidth=0.2, sparsity=3.0)
    assert rule_of("matryoshka,shares=0.25/0.5") == Matryoshka(shares=(0.25, 0.5))
    assert rule_of("matryoshka,shares=0.25/0.5").prefixes(16) == [4, 8, 16]
    assert rule_of("matryoshka,shares=1").prefixes(16) == [16]


@pytest.mark.parametrize(
    ("architecture", "line"),
    [
        ("topkk", "no architecture 'topkk'; choose one of topk, batchtopk, matryoshka, jumprelu"),
        ("topk,bandwidth=1", "topk has no knob 'bandwidth'; it has none"),
        ("jumprelu,width=1", "jumprelu has no knob 'width'; it has bandwidth, sparsity"),
        ("jumprelu,bandwidth", "jumprelu cannot read 'bandwidth'; write bandwidth=NUMBER"),
        ("jumprelu,bandwidth=1/2", "jumprelu cannot read 'bandwidth=1/2'"),
        ("jumprelu,bandwidth=0", r"JumpReLU.bandwidth is 0\.0, and takes a number above 0"),
        ("matryoshka,shares=2", r"Matryoshka.shares is \(2\.0,\), and takes a sequence, each a number above 0"),
    ],
)
def test_what_a_rule_cannot_read_is_told_in_a_line(architecture: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        rule_of(architecture)


@pytest.mark.parametrize("knob", ["jumprelu,bandwidth=0.5", "jumprelu,sparsity=9", "matryoshka,shares=0.5"])
def test_a_knob_changes_what_is_learned(knob: str, planted, short: SAESettings, world: World) -> None:
    name = knob.partition(",")[0]
    usual, other = (
        train_dictionary(planted, SAESettings(**(vars(short) | {"architecture": architecture})), world=world).sae
        for architecture in (name, knob)
    )
    assert not torch.equal(usual.W_dec, other.W_dec)
