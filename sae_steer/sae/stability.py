"""Which features do other seeds find too? Dictionaries of the same rows, compared feature by feature.

Dictionaries that differ in their seed alone learn partly different features (Paulo and Belrose 2025, 2501.16615).
1. Between two dictionaries, features are matched one to one so that the sum of decoder cosines is largest (the
   Hungarian algorithm, as there).
2. A feature's stability is the mean, or the least, cosine with its matches in all the other dictionaries.
3. What chance would give: the same match after one dictionary is turned by a random rotation, which keeps how its
   features lie to each other.

The record of it stands beside each dictionary and belongs to its weights, by their hash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.stats import ortho_group
from torch import Tensor
from torch.nn.functional import normalize

from sae_steer.errors import InputError
from sae_steer.files import sha256
from sae_steer.outputs import writing
from sae_steer.records import first_difference, hashes_of, provenance, read_record, read_table, write_json, write_table
from sae_steer.sae.architectures import SparseDictionary
from sae_steer.shapes import Count, Provenance

RECORD_FILE, TABLE_FILE = "seed_stability.json", "seed_stability.parquet"
LEVELS = (0.7, 0.9)
"""Cosines above which a match counts; at .7 Paulo and Belrose call a feature shared (there by the encoder as well)."""
CHANCE_SEED = 0
MOST_FEATURES = 16_384
"""A match of 4,096 features takes 3 s, and time and memory grow with the square of their number, or faster."""


class StabilityRecord(TypedDict):
    """What is read back of `seed_stability.json`."""

    provenance: Provenance
    seeds: Count
    all: "Summary"
    alive: "Summary | None"


class Summary(TypedDict):
    """How well some features are found by other seeds."""

    features: Count
    mean: float | None
    found_in_every_seed: dict[str, float | None]


@dataclass(frozen=True)
class SeedStability:
    """One dictionary's features in all the others."""

    matches: Int[np.ndarray, "other d_sae"]
    """The feature of each other dictionary that is this one's."""
    cosines: Float[np.ndarray, "other d_sae"]
    """Of their decoder rows."""

    @cached_property
    def mean(self) -> Float[np.ndarray, " d_sae"]:
        """Each feature's cosine with its matches, over the other dictionaries."""
        return self.cosines.mean(0)

    @cached_property
    def least(self) -> Float[np.ndarray, " d_sae"]:
        """Its cosine with the match that is least like it."""
        return self.cosines.min(0)

    @property
    def sha256(self) -> str:
        """Of all matches and cosines."""
        return sha256(self.matches.tobytes(), self.cosines.tobytes())

    def summary(self, among: Bool[np.ndarray, " d_sae"]) -> dict:
        """The mean cosine of some features, and the share of them whose match is above each level in every seed."""
        if not among.any():
            return {"features": 0, "mean": None, "found_in_every_seed": {str(level): None for level in LEVELS}}
        return {
            "features": int(among.sum()),
            "mean": float(self.mean[among].mean()),
            "found_in_every_seed": {str(level): float((self.least[among] > level).mean()) for level in LEVELS},
        }


@torch.no_grad()
def seed_stability(saes: Sequence[SparseDictionary]) -> list[SeedStability]:
    """Each dictionary's features in the others, in the order given, one dictionary a seed.

    Dictionaries of different shapes, or of more than `MOST_FEATURES` features, are an `InputError`.
    """
    shapes = {(sae.config.d_in, sae.config.d_sae) for sae in saes}
    if len(saes) < 2 or len(shapes) > 1:
        told = ", ".join(f"{sae.config.d_in} -> {sae.config.d_sae}" for sae in saes) or "none"
        raise InputError(f"seeds are compared between two or more dictionaries of one shape; these are {told}")
    ((_, d_sae),) = shapes
    if d_sae > MOST_FEATURES:
        raise InputError(f"features are matched among {MOST_FEATURES} at most, and these dictionaries have {d_sae}")
    rows = [_unit_rows(sae) for sae in saes]
    matches, cosines = np.zeros((len(saes), len(saes), d_sae), np.int64), np.ones((len(saes), len(saes), d_sae))
    for one, other in combinations(range(len(saes)), 2):
        found, alike = match(rows[one], rows[other])
        matches[one, other], cosines[one, other] = found, alike
        matches[other, one, found], cosines[other, one, found] = np.arange(d_sae), alike
    others = ~np.eye(len(saes), dtype=bool)
    return [SeedStability(matches[i, others[i]], cosines[i, others[i]]) for i in range(len(saes))]


def match(
    one: Float[Tensor, "d_sae d_in"], other: Float[Tensor, "d_sae d_in"]
) -> tuple[Int[np.ndarray, " d_sae"], Float[np.ndarray, " d_sae"]]:
    """The row of `other` that each of `one` is given, all different, and their products, whose sum is the largest."""
    products = (one @ other.T).double().numpy()
    rows, found = linear_sum_assignment(products, maximize=True)
    return found, products[rows, found]


@torch.no_grad()
def chance_cosines(one: SparseDictionary, other: SparseDictionary) -> Float[np.ndarray, " d_sae"]:
    """Cosines of matched features after `other` is turned at random: dictionaries that have nothing in common."""
    rotation = ortho_group.rvs(one.config.d_in, random_state=CHANCE_SEED)
    return match(_unit_rows(one), _unit_rows(other) @ torch.from_numpy(rotation).float())[1]


def _unit_rows(sae: SparseDictionary) -> Float[Tensor, "d_sae d_in"]:
    rows = torch.stack([sae.direction(feature) for feature in range(sae.config.d_sae)])
    return normalize(rows.float().cpu(), dim=1)


@dataclass(frozen=True)
class SeedFolder:
    """A finished dictionary among those of other seeds."""

    path: Path
    seed: int
    sha256: str
    """Of its weights."""
    alive: Bool[np.ndarray, " d_sae"] | None
    """Features that fire on held-out rows, where that is known."""


def find_or_compare(folders: Sequence[SeedFolder], saes: Sequence[SparseDictionary]) -> None:
    """Leave the record of each dictionary's stability beside it, unless these very weights are compared already."""
    origins = [_origin(own, [other for other in folders if other is not own]) for own in folders]
    if all(_is_there(own.path, origin) for own, origin in zip(folders, origins, strict=True)):
        return
    compared = seed_stability(saes)
    by_seed = [sae for _, sae in sorted(zip(folders, saes, strict=True), key=lambda named: named[0].seed)]
    chance = chance_cosines(*by_seed[:2])
    for own, origin, stability in zip(folders, origins, compared, strict=True):
        _save(own, [other for other in folders if other is not own], origin, stability, chance)


def _origin(own: SeedFolder, others: Sequence[SeedFolder]) -> dict:
    weights = {"dictionary": own.sha256} | {f"seed {other.seed}": other.sha256 for other in others}
    return provenance(settings={"seed": own.seed, "levels": LEVELS, "chance_seed": CHANCE_SEED}, inputs=weights)


def _is_there(folder: Path, origin: Mapping) -> bool:
    path = folder / RECORD_FILE
    parts = ("sae_steer", "settings", "inputs")
    if not path.is_file():
        return False
    return first_difference(read_record(path, StabilityRecord)["provenance"], origin, parts=parts) is None


def _save(
    own: SeedFolder,
    others: Sequence[SeedFolder],
    origin: Mapping,
    stability: SeedStability,
    chance: Float[np.ndarray, " d_sae"],
) -> None:
    with writing(own.path, (RECORD_FILE, TABLE_FILE)):
        (own.path / RECORD_FILE).unlink(missing_ok=True)
        columns = {"feature": np.arange(len(stability.mean)), "mean": stability.mean, "least": stability.least}
        for other, matches, cosines in zip(others, stability.matches, stability.cosines, strict=True):
            columns |= {f"match/{other.seed}": matches, f"cosine/{other.seed}": cosines}
        write_table(own.path / TABLE_FILE, columns)
        pairs = [
            {"seed": other.seed, "folder": other.path.name, **_summary(cosines)}
            for other, cosines in zip(others, stability.cosines, strict=True)
        ]
        record = {
            "provenance": origin,
            "seeds": 1 + len(others),
            "all": stability.summary(np.ones(len(stability.mean), bool)),
            "alive": None if own.alive is None else stability.summary(own.alive),
            "others": pairs,
            "by_chance": _summary(chance),
            "files": hashes_of(own.path, [TABLE_FILE]),
        }
        write_json(own.path / RECORD_FILE, record)


def _summary(cosines: Float[np.ndarray, " d_sae"]) -> dict:
    return {"mean": float(cosines.mean()), "above": {str(level): float((cosines > level).mean()) for level in LEVELS}}


def load_stability(folder: Path, weights: str) -> SeedStability | None:
    """The stability recorded beside the dictionary of these weights; None where there is none of them."""
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    record = read_record(path, StabilityRecord)
    if record["provenance"]["inputs"]["dictionary"] != weights:
        return None
    table = read_table(path.with_name(TABLE_FILE), of=record)
    found = [[table[name] for name in table if name.startswith(kind)] for kind in ("match/", "cosine/")]
    if not found[0] or len(found[0]) != len(found[1]):
        raise InputError(f"{path.with_name(TABLE_FILE)} has no matches; delete {path} and learn the seeds again")
    return SeedStability(*map(np.stack, found))
