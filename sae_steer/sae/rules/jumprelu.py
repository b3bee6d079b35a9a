"""JumpReLU (Rajamanoharan et al. 2024, 2407.14435): the pre-activations above their feature's threshold."""

from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from sae_steer.arguments import AtLeastZero, Positive
from sae_steer.sae.architectures import JumpReLUConfig, JumpReLUSAE, LinearSAE
from sae_steer.sae.kernels import portable
from sae_steer.sae.kernels.portable import RowCodes
from sae_steer.sae.rules.rule import Batch, Chosen, Rule


@dataclass(frozen=True)
class JumpReLU(Rule):
    """f = pre where pre > threshold; the thresholds are learned by a gradient, and L0 is drawn to k."""

    bandwidth: Positive = 0.1
    """How near its threshold, on rows of mean square d_in, a code moves it."""
    sparsity: AtLeastZero = 1.0
    """The weight of (L0 / k - 1)^2 beside the unexplained share of variance."""

    def choose(self, batch: Batch) -> Chosen:
        """Those above their thresholds; those near them say how the thresholds should move."""
        near = batch.engine.select_above(batch.x, batch.W, batch.bias, batch.threshold - self.bandwidth / 2)
        fires = near.values > batch.threshold[near.indices.long()]
        codes = near.with_values(near.values * fires)
        return Chosen(codes, partial(self._threshold_gradient, batch, codes, near))

    def _threshold_gradient(
        self,
        batch: Batch,
        codes: RowCodes,
        near: RowCodes,
        errors: Float[Tensor, "row d_in"],
        W_dec: Float[Tensor, "d_sae d_in"],
    ) -> Float[Tensor, " d_sae"]:
        """d loss / d threshold by the rectangle kernel (eq. 11 and 12); L0 is drawn to k (appendix E)."""
        indices, rows, k = near.indices.long(), batch.rows, batch.final_k
        threshold = batch.threshold[indices]
        inside = ((near.values - threshold).abs() < self.bandwidth / 2) & (near.values > 0)
        l0 = batch.world.sum_((codes.values > 0).sum().float()) / rows
        pull = self.sparsity * 2 * (l0 / k - 1) / (k * rows)
        slopes = portable.selected_dots(errors, W_dec, indices)
        change = -(threshold * slopes + pull) * inside / self.bandwidth
        return portable.sums_by_feature(near.indices, change, len(batch.threshold))

    def stored(self, d_in: int, d_sae: int, k: int) -> LinearSAE:
        """A JumpReLU dictionary."""
        return JumpReLUSAE(JumpReLUConfig(d_in=d_in, d_sae=d_sae))
