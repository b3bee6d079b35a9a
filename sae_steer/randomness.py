"""Random streams fixed by seeds: randomness is an argument."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What each random stream of a seed is for. Numbers are never changed, so that the same seed gives the same bytes.

    Two streams of one number are told apart by what else is mixed in, or are drawn from by generators of two kinds.
    """

    FIRST_WEIGHTS = 1
    ROW_ORDER = 3
    ONSETS_READ = 5
    """Which onsets of a text are edited one at a time."""
    BATCH_ORDER = 7
    SAMPLED_TOKENS = 21
    ISOTROPIC_CONTROLS = 31
    MATCHED_ORDER = 37
    """The order of matched control features."""
    COVARIANCE_CONTROLS = 41
    ELSEWHERE = 43
    """Positions that are no onsets, for the position control."""
    RANDOM_DIRECTION = 53
    EMBEDDING_HALVES = 61
    """By torch: which tokens the map between embedding tables is fitted on."""
    CLUSTER_SPLITS = 61
    """By numpy: how clusters in memory are divided into fit, tune and confirm."""
    ATLAS_FEATURES = 67
    """Which decoder rows are controls of an atlas."""
    ATLAS_ONSETS = 71
    """Where controls of an atlas are read."""
    PLANTED_BODY = 71
    """Tokens and content of a planted pair (selftest)."""
    ATLAS_ISOTROPIC = 73
    """By torch: isotropic controls of an atlas."""
    POPULATION_READ = 73
    """By numpy: onsets at which a selftest measures truth."""
    PLANTED_ROTATION = 79
    PROBE_TOKENS = 97
    """On which two readings of one model are compared."""


def random_numbers(seed: int, stream: Stream) -> np.random.Generator:
    """A numpy generator of one stream of a seed."""
    return np.random.default_rng([seed, int(stream)])


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator fixed by a path of integers, so that (seed, 1) and (seed, 2) are independent."""
    mixed = 0
    for seed in seeds:  # splitmix64 over the path
        mixed = (mixed + seed + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed % 2**63)
