"""One study of a selftest: a planted pair, texts drawn anew, the whole protocol, and the truth beside its verdicts."""

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

import numpy as np
from scipy.interpolate import PchipInterpolator

from sae_steer import stats
from sae_steer.effects.firings import count_firings
from sae_steer.effects.measure import FanRequest, Request, read, unedited
from sae_steer.effects.readings import Onsets
from sae_steer.effects.splicing import ce_recovered
from sae_steer.model.language_model import LanguageModel
from sae_steer.pair.texts import Text
from sae_steer.selftest.ground import Ground, Prepared, study_settings
from sae_steer.selftest.kinds import (
    KINDS,
    REDUNDANT_TARGET,
    SIGN,
    TUNED,
    VARIANTS,
    is_right,
    promised,
    right_of,
)
from sae_steer.selftest.population import BASE, effects
from sae_steer.settings import MODES, InterveneSettings
from sae_steer.study.gates import Gate, dictionary_gate
from sae_steer.study.protocol import weigh
from sae_steer.typed_json import as_json

STRENGTHS = (0.0, 0.015, 0.03, 0.045, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22, 0.3, 0.4, 0.55, 0.75, 1.0, 1.4, 2.0)
"""At which a reader's effect is measured; between them it is interpolated."""
LEVEL_KIND = "causal"
SPLICED_TEXTS = 40
"""Texts on which gate 4 reads the cross-entropy that the dictionary recovers."""


def run_study(ground: Ground, kind: str, number: int) -> dict:
    """The record of study `number` of a kind: strengths, truth, and per variant the verdict and whether it is right."""
    planted, random = KINDS[kind], _random(ground, kind, number)
    name = planted.bodies[number % len(planted.bodies)]
    body, strengths = ground.prepared(name), _strengths(ground, kind, name, random)
    truth, bound = truth_of(ground, name, planted.reader, strengths)
    texts, settings = draw_texts(ground, random), study_settings(ground.settings, int(random.integers(2**31)))
    models = body.pair(planted.reader, strengths)
    arms = body.arms(models, settings)
    weighed = weigh(
        arms, texts, ground.measure, settings, known_gates=[_dictionary_gate(body, models[1].model, texts, settings)]
    )
    variants = {}
    for result in weighed.evidence.variants:
        variant, is_tested = result.name, result.name in right_of(kind)
        variants[variant] = {
            "truth": truth[variant],
            "verdict": result.verdict,
            "why": result.why,
            "promised": promised(kind, variant, truth[variant], bound) if is_tested else None,
            "right": is_right(kind, variant, result.verdict) if is_tested else None,
            "direction": result.flavour,
            "tests": {mode: as_json(read.tests) for mode, read in result.modes.items()},
            "rank_p": {family.family: family.rank_p for family in result.controls},
            "failed_gates": [gate.number for gate in result.gates if not gate.passed],
        }
    return {
        "kind": kind,
        "number": number,
        "body": name,
        "strengths": strengths,
        "bound": bound,
        "tasks": len(texts),
        "verdict": weighed.verdict,
        "gates": [as_json(gate) for gate in weighed.evidence.gates],
        "variants": variants,
    }


def run_level_study(ground: Ground, number: int) -> dict:
    """How many fresh directions of each family the rank test calls special at 5 %, each against its own family.

    Drawn as controls are and treated as if each were the direction studied, in one pair edited in both models.
    """
    random, fresh = _random(ground, "level", number), ground.settings.fresh
    bodies = KINDS[LEVEL_KIND].bodies
    name = bodies[number % len(bodies)]
    body = ground.prepared(name)
    texts, controls = draw_texts(ground, random), ground.settings.controls
    settings = study_settings(ground.settings, int(random.integers(2**31)), controls=controls + fresh, calibration=0)
    models = body.pair(LEVEL_KIND, _strengths(ground, LEVEL_KIND, name, random))
    single, levels = Onsets.of(texts, settings).single, {}
    for arm in body.arms(models, settings):
        if arm.variant.name not in TUNED.values():
            continue
        fan, places = arm.fan(settings)
        base, values = read(
            arm.model.model, arm.layer, [Request(single, [unedited]), FanRequest(single, fan)], ground.measure
        )
        means = (values - base.value[:, :1]).mean(axis=0)
        families = {family: means[where] for family, _, where in places if where.stop > where.start}
        levels[arm.variant.name] = {
            family: _level(drawn[:controls], drawn[controls:]) for family, drawn in families.items()
        }
    return {"number": number, "body": name, "variants": levels}


def draw_texts(ground: Ground, random: np.random.Generator) -> list[Text]:
    """One text each of tasks drawn from the population with replacement: independent clusters, numbered anew."""
    by_task: dict[int, list[Text]] = {}
    for text in ground.population.texts:
        by_task.setdefault(text.task, []).append(text)
    drawn = random.choice(sorted(by_task), ground.settings.tasks)
    chosen = [by_task[task][random.integers(len(by_task[task]))] for task in drawn.tolist()]
    return [replace(text, prompt=number, task=number) for number, text in enumerate(chosen)]


def truth_of(
    ground: Ground, name: str, reader: str, strengths: dict[str, float]
) -> tuple[dict[str, dict[str, float]], float]:
    """{variant: {base, single, joint}} on the population, and the bound there."""
    key = (name, reader, *sorted(strengths.items()))
    if key not in ground.truths:
        reference, target = ground.prepared(name).pair(reader, strengths)
        models, inputs = {"reference": reference.model, "target": target.model}, ground.inputs(name)
        truth = {v: effects(inputs, v, models[m], ground.population, ground.measure) for v, m in VARIANTS.items()}
        usual = InterveneSettings()
        gap = truth["subtract"][BASE] - truth["inject"][BASE]
        ground.truths[key] = truth, min(usual.bound_share * gap, usual.bound_cap)
    return ground.truths[key]


def _strengths(ground: Ground, kind: str, name: str, random: np.random.Generator) -> dict[str, float]:
    """Of both models' readers: such that the tuned variant's effect is drawn from the kind's range, in bounds."""
    planted, strengths = KINDS[kind], {"reference": 0.0, "target": 0.0}
    bound = truth_of(ground, name, "inert", strengths)[1]
    for model, (low, high) in planted.goals.items():
        goal = bound * np.exp(random.uniform(np.log(low), np.log(high)))
        strengths[model] = _strength_for(ground, name, planted.reader, model, planted.mode, goal)
    if kind == "redundant":
        strengths["target"] = float(random.uniform(*REDUNDANT_TARGET))
    return strengths


def _strength_for(ground: Ground, name: str, reader: str, model: str, mode: str, goal: float) -> float:
    """The least strength at which a model's tuned variant has an effect of `goal`, on a curve measured as far as that.

    Between measured strengths it is interpolated monotonically (Fritsch and Carlson 1980).
    """
    modes = MODES if mode == "larger" else (mode,)
    curve = ground.curves.setdefault((name, reader, model), [])
    sizes: list[float] = []
    for number, strength in enumerate(STRENGTHS):
        if number == len(curve):
            curve.append(_effect(ground, name, reader, model, strength))
        sizes.append(max(SIGN[model] * curve[number][m] for m in modes))
        if sizes[-1] > goal:
            break
    assert sizes[-1] > goal, f"no reader of a {reader} pair moves {name} by {goal:.3f}"
    rising = [i for i in range(max(len(sizes) - 4, 0), len(sizes)) if i == 0 or sizes[i] > max(sizes[:i])]
    return float(PchipInterpolator(np.array(sizes)[rising], np.array(STRENGTHS)[rising])(goal))


def _effect(ground: Ground, name: str, reader: str, model: str, strength: float) -> dict[str, float]:
    pair = ground.prepared(name).pair(reader, {"reference": strength, "target": strength})
    named = pair[0] if model == "reference" else pair[1]
    return effects(ground.inputs(name), TUNED[model], named.model, ground.population, ground.measure)


def _dictionary_gate(body: Prepared, target: LanguageModel, texts: Sequence[Text], settings: InterveneSettings) -> Gate:
    """Gate 4, on the study's own texts."""
    firings = count_firings(
        target, body.layer, body.direction, Onsets.of(texts, settings),
        needs_onsets=settings.min_firings, needs_tasks=settings.min_tasks,
    )  # fmt: skip
    spliced = ce_recovered(
        target, body.sae, texts[:SPLICED_TEXTS], body.layer, only_onsets=True, draws=settings.bootstrap_draws
    )
    return dictionary_gate(spliced, firings)


def _level(controls: np.ndarray, fresh: np.ndarray) -> dict[str, int]:
    p = np.array([stats.rank_p(float(mean), controls) for mean in fresh])
    return {"special": int((p <= 0.05).sum()), "fresh": len(fresh), "controls": len(controls)}


def _random(ground: Ground, kind: str, number: int) -> np.random.Generator:
    return np.random.default_rng([ground.settings.seed, crc32(kind.encode()), number])
