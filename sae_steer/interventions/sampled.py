"""The card's own measure: the share of regulation steps in sampled plans, steered and not, against the A/A null.

Arms draw noise of their own, so they are compared with what two samples of the unedited model differ by:
each null draw takes two different baseline seeds of every prompt. The observed difference is that of one
steered and one baseline sample a prompt, and so is distributed like the null if the edit does nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from sae_steer import stats
from sae_steer.cache import site
from sae_steer.interventions.variants import FeatureEdit, Variant
from sae_steer.model.replay import edited
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.quality import sample_plans, step_counts
from sae_steer.settings import InterveneSettings

STEPS, STRICT, LENIENT = range(3)
CHUNK = 320
"""Plans sampled at once."""
MATCHERS = {"strict": STRICT, "lenient": LENIENT}


@dataclass(frozen=True)
class Baseline:
    """Unedited samples of one model."""

    counts: Int[np.ndarray, "prompt seed 3"]
    """Steps, target steps, steps with a lenient keyword."""

    def rate(self, matcher: str) -> float:
        """Matched steps over steps, all seeds together."""
        return float(self.counts[..., MATCHERS[matcher]].sum() / self.counts[..., STEPS].sum())

    def null(self, matcher: str, settings: InterveneSettings) -> np.ndarray:
        """What two samples of the model differ by."""
        hits, steps = self.counts[..., MATCHERS[matcher]], self.counts[..., STEPS]
        return stats.aa_null(hits, steps, draws=settings.null_draws, seed=settings.seed)


def sample_baseline(pair: ModelPair, model: NamedModel, titles: list[str], settings: InterveneSettings) -> Baseline:
    """`baseline_seeds` samples of every prompt."""
    counts = _sample(pair, model, titles * settings.baseline_seeds, settings, arm=0)
    return Baseline(counts.reshape(settings.baseline_seeds, len(titles), 3).transpose(1, 0, 2))


def sampled_arm(
    pair: ModelPair,
    variant: Variant,
    layer: int,
    edit: FeatureEdit,
    titles: list[str],
    baseline: Baseline,
    settings: InterveneSettings,
    *,
    arm: int,
) -> dict:
    """One sample a prompt under the variant's edit at every delimiter, compared with the baseline."""
    model = variant.model(pair)
    delimiters = tuple(pair.tokenizer.token_id(token) for token in pair.onsets.tokens)
    where = site(layer - variant.layers_below)
    steer = edited(model.decoder, where, edit.of(variant, settings.primary_dose), after=delimiters)
    counts = _sample(pair, model, titles, settings, arm=arm, edit=steer)
    found = {
        "texts": len(titles),
        "steps": int(counts[:, STEPS].sum()),
        "mean_step_count": float(counts[:, STEPS].mean()),
    }
    for matcher, column in MATCHERS.items():
        rate = float(counts[:, column].sum() / max(counts[:, STEPS].sum(), 1))
        once = baseline.counts[:, 0]
        delta = rate - float(once[:, column].sum() / once[:, STEPS].sum())
        null = baseline.null(matcher, settings)
        low, high = np.quantile(null, [0.025, 0.975])
        found[matcher] = {
            "rate": rate,
            "baseline_rate": baseline.rate(matcher),
            "delta": delta,
            "null_low": float(low),
            "null_high": float(high),
            "null_sd": float(null.std()),
            "p": stats.rank_p(delta, null),
        }
    return found


def _sample(
    pair: ModelPair,
    model: NamedModel,
    titles: list[str],
    settings: InterveneSettings,
    *,
    arm: int,
    edit: AbstractContextManager | None = None,
) -> Int[np.ndarray, "text 3"]:
    texts: list[str] = []
    with edit or nullcontext():
        for start in range(0, len(titles), CHUNK):
            texts += sample_plans(
                pair,
                model,
                titles[start : start + CHUNK],
                temperature=settings.temperature,
                seeds=(settings.seed, arm, start),
            )
    return step_counts(texts, pair)
