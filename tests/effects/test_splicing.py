"""Cross-entropy recovered: 1 for a perfect dictionary, 0 for a constant one, and the same as splicing by a hook."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from long_rows import TASK, with_long_rows
from tiny_pair import SHAPE, lively
from torch import nn

from sae_steer.effects.firings import FiringCount
from sae_steer.effects.splicing import ce_recovered, find_or_splice
from sae_steer.errors import InputError
from sae_steer.records import read_json
from sae_steer.row_filter import RowFilter

LAYER, DRAWS = 2, 200


@pytest.fixture(scope="module")
def texts(cache):
    return cache.own_texts("confirm", "adhd")[:12]


class MeanOf(nn.Module):
    """Every row becomes the mean of the rows it is called with in all."""

    def __init__(self, rows):
        super().__init__()
        self.mean = rows.mean(0)

    def forward(self, x):
        return self.mean.expand_as(x)


@pytest.mark.parametrize("only_onsets", [True, False])
def test_a_perfect_reconstruction_recovers_everything(pair, texts, only_onsets) -> None:
    found = ce_recovered(pair.target.model, nn.Identity(), texts, LAYER, only_onsets=only_onsets, draws=DRAWS)
    assert (found.recovered, found.low, found.high) == (1.0, 1.0, 1.0)
    assert found.spliced == found.clean < found.mean_ablated


def test_a_constant_recovers_nothing(pair, texts) -> None:
    model = pair.target.model
    rows = []
    for text in texts:
        resid = model.resid_posts(torch.from_numpy(text.token.astype(np.int64))[None], (LAYER,))[LAYER][0]
        rows.append(resid[torch.from_numpy(text.is_onset)])
    found = ce_recovered(model, MeanOf(torch.cat(rows).detach()), texts, LAYER, only_onsets=True, draws=DRAWS)
    assert found.recovered == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("only_onsets", [True, False])
def test_the_spliced_loss_is_that_of_a_forward_pass_with_a_hook(pair, texts, dictionary, only_onsets) -> None:
    model, losses = pair.target.model, []
    for text in texts:
        tokens = torch.from_numpy(text.token.astype(np.int64))[None]
        where = torch.from_numpy(text.is_onset)[:-1] if only_onsets else torch.ones(len(text) - 1, dtype=torch.bool)

        def splice(module, inputs, resid, where=where):
            resid = resid.clone()
            resid[0, :-1][where] = dictionary.sae(resid[0, :-1][where])
            return resid

        handle = model.layers[LAYER].register_forward_hook(splice)
        with torch.no_grad():
            logits = model(tokens)
        handle.remove()
        losses.append(nn.functional.cross_entropy(logits[0, :-1][where], tokens[0, 1:][where], reduction="none"))
    found = ce_recovered(model, dictionary.sae, texts, LAYER, only_onsets=only_onsets, draws=DRAWS)
    assert found.n == sum(map(len, losses))
    assert found.spliced == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)
    assert found.low <= found.recovered <= found.high


def test_the_record_beside_a_dictionary_is_made_once(
    toy_pair, toy_cache, toy_dictionary, tmp_path, monkeypatch
) -> None:
    path = find_or_splice(toy_pair, toy_cache, toy_dictionary, tmp_path)
    record = read_json(path)
    assert record["onsets"]["n"] < record["all"]["n"]
    assert record["onsets"]["clean"] <= record["onsets"]["mean_ablated"]
    monkeypatch.setattr("sae_steer.effects.splicing.ce_recovered", None)
    assert find_or_splice(toy_pair, toy_cache, toy_dictionary, tmp_path) == path


def test_texts_of_one_task_are_refused(pair, texts, dictionary) -> None:
    with pytest.raises(InputError, match="two tasks or more"):
        ce_recovered(pair.target.model, dictionary.sae, texts[:1], LAYER, only_onsets=True)


@pytest.mark.parametrize(
    ("clean", "spliced", "ablated"),
    [(4.10, 4.17, 4.03), (4.10, 4.20, 4.10), (4.10, 4.15, 4.1001)],
    ids=["ablating helps", "ablating costs nothing", "ablating costs less than its noise"],
)
def test_a_share_of_nothing_is_undefined_and_fails_gate_4_with_its_losses(
    monkeypatch, pair, texts, clean, spliced, ablated
) -> None:
    from sae_steer.effects import splicing
    from sae_steer.study.gates import dictionary_gate

    random = np.random.default_rng(0)

    def losses(model, sae, batch, layer, mean):
        noise = random.normal(0, 0.2, (int(batch.real.sum()), 1))
        return np.array([clean, spliced, ablated]) + noise * np.array([0.0, 0.5, 1.0])

    monkeypatch.setattr(splicing, "_losses", losses)
    found = ce_recovered(pair.target.model, nn.Identity(), texts, LAYER, only_onsets=True, draws=DRAWS)
    assert (found.recovered, found.low, found.high) == (None, None, None)
    firings = FiringCount(
        onsets=500, of_onsets=900, tasks=100, single_onsets=90, of_single_onsets=100, needs_onsets=50, needs_tasks=30
    )
    gate = dictionary_gate(found, firings)
    assert not gate.passed
    assert gate.invalidates
    assert "undefined" in gate.detail
    assert f"{found.clean:.2f} nats clean, {found.spliced:.2f} spliced, {found.mean_ablated:.2f}" in gate.detail


def test_the_loss_at_the_end_of_a_text_is_expected_over_the_clean_prediction(pair, texts, dictionary) -> None:
    model, sae, ends = pair.target.model, dictionary.sae, []
    marked = [replace(text, is_onset=np.arange(len(text)) == len(text) - 1) for text in texts]
    rows = []
    for text in marked:
        tokens = torch.from_numpy(text.token.astype(np.int64))[None]
        rows.append(model.resid_posts(tokens, (LAYER,))[LAYER][0, -1].detach())
    mean = torch.stack(rows).mean(0)
    for text in marked:
        tokens, read = torch.from_numpy(text.token.astype(np.int64))[None], []
        for edit in (lambda x: x, sae, lambda x: mean.expand_as(x)):

            def splice(module, inputs, resid, edit=edit):
                return torch.cat([resid[:, :-1], edit(resid[0, -1:])[None]], dim=1)

            handle = model.layers[LAYER].register_forward_hook(splice)
            with torch.no_grad():
                read.append(model(tokens)[0, -1].double().log_softmax(-1))
            handle.remove()
        ends.append([-float((read[0].exp() * log).sum()) for log in read])
    clean, spliced, ablated = np.mean(ends, axis=0)
    found = ce_recovered(model, sae, marked, LAYER, only_onsets=True, draws=DRAWS)
    assert found.n == found.ends == len(texts)
    assert (found.clean, found.spliced, found.mean_ablated) == pytest.approx((clean, spliced, ablated), abs=1e-4)
    assert found.recovered == pytest.approx((ablated - spliced) / (ablated - clean), abs=1e-3)


@pytest.mark.parametrize(("row_filter", "special"), [(RowFilter(), 0), (RowFilter(frozenset({TASK, 1027})), 2)])
def test_a_long_first_row_is_neither_replaced_nor_the_mean(texts, row_filter, special) -> None:
    model = with_long_rows(lively(SHAPE, 1), [TASK])
    found = ce_recovered(model, nn.Identity(), texts, 1, only_onsets=False, row_filter=row_filter, draws=DRAWS)
    every = sum(len(text) - 1 for text in texts)
    assert found.n == every - len(texts)
    assert found.left_out.long == (0 if special else len(texts))
    assert found.left_out.special_tokens == special * len(texts)
    kept = ce_recovered(model, nn.Identity(), texts, 1, only_onsets=False, row_filter=RowFilter(keep=True), draws=DRAWS)
    assert kept.n == every
    rows = []
    for text in texts:
        tokens = torch.from_numpy(text.token.astype(np.int64))[None]
        rows.append(model.resid_posts(tokens, (1,))[1][0, 1:-1])
    constant = ce_recovered(
        model, MeanOf(torch.cat(rows)), texts, 1, only_onsets=False, row_filter=row_filter, draws=DRAWS
    )
    assert constant.spliced == pytest.approx(constant.mean_ablated, abs=1e-4)
