"""Synthetic rows for the dictionary's tests: a planted dictionary, superposed, off centre."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_steer.randomness import generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.settings import SAESettings
from sae_steer.world import World


class PlantedRows:
    """x = mean + a sparse positive sum of planted unit directions; meets `RowSource`."""

    def __init__(self, *, d_in: int = 32, features: int = 64, active: int = 3, fingerprint: str = "planted"):
        self.d_in, self.n_rows, self.fingerprint = d_in, 10**6, fingerprint
        self.directions = normalize(torch.randn(features, d_in, generator=generator(0, 1)), dim=1)
        self.offset = 5 * torch.randn(d_in, generator=generator(0, 2))
        self.share = active / features
        sample = self.batch(10**6, 20_000, 0).double()
        self.mean = sample.mean(0).float()
        self.mean_square = float((sample - sample.mean(0)).square().sum(1).mean())

    def batch(self, step: int, batch_size: int, seed: int) -> Tensor:
        drawn = generator(seed, 3, step)
        fires = torch.rand(batch_size, len(self.directions), generator=drawn) < self.share
        strength = 1 + torch.rand(batch_size, len(self.directions), generator=drawn)
        return (fires * strength) @ self.directions + self.offset


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """A second thread gains nothing on tensors this small, and waits long where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def planted() -> PlantedRows:
    return PlantedRows()


@pytest.fixture(scope="session")
def planted_rows() -> type[PlantedRows]:
    return PlantedRows


@pytest.fixture(scope="session")
def world() -> World:
    return World.local(precision="float32", device="cpu")


@pytest.fixture(scope="session")
def short() -> SAESettings:
    """Forty steps in which features die, so that the auxiliary loss takes part."""
    return SAESettings(
        d_sae=96,
        k=4,
        rows=40 * 128,
        batch_size=128,
        lr=1e-2,
        aux_k=8,
        dead_after_rows=500,
        checkpoint_every=10,
        precision="float32",
    )


@pytest.fixture
def random_sae() -> TopKSAE:
    """Random weights and biases, nothing learned."""
    sae = TopKSAE(TopKConfig(d_in=16, d_sae=64, k=5))
    for number, weight in enumerate(sae.parameters()):
        weight.data.normal_(generator=generator(3, number))
    return sae
