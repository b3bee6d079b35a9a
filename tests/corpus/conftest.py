from itertools import chain

import pytest

from sae_steer.corpus import VARIANTS, Plan, PlanTokenizer, write_plans

HELD_OUT = ("scan", "tune", "confirm")


@pytest.fixture(scope="session")
def train_texts() -> dict[str, list[str]]:
    return {v: [plan.text for plan in write_plans("train", v, count=1500, seed=0)] for v in VARIANTS}


@pytest.fixture(scope="session")
def held_out() -> dict[str, list[Plan]]:
    """2,001 held-out plans of each variant."""
    return {v: [p for s in HELD_OUT for p in write_plans(s, v, count=667, seed=0)] for v in VARIANTS}


@pytest.fixture(scope="session")
def small(train_texts) -> PlanTokenizer:
    return PlanTokenizer.train(chain(*train_texts.values()), merges_vocab=1024)


@pytest.fixture(scope="session")
def large(train_texts) -> PlanTokenizer:
    return PlanTokenizer.train(chain(*train_texts.values()), merges_vocab=8192)
