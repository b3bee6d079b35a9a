"""One long row shared by two models makes no basis of theirs, no control direction and no size."""

import dataclasses

import numpy as np
import pytest
import torch
from long_rows import LENGTH, common_word, with_long_rows
from tiny_pair import SHAPE, lively

from sae_steer.align import identity_r2
from sae_steer.corpus import PlanTokenizer
from sae_steer.edits.arms import Bench
from sae_steer.edits.basis import PairedRows, embedding_check
from sae_steer.edits.directions import of_vector
from sae_steer.model.readout import TargetMass
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.quality import basis_by_layer
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.randomness import generator
from sae_steer.row_filter import RowFilter
from sae_steer.settings import CorpusSettings, InterveneSettings
from sae_steer.study.gates import basis_gate

LAYER = 2
FEW = CorpusSettings(train_plans=40, scan_plans=1, tune_plans=40, confirm_plans=1)


@pytest.fixture(scope="module")
def texts(pair) -> dict:
    return {split: list(GeneratedTexts(FEW).texts(pair, split)) for split in ("train", "tune")}


@pytest.fixture(scope="module")
def word(pair, texts) -> int:
    return common_word(pair, texts["tune"])


@pytest.fixture(scope="module")
def bench(word, texts) -> Bench:
    """Two models that share one long row, of an ordinary word, and nothing else."""
    models = [NamedModel.of(name, with_long_rows(lively(SHAPE, seed), [word])) for seed, name in enumerate("ab", 1)]
    settings = InterveneSettings(controls=40, calibration=5)
    return Bench(
        reference=models[0], target=models[1], layer=LAYER, measure=TargetMass((5, 6)), settings=settings,
        fit=texts["train"], tune=texts["tune"],
    )  # fmt: skip


def test_two_unrelated_models_do_not_pass_gate_5_by_one_long_row(bench):
    vector = torch.randn(SHAPE.d_model, generator=generator(4))
    arm = next(arm for arm in bench.arms(of_vector("a vector", vector, None)) if not arm.variant.edits_target)
    gate, check = basis_gate(arm), arm.bridge.check
    assert check.on_all.identity_r2 > 0.9, "with the long row they look like one"
    assert check.identity_r2 < 0.1
    assert "identity 0.9" not in gate.detail
    assert not gate.passed or arm.flavour == "transported"


def test_r2_is_that_of_the_rows_that_count_and_of_all_beside(bench, word):
    found, tune = bench.bridge(LAYER, LAYER).check, bench.tuned
    x, y = tune.target[LAYER].astype(np.float64), tune.reference[LAYER].astype(np.float64)
    token = np.linalg.norm(x, axis=1) < LENGTH / 2
    between = token & ~tune.opens
    assert found.identity_r2 == pytest.approx(identity_r2(x[between], y[between]))
    assert found.on_all.identity_r2 == pytest.approx(identity_r2(x[~tune.opens], y[~tune.opens]))
    assert found.n_test == between.sum() < found.on_all.n_test == (~tune.opens).sum()
    left = tune.selection.left_out
    assert (left.special_tokens, left.long) == (0, (~token & ~tune.is_onset).sum())


def test_the_covariance_family_is_not_the_direction_of_one_long_onset(pair, bench, texts):
    delimiter = pair.tokenizer.token_id("<|steps|>")
    models = [
        NamedModel.of(name, with_long_rows(lively(SHAPE, seed), [delimiter])) for seed, name in ((1, "a"), (2, "b"))
    ]
    own = dataclasses.replace(bench, reference=models[0], target=models[1], _bridges={})
    assert own.tuned.selection.left_out.long_onsets == sum(
        int((text.token[text.is_onset] == delimiter).sum()) for text in texts["tune"]
    )
    assert own.tuned.selection.counts[own.tuned.is_onset].all(), "an onset is never dropped"
    (arm, *_) = own.arms(of_vector("a vector", torch.randn(SHAPE.d_model, generator=generator(4)), None))
    along = arm.families["covariance"][:, 0].abs()
    assert float(along.mean()) < 0.5, "the long onsets stand along axis 0"
    assert "CAREFUL" in own.tuned.selection.left_out.sentence("tune texts")


def test_sizes_are_read_from_rows_that_count(bench):
    rows, is_onset = bench.sizing_rows
    assert len(rows) == len(is_onset) == bench.tuned.selection.counts.sum() < len(bench.tune_rows)
    assert is_onset.sum() == bench.tuned.is_onset.sum()
    assert float(rows.norm(dim=1).max()) < LENGTH / 2 < float(bench.tune_rows.norm(dim=1).max())


def test_embedding_tables_are_compared_without_long_and_special_rows(pair):
    tables = [with_long_rows(lively(SHAPE, seed), [7, 900, 1024]) for seed in (1, 2)]
    found = embedding_check(*tables, seed=0, row_filter=RowFilter(frozenset({1024})))
    assert abs(found.identity_r2 + 1) < 0.3, "two independent tables of one variance: R2 of -1"
    assert found.n_fit + found.n_test == SHAPE.d_vocab - 3
    assert found.on_all.identity_r2 > 0.5


def test_the_basis_of_a_trained_pair_is_measured_without_special_tokens(pair):
    def of(tokenizer: PlanTokenizer, model: NamedModel, name: str) -> NamedModel:
        return NamedModel(name, with_long_rows(lively(SHAPE, ord(name[0])), [1024]), tokenizer)

    models = {name: of(pair.tokenizer, pair.reference, name) for name in ("standard", "adhd")}
    long: ModelPair = dataclasses.replace(pair, reference=models["standard"], target=models["adhd"])
    assert all(layer["identity_r2"] < 0.1 for layer in basis_by_layer(long, plans=20))


def test_kept_rows_take_part_in_maps(bench, texts):
    kept = dataclasses.replace(bench, row_filter=RowFilter(keep=True), _bridges={})
    assert kept.bridge(LAYER, LAYER).check.identity_r2 > 0.9
    assert kept.tuned.selection.left_out.kept


def test_positions_long_in_either_model_are_left_out_of_both(bench, word, texts):
    plain = NamedModel.of("plain", lively(SHAPE, 9))
    one = PairedRows.of(bench.target.model, plain.model, texts["tune"], (LAYER,))
    other = PairedRows.of(plain.model, bench.target.model, texts["tune"], (LAYER,))
    assert np.array_equal(one.selection.counts, other.selection.counts)
    assert one.selection.left_out.long == bench.tuned.selection.left_out.long > 0
