"""A seeded order of n things that needs no memory: place by place, whatever n is.

A Feistel network permutes the numbers of an even count of bits; a number that falls outside `range(n)` is sent
through again until it falls inside (cycle walking, Black and Rogaway 2002), which keeps it a permutation.
"""

from dataclasses import dataclass

import numpy as np

ROUNDS = 6


@dataclass(frozen=True)
class Shuffle:
    """A permutation of `range(n)` fixed by `key`."""

    n: int
    key: int

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at `places`."""
        found = self._permute(places.astype(np.uint64))
        while (outside := found >= self.n).any():
            found[outside] = self._permute(found[outside])
        return found.astype(np.int64)

    def _permute(self, numbers: np.ndarray) -> np.ndarray:
        bits = np.uint64(max(1, (int(self.n - 1).bit_length() + 1) // 2))
        mask = np.uint64((1 << int(bits)) - 1)
        left, right = numbers >> bits, numbers & mask
        for key in range(ROUNDS):
            left, right = right, left ^ (_mixed(right, (self.key + key * 0x9E3779B97F4A7C15) % 2**64) & mask)
        return (left << bits) | right


def _mixed(numbers: np.ndarray, key: int) -> np.ndarray:
    """splitmix64 of the numbers under a key; arrays of unsigned integers wrap around without a warning."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
