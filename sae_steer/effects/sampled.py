"""The card's own measure: the share of regulation steps in sampled plans, steered and not.

Unpaired, against the A/A null: what two samples of the unedited model differ by. Each null draw takes two different
seeds of every prompt, and the observed difference is that of a steered and a baseline sample with noise of their
own, so it is distributed like the null if the edit does nothing.

Paired, with common random numbers: a steered and a baseline sample that share their noise differ by less, and are
compared by a sign-flip over tasks (never with the A/A null, which called a true +3.7 points noise in 93 % of runs).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from sae_steer import stats
from sae_steer.cache import site
from sae_steer.corpus import parse_plan
from sae_steer.edits.arms import Arm
from sae_steer.model.replay import edited
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.quality import sample_plans, step_counts
from sae_steer.pair.texts import Text
from sae_steer.settings import Draws, InterveneSettings

STEPS, STRICT, LENIENT = range(3)
MATCHERS = {"strict": STRICT, "lenient": LENIENT}
TOGETHER = {"cpu": 1, "cuda": 8}
"""Samples of every prompt in one batch; on a CPU each thread draws one, on a GPU more rows cost no more."""


def plan_prompts(pair: ModelPair, texts: Sequence[Text]) -> list[tuple[str, int]]:
    """(title, task) of what to sample plans for: those of the texts, or none if one of them is no plan."""
    plans = [parse_plan(pair.tokenizer.decode(text.token.tolist())) for text in texts]
    if pair.onsets.regex is not None or not all(plan.well_formed for plan in plans):
        return []
    return [(plan.title, text.task) for plan, text in zip(plans, texts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Steered and unedited plans that share their noise: the mean difference of a plan's share of matched steps."""

    delta: float
    low: float | None
    """Of the interval over tasks, as `high` and `p` None on fewer than two."""
    high: float | None
    p: float | None
    """By sign flips over tasks."""
    plans: int


@dataclass(frozen=True, kw_only=True)
class MatchedSteps:
    """The share of target steps by one matcher, beside what two unedited samples differ by."""

    rate: float | None
    """Matched steps over steps; None for an arm that wrote none, as `delta` and `p` then are."""
    baseline_rate: float | None
    baseline_rate_all_seeds: float
    delta: float | None
    null_low: float
    """Of the middle 95 % of the A/A null."""
    null_high: float
    null_sd: float
    p: float | None
    paired: PairedDifference

    @property
    def outside_null(self) -> bool:
        """Whether the difference is one that unedited samples seldom show."""
        return self.delta is not None and not self.null_low <= self.delta <= self.null_high


@dataclass(frozen=True, kw_only=True)
class SampledArm:
    """Plans sampled under an edit."""

    texts: int
    steps: int
    mean_step_count: float
    strict: MatchedSteps
    """By the grammar's phrases."""
    lenient: MatchedSteps
    """By keywords."""

    @property
    def by_matcher(self) -> dict[str, MatchedSteps]:
        """Both, by name."""
        return {"strict": self.strict, "lenient": self.lenient}


@dataclass(frozen=True)
class SampledArms:
    """Samples of plans under each arm's edit, and of the unedited models once."""

    pair: ModelPair
    prompts: list[tuple[str, int]]
    """(title, task)."""
    settings: InterveneSettings
    _baselines: dict[str, Int[np.ndarray, "prompt seed 3"]] = field(default_factory=dict)

    def read(self, arm: Arm) -> SampledArm | None:
        """Samples under the arm's edit at every delimiter, compared with the baseline's.

        None without prompts, and if the unedited model writes so few steps that a null draw could hold none.
        """
        if not self.prompts:
            return None
        baseline = self._baseline(arm.model)
        if not baseline[..., STEPS].min(axis=1).any():
            return None
        delimiters = tuple(self.pair.tokenizer.token_id(token) for token in self.pair.onsets.tokens)
        edit = arm.edit(self.settings.primary_dose)
        steer = edited(arm.model.model, site(arm.layer), edit, after=delimiters)
        counts = self._sample(arm.model, min(self.settings.paired_seeds, self.settings.baseline_seeds - 1), steer)
        return compare(counts, baseline, np.array([task for _, task in self.prompts]), self.settings)

    def _baseline(self, model: NamedModel) -> Int[np.ndarray, "prompt seed 3"]:
        if model.name not in self._baselines:
            self._baselines[model.name] = self._sample(model, self.settings.baseline_seeds, nullcontext())
        return self._baselines[model.name]

    def _sample(self, model: NamedModel, seeds: int, edit: AbstractContextManager) -> Int[np.ndarray, "prompt seed 3"]:
        """One plan a prompt and seed; the same seed is the same noise, edited or not."""
        titles, device = [title for title, _ in self.prompts], model.model.device
        temperature, seed, together = self.settings.temperature, self.settings.seed, TOGETHER.get(device.type, 1)

        def draw(parts: range) -> list[str]:
            repeated = titles * len(parts)
            return sample_plans(self.pair, model, repeated, temperature=temperature, seeds=(seed,), parts=parts)

        batches = [range(start, min(start + together, seeds)) for start in range(0, seeds, together)]
        with edit:
            texts = [text for part in model.model.each(draw, batches) for text in part]
        return step_counts(texts, self.pair).reshape(seeds, len(titles), 3).transpose(1, 0, 2)


def compare(
    counts: Int[np.ndarray, "prompt paired 3"],
    baseline: Int[np.ndarray, "prompt seed 3"],
    task: Int[np.ndarray, " prompt"],
    settings: InterveneSettings,
) -> SampledArm:
    """The arm's rates, its difference from a baseline with other noise beside the A/A null, and from one with the same.

    An arm that wrote no step has no rate, and so no difference.
    Seed i of `counts` has the noise of seed i of `baseline`.
    """
    steered = counts[:, 0]
    matched = {name: _matched(counts, baseline, column, task, settings) for name, column in MATCHERS.items()}
    return SampledArm(
        texts=len(steered),
        steps=int(steered[:, STEPS].sum()),
        mean_step_count=float(steered[:, STEPS].mean()),
        **matched,
    )


def _matched(
    counts: Int[np.ndarray, "prompt paired 3"],
    baseline: Int[np.ndarray, "prompt seed 3"],
    column: int,
    task: Int[np.ndarray, " prompt"],
    settings: InterveneSettings,
) -> MatchedSteps:
    hits, steps = baseline[..., column], baseline[..., STEPS]
    null = stats.aa_null(hits, steps, draws=settings.null_draws, seed=settings.seed)
    low, high = np.quantile(null, [0.025, 0.975])
    rate, unedited = _rate(counts[:, 0], column), _rate(baseline[:, -1], column)
    delta = None if rate is None or unedited is None else rate - unedited
    return MatchedSteps(
        rate=rate,
        baseline_rate=unedited,
        baseline_rate_all_seeds=float(hits.sum() / steps.sum()),
        delta=delta,
        null_low=float(low),
        null_high=float(high),
        null_sd=float(null.std()),
        p=None if delta is None else stats.rank_p(delta, null),
        paired=_paired(counts, baseline[:, : counts.shape[1]], column, task, settings.resampling),
    )


def _paired(
    counts: Int[np.ndarray, "prompt paired 3"],
    baseline: Int[np.ndarray, "prompt paired 3"],
    column: int,
    task: Int[np.ndarray, " prompt"],
    draws: Draws,
) -> PairedDifference:
    """The mean difference of a plan's share of matched steps, both samples with the same noise."""
    difference = (_shares(counts, column) - _shares(baseline, column)).mean(axis=1, keepdims=True)
    plans = counts[..., 0].size
    if len(np.unique(task)) < 2:
        return PairedDifference(delta=float(difference.mean()), low=None, high=None, p=None, plans=plans)
    estimate = stats.cluster_bootstrap(difference, task, **vars(draws))
    return PairedDifference(
        delta=float(estimate.mean[0]),
        low=float(estimate.low[0]),
        high=float(estimate.high[0]),
        p=float(stats.sign_flip_p(difference, task, **vars(draws))[0]),
        plans=plans,
    )


def _shares(counts: Int[np.ndarray, "prompt paired 3"], column: int) -> Float[np.ndarray, "prompt paired"]:
    """Each plan's share of matched steps; 0 for one without steps."""
    return counts[..., column] / np.maximum(counts[..., STEPS], 1)


def _rate(counts: Int[np.ndarray, "prompt 3"], column: int) -> float | None:
    """Matched steps over steps; None for an arm that wrote none."""
    steps = counts[:, STEPS].sum()
    return float(counts[:, column].sum() / steps) if steps else None
