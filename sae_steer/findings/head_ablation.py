"""What the model's plans lose without one head: does a harder task still get more steps?

1. Plans of held-out tasks are sampled from the whole model and from the model without each of its heads, one after
   another: every head's output zero, and at its mean over texts those of the studied head's layer (or all, which
   takes longer). All share their noise, seed by seed.
2. The measure is the card's: Spearman(complexity of the task, steps generated), a seed at a time, the mean of seeds.
3. Its change without a head has an interval over resampled tasks, paired, and is ranked among the changes without
   every other head taken out the same way: what any head's loss does is the null.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata

from sae_steer import stats
from sae_steer.corpus import parse_plan, tasks
from sae_steer.findings.head_match import Interval
from sae_steer.findings.head_profiles import HeadProfiles
from sae_steer.model.heads import head_replaced
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.quality import sample_plans, step_counts
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress
from sae_steer.settings import HeadsSettings
from sae_steer.world import in_threads

WAYS = ("zero", "mean")
"""What stands for the head's output."""
FEWEST_TASKS = 10

Steps = Int[np.ndarray, "seed task"]


@dataclass(frozen=True)
class PlanTask:
    """A task to sample plans for."""

    title: str
    complexity: int


@dataclass(frozen=True)
class HeadEffect:
    """What the model's plans lose without a head."""

    head: str
    way: str
    change: Interval
    """Of Spearman(complexity, steps), the mean over seeds."""
    median_change: float
    """The median over seeds, as the card has it."""
    per_seed: tuple[float, ...]
    p_heads: float
    """Rank of the change's size among those without every other head that was taken out the same way."""
    mean_steps: float


@dataclass(frozen=True)
class HeadAblations:
    """The whole model's plans, and those without each head."""

    model: str
    baseline: Interval
    """Spearman(complexity, steps), the mean over seeds."""
    baseline_per_seed: tuple[float, ...]
    baseline_mean_steps: float
    tasks: int
    effects: tuple[HeadEffect, ...]

    def of(self, head: str) -> list[HeadEffect]:
        """A head's effects, both ways."""
        return [effect for effect in self.effects if effect.head == head]

    def per_seed(self, head: str) -> dict:
        """`causal_nulls_per_seed.json`: the measure with all heads, and its change without each, seed by seed."""
        return {
            "model": self.model,
            "head": head,
            "measure": "Spearman(task_complexity, step_count)",
            "baseline": self.baseline_per_seed,
            "change": {way: {e.head: e.per_seed for e in self.effects if e.way == way} for way in WAYS},
        }


def plan_tasks(pair: ModelPair, texts: Sequence[Text], limit: int) -> list[PlanTask]:
    """Up to `limit` distinct tasks of the texts whose complexity is known; none if the texts are no plans of ours."""
    if pair.onsets.regex is not None:
        return []
    complexity = {task.title: task.complexity for task in tasks()}
    titles = dict.fromkeys(parse_plan(pair.tokenizer.decode(text.token.tolist())).title for text in texts)
    found = [PlanTask(title, complexity[title]) for title in titles if title in complexity][:limit]
    varied = len(found) >= FEWEST_TASKS and len({task.complexity for task in found}) > 1
    return found if varied else []


def ablate_heads(
    pair: ModelPair,
    model: NamedModel,
    profiles: HeadProfiles,
    chosen: Sequence[PlanTask],
    studied: int,
    settings: HeadsSettings,
    on_step: Progress,
) -> HeadAblations:
    """The effects of every head of `model`.

    Args:
        studied: the head, numbered through all layers, whose layer is held at its means.
    """
    titles, n_heads = [task.title for task in chosen], profiles.n_heads
    pair = replace(pair, context=min(pair.context, settings.ablation_tokens))
    conditions = ablations_of(len(profiles.mean_read), n_heads, studied, settings)
    baseline = _sampled_steps(pair, model, titles, settings)
    steps = []
    for done, (head, way) in enumerate(conditions):
        on_step(done, len(conditions), f"plans without {profiles.name(head)} ({way})")
        value = torch.from_numpy(profiles.mean_read[head]).float() * (way == "mean")
        with head_replaced(model.model, head // n_heads, head % n_heads, value.to(model.model.device)):
            steps.append(_sampled_steps(pair, model, titles, settings))
    complexity = np.array([task.complexity for task in chosen])
    named = [(profiles.name(head), way) for head, way in conditions]
    return compare_steps(model.name, complexity, baseline, np.stack(steps), named, settings)


def ablations_of(heads: int, n_heads: int, studied: int, settings: HeadsSettings) -> list[tuple[int, str]]:
    """(head, way) of everything that is taken out."""
    layer = range(studied // n_heads * n_heads, (studied // n_heads + 1) * n_heads)
    means = range(heads) if settings.means == "all" else layer
    return [(head, "zero") for head in range(heads)] + [(head, "mean") for head in means]


def _sampled_steps(pair: ModelPair, model: NamedModel, titles: list[str], settings: HeadsSettings) -> Steps:
    """Steps of one plan a seed and title; the same seed is the same noise, whatever the model."""
    halves = 2 if model.model.threads else 1
    parts = [range(start, settings.ablation_seeds, halves) for start in range(min(halves, settings.ablation_seeds))]

    def draw(part: range) -> list[str]:
        return sample_plans(
            pair, model, titles * len(part), temperature=settings.temperature, seeds=(settings.seed, 73), parts=part
        )

    drawn = in_threads(draw, parts, model.model.device)
    steps = np.zeros((settings.ablation_seeds, len(titles)), dtype=np.int64)
    for part, texts in zip(parts, drawn, strict=True):
        steps[list(part)] = step_counts(texts, pair)[:, 0].reshape(len(part), len(titles))
    return steps


def compare_steps(
    model: str,
    complexity: Int[np.ndarray, " task"],
    baseline: Steps,
    without: Int[np.ndarray, "condition seed task"],
    named: Sequence[tuple[str, str]],
    settings: HeadsSettings,
) -> HeadAblations:
    """Spearman's change in every condition, with intervals over tasks and ranks among the other heads.

    Args:
        named: (head, way) of each condition.
    """
    every = np.concatenate([baseline[None], without])
    rho = rank_correlations(complexity, every)
    picks = np.random.default_rng([settings.seed, 79]).integers(
        len(complexity), size=(settings.bootstrap_draws, len(complexity))
    )
    draws = np.stack([rank_correlations(complexity[pick], every[..., pick]).mean(1) for pick in picks])
    change = rho[1:] - rho[0]
    mean = change.mean(1)
    effects = tuple(
        HeadEffect(
            head=head,
            way=way,
            change=Interval.of(mean[i], draws[:, i + 1] - draws[:, 0]),
            median_change=float(np.median(change[i])),
            per_seed=tuple(map(float, change[i])),
            p_heads=stats.rank_p(
                float(mean[i]), mean[[j for j, (_, other) in enumerate(named) if other == way and j != i]]
            ),
            mean_steps=float(without[i].mean()),
        )
        for i, (head, way) in enumerate(named)
    )
    return HeadAblations(
        model=model,
        baseline=Interval.of(rho[0].mean(), draws[:, 0]),
        baseline_per_seed=tuple(map(float, rho[0])),
        baseline_mean_steps=float(baseline.mean()),
        tasks=len(complexity),
        effects=effects,
    )


def rank_correlations(
    x: Int[np.ndarray, " task"], y: Int[np.ndarray, "condition seed task"]
) -> Float[np.ndarray, "condition seed"]:
    """Spearman of x with each row of y; zero where either is constant: a model that always writes as many steps."""
    a, b = (ranks - ranks.mean(-1, keepdims=True) for ranks in (rankdata(x), rankdata(y, axis=-1)))
    spread = np.sqrt((a**2).sum() * (b**2).sum(-1))
    return np.divide(b @ a, spread, out=np.zeros(y.shape[:-1]), where=spread > 0)
