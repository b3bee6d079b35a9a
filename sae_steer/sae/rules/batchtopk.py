"""BatchTopK (Bussmann et al. 2024, 2412.06410): the rows x k largest pre-activations of a batch."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.sae.architectures import JumpReLUConfig, JumpReLUSAE, LinearSAE
from sae_steer.sae.kernels import portable
from sae_steer.sae.kernels.portable import RowCodes
from sae_steer.sae.rules.rule import Batch, Chosen, Rule

_MEMORY = 0.99


@dataclass(frozen=True)
class BatchTopK(Rule):
    """f = pre where it is among the rows x k largest of all rows and features; the threshold, the same for all
    features, is the running mean of each batch's least code, and what rows are read with afterwards."""

    def choose(self, batch: Batch) -> Chosen:
        """Those of the batch, of all processes together."""
        wanted = batch.k * batch.rows
        candidates = self._candidates(batch, wanted)
        least = portable.nth_largest(candidates.values, wanted, batch.world)
        self._remember_(batch, least)
        return Chosen(batch.engine.at_least(candidates, least))

    def _candidates(self, batch: Batch, wanted: int) -> RowCodes:
        """At least `wanted` codes, if there are as many above zero: those above half the threshold, else all."""
        floor = 0.5 * batch.threshold
        while True:
            candidates = batch.engine.select_above(batch.x, batch.W, batch.bias, floor)
            count = batch.world.sum_(candidates.counts.sum())
            if int(count) >= wanted or not bool(floor.any()):
                return candidates
            floor = torch.zeros_like(floor)

    def _remember_(self, batch: Batch, least: Float[Tensor, ""]) -> None:
        memory = 0.0 if batch.is_first else _MEMORY
        batch.threshold.mul_(memory).add_((1 - memory) * least)

    def stored(self, d_in: int, d_sae: int, k: int) -> LinearSAE:
        """A JumpReLU dictionary with one threshold for all features."""
        return JumpReLUSAE(JumpReLUConfig(d_in=d_in, d_sae=d_sae))
