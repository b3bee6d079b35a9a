"""The two models side by side before anything is tested: maps between their streams, control directions, arms.

Everything here reads fit and tune texts alone, so that a plan can be fixed before the confirm texts are read.
An `Arm` is one intervention made ready: the model and block it edits, the direction in that stream's own basis,
and the directions that stand beside it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_steer.edits import controls as families
from sae_steer.edits.basis import Bridge, PairedRows, bridge
from sae_steer.edits.controls import FiringProfile
from sae_steer.edits.directions import mean_difference, unembedding
from sae_steer.edits.edit import Donor, Fan, Patch
from sae_steer.edits.variants import Direction, Variant
from sae_steer.errors import InputError
from sae_steer.model.readout import Measure, TargetMass
from sae_steer.model.replay import Edit
from sae_steer.pair.model_pair import NamedModel
from sae_steer.pair.texts import Text
from sae_steer.row_filter import RowFilter
from sae_steer.sae.architectures import SparseDictionary
from sae_steer.settings import InterveneSettings

RAW, ROTATED, TRANSPORTED = "raw", "rotated", "transported"
FRESH = "fresh"
MEAN_DIFFERENCE, UNEMBEDDING = "mean difference", "unembedding"


@dataclass(frozen=True)
class Arm:
    """One intervention made ready."""

    variant: Variant
    model: NamedModel
    layer: int
    """The block after which it edits."""
    direction: Direction
    units: dict[str, Float[Tensor, " d_model"]]
    """{raw or transported: the direction in the edited stream's basis}; the first is the primary one."""
    bridge: Bridge | None
    """How the target's stream maps to the edited one; None where the edited model is the target."""
    patches: dict[str, Patch]
    """The other model's whole stream in place of this one's, raw and transported: not norm-matched."""
    patch_r2: float
    """Held-out R2 of the map that transports it."""
    positives: dict[str, Float[Tensor, " d_model"]]
    """Norm-matched positive controls, by name, of length one."""
    families: dict[str, Float[Tensor, "_direction d_model"]]
    """Control directions by family."""
    fresh: Float[Tensor, "fresh d_model"]
    """Directions never used as controls, to be treated as if each were the one studied."""
    fresh_family: str

    @property
    def flavour(self) -> str:
        """`raw` or `transported`: which of the units is primary."""
        return next(iter(self.units))

    def edit(self, dose: float, flavour: str | None = None) -> Edit:
        """The intervention at a dose, by default along the primary unit."""
        return self.variant.edit(self.direction, dose, self.units[flavour or self.flavour])

    def intended(self, before: Float[Tensor, "row d_model"], dose: float) -> Float[Tensor, "row d_model"]:
        """The change it should make of each row, written apart from the edit."""
        return self.variant.intended(self.direction, dose, self.units[self.flavour], before)

    def positive(self, name: str, dose: float) -> "Signed":
        """A norm-matched positive control: added on the reference model, subtracted on the target model."""
        return Signed(self.edit(dose), self.positives[name], self.variant.predicted_sign)

    def fan(self, settings: InterveneSettings) -> tuple[Fan, list[tuple[str, float, slice]]]:
        """All control directions at once, and where each family (or the fresh ones) stands, by dose."""
        parts, scales, places, start = [], [], [], 0
        blocks = [(name, 1.0, drawn) for name, drawn in [*self.families.items(), (FRESH, self.fresh)]]
        primary = settings.primary_dose
        others = [dose for dose in settings.doses if dose not in (0.0, primary)]
        blocks += [(name, dose / primary, few) for name, few in self.ribbon(settings).items() for dose in others]
        for name, scale, drawn in blocks:
            parts.append(drawn)
            scales.append(torch.full((len(drawn),), scale, device=drawn.device))
            places.append((name, primary * scale, slice(start, start + len(drawn))))
            start += len(drawn)
        return Fan(self.edit(primary), torch.cat(parts), torch.cat(scales)), places

    def ribbon(self, settings: InterveneSettings) -> dict[str, Float[Tensor, "_direction d_model"]]:
        """The few of each family that are read beyond the single edits at the primary dose."""
        return {name: drawn[: settings.ribbon] for name, drawn in self.families.items()}


@dataclass(frozen=True)
class Signed:
    """As far as `edit` moves each row, along `direction` or against it."""

    edit: Edit
    direction: Float[Tensor, " d_model"]
    sign: int

    def __call__(self, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The rows moved."""
        return resid + self.sign * (self.edit(resid) - resid).norm(dim=-1, keepdim=True) * self.direction


@dataclass(frozen=True)
class Bench:
    """Two models, the block studied, what is measured, and the texts that maps and sizes are read from."""

    reference: NamedModel
    target: NamedModel
    layer: int
    measure: Measure
    settings: InterveneSettings
    fit: Sequence[Text]
    """Texts on which maps are fitted."""
    tune: Sequence[Text]
    """Texts on which maps are judged, and sizes, rates and differences of means are read."""
    dictionary: SparseDictionary | None = None
    """Where matched control features come from for a direction that is no feature."""
    row_filter: RowFilter = field(default_factory=RowFilter)
    """Which rows maps, sizes and covariances are taken from."""
    _bridges: dict[tuple[bool, int, int], Bridge] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """The block studied, and the one upstream."""
        return self.layer - self.settings.upstream, self.layer

    @cached_property
    def tuned(self) -> PairedRows:
        """Both streams over the tune texts."""
        return PairedRows.of(self.target.model, self.reference.model, self.tune, self.layers, self.row_filter)

    @cached_property
    def fitted(self) -> PairedRows:
        """Both streams over the fit texts."""
        return PairedRows.of(self.target.model, self.reference.model, self.fit, self.layers, self.row_filter)

    @cached_property
    def tune_rows(self) -> Float[Tensor, "row d_model"]:
        """The target's stream over the tune texts, on the target's device."""
        return torch.from_numpy(self.tuned.target[self.layer]).to(self.target.model.device)

    @cached_property
    def sizing_rows(self) -> tuple[Float[Tensor, "row d_model"], Bool[np.ndarray, " row"]]:
        """Of the tune rows those that count, and which are onsets: what a feature's size is read from."""
        counts = self.tuned.selection.counts
        return self.tune_rows[torch.from_numpy(counts).to(self.tune_rows.device)], self.tuned.is_onset[counts]

    @cached_property
    def mean_difference(self) -> Direction:
        """Onsets before a target step minus the others, in the target's stream."""
        return mean_difference(self.tune_rows, self.tuned.is_onset, self.tuned.next_is_target)

    def bridge(self, source: int, sink: int, *, to_target: bool = False) -> Bridge:
        """The map from the target's stream after `source` to the reference's after `sink`, or the other way."""
        key = (to_target, source, sink)
        if key not in self._bridges:
            fit, tune = self.fitted, self.tuned
            streams = [
                (rows.reference[source], rows.target[sink])
                if to_target
                else (rows.target[source], rows.reference[sink])
                for rows in (fit, tune)
            ]
            (x_fit, y_fit), (x_test, y_test) = streams
            every = x_test[tune.between_all], y_test[tune.between_all]
            device = (self.target if to_target else self.reference).model.device
            self._bridges[key] = bridge(
                x_fit[fit.between], y_fit[fit.between], x_test[tune.between], y_test[tune.between], device, every
            )
        return self._bridges[key]

    def link(self, variant: Variant) -> Bridge | None:
        """How the target's stream maps to the one a variant edits; None where that is the target's own."""
        return None if variant.edits_target else self.bridge(self.layer, self.layer - variant.layers_below)

    def onset_stream(self, variant: Variant) -> Float[np.ndarray, "onset d_model"]:
        """The stream a variant edits, at the onsets of the tune texts: the typical ones, where there are any.

        One onset of a hundred times the others' length would make its direction the only one of the covariance.
        """
        streams, onsets = self.tuned.target if variant.edits_target else self.tuned.reference, self.tuned.is_onset
        typical = onsets & self.tuned.selection.typical
        return streams[self.layer - variant.layers_below][typical if typical.sum() > 1 else onsets]

    def units(
        self, unit: Float[Tensor, "*rows d_model"], variant: Variant
    ) -> dict[str, Float[Tensor, "*rows d_edited"]]:
        """Directions raw and transported, the primary ones first; raw alone in their own model."""
        link, device = self.link(variant), (self.target if variant.edits_target else self.reference).model.device
        if link is None:
            return {RAW: unit.to(device)}
        carried = {TRANSPORTED: link.carry.direction(unit)}
        if link.check.identity_r2 is None:  # streams of two widths have no raw direction in common
            return carried
        raw = {RAW: unit.to(device)}
        return {**carried, **raw} if link.transported else {**raw, **carried}

    def arms(self, direction: Direction, *, leave_out: Collection[int] | None = None) -> list[Arm]:
        """Every intervention that can be made with the direction.

        Args:
            leave_out: features that are no controls, because they are specific to the target model; by default
                those that are on the tune texts.
        """
        if not 0 < self.settings.upstream <= self.layer:
            raise InputError(
                f"cannot inject {self.settings.upstream} layers upstream of layer {self.layer}; set upstream to 1 or "
                "more, and take a direction of a layer that has as many below it"
            )
        matched = self._matched(direction, leave_out)
        return [self._arm(direction, variant, matched) for variant in direction.variants(self.settings.upstream)]

    def _arm(self, direction: Direction, variant: Variant, matched: Float[Tensor, "direction d_model"] | None) -> Arm:
        settings, below = self.settings, self.layer - variant.layers_below
        model = self.target if variant.edits_target else self.reference
        device = model.model.device
        link, stream = self.link(variant), self.onset_stream(variant)
        count, spare = settings.controls, settings.calibration
        if matched is not None and link is not None and link.transported:
            matched = link.carry.direction(matched)
        source = families.DrawnFrom(stream, matched, settings.seed)
        drawn = {
            family.name: units.to(device)
            for family in families.FAMILIES
            if (units := family.draw(source, count + spare)) is not None and len(units)
        }
        enough = drawn.get(families.MATCHED, ())
        fresh_family = families.MATCHED if len(enough) >= count + spare else families.ISOTROPIC
        donor = self.reference if variant.edits_target else self.target
        carried = self.bridge(below, below, to_target=variant.edits_target)
        other = Donor(donor.model, below)
        patches = {TRANSPORTED: Patch(other, carried.carry)}
        if carried.rotation is not None:
            patches |= {ROTATED: Patch(other, carried.rotation), RAW: Patch(other, lambda rows: rows.to(device))}
        return Arm(
            variant=variant,
            model=model,
            layer=below,
            direction=direction,
            units=self.units(direction.unit, variant),
            bridge=link,
            patches=patches,
            patch_r2=carried.check.affine_r2,
            positives=self._positives(model, link),
            families={name: units[:count] for name, units in drawn.items()},
            fresh=drawn[fresh_family][count : count + spare],
            fresh_family=fresh_family,
        )

    def _positives(self, model: NamedModel, link: Bridge | None) -> dict[str, Tensor]:
        """Directions that should move the measure up, in the edited stream."""
        units = {}
        onsets, follows = self.tuned.is_onset, self.tuned.next_is_target
        if (onsets & follows).any() and (onsets & ~follows).any():
            unit = self.mean_difference.unit
            units[MEAN_DIFFERENCE] = unit.to(model.model.device) if link is None else link.carry.direction(unit)
        if isinstance(self.measure, TargetMass):
            units[UNEMBEDDING] = unembedding(model.model, self.measure.ids)
        return units

    def _matched(self, direction: Direction, leave_out: Collection[int] | None) -> Float[Tensor, "row d_model"] | None:
        """Decoder rows of other features, in the target's basis, of length one."""
        sae = direction.sae if direction.sae is not None else self.dictionary
        if sae is None:
            return None
        onsets = torch.from_numpy(self.tuned.is_onset)
        profile = FiringProfile.of(sae, self.tune_rows[onsets])
        if leave_out is None:
            reference = torch.from_numpy(self.tuned.reference[self.layer]).to(self.tune_rows.device)
            leave_out = (
                families.specific_features(profile, FiringProfile.of(sae, reference[onsets]))
                if reference.shape[1] == self.tune_rows.shape[1]
                else ()
            )
        settings = self.settings
        decoder = families.decoder_rows(sae)
        chosen = families.matched_features(
            direction,
            decoder,
            profile,
            leave_out=[int(feature) for feature in leave_out],
            count=settings.controls + settings.calibration,
            seed=settings.seed,
        )
        rows = decoder[torch.from_numpy(chosen)]
        return rows / rows.norm(dim=1, keepdim=True)
