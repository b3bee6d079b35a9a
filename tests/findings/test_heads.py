"""Heads planted in another order are matched back, and the broadcast head is found by what it does."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_pair import SHAPE, lively, write_pair

from sae_steer.errors import InputError
from sae_steer.findings import head_profiles
from sae_steer.findings.head_ablation import compare_steps, rank_correlations
from sae_steer.findings.head_match import match_heads
from sae_steer.findings.head_profiles import EARLIER_BOUNDARIES, KEYS, OFFSETS, read_profiles
from sae_steer.findings.heads import study_heads
from sae_steer.pair.model_pair import NamedModel, load_pair
from sae_steer.randomness import generator
from sae_steer.settings import HeadsSettings

SETTINGS = HeadsSettings(prompts=6, bootstrap_draws=40, null_draws=99, ablation_prompts=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A pair of 3 layers of 4 heads, on the texts of the embedded one."""
    return load_pair(write_pair(tmp_path_factory.mktemp("pairs") / "tiny"))


@pytest.fixture(scope="module")
def texts(cache):
    return [text for text in cache.texts("confirm") if text.is_onset.sum() > 1]


def with_heads_in_order(model, orders: list[list[int]]):
    """The same function, its heads stored in another order."""
    found = copy.deepcopy(model)
    for layer, order in zip(found.layers, orders, strict=True):
        attention, d_head = layer.self_attn, model.shape.d_head
        rows = torch.cat([torch.arange(head * d_head, (head + 1) * d_head) for head in order])
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            projection.weight.data = projection.weight.data[rows]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, rows]
    return found


def test_48_heads_in_another_order_are_matched_back(texts) -> None:
    shape = dataclasses.replace(SHAPE, n_layers=6, n_heads=8, n_kv_heads=8, d_model=64)
    model = lively(shape, 5)
    orders = [torch.randperm(8, generator=generator(1, layer)).tolist() for layer in range(6)]
    moved = with_heads_in_order(model, orders)
    tokens = torch.from_numpy(texts[0].token.astype(np.int64))[None]
    torch.testing.assert_close(moved(tokens), model(tokens), rtol=1e-4, atol=1e-3)
    found = match_heads(read_profiles(model, texts), read_profiles(moved, texts), SETTINGS)
    pairs = {match.pair.reference: match.pair.target for match in found.matches}
    assert pairs == {f"L{layer}H{orders[layer][at]}": f"L{layer}H{at}" for layer in range(6) for at in range(8)}
    assert len(pairs) == 48
    assert min(match.pair.centred.value for match in found.matches) > 0.999
    assert found.in_layer == 48
    assert found.in_place == sum(order[at] == at for order in orders for at in range(8)) < 48
    assert found.broadcast.matched, "the same head, wherever it stands"
    assert all(match.p_layer == pytest.approx(1 / 15) for match in found.matches)
    assert all(match.stability == 1 for match in found.matches)


def test_profiles_do_not_depend_on_batches_and_are_shares_of_attention(tiny, texts, monkeypatch) -> None:
    together = read_profiles(tiny.target.model, texts)
    monkeypatch.setattr(head_profiles, "TOKENS_PER_BATCH", 1)
    alone = read_profiles(tiny.target.model, texts)
    np.testing.assert_allclose(together.mass, alone.mass, atol=1e-4)
    np.testing.assert_allclose(together.mean_read, alone.mean_read, atol=1e-5)
    np.testing.assert_allclose(together.over().profile.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(together.over().uniform.sum(-1), 1, atol=1e-9)
    steps = sum(int(text.is_onset.sum()) - 1 for text in texts)
    assert together.queries[:, 0].sum() == steps, "one delimiter a step, from the second on"


def test_a_profile_equals_one_counted_token_by_token(tiny, texts) -> None:
    text = texts[0]
    kept = []
    head_profiles.read_heads(
        tiny.target.model, torch.from_numpy(text.token.astype(np.int64))[None], lambda *seen: kept.append(seen[1])
    )
    onsets = np.flatnonzero(text.is_onset)
    expected = np.zeros((len(kept), SHAPE.n_heads, OFFSETS, KEYS))
    for query in range(onsets[1], len(text)):
        own = np.searchsorted(onsets, query, side="right") - 1
        for key in range(query + 1):
            step = np.searchsorted(onsets, key, side="right") - 1
            kind = (0 if key == 0 else 1) if step < 0 else 2 + min(own - step, 3) * 5 + min(key - onsets[step], 4)
            for layer, pattern in enumerate(kept):
                expected[layer, :, min(query - onsets[own], 4), kind] += pattern[0, :, query, key].numpy()
    found = read_profiles(tiny.target.model, [text])
    np.testing.assert_allclose(found.mass[0], expected.reshape(-1, OFFSETS, KEYS), atol=1e-5)


def test_the_broadcast_head_is_found_by_what_it_does(tiny, texts, monkeypatch) -> None:
    """Head 2 of layer 1 reads the delimiters of earlier steps alone; the others read all alike, or the last token."""
    is_onset = {tuple(text.token.tolist()): text.is_onset for text in texts}

    def planted(model, tokens, look) -> None:
        batch, pos = tokens.shape
        uniform = torch.ones(pos, pos).tril() / torch.arange(1, pos + 1)[:, None]
        for layer in range(SHAPE.n_layers):
            pattern = uniform.expand(batch, SHAPE.n_heads, pos, pos).clone()
            pattern[:, 0] = torch.eye(pos)
            if layer == 1:
                for row, ids in enumerate(tokens.tolist()):
                    onset = next(mark for token, mark in is_onset.items() if list(token) == ids[: len(token)])
                    pattern[row, 2] = earlier_boundaries(onset, pos)
            look(layer, pattern, torch.zeros(batch, SHAPE.n_heads, pos, SHAPE.d_head))

    monkeypatch.setattr(head_profiles, "read_heads", planted)
    found = read_profiles(tiny.target.model, texts)
    score = found.over().broadcast
    assert found.name(int(score.argmax())) == "L1H2"
    assert score.max() > 0.5
    np.testing.assert_allclose(np.delete(score, [0, 4, 6, 8]), 0, atol=1e-5)
    assert (score[[0, 4, 8]] < 0).all(), "a head that reads its own token reads fewer delimiters than there are"
    assert len(EARLIER_BOUNDARIES) == 3


def earlier_boundaries(onset: np.ndarray, pos: int) -> torch.Tensor:
    marks = np.flatnonzero(onset)
    pattern = torch.zeros(pos, pos)
    for query in range(pos):
        mine = marks[marks <= query][:-1]
        pattern[query, mine if len(mine) else [query]] = 1 / max(len(mine), 1)
    return pattern


def test_heads_of_unrelated_models_do_not_vary_together(tiny, texts) -> None:
    found = match_heads(read_profiles(tiny.reference.model, texts), read_profiles(tiny.target.model, texts), SETTINGS)
    raw = np.mean([match.pair.raw.value for match in found.matches])
    assert raw > 0.5, "raw cosines are high for any two heads"
    assert np.mean([match.stability for match in found.matches]) < 1
    for match in found.matches:
        assert match.pair.centred.low <= match.pair.centred.high
        assert 0 < match.p_prompts <= 1


def test_rank_correlations_are_scipys_and_zero_for_constant_steps() -> None:
    random = np.random.default_rng(0)
    x, y = random.integers(1, 6, 30), random.integers(0, 9, (4, 3, 30))
    y[2, 1] = 7
    found = rank_correlations(x, y)
    for at in np.ndindex(4, 3):
        expected = 0 if at == (2, 1) else spearmanr(x, y[at]).statistic
        assert found[at] == pytest.approx(expected)


def test_the_head_that_carries_complexity_is_first_among_all() -> None:
    random = np.random.default_rng(1)
    complexity = random.integers(1, 6, 60)
    baseline = 3 * complexity + random.integers(0, 4, (6, 60))
    without = np.stack([baseline + random.integers(0, 3, (6, 60)) for _ in range(20)])
    without[7] = random.integers(3, 18, (6, 60))
    named = [(f"L0H{head}", "zero") for head in range(20)]
    found = compare_steps("adhd", complexity, baseline, without, named, HeadsSettings(bootstrap_draws=200))
    effect = found.effects[7]
    assert effect.change.value < -0.5
    assert effect.change.high < 0
    assert effect.p_heads == pytest.approx(1 / 20)
    assert sorted(e.p_heads for e in found.effects)[1] > 0.05
    assert effect.change.value == pytest.approx(
        np.mean([spearmanr(complexity, without[7, s])[0] - spearmanr(complexity, baseline[s])[0] for s in range(6)])
    )


def test_a_study_leaves_its_record_and_the_released_studys_file(tiny, cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sae_steer.findings.head_ablation.FEWEST_TASKS", 2)
    dead = copy.deepcopy(tiny.target.model)
    dead.layers[1].self_attn.o_proj.weight.data[:, 8:16] = 0  # L1H1 writes nothing
    dead_pair = dataclasses.replace(tiny, target=NamedModel("adhd", dead), context=32)
    settings = dataclasses.replace(SETTINGS, ablation_prompts=2, ablation_seeds=2)
    monkeypatch.setattr(type(cache), "check_pair", lambda self, pair: None)
    for folder in ("a", "b"):
        study = study_heads(dead_pair, cache, settings=settings)
        study.save(tmp_path / folder)
    for name in ("heads.json", "heads.parquet", "causal_nulls_per_seed.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a" / "heads.json").read_text())
    assert record["heads"] == [12, 12]
    assert len(record["matches"]) == 12
    silent = study.ablations.of("L1H1")
    assert silent[0].way == "zero"
    assert all(effect.per_seed == (0.0, 0.0) for effect in silent), "the same noise, and a head that writes nothing"
    nulls = json.loads((tmp_path / "a" / "causal_nulls_per_seed.json").read_text())
    assert len(nulls["change"]["zero"]) == 12
    assert {head[:2] for head in nulls["change"]["mean"]} == {record["broadcast"]["target"][:2]}
    assert nulls["head"] == record["broadcast"]["target"]
    assert study.sentence == record["summary"]


def test_too_few_tasks_are_refused(pair, cache) -> None:
    with pytest.raises(InputError, match="are of 1 tasks, and heads are matched over 5"):
        study_heads(pair, cache, settings=dataclasses.replace(SETTINGS, prompts=1))
