"""Features are matched across seeds as they were planted, and the record beside a dictionary belongs to its weights."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sae_steer.errors import InputError
from sae_steer.randomness import generator
from sae_steer.records import read_json, read_table
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.sae.stability import (
    MOST_FEATURES,
    RECORD_FILE,
    TABLE_FILE,
    SeedFolder,
    chance_cosines,
    find_or_compare,
    load_stability,
    match,
    seed_stability,
)
from sae_steer.sae.training import train_dictionary
from sae_steer.settings import SAESettings
from sae_steer.world import World

FOUND = 20
"""Features that every seed has; each seed orders and scales its rows in its own way."""


def seeded(seed: int, *, d_in: int = 64, d_sae: int = 32) -> tuple[TopKSAE, torch.Tensor]:
    """A dictionary whose first `FOUND` directions are those of all seeds, shuffled; and where each of them went."""
    rows = torch.randn(d_sae, d_in, generator=generator(seed, 1))
    rows[:FOUND] = torch.randn(FOUND, d_in, generator=generator(99))
    order = torch.randperm(d_sae, generator=generator(seed, 2))
    sae = TopKSAE(TopKConfig(d_in=d_in, d_sae=d_sae, k=4)).requires_grad_(False)
    sae.W_dec[order] = (0.5 + seed) * rows
    return sae, order


def test_planted_features_are_matched_back_in_every_seed_and_the_others_are_not() -> None:
    saes, orders = zip(*(seeded(seed) for seed in range(3)), strict=True)
    for own, (stability, order) in enumerate(zip(seed_stability(saes), orders, strict=True)):
        others = [orders[other] for other in range(3) if other != own]
        for matches, theirs in zip(stability.matches, others, strict=True):
            assert np.array_equal(matches[order[:FOUND]], theirs[:FOUND])
            assert sorted(matches) == list(range(32)), "one to one"
        assert np.allclose(stability.mean[order[:FOUND]], 1)
        assert (stability.least[order[FOUND:]] < 0.7).all()
        assert (stability.least <= stability.mean + 1e-12).all()
        everything = stability.summary(np.ones(32, bool))
        assert everything["found_in_every_seed"] == {"0.7": FOUND / 32, "0.9": FOUND / 32}
        assert everything["mean"] == pytest.approx(stability.cosines.mean())
        alive = np.isin(np.arange(32), order[:FOUND])
        assert stability.summary(alive) == {
            "features": FOUND, "mean": pytest.approx(1), "found_in_every_seed": {"0.7": 1.0, "0.9": 1.0},
        }  # fmt: skip
        assert stability.summary(~alive & alive)["mean"] is None


def test_a_match_seen_from_the_other_side_is_the_same() -> None:
    (one, _), (other, _) = seeded(0), seeded(1)
    there, back = seed_stability([one, other])
    assert np.array_equal(back.matches[0][there.matches[0]], np.arange(32))
    assert np.array_equal(back.cosines[0][there.matches[0]], there.cosines[0])


def test_the_sum_of_cosines_is_the_largest_and_an_opposite_direction_is_no_match() -> None:
    one, other = (normalize(torch.randn(6, 4, generator=generator(seed)), dim=1) for seed in (1, 2))
    found, cosines = match(one, other)
    products = (one @ other.T).numpy()
    best = max(products[np.arange(6), list(order)].sum() for order in itertools.permutations(range(6)))
    assert cosines.sum() == pytest.approx(best)
    assert np.allclose(cosines, products[np.arange(6), found])
    assert match(torch.eye(2)[:1], -torch.eye(2)[:1])[1] == -1


def test_what_cannot_be_compared_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match=r"two or more dictionaries of one shape; these are 64 -> 32$"):
        seed_stability([seeded(0)[0]])
    with pytest.raises(InputError, match="these are 64 -> 32, 64 -> 40"):
        seed_stability([seeded(0)[0], seeded(1, d_sae=40)[0]])
    wide = TopKSAE(TopKConfig(d_in=1, d_sae=MOST_FEATURES + 1, k=1))
    with pytest.raises(InputError, match=f"among {MOST_FEATURES} at most"):
        seed_stability([wide, wide])


def test_chance_matches_what_has_nothing_in_common_and_does_not_see_what_does() -> None:
    (one, _), (other, _) = seeded(0), seeded(1)
    alike, by_chance = seed_stability([one, other])[0].cosines[0], chance_cosines(one, other)
    strangers = match(*(normalize(torch.randn(32, 64, generator=generator(seed, 3)), dim=1) for seed in (1, 2)))[1]
    assert alike.mean() > 0.6
    assert by_chance.mean() == pytest.approx(strangers.mean(), abs=0.02)
    assert np.array_equal(by_chance, chance_cosines(one, other)), "drawn once"


def test_the_record_comes_back_and_belongs_to_its_weights(tmp_path: Path) -> None:
    saes = [seeded(seed)[0] for seed in (4, 5)]
    alive = np.arange(32) < 8
    folders = [SeedFolder(tmp_path / str(seed), seed, f"{seed}" * 64, alive) for seed in (4, 5)]
    find_or_compare(folders, saes)
    for own, stability in zip(folders, seed_stability(saes), strict=True):
        found = load_stability(own.path, own.sha256)
        assert np.array_equal(found.matches, stability.matches)
        assert np.array_equal(found.cosines, stability.cosines)
        assert load_stability(own.path, "0" * 64) is None
        record, other = read_json(own.path / RECORD_FILE), 9 - own.seed
        assert record["provenance"]["inputs"] == {"dictionary": own.sha256, f"seed {other}": f"{other}" * 64}
        assert record["seeds"] == 2
        assert record["alive"] == stability.summary(alive)
        assert record["others"][0]["above"]["0.7"] == (stability.cosines[0] > 0.7).mean()
        assert record["by_chance"]["mean"] == pytest.approx(chance_cosines(*saes).mean())
        assert list(read_table(own.path / TABLE_FILE)) == [
            "feature", "mean", "least", f"match/{other}", f"cosine/{other}",
        ]  # fmt: skip
    assert load_stability(tmp_path, "4" * 64) is None


def test_weights_compared_already_are_not_compared_again_and_new_ones_are(tmp_path: Path) -> None:
    saes = [seeded(seed)[0] for seed in (4, 5)]
    folders = [SeedFolder(tmp_path / str(seed), seed, f"{seed}" * 64, None) for seed in (4, 5)]
    find_or_compare(folders, saes)
    assert read_json(folders[0].path / RECORD_FILE)["alive"] is None
    find_or_compare(folders, [])  # nothing to compare is an error, had it tried
    with pytest.raises(InputError):
        find_or_compare([folders[0], SeedFolder(tmp_path / "5", 5, "6" * 64, None)], [])


def test_seeds_that_learn_planted_features_agree_on_them_and_their_starts_do_not(planted, world: World) -> None:
    learned = [
        train_dictionary(
            planted,
            SAESettings(d_sae=64, k=3, rows=steps * 256, batch_size=256, lr=5e-3, precision="float32", seed=seed),
            world=world,
        ).sae
        for steps in (400, 1)
        for seed in (0, 1)
    ]
    assert (seed_stability(learned[:2])[0].mean > 0.9).mean() > 0.5
    assert (seed_stability(learned[2:])[0].mean < 0.7).all()
