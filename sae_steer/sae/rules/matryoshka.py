"""Matryoshka BatchTopK (Bussmann et al. 2025, 2503.17547): the first features must reconstruct the rows alone."""

from dataclasses import dataclass

from sae_steer.arguments import PositiveShare
from sae_steer.sae.rules.batchtopk import BatchTopK


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose loss sums the errors of the reconstructions by each prefix of the features."""

    shares: tuple[PositiveShare, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """The shares of the features that must reconstruct the rows by themselves."""

    def prefixes(self, d_sae: int) -> list[int]:
        """As many features as the shares say, and all."""
        return sorted({max(1, round(share * d_sae)) for share in self.shares} | {d_sae})
