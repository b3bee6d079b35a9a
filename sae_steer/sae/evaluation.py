"""How well a dictionary explains rows it was not trained on, in one pass.

FVE  = 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2,  mean = that of the evaluated rows, in float64
L0   = features above zero, a row
dead = share of features that fire in none of these rows
density = how many of the others fire in which share of the rows, on a logarithmic scale
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.errors import InputError
from sae_steer.sae.architectures import SparseDictionary, on_device
from sae_steer.world import World

BINS_A_DECADE = 4
"""Of the density: edges at the quarter steps of log10, so that dictionaries compare bin by bin."""


@dataclass(frozen=True, kw_only=True)
class Density:
    """How many features fire how often, on a logarithmic scale."""

    log10_edges: list[float]
    """Of the bins: the firing rate, from the decade of one firing in all rows up to a firing in every row."""
    counts: list[int]
    """Features in each bin; one on an edge stands above it."""
    dead: int
    """Features that never fire, in no bin."""


@dataclass(frozen=True, kw_only=True)
class SAEMetrics:
    """Sums over the evaluated rows, and the figures that follow from them."""

    rows: int
    squared_error: float
    """Sum of ||x - x_hat||^2."""
    squared_deviation: float
    """Sum of ||x - mean||^2."""
    firings: Int[Tensor, " d_sae"]
    """Rows in which each feature is above zero."""

    @property
    def fve(self) -> float:
        """The fraction of variance explained."""
        return 1 - self.squared_error / self.squared_deviation

    @property
    def l0(self) -> float:
        """Features above zero, a row."""
        return int(self.firings.sum()) / self.rows

    @property
    def dead_share(self) -> float:
        """Share of features that never fire."""
        return float((self.firings == 0).double().mean())

    @property
    def rates(self) -> Float[Tensor, " d_sae"]:
        """Share of rows in which each feature fires."""
        return self.firings.double() / self.rows

    @property
    def density(self) -> Density:
        """The histogram of the rates, from the decade of the least rate that these rows can show."""
        largest = np.log10(self.rows)
        decades = max(int(np.ceil(largest)), 1)
        edges = np.arange(-decades * BINS_A_DECADE, 1) / BINS_A_DECADE
        firings = self.firings.numpy()
        counts, _ = np.histogram(np.log10(firings[firings > 0]) - largest, edges)
        return Density(log10_edges=edges.tolist(), counts=counts.tolist(), dead=int((firings == 0).sum()))


class _Sums:
    """The running sums; deviations are from the first batch's mean, so that a large mean cancels nothing."""

    def __init__(self, sae: SparseDictionary, world: World) -> None:
        self.sae, self.world = on_device(sae, world.device), world
        self.rows = 0
        self.squared_error = self.squared = 0.0
        self.origin: Tensor | None = None
        self.total = torch.zeros(sae.config.d_in, dtype=torch.float64, device=world.device)
        self.firings = torch.zeros(sae.config.d_sae, dtype=torch.long, device=world.device)

    def update(self, batch: Float[Tensor, "row d_in"]) -> None:
        """Add a batch of rows."""
        batch = batch.to(self.world.device, getattr(torch, self.sae.config.dtype))
        with self.world.compute():
            codes = self.sae.encode(batch)
        exact = batch.double()
        if self.origin is None:
            self.origin = exact.mean(0)
        deviation = exact - self.origin
        self.rows += len(batch)
        self.squared_error += float((exact - self.sae.decode(codes)).square().sum())
        self.squared += float(deviation.square().sum())
        self.total += deviation.sum(0)
        self.firings += codes.firings

    def metrics(self) -> SAEMetrics:
        """What is known once all rows are in."""
        if not self.rows:
            raise InputError("there are no rows to evaluate on; read more texts into the cache")
        return SAEMetrics(
            rows=self.rows,
            squared_error=self.squared_error,
            squared_deviation=self.squared - float(self.total.square().sum()) / self.rows,
            firings=self.firings.cpu(),
        )


@torch.no_grad()
def evaluate(sae: SparseDictionary, rows: Iterable[Tensor], world: World) -> SAEMetrics:
    """The dictionary's figures on batches of held-out rows, however they are cut."""
    sums = _Sums(sae, world)
    for batch in rows:
        if len(batch):
            sums.update(batch)
    return sums.metrics()
