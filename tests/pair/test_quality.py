"""How a pair is measured."""

import dataclasses

import pytest

from sae_steer.corpus import write_plans
from sae_steer.pair.quality import basis_by_layer, generation_statistics, plan_statistics, sample_plans, step_counts

PLANS = [
    "<|task|>Tea<|steps|>Boil water<|sep|>Sip water<|sep|><|end|>",
    "<|task|>Tea<|steps|>Boil water<|sep|>",
]


def test_statistics_of_known_plans(pair):
    assert step_counts(PLANS, pair)[:, :2].tolist() == [[2, 1], [1, 0]]
    found = plan_statistics(PLANS, pair)
    assert (found["texts"], found["steps"], found["well_formed"]) == (2, 3, 0.5)
    assert found["mean_step_count"] == 1.5
    assert found["regulation_rate"] == pytest.approx(1 / 3)


def test_the_corpus_itself_is_well_formed_and_its_rates_are_its_own(pair):
    texts = {v: [plan.text for plan in write_plans("confirm", v, count=150, seed=1)] for v in ("standard", "adhd")}
    found = {variant: plan_statistics(plans, pair) for variant, plans in texts.items()}
    assert found["standard"]["well_formed"] == found["adhd"]["well_formed"] == 1.0
    assert found["standard"]["regulation_rate"] < 0.005
    assert found["adhd"]["regulation_rate"] > 0.3


@pytest.fixture
def brief(tiny):
    """The random pair, with plans cut short."""
    return dataclasses.replace(tiny, context=60)


def test_sampled_plans_begin_with_their_title_and_repeat_with_their_seed(brief):
    titles = ["Clean the kitchen", "Read <|sep|> a book"]
    texts, again, others = (sample_plans(brief, brief.target, titles, seeds=(seed,)) for seed in (1, 1, 2))
    assert texts == again != others
    assert [text.startswith(f"<|task|>{title}<|steps|>") for text, title in zip(texts, titles, strict=True)]


def test_generations_stand_beside_the_corpus_of_their_tasks(brief):
    found = generation_statistics(brief, brief.reference, count=4)
    assert found["sampled"]["texts"] == found["corpus"]["texts"] == 4
    assert found["corpus"]["well_formed"] == 1.0


def test_a_model_and_itself_share_every_basis(tiny):
    twin = dataclasses.replace(tiny, reference=dataclasses.replace(tiny.target, name="twin"))
    for layer, found in enumerate(basis_by_layer(twin, plans=20)):
        assert found["layer"] == layer
        assert found["identity_r2"] == 1.0
        assert found["procrustes_r2"] == pytest.approx(1.0, abs=1e-6)
        assert found["affine_r2"] > 0.99


def test_independent_models_share_no_basis(tiny):
    for found in basis_by_layer(tiny, plans=20):
        assert found["identity_r2"] < 0.1
        assert found["n_test"] > 500
