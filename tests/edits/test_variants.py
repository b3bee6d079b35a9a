"""Every variant that is registered does what it says it intends, and is told from the others."""

import pytest
import torch
from toy import FEATURE, toy_sae

from sae_steer.edits.controls import FAMILIES, DrawnFrom, color_of_family
from sae_steer.edits.variants import VARIANTS, Direction, all_variants, variant_named
from sae_steer.randomness import generator
from sae_steer.selftest.kinds import KINDS, RIGHT

ROWS = (
    torch.randn(40, 16, generator=generator(8))
    + torch.tensor([0.0, 12.0] + 14 * [0.0]) * (torch.arange(40) % 2)[:, None]
)
"""The cause stands high in every other row."""


@pytest.fixture(scope="module")
def direction():
    sae = toy_sae()
    return Direction("the cause", sae.direction(FEATURE), 1.7, "here", sae, FEATURE)


@pytest.mark.parametrize("variant", all_variants(1), ids=lambda variant: variant.name)
@pytest.mark.parametrize("dose", [0.0, 0.5, 2.0])
def test_an_edit_moves_every_row_as_is_intended_and_nothing_at_dose_zero(variant, dose, direction):
    unit = torch.nn.functional.normalize(torch.randn(16, generator=generator(9)), dim=0)
    moved = variant.edit(direction, dose, unit)(ROWS) - ROWS
    torch.testing.assert_close(moved, variant.intended(direction, dose, unit, ROWS), atol=1e-5, rtol=1e-4)
    assert bool(moved.any()) == (dose > 0)


@pytest.mark.parametrize("variant", all_variants(1), ids=lambda variant: variant.name)
def test_a_variant_pushes_the_way_it_predicts(variant, direction):
    along = (variant.edit(direction, 1.0, direction.unit)(ROWS) - ROWS) @ direction.unit
    assert (variant.predicted_sign * along >= 0).all()
    assert (variant.predicted_sign * along > 0).any()


def test_names_titles_and_released_names_tell_variants_apart():
    for what in ("name", "title", "released"):
        values = [getattr(kind, what) for kind in VARIANTS]
        assert all(values)
        assert len(set(values)) == len(values)
    assert variant_named("subtract").released == "subtract_from_target"
    assert variant_named("no such") is None


def test_a_bare_direction_has_the_variants_that_need_no_feature(direction):
    bare = Direction("a vector", direction.unit, 1.0, "here")
    assert {v.name for v in direction.variants(1)} - {v.name for v in bare.variants(1)} == {"zero_ablate"}


def test_every_variant_has_its_truth_in_the_selftest():
    assert {kind.name for kind in VARIANTS} == set(RIGHT)
    assert all(set(row) <= set(KINDS) for row in RIGHT.values())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_draws_unit_directions_by_seed_and_has_a_colour(family):
    stream, rows = ROWS.numpy(), torch.nn.functional.normalize(ROWS, dim=1)
    drawn, again, other = (family.draw(DrawnFrom(stream, rows, seed), 25) for seed in (0, 0, 1))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(len(drawn)))
    assert torch.equal(drawn, again)
    assert family.name == "matched features" or not torch.equal(drawn, other)
    assert color_of_family(family.name) == family.color != color_of_family("of another version")
