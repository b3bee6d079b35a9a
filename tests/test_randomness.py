"""Generators follow their seeds."""

import torch

from sae_steer.randomness import generator


def test_a_seed_path_gives_one_stream_and_no_two_paths_the_same():
    paths = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1,), (2**40,)]
    draws = [tuple(torch.rand(4, generator=generator(*path)).tolist()) for path in paths]
    assert draws == [tuple(torch.rand(4, generator=generator(*path)).tolist()) for path in paths]
    assert len(set(draws)) == len(paths)


def test_neighbouring_seeds_are_unlike():
    draws = torch.stack([torch.randn(1_000, generator=generator(seed, 7)) for seed in range(20)])
    correlations = torch.corrcoef(draws) - torch.eye(20)
    assert correlations.abs().max() < 0.2
