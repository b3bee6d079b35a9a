"""Random streams fixed by seeds: randomness is an argument."""

import torch


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator fixed by a path of integers, so that (seed, 1) and (seed, 2) are independent."""
    mixed = 0
    for seed in seeds:  # splitmix64 over the path
        mixed = (mixed + seed + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed % 2**63)
