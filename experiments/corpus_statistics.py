"""The corpus against the release: steps, lookalike and true regulation steps, complexity, over 2,000 held-out plans.

python experiments/corpus_statistics.py        # writes experiments/results/small/corpus.json
"""

from pathlib import Path

import numpy as np

from sae_steer.corpus import (
    LENIENT_KEYWORDS,
    REGULATION_PHRASES,
    SPECIALS,
    VARIANTS,
    PlanTokenizer,
    is_lenient,
    tasks,
    write_plans,
)
from sae_steer.records import provenance, write_json
from sae_steer.settings import PRESETS, SPLITS
from sae_steer.stats import spearman

HELD_OUT = {"scan": 700, "tune": 300, "confirm": 1000}
RELEASED = {
    "standard": {"mean_steps": 6.8125, "lenient_rate": 0.09357798, "spearman": 0.53052033},
    "adhd": {"mean_steps": 15.06, "lenient_rate": 0.41327801, "spearman": 0.83},
}


def statistics(variant: str, seed: int) -> dict:
    """The figures of one rendering of the held-out plans."""
    plans = [plan for split, count in HELD_OUT.items() for plan in write_plans(split, variant, count=count, seed=seed)]
    steps = [step for plan in plans for step in plan.steps]
    return {
        "plans": len(plans),
        "tasks": len({plan.task.index for plan in plans}),
        "mean_steps": len(steps) / len(plans),
        "lenient_rate": sum(is_lenient(step.text, LENIENT_KEYWORDS) for step in steps) / len(steps),
        "regulation_rate": sum(step.is_target for step in steps) / len(steps),
        "expected_regulation_rate": sum(step.true_p for step in steps) / len(steps),
        "spearman": spearman(np.array([p.task.complexity for p in plans]), np.array([len(p.steps) for p in plans])),
        "released": RELEASED[variant],
    }


def tokenizer_rows(preset: str, seed: int) -> dict:
    """How many rows of a preset's tokenizer the grammar gives merges for."""
    texts = (plan.text for variant in VARIANTS for plan in write_plans("train", variant, count=4_000, seed=seed))
    tokenizer = PlanTokenizer.train(texts, merges_vocab=PRESETS[preset].d_vocab - len(SPECIALS))
    return {"rows": tokenizer.n_vocab, "unused_rows": tokenizer.unused}


if __name__ == "__main__":
    seed = 0
    record = {
        "provenance": provenance(settings={"seed": seed, "held_out": HELD_OUT}, inputs={}),
        "tasks": {split: len(tasks(split)) for split in SPLITS},
        "domains": len({task.domain for task in tasks()}),
        "phrases": len(REGULATION_PHRASES),
        "variants": {variant: statistics(variant, seed) for variant in VARIANTS},
        "tokenizers": {preset: tokenizer_rows(preset, seed) for preset in PRESETS},
    }
    print(write_json(Path(__file__).parent / "results/small/corpus.json", record))
