"""The selftest in a small form: verdicts that must come out, and a truth that full passes with the edit confirm."""

import json

import numpy as np
import pytest
import torch

from sae_steer.model.replay import whole_pass
from sae_steer.selftest import run
from sae_steer.selftest.kinds import VARIANTS
from sae_steer.selftest.population import BASE, Population, edited_inputs
from sae_steer.selftest.trial import draw_texts
from sae_steer.settings import InterveneSettings, SelftestSettings

SMALL = SelftestSettings(
    studies=1, level_studies=0, controls=39, calibration=10, joint_control_prompts=6, prompts_per_task=1,
    bootstrap_draws=1_000, train_plans=300, d_sae=1_024, sae_rows=240_000, fit_texts=60, tune_texts=60,
)  # fmt: skip


@pytest.fixture(scope="module")
def ground(pair, tmp_path_factory):
    return run.prepare(pair, tmp_path_factory.mktemp("selftest"), SMALL)


@pytest.fixture(scope="module")
def record(pair, ground, tmp_path_factory):
    out = tmp_path_factory.mktemp("studies")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "prepare", lambda *_: ground)
        path = run.selftest(pair, out, settings=SMALL, kinds=("causal", "inert"))
        patch.setattr(run, "prepare", lambda *_: pytest.fail("a finished study was made again"))
        run.selftest(pair, out, settings=SMALL, kinds=("causal", "inert"))
    return json.loads(path.read_text())


def test_every_variant_of_a_causal_pair_is_causal(record):
    assert record["failed_gates"] == {**record["failed_gates"], "causal": {}, "inert": {}}
    assert record["confusion"]["causal"] == {
        v: {"CAUSAL": 1} for v in ("inject", "subtract", "zero_ablate", "upstream")
    }


def test_every_variant_of_an_inert_pair_is_null(record):
    assert record["confusion"]["inert"] == {variant: {"NULL": 1} for variant in VARIANTS}
    assert record["inert_called_causal"]["studies"]["hits"] == 0


def test_the_truth_is_what_full_passes_with_the_edit_say(ground):
    few = Population.of(ground.population.texts[:4], 0)
    body, settings = ground.prepared("whole"), InterveneSettings(controls=1, calibration=0)
    models = body.pair("causal", {"reference": 0.3, "target": 0.3})
    arms = body.arms(models, settings)
    inputs = edited_inputs(arms, few, 1.0)
    for arm in arms:
        model, name = arm.model.model, arm.variant.name
        found = {mode: inputs[name, mode].values(model, few, ground.measure) for mode in (BASE, "single", "joint")}
        row = 0
        for read, every in zip(few.read.batches, few.every.batches, strict=True):
            onsets = every.marked("onsets")
            for text, positions in enumerate(read.positions):
                tokens = read.tokens[text : text + 1]
                for position in positions[read.real[text]].tolist():
                    alone = torch.arange(tokens.shape[1])[None] == position
                    for mode, at in (("single", alone), ("joint", onsets[text : text + 1])):
                        logits = whole_pass(model, tokens, arm.layer, arm.edit(1.0), at)[1]
                        wanted = float(ground.measure(logits[0, position]))
                        assert found[mode][row] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
                    assert found[BASE][row] == pytest.approx(
                        float(ground.measure(model(tokens)[0, position])), rel=1e-3
                    )
                    row += 1
        assert row == len(few.read)


def test_studies_draw_other_texts_and_the_same_study_the_same(ground):
    first, again, other = (draw_texts(ground, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert [text.token.tolist() for text in first] == [text.token.tolist() for text in again]
    assert [text.token.tolist() for text in first] != [text.token.tolist() for text in other]
    assert sorted({text.task for text in first}) == list(range(SMALL.tasks))
