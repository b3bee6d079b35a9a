"""What all studies of a selftest stand on: texts, a dictionary, and four bodies to plant readers in.

    whole     the feature is written at every onset of the target
    partial   at six of ten, as the stream's content decides
    rotated   as `whole`, the reference in another basis
    tiny      the reference's target mass is some tenths of a percent, and the feature large enough that a positive
              control of its size moves even that

Readers are planted in the last block, edits stand right below it, so a body's streams, the maps between them and
the population's edited inputs hold for every pair planted in it, and are made once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.corpus import tasks
from sae_steer.edits.arms import Arm, Bench
from sae_steer.edits.basis import Bridge, PairedRows
from sae_steer.edits.directions import feature_direction
from sae_steer.edits.variants import Direction
from sae_steer.model.readout import TargetMass
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.texts import Text
from sae_steer.randomness import Stream, generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.selftest.bodies import CONSTANT, FEATURE, LANES, TWIN, Body, build_body
from sae_steer.selftest.plants import planted
from sae_steer.selftest.population import Inputs, Population, edited_inputs
from sae_steer.selftest.surgery import random_rotation, rotated
from sae_steer.settings import InterveneSettings, SelftestSettings

BODIES = {
    "whole": {"size": 0.22, "coverage": 1.0, "suppression": 0.85},
    "partial": {"size": 0.22, "coverage": 0.6, "suppression": 0.85},
    "rotated": {"size": 0.22, "coverage": 1.0, "suppression": 0.85},
    "tiny": {"size": 0.5, "coverage": 1.0, "suppression": 1.5},
}
SIZING_TEXTS = 60
"""Texts on which a body's writers are sized."""
FIRES_FROM = 0.1
"""Share of the feature's size from which the dictionary calls it active."""


@dataclass(frozen=True, kw_only=True)
class SharedBench(Bench):
    """A bench whose streams were read before, in another pair of the same body."""

    tuned: PairedRows
    fitted: PairedRows


@dataclass(frozen=True)
class Prepared:
    """A body with all that its planted pairs share."""

    body: Body
    rotation: Float[Tensor, "d_model d_model"] | None
    """Of the reference."""
    sae: TopKSAE
    feature: int
    tuned: PairedRows
    fitted: PairedRows
    layer: int
    measure: TargetMass
    bridges: dict[tuple[bool, int, int], Bridge] = field(default_factory=dict)

    def pair(self, kind: str, strengths: dict[str, float]) -> tuple[NamedModel, NamedModel]:
        """Reference and target with readers of these strengths."""
        reference = planted(self.body, self.body.reference, kind, strengths["reference"], self.measure.ids)
        target = planted(self.body, self.body.target, kind, strengths["target"], self.measure.ids)
        if self.rotation is not None:
            reference = rotated(reference, self.rotation)
        return NamedModel("reference", reference), NamedModel("target", target)

    def arms(self, models: Sequence[NamedModel], settings: InterveneSettings) -> list[Arm]:
        """The four interventions on a planted pair, made ready."""
        bench = SharedBench(
            reference=models[0],
            target=models[1],
            layer=self.layer,
            measure=self.measure,
            settings=settings,
            fit=(),
            tune=(),
            _bridges=self.bridges,
            tuned=self.tuned,
            fitted=self.fitted,
        )
        return bench.arms(self.direction)

    @cached_property
    def direction(self) -> Direction:
        """The feature studied: the lane's row of the dictionary."""
        rows = torch.from_numpy(self.tuned.target[self.layer])
        feature = feature_direction(self.sae, self.feature, rows, self.tuned.is_onset)
        assert feature is not None, "the planted feature is silent on the tune texts"
        return feature


@dataclass(frozen=True)
class Ground:
    """Texts and dictionary of a selftest; bodies are prepared when first asked for."""

    pair: ModelPair
    measure: TargetMass
    sae: TopKSAE
    """Of the embedded target model, after the block below its last."""
    layer: int
    fit: tuple[Text, ...]
    tune: tuple[Text, ...]
    population: Population
    settings: SelftestSettings
    truths: dict[tuple, tuple[dict, float]] = field(default_factory=dict)
    """What was measured of pairs met before."""
    curves: dict[tuple, list[dict[str, float]]] = field(default_factory=dict)
    """Effects by body, reader and model, at rising strengths of the reader."""
    _prepared: dict[str, Prepared] = field(default_factory=dict)
    _inputs: dict[str, Inputs] = field(default_factory=dict)

    def prepared(self, name: str) -> Prepared:
        """One of `BODIES`."""
        if name not in self._prepared:
            body = build_body(
                self.pair.target.model,
                self.fit[:SIZING_TEXTS],
                self.measure.ids,
                seed=self.settings.seed,
                **BODIES[name],
            )
            rotation, reference = None, body.reference
            if name == "rotated":
                rotation = random_rotation(body.d_model, generator(self.settings.seed, Stream.PLANTED_ROTATION))
                reference = rotated(reference, rotation)
            layers = (self.layer - InterveneSettings.upstream, self.layer)
            tuned, fitted = (PairedRows.of(body.target, reference, texts, layers) for texts in (self.tune, self.fit))
            sae, feature = with_lanes(self.sae, body)
            self._prepared[name] = Prepared(body, rotation, sae, feature, tuned, fitted, self.layer, self.measure)
        return self._prepared[name]

    def inputs(self, name: str) -> Inputs:
        """The last block's input under every edit, on the population."""
        if name not in self._inputs:
            body = self.prepared(name)
            arms = body.arms(body.pair("inert", {"reference": 0.0, "target": 0.0}), InterveneSettings(controls=1))
            self._inputs[name] = edited_inputs(arms, self.population, InterveneSettings.primary_dose)
        return self._inputs[name]


def population_plans(settings: SelftestSettings) -> int:
    """How many plans the population holds: the same number of every held-out task."""
    return settings.prompts_per_task * len(tasks("confirm"))


@torch.no_grad()
def with_lanes(sae: TopKSAE, body: Body) -> tuple[TopKSAE, int]:
    """A dictionary of the body's stream, and the number of its planted feature.

    The dictionary learned on the embedded model, which reads and writes no lane, and one feature more for each
    lane that the last block can read. k grows by as many, so that no learned feature loses its place.
    """
    lanes, old = (CONSTANT, FEATURE, TWIN), sae.config
    wide = TopKSAE(TopKConfig(d_in=old.d_in + len(LANES), d_sae=old.d_sae + len(lanes), k=old.k + len(lanes)))
    wide.requires_grad_(False)
    wide.W_enc[: old.d_in, : old.d_sae], wide.W_dec[: old.d_sae, : old.d_in] = sae.W_enc, sae.W_dec
    wide.b_enc[: old.d_sae], wide.b_dec[: old.d_in] = sae.b_enc, sae.b_dec
    for number, lane in enumerate(lanes, old.d_sae):
        wide.W_enc[body.lane + lane, number] = wide.W_dec[number, body.lane + lane] = 1.0
        wide.b_enc[number] = 0.0 if lane == CONSTANT else -FIRES_FROM * body.size
    return wide, old.d_sae + lanes.index(FEATURE)


def opening(text: Text, onsets: int) -> Text:
    """The text up to its onset of that number and the token after it."""
    places = np.flatnonzero(text.is_onset)
    stop = len(text) if len(places) <= onsets else int(places[onsets - 1]) + 2
    columns = ("token", "is_onset", "step", "next_is_target", "true_p")
    return replace(text, **{name: getattr(text, name)[:stop] for name in columns})


def study_settings(settings: SelftestSettings, seed: int, **changes) -> InterveneSettings:
    """The protocol as a study of a selftest runs it: every gate and test, dose 1 alone, no sampled plans."""
    usual = InterveneSettings(
        doses=(0.0, 1.0),
        prompts=settings.tasks,
        onsets_per_prompt=settings.onsets_per_prompt,
        controls=settings.controls,
        calibration=settings.calibration,
        joint_control_prompts=settings.joint_control_prompts,
        ribbon=2,
        bootstrap_draws=settings.bootstrap_draws,
        generations=0,
        seed=seed,
    )
    return replace(usual, **changes)
