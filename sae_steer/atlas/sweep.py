"""All that an atlas reads of one stream: many edits of each onset alone, the gradient, and the control directions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.atlas.pool import Pool
from sae_steer.edits.variants import Variant
from sae_steer.effects.measure import OnsetRows
from sae_steer.model.readout import Measure
from sae_steer.model.replay import CleanPass
from sae_steer.pair.model_pair import NamedModel


@dataclass(frozen=True)
class Swept:
    """What was read, each onset edited alone; all but `base` and `gradient` are changes of the measure."""

    base: Float[np.ndarray, " onset"]
    gradient: Float[np.ndarray, "onset d_model"]
    added: Float[np.ndarray, "onset feature"]
    """By each tested feature's dose 1."""
    ablated: Float[np.ndarray, "onset feature"]
    """By taking each tested feature's contribution away; zero where it is silent, or nothing is ablated."""
    controls: Float[np.ndarray, "ranked norm control"]
    checked: Float[np.ndarray, "spread length checked"]
    """By some controls at lengths between the norms."""


@dataclass(frozen=True)
class Place:
    """One stream that some variants edit, and the edits to read there."""

    variants: tuple[Variant, ...]
    model: NamedModel
    layer: int
    flavour: str
    """`raw` or `transported`: how the directions came into this stream."""
    basis_r2: float | None
    """Held-out R2 of the basis; None in the dictionary's own stream."""
    shifts: Float[Tensor, "alive d_model"]
    """What dose 1 of each alive feature adds, the sign of the variants in it."""
    tested: Int[np.ndarray, " feature"]
    """Which of these are measured."""
    contribution: Float[Tensor, "onset feature"] | None
    """f of each tested feature, where features are ablated too."""
    decoder: Float[Tensor, "feature d_dictionary"]
    """What one unit of each tested feature adds to the dictionary's stream."""
    pool: Pool
    ranked: Int[np.ndarray, " ranked"]
    """Onsets at which controls are read."""
    spread: int
    """The first so many of these rank every variant, all of them ablation."""
    norms: Float[np.ndarray, " norm"]
    lengths: Float[np.ndarray, " length"]
    """At which the interpolation between norms is checked."""

    def read(self, onsets: OnsetRows, measure: Measure, on_batch: Callable[[int], None]) -> Swept:
        """Read everything, one clean pass a batch of texts."""
        model = self.model.model
        swept = self._empty(len(onsets))
        # the same moves at every ranked onset: made once
        added = self.shifts[torch.from_numpy(self.tested).to(model.device)]
        controls = self._moves(self.pool.units, self.norms)
        checked = self._moves(self.pool.units[self.pool.checks], self.lengths)
        place_of = {int(row): place for place, row in enumerate(self.ranked)}
        start = 0
        for number, batch in enumerate(onsets.batches):
            on_batch(number)
            clean = CleanPass.of(model, batch.tokens.to(model.device), self.layer)
            slopes = clean.gradient(batch.positions.to(model.device), measure).double().cpu().numpy()
            onset = batch.real.nonzero().tolist()

            def at(row: int, clean=clean, batch=batch, slopes=slopes, onset=onset, start=start) -> None:
                text, slot = onset[row - start]
                position = int(batch.positions[text, slot])
                # controls are read at ranked onsets alone, the checks of their interpolation at the spread ones alone
                place = place_of.get(row)
                ranks = place is not None
                checks = place is not None and place < self.spread
                firing, taken = self._taken(row)
                moves = [added, taken, controls if ranks else controls[:0], checked if checks else checked[:0]]
                # the unedited stream and all its copies go through the blocks above together
                here = clean.resid[text, position]
                copies = torch.cat([here[None], here + torch.cat(moves)])
                values = clean.read_many(text, position, copies, measure).double().cpu().numpy()
                by_added, by_taken, by_controls, by_checked = np.split(
                    values[1:] - values[0], np.cumsum([len(move) for move in moves])[:-1]
                )
                swept.base[row], swept.gradient[row] = values[0], slopes[text, slot]
                swept.added[row], swept.ablated[row, firing] = by_added, by_taken
                if ranks:
                    swept.controls[place] = by_controls.reshape(swept.controls.shape[1:])
                if checks:
                    swept.checked[place] = by_checked.reshape(swept.checked.shape[1:])

            model.each(at, range(start, start + len(onset)))
            start += len(onset)
        return swept

    def _empty(self, onsets: int) -> Swept:
        """Room for what is read; where a feature is silent, its ablation stays at zero."""
        features, checks = len(self.tested), len(self.pool.units[self.pool.checks])
        return Swept(
            base=np.empty(onsets),
            gradient=np.empty((onsets, self.shifts.shape[1])),
            added=np.empty((onsets, features)),
            ablated=np.zeros((onsets, features)),
            controls=np.empty((len(self.ranked), len(self.norms), len(self.pool.units)), np.float32),
            checked=np.empty((self.spread, len(self.lengths), checks), np.float32),
        )

    def _moves(self, units: Float[Tensor, "unit d_model"], lengths: np.ndarray) -> Float[Tensor, "move d_model"]:
        """Every unit at every length, those of one length together."""
        scaled = torch.from_numpy(lengths).to(units)[:, None, None] * units
        return self.variants[0].predicted_sign * scaled.flatten(0, 1)

    def _taken(self, row: int) -> tuple[np.ndarray, Float[Tensor, "firing d_model"]]:
        """The tested features that fire at an onset, and what taking their contribution away adds, or doubling it."""
        if self.contribution is None:
            return np.zeros(0, dtype=np.int64), self.shifts[:0]
        firing = self.contribution[row].nonzero()[:, 0]
        sign = self.variants[0].predicted_sign
        return firing.cpu().numpy(), sign * self.contribution[row, firing, None] * self.decoder[firing]
