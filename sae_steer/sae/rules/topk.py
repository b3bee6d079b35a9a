"""TopK (Gao et al. 2024, 2406.04093): the k largest pre-activations of each row."""

from dataclasses import dataclass
from typing import ClassVar

from sae_steer.sae.architectures import LinearSAE, TopKConfig, TopKSAE
from sae_steer.sae.rules.rule import Batch, Chosen, Rule


@dataclass(frozen=True)
class TopK(Rule):
    """f = relu of the k largest of pre."""

    row_alone: ClassVar[bool] = True

    def choose(self, batch: Batch) -> Chosen:
        """Each row's own."""
        return Chosen(batch.engine.select_topk(batch.x, batch.W, batch.bias, batch.k))

    def stored(self, d_in: int, d_sae: int, k: int) -> LinearSAE:
        """A TopK dictionary."""
        return TopKSAE(TopKConfig(d_in=d_in, d_sae=d_sae, k=k))
