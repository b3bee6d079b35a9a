"""The card's own measure: the share of regulation steps in sampled plans, steered and not, against the A/A null.

Arms draw noise of their own, so they are compared with what two samples of the unedited model differ by:
each null draw takes two different baseline seeds of every prompt. The observed difference is that of one
steered and one baseline sample a prompt, and so is distributed like the null if the edit does nothing.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

from sae_steer import stats
from sae_steer.cache import site
from sae_steer.corpus import parse_plan
from sae_steer.interventions.variants import FeatureEdit, Variant
from sae_steer.model.replay import edited
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.quality import sample_plans, step_counts
from sae_steer.pair.texts import Text
from sae_steer.settings import InterveneSettings

STEPS, STRICT, LENIENT = range(3)
MATCHERS = {"strict": STRICT, "lenient": LENIENT}
CHUNK = 640
"""Plans sampled at once."""

Counts = Int[np.ndarray, "prompt 3"]
"""Steps, target steps, steps with a lenient keyword."""


def plan_titles(pair: ModelPair, texts: Sequence[Text]) -> list[str]:
    """What to sample plans for: the titles of the texts, or none if one of them is no plan."""
    plans = [parse_plan(pair.tokenizer.decode(text.token.tolist())) for text in texts]
    if pair.onsets.regex is not None or not all(plan.well_formed for plan in plans):
        return []
    return [plan.title for plan in plans]


@dataclass(frozen=True)
class SampledArms:
    """Samples of plans under each variant's edit, and of the unedited models once."""

    pair: ModelPair
    layer: int
    """The dictionary's."""
    edit: FeatureEdit
    titles: list[str]
    settings: InterveneSettings
    _baselines: dict[str, Int[np.ndarray, "prompt seed 3"]] = field(default_factory=dict)

    def read(self, variant: Variant, number: int) -> dict | None:
        """One sample a prompt under the variant's edit at every delimiter, compared with the baseline.

        None without prompts, and if the unedited model writes so few steps that a null draw could hold none.
        `number` fixes the arm's noise; that of the baseline is 0.
        """
        if not self.titles:
            return None
        model = variant.model(self.pair)
        baseline = self._baseline(model)
        if not baseline[..., STEPS].min(axis=1).any():
            return None
        delimiters = tuple(self.pair.tokenizer.token_id(token) for token in self.pair.onsets.tokens)
        steer = edited(
            model.decoder,
            site(self.layer - variant.layers_below),
            self.edit.of(variant, self.settings.primary_dose),
            after=delimiters,
        )
        return compare(self._sample(model, self.titles, number, steer), baseline, self.settings)

    def _baseline(self, model: NamedModel) -> Int[np.ndarray, "prompt seed 3"]:
        if model.name not in self._baselines:
            seeds = self.settings.baseline_seeds
            counts = self._sample(model, self.titles * seeds, 0, nullcontext())
            self._baselines[model.name] = counts.reshape(seeds, len(self.titles), 3).transpose(1, 0, 2)
        return self._baselines[model.name]

    def _sample(self, model: NamedModel, titles: list[str], number: int, edit: AbstractContextManager) -> Counts:
        texts: list[str] = []
        temperature, seed = self.settings.temperature, self.settings.seed
        with edit:
            for start in range(0, len(titles), CHUNK):
                part = titles[start : start + CHUNK]
                texts += sample_plans(self.pair, model, part, temperature=temperature, seeds=(seed, number, start))
        return step_counts(texts, self.pair)


def compare(counts: Counts, baseline: Int[np.ndarray, "prompt seed 3"], settings: InterveneSettings) -> dict:
    """The arm's rates, their difference from one baseline sample a prompt, and the null of such differences."""
    once = baseline[:, 0]
    found = {
        "texts": len(counts),
        "steps": int(counts[:, STEPS].sum()),
        "mean_step_count": float(counts[:, STEPS].mean()),
    }
    for matcher, column in MATCHERS.items():
        hits, steps = baseline[..., column], baseline[..., STEPS]
        null = stats.aa_null(hits, steps, draws=settings.null_draws, seed=settings.seed)
        rate, unedited = _rate(counts, column), _rate(once, column)
        low, high = np.quantile(null, [0.025, 0.975])
        found[matcher] = {
            "rate": rate,
            "baseline_rate": unedited,
            "baseline_rate_all_seeds": float(hits.sum() / steps.sum()),
            "delta": rate - unedited,
            "null_low": float(low),
            "null_high": float(high),
            "null_sd": float(null.std()),
            "p": stats.rank_p(rate - unedited, null),
        }
    return found


def _rate(counts: Counts, column: int) -> float:
    """Matched steps over steps; 0 for an arm that wrote none."""
    return float(counts[:, column].sum() / max(counts[:, STEPS].sum(), 1))
