"""How well a dictionary explains rows it was not trained on, in one pass.

FVE  = 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2,  mean = that of the evaluated rows, in float64
L0   = features above zero, a row
dead = share of features that fire in none of these rows
density = how many of the others fire in which share of the rows, on a logarithmic scale
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.errors import InputError
from sae_steer.sae.architectures import SparseDictionary, on_device
from sae_steer.world import World

ALL = "all"
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
    """The running sums of a group of rows; deviations are from its first rows' mean, so that a large mean cancels
    nothing.
    """

    def __init__(self, sae: SparseDictionary, device: torch.device) -> None:
        self.rows = 0
        self.squared_error = self.squared = 0.0
        self.origin: Tensor | None = None
        self.total = torch.zeros(sae.config.d_in, dtype=torch.float64, device=device)
        self.firings = torch.zeros(sae.config.d_sae, dtype=torch.long, device=device)

    def update(
        self, exact: Float[Tensor, "row d_in"], error: Float[Tensor, " row"], firings: Int[Tensor, " d_sae"]
    ) -> None:
        """Add rows, what is left of each, and how many of them each feature fires in."""
        if self.origin is None:
            self.origin = exact.mean(0)
        deviation = exact - self.origin
        self.rows += len(exact)
        self.squared_error += float(error.sum())
        self.squared += float(deviation.square().sum())
        self.total += deviation.sum(0)
        self.firings += firings

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
    return evaluate_groups(sae, rows, {ALL: None}, world)[ALL]


@torch.no_grad()
def evaluate_groups(
    sae: SparseDictionary,
    rows: Iterable[Tensor],
    groups: Mapping[str, Bool[np.ndarray, " row"] | None],
    world: World,
) -> dict[str, SAEMetrics]:
    """The dictionary's figures on each of some groups of the rows, from one reading.

    Args:
        groups: which of all rows, in their order, are of the group; None for all. Groups may overlap.
    """
    sae, start = on_device(sae, world.device), 0
    sums = {name: _Sums(sae, world.device) for name in groups}
    members = {name: None if group is None else torch.from_numpy(group) for name, group in groups.items()}
    for batch in rows:
        if not len(batch):
            continue
        batch = batch.to(world.device, getattr(torch, sae.config.dtype))
        with world.compute():
            codes = sae.encode(batch)
        exact = batch.double()
        error = (exact - sae.decode(codes)).square().sum(1)
        for name, group in members.items():
            if group is None:
                sums[name].update(exact, error, codes.firings)
                continue
            mine = group[start : start + len(batch)].to(world.device)
            if mine.any():
                sums[name].update(exact[mine], error[mine], codes.firings_in(mine))
        start += len(batch)
    return {name: group.metrics() for name, group in sums.items()}
