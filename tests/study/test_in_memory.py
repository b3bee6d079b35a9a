"""The protocol on a user's own models, tensors and measure: the toy pair without its folder or its cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import CAUSE, FEATURE, SHAPE, toy_sae

import sae_steer as ss
from sae_steer.effects.units import cap_of
from sae_steer.errors import InputError
from sae_steer.model.loading import save_decoder
from sae_steer.model.readout import TargetMass
from sae_steer.sae.saelens.adapter import sae_lens
from sae_steer.sae.saelens.files import save_sae
from sae_steer.settings import InterveneSettings
from sae_steer.study.in_memory import measure_of

SETTINGS = InterveneSettings(
    doses=(0.0, 1.0), controls=99, ribbon=2, calibration=5, joint_control_prompts=4, bootstrap_draws=400,
    onsets_per_prompt=1, min_firings=10,
)  # fmt: skip
FEW = replace(SETTINGS, controls=4, ribbon=1, calibration=2, bootstrap_draws=100)
"""Where effects are compared and no verdict."""
TEXTS = 64


@pytest.fixture(scope="module")
def texts(toy_pair):
    """Random tokens, delimiters here and there; the delimiters are marked."""
    random = torch.Generator().manual_seed(2)
    tokens = torch.randint(10, 900, (TEXTS, 24), generator=random)
    delimiter = toy_pair.tokenizer.token_id("<|sep|>")
    marked = torch.zeros(TEXTS, 24, dtype=torch.bool)
    marked[:, [5, 11, 17]] = True
    return {"tokens": tokens.masked_fill(marked, delimiter), "positions": marked, "layer": 2, "settings": SETTINGS}


@pytest.fixture(scope="module")
def ids(toy_pair):
    return sorted({toy_pair.tokenizer.encode(phrase)[0] for phrase in toy_pair.phrases})


@pytest.fixture(scope="module")
def cause():
    return 2.0 * torch.eye(SHAPE.d_model)[CAUSE]


@pytest.fixture(scope="module")
def found(toy_pair, texts, ids, cause):
    return ss.intervene([model.model for model in toy_pair.models], cause, measure=ids, **texts)


def effects(study):
    return {v["variant"]: v["single"]["doses"][1]["mean"] for v in study.record()["variants"]}


def test_the_cause_moves_the_measure_as_predicted_and_the_verdict_says_so(found):
    moved = effects(found)
    assert set(moved) == {"inject", "subtract", "upstream"}
    assert moved["inject"] > 0.02
    assert moved["subtract"] < -0.02
    verdicts = {v["variant"]: v["verdict"] for v in found.record()["variants"]}
    assert verdicts["subtract"] == "CAUSAL", found.table()
    assert found.verdict in found.table()


def test_other_kinds_of_the_same_models_give_the_same_effects(toy_pair, texts, ids, cause, found, tmp_path):
    from transformers import LlamaForCausalLM

    reference, target = (model.model for model in toy_pair.models)
    hub = LlamaForCausalLM.from_pretrained(save_decoder(reference, tmp_path / "hub", dtype=torch.float32))
    others = [hub, ss.to_hooked_transformer(target)]
    again = ss.intervene(others, cause, measure=ids, **{**texts, "settings": FEW})
    for name, effect in effects(found).items():
        assert effects(again)[name] == pytest.approx(effect, abs=1e-5)


def test_a_feature_of_a_dictionary_and_a_measure_of_ones_own(toy_pair, texts, ids, found):
    def log_odds(logits):
        rest = logits.clone()
        rest[..., ids] = -torch.inf
        return logits[..., ids].logsumexp(-1) - rest.logsumexp(-1)

    study = ss.intervene(
        toy_pair, toy_sae(), feature=FEATURE, measure=log_odds, **{**texts, "settings": replace(FEW, bound_cap=1e6)}
    )
    moved = effects(study)
    assert moved["zero_ablate"] < 0 < moved["inject"]
    assert abs(moved["inject"]) > abs(effects(found)["inject"])  # in nats, not in probability


@pytest.fixture(scope="module")
def saelens_object(tmp_path_factory):
    """`toy_sae` as sae_lens itself holds it."""
    package = sae_lens()
    return package.SAE.load_from_disk(save_sae(toy_sae(), tmp_path_factory.mktemp("sae") / "toy", metadata={}))


@pytest.mark.parametrize("given", ["object", "release"])
def test_a_saelens_dictionary_gives_the_effects_of_the_native_one(
    toy_pair, texts, ids, saelens_object, monkeypatch, given
):
    asked = []

    def from_pretrained(release, sae_id, device):
        asked.append((release, sae_id))
        return saelens_object

    monkeypatch.setattr(sae_lens().SAE, "from_pretrained", from_pretrained)
    subject = saelens_object if given == "object" else ("a-release", "blocks.2.hook_resid_post")
    few = {**texts, "settings": FEW, "measure": ids, "feature": FEATURE}
    theirs, ours = (effects(ss.intervene(toy_pair, sae, **few)) for sae in (subject, toy_sae()))
    assert set(theirs) == {"inject", "subtract", "zero_ablate", "upstream"}
    assert theirs == pytest.approx(ours, abs=1e-6)
    assert abs(theirs["zero_ablate"]) > 0.01
    assert asked == ([] if given == "object" else [subject])


def test_a_release_that_cannot_be_fetched_is_told_in_one_line(toy_pair, texts, ids, monkeypatch):
    def no_network(release, sae_id, device):
        raise OSError("no route\nto host")

    monkeypatch.setattr(sae_lens().SAE, "from_pretrained", no_network)
    with pytest.raises(InputError, match=r"a-release/some-id cannot be read .*no route to host") as told:
        ss.intervene(toy_pair, ("a-release", "some-id"), feature=FEATURE, measure=ids, **texts)
    assert "\n" not in str(told.value)


def test_a_silent_feature_is_invalid_with_the_reason(toy_pair, texts, ids):
    sae = toy_sae()
    sae.b_enc[5] = -1e6
    study = ss.intervene(toy_pair, sae, feature=5, measure=ids, **texts)
    assert study.verdict == "INVALID"
    assert "fires" in study.table()


def test_what_cannot_be_studied_is_told_in_one_line(toy_pair, texts, ids, cause):
    few = {**texts, "tokens": texts["tokens"][:30], "positions": texts["positions"][:30]}
    with pytest.raises(InputError, match="intervals over tasks need 30"):
        ss.intervene(toy_pair, cause, measure=ids, **few)
    with pytest.raises(InputError, match="3 numbers and the stream 16 dimensions"):
        ss.intervene(toy_pair, torch.ones(3), measure=ids, **texts)
    with pytest.raises(InputError, match="name one with feature="):
        ss.intervene(toy_pair, toy_sae(), measure=ids, **texts)
    with pytest.raises(InputError, match="marks no token"):
        ss.intervene(toy_pair, cause, measure=ids, **{**texts, "positions": torch.zeros(TEXTS, 24, dtype=torch.bool)})
    with pytest.raises(
        InputError, match=r"subject of intervene is a ndarray of float64 \[16\], and takes a Dictionary or"
    ):
        ss.intervene(toy_pair, np.ones(16), measure=ids, **texts)
    with pytest.raises(InputError, match="give tokens= and positions="):
        ss.intervene(toy_pair, cause)


def log_odds_of(ids):
    """A measure of one's own, in nats."""

    def log_odds(logits):
        rest = logits.clone()
        rest[..., ids] = -torch.inf
        return logits[..., ids].logsumexp(-1) - rest.logsumexp(-1)

    return log_odds


def test_too_few_controls_leave_the_verdict_open_and_say_how_many_it_takes(toy_pair, texts, ids, cause):
    few = replace(SETTINGS, controls=5, ribbon=2, calibration=2)
    study = ss.intervene(toy_pair, cause, measure=ids, **{**texts, "settings": few})
    subtract = next(v for v in study.record()["variants"] if v["variant"] == "subtract")
    assert subtract["single"]["tests"]["p_below_holm"] < 0.05, "the effect lies beyond the bound"
    furthest = max(abs(mean) for family in subtract["controls"] for mean in family["means"])
    assert abs(effects(study)["subtract"]) > furthest, "no control goes as far"
    assert subtract["verdict"] == study.verdict == "INCONCLUSIVE"
    assert "a family ranks an effect from 19 on" in subtract["why"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"doses": (0.0, 2.0)}, "the primary dose 1.0 is not among the doses"),
        ({"doses": (0.5, 1.0)}, "dose 0, at which gate 1 reads, is not among the doses"),
        ({"controls": 0}, "set controls to 19 or more"),
        ({"calibration": 0}, "calibration to 1 or more"),
    ],
)
def test_settings_that_leave_a_gate_nothing_to_read_are_refused(toy_pair, texts, ids, cause, change, match):
    with pytest.raises(InputError, match=match):
        ss.intervene(toy_pair, cause, measure=ids, **{**texts, "settings": replace(SETTINGS, **change)})


def test_a_measure_in_logits_has_no_cap_of_probabilities_and_is_not_told_in_points(toy_pair, texts, ids, cause):
    few = {**texts, "settings": replace(FEW, doses=(0.0, 1.0))}
    own = ss.intervene(toy_pair, cause, measure=log_odds_of(ids), **few).record()
    assert own["bound"]["cap"] is None
    assert own["bound"]["value"] == pytest.approx(0.05 * abs(own["gap"]["single"]["mean"]))
    assert own["bound"]["value"] > 0.012
    details = [gate["detail"] for part in [own, *own["variants"]] for gate in part["gates"]]
    assert not any("points" in detail for detail in details)
    assert any("in the measure's own unit" in detail for detail in details)
    assert {row["log_odds"] for v in own["variants"] for row in v["single"]["doses"]} == {None}
    probability = ss.intervene(toy_pair, cause, measure=ids, **few).record()
    assert probability["bound"]["cap"] == 0.012
    assert any("points" in gate["detail"] for gate in probability["gates"])
    assert cap_of(log_odds_of(ids), replace(SETTINGS, bound_cap=0.5)) == 0.5, "one that is set is kept"


def test_texts_read_at_their_last_token_are_studied_whatever_their_lengths(toy_pair, ids, cause):
    random = torch.Generator().manual_seed(4)
    lengths = torch.randint(8, 25, (TEXTS,), generator=random)
    tokens, last = torch.randint(10, 900, (TEXTS, 24), generator=random), torch.arange(TEXTS)
    tokens[last, lengths - 1] = toy_pair.tokenizer.token_id("<|sep|>")
    marked = torch.zeros(TEXTS, 24, dtype=torch.bool)
    marked[last, lengths - 1] = True
    texts = {"tokens": tokens, "positions": marked, "lengths": lengths, "layer": 2, "settings": FEW, "measure": ids}
    moved = effects(ss.intervene(toy_pair, cause, **texts))
    assert moved["subtract"] < -0.02 < 0.02 < moved["inject"]
    of_feature = ss.intervene(toy_pair, toy_sae(), feature=FEATURE, **texts)
    gate = next(gate for gate in of_feature.record()["gates"] if gate["gate"] == "4")
    assert "nats clean" in gate["detail"]
    for variant in of_feature.record()["variants"]:
        for row in variant["single"]["doses"]:
            assert (row["off_target_nats"], row["off_target_rows"]) == (None, 0)
    shifted = {**texts, "tokens": tokens.masked_fill(torch.arange(24) >= lengths[:, None], 5)}
    again = effects(ss.intervene(toy_pair, cause, **shifted))
    assert again == pytest.approx(moved, abs=1e-6), "what stands in the padding does not matter"


def test_left_padded_texts_give_the_effects_of_the_same_texts_padded_on_the_right(toy_pair, texts, ids, cause):
    few = {**texts, "settings": FEW}
    ends = torch.arange(TEXTS) % 3 + 22
    columns = torch.arange(24) - (24 - ends)[:, None]
    mask = columns >= 0
    left = {name: texts[name].gather(1, columns.clamp(min=0)).masked_fill(~mask, 0) for name in ("tokens", "positions")}
    plain = ss.intervene(toy_pair, cause, measure=ids, **few, lengths=ends)
    shifted = ss.intervene(toy_pair, cause, measure=ids, **{**few, **left}, attention_mask=mask)
    assert effects(shifted) == pytest.approx(effects(plain), abs=1e-6)
    with pytest.raises(InputError, match="looks like padding on the left; say which tokens are real: attention_mask="):
        ss.intervene(toy_pair, cause, measure=ids, **{**few, **left})


def test_an_id_named_twice_is_counted_once_and_a_mask_of_the_vocabulary_means_its_ids(ids):
    mask = torch.zeros(1029, dtype=torch.bool)
    mask[ids] = True
    for named in (ids, ids + ids, np.array(ids), torch.tensor(ids), mask, TargetMass((*ids, *ids))):
        assert measure_of(named, 1029, 1029) == TargetMass(tuple(ids))


@pytest.mark.parametrize(
    ("measure", "told"),
    [
        ([], "names no token"),
        ([-1], "names token -1, and both models have ids 0 to 1028"),
        ([5, 1029], "names token 1029"),
        (
            [2.5],
            r"measure of intervene is \[2\.5\], and takes a Callable or a sequence, each a whole number or a Tensor",
        ),
        (range(1029), "total probability of all tokens is 1"),
        ("Sip", "measure of intervene is 'Sip', and takes a Callable or"),
        (
            lambda logits: logits.mean(),
            r"the measure makes .* of logits \[2, 1029\]; it must make one finite number a row",
        ),
        (lambda logits: logits[..., 0] / 0, "one finite number a row"),
    ],
)
def test_a_measure_of_nothing_is_refused(toy_pair, texts, cause, measure, told):
    with pytest.raises(InputError, match=told):
        ss.intervene(toy_pair, cause, measure=measure, **texts)


def test_directions_and_depths_that_cannot_be_studied_are_refused(toy_pair, texts, ids, cause):
    for vector in (torch.zeros(16), cause * torch.nan):
        with pytest.raises(InputError, match="the direction is zero or not finite"):
            ss.intervene(toy_pair, vector, measure=ids, **texts)
    with pytest.raises(InputError, match="cannot inject 1 layers upstream of layer 0"):
        ss.intervene(toy_pair, cause, measure=ids, **{**texts, "layer": 0})
    with pytest.raises(InputError, match="the target model has no layer 9"):
        ss.intervene(toy_pair, cause, measure=ids, **{**texts, "layer": 9})
    with pytest.raises(InputError, match=r"one cluster|of 1 cluster; a quarter of them"):
        ss.intervene(toy_pair, cause, measure=ids, **texts, clusters=[0] * TEXTS)
    with pytest.raises(InputError, match=r"is not in this dictionary|feature 99"):
        ss.intervene(toy_pair, toy_sae(), feature=99, measure=ids, **texts)


def test_texts_stand_third_and_what_means_nothing_with_them_is_refused(
    toy_pair, toy_cache, toy_dictionary, texts, ids, cause
):
    few = {name: value for name, value in texts.items() if name != "tokens"}
    tokens = texts["tokens"]
    with pytest.raises(InputError, match="intervals over tasks need 30"):  # as far as a study gets on few texts
        ss.intervene(
            toy_pair, cause, tokens[:30].tolist(), measure=ids, **{**few, "positions": texts["positions"][:30]}
        )
    with pytest.raises(InputError, match="leave_out= means nothing with texts in memory"):
        ss.intervene(toy_pair, cause, tokens, measure=ids, leave_out=[1], **few)
    with pytest.raises(InputError, match="measure= means nothing with a cache, which takes direction="):
        ss.intervene(toy_pair, toy_dictionary, toy_cache, feature=FEATURE, measure=ids)
    with pytest.raises(InputError, match=r"texts in memory need measure=; give layer="):
        ss.intervene(toy_pair, cause, tokens, positions=texts["positions"], layer=2)
    with pytest.raises(InputError, match="a cache is read with its pair and a dictionary of it"):
        ss.intervene(toy_pair, cause, toy_cache)
    with pytest.raises(InputError, match="intervene has no argument 'measur'; did you mean 'measure'"):
        ss.intervene(toy_pair, cause, tokens, measur=ids)
    with pytest.raises(InputError, match="models of intervene is 'small', and takes a ModelPair or a sequence"):
        ss.intervene("small", cause, tokens)
