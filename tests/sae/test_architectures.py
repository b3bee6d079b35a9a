"""The dictionary is its equations, and says in one line what it cannot do."""

import pytest
import torch

from sae_steer.errors import InputError
from sae_steer.randomness import generator
from sae_steer.sae.architectures import SLAB, JumpReLUConfig, JumpReLUSAE, SparseDictionary, TopKConfig, TopKSAE

X = torch.randn(40, 16, generator=generator(9))


def test_the_dictionary_is_its_equations(random_sae: TopKSAE) -> None:
    preactivations = (X - random_sae.b_dec) @ random_sae.W_enc + random_sae.b_enc
    top = preactivations.topk(5, dim=1)
    f = torch.zeros(40, 64).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(random_sae.encode(X).dense(), f)
    torch.testing.assert_close(random_sae(X), f @ random_sae.W_dec + random_sae.b_dec)


def test_a_jumprelu_dictionary_is_its_equations() -> None:
    sae = JumpReLUSAE(JumpReLUConfig(d_in=16, d_sae=64))
    for number, weight in enumerate(sae.parameters()):
        weight.data.normal_(generator=generator(4, number))
    preactivations = (X - sae.b_dec) @ sae.W_enc + sae.b_enc
    f = preactivations.relu() * (preactivations > sae.threshold)
    assert bool((sae.threshold < 0).any()), "a threshold below zero lets nothing negative through"
    torch.testing.assert_close(sae.encode(X).dense(), f)
    torch.testing.assert_close(sae(X), f @ sae.W_dec + sae.b_dec)
    assert torch.equal(sae.scaled(4.0)(4 * X), 4 * sae(X))
    assert isinstance(sae, SparseDictionary)


def test_codes_do_not_depend_on_the_slabs_rows_are_cut_into(random_sae: TopKSAE) -> None:
    x = torch.randn(SLAB + 7, 16, generator=generator(2))
    dense = torch.cat([random_sae.encode(part).dense() for part in x.split(100)])
    torch.testing.assert_close(random_sae.encode(x).dense(), dense)
    assert random_sae.encode(x[:0]).n_rows == 0


def test_activation_of_a_feature_is_its_column_of_the_codes(random_sae: TopKSAE) -> None:
    dense = random_sae.encode(X).dense()
    for feature in range(64):
        assert torch.equal(random_sae.activation_of(X, feature), dense[:, feature])


def test_a_scaled_dictionary_commutes_with_scaling_its_rows(random_sae: TopKSAE) -> None:
    scaled = random_sae.scaled(4.0)  # a power of two, so that every product is the same but for its exponent
    assert torch.equal(scaled(4 * X), 4 * random_sae(X))
    assert torch.equal(scaled.encode(4 * X).values, 4 * random_sae.encode(X).values)
    assert torch.equal(scaled.W_dec, random_sae.W_dec)


def test_a_features_direction_is_its_decoder_row(random_sae: TopKSAE) -> None:
    assert torch.equal(random_sae.direction(7), random_sae.W_dec[7])


def test_a_feature_out_of_range_is_told_the_range(random_sae: TopKSAE) -> None:
    for feature in (-1, 64):
        line = f"^feature {feature} is not in this dictionary; it has features 0 to 63$"
        with pytest.raises(InputError, match=line):
            random_sae.direction(feature)
        with pytest.raises(InputError, match=line):
            random_sae.activation_of(X, feature)


def test_rows_of_another_width_are_told_both_widths(random_sae: TopKSAE) -> None:
    with pytest.raises(InputError, match="17 dimensions and the dictionary reads 16"):
        random_sae.encode(torch.zeros(3, 17))


@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(4, 8, 9), (4, 8, 0), (0, 8, 2)])
def test_an_impossible_shape_is_refused(d_in: int, d_sae: int, k: int) -> None:
    with pytest.raises(InputError, match=f"got d_in {d_in}, d_sae {d_sae}, k {k}"):
        TopKConfig(d_in=d_in, d_sae=d_sae, k=k)
