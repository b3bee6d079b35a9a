import numpy as np
import pytest

from sae_steer.corpus import OnsetRule, first_token_purity, label_positions, write_plans
from sae_steer.errors import InputError

PLAN = "<|task|>Clean<|steps|>Wipe the oven<|sep|>Sip water<|sep|>Dry the oven<|sep|><|end|>"


def onsets_of(text, tokenizer, **options):
    ids = tokenizer.encode(text)
    labels = label_positions(ids, tokenizer=tokenizer, **options)
    return [(tokenizer.decode([ids[at]]), int(labels.step[at]), bool(labels.next_is_target[at]))
            for at in np.flatnonzero(labels.is_onset)]  # fmt: skip


def test_an_onset_is_a_delimiter_followed_by_a_step(small):
    assert onsets_of(PLAN, small) == [("<|steps|>", 0, False), ("<|sep|>", 1, True), ("<|sep|>", 2, False)]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("<|task|>Clean<|steps|>", 0),
        ("<|task|>Clean<|steps|><|end|>", 0),
        ("<|task|>Clean<|steps|>Wipe<|sep|>", 1),
        ("<|task|>Clean<|steps|>Wipe<|sep|><|sep|>Dry<|sep|><|end|><|pad|>", 2),
        ("<|task|>Clean<|steps|>Wipe<|sep|> <|sep|>Dry", 2),
        ("no plan at all", 0),
        ("", 0),
    ],
)
def test_a_delimiter_that_no_step_follows_is_none(small, text, count):
    assert len(onsets_of(text, small)) == count


def test_positions_that_are_no_onset_carry_nothing(small):
    labels = label_positions(small.encode(PLAN), tokenizer=small)
    assert np.all((labels.step == -1) == ~labels.is_onset)
    assert not np.any(labels.next_is_target & ~labels.is_onset)


def test_labels_agree_with_the_grammar_and_spread_its_probabilities(small):
    for plan in write_plans("scan", "adhd", count=100, seed=0):
        labels = label_positions(small.encode(plan.text), tokenizer=small)
        assert labels.step[labels.is_onset].tolist() == list(range(len(plan.steps)))
        assert labels.next_is_target[labels.is_onset].tolist() == [step.is_target for step in plan.steps]
        p = labels.spread([step.true_p for step in plan.steps])
        assert p[labels.is_onset].tolist() == [step.true_p for step in plan.steps]
        assert np.isnan(p[~labels.is_onset]).all()


def test_typed_delimiters_are_no_onsets(small):
    ids = [*small.encode_prompt("Clean <|sep|> up"), *small.encode_text("Wipe <|sep|> Sip water")]
    assert label_positions(ids, tokenizer=small).is_onset.sum() == 1


def test_a_regex_finds_the_onsets_of_other_domains(small, large):
    text = "Plan: 漢\n- Sip water\n- Wipe the oven\n- pause and breathe"
    for tokenizer in (small, large):
        found = onsets_of(text, tokenizer, rule=OnsetRule(regex=r"\n-"))
        assert [(step, target) for _, step, target in found] == [(0, True), (1, False), (2, True)]


def test_a_regex_and_tokens_agree_where_both_apply(small):
    for plan in write_plans("tune", "adhd", count=30, seed=0):
        by_regex = onsets_of(plan.text, small, rule=OnsetRule(regex=r"<\|(steps|sep)\|>"))
        assert by_regex == onsets_of(plan.text, small)


def test_phrases_are_the_callers(small):
    assert [target for *_, target in onsets_of(PLAN, small, phrases=["wipe the oven"])] == [
        True,
        False,
        False,
    ]


def test_a_regex_that_does_not_compile_and_a_missing_token_are_told(small):
    with pytest.raises(InputError, match="does not compile"):
        label_positions(small.encode(PLAN), tokenizer=small, rule=OnsetRule(regex="("))
    with pytest.raises(InputError, match="no token '<step>'"):
        label_positions(small.encode(PLAN), tokenizer=small, rule=OnsetRule(tokens=("<step>",)))


def test_purity_is_the_share_of_onsets_where_a_token_begins_a_target(large):
    steps = ["Sip water"] * 3 + ["Take a deep breath"] + ["Take the bin out"] * 3
    text = "<|task|>T<|steps|>" + "".join(f"{step}<|sep|>" for step in steps) + "<|end|>"
    found = first_token_purity([large.encode(text)], tokenizer=large)
    sip, take = large.encode("Sip")[0], large.encode("Take")[0]
    assert found.ids == (sip,)
    assert found.purity == {take: 0.25, sip: 1.0}
    assert found.coverage == 0.75


def test_target_tokens_cover_most_regulation_steps_of_the_corpus(small, large, train_texts):
    for tokenizer in (small, large):
        found = first_token_purity(tokenizer.encode_batch(train_texts["adhd"]), tokenizer=tokenizer)
        assert found.coverage >= 0.7
        assert min(found.purity[token] for token in found.ids) >= 0.9
        assert set(found.ids).isdisjoint(tokenizer.specials.values())


def test_texts_without_a_target_step_are_told(small):
    with pytest.raises(InputError, match="no step of these texts is a target phrase"):
        first_token_purity([small.encode(PLAN)], tokenizer=small, phrases=["Dance"])


def test_a_phrase_that_the_tokenizer_cannot_make_is_named(small, monkeypatch):
    monkeypatch.setattr(type(small), "decode", lambda self, ids: "Sip <unk>")  # as a word tokenizer would
    with pytest.raises(InputError, match=r"cannot make 1 of the 2 target phrases, the first 'Sip water'"):
        first_token_purity([], tokenizer=small, phrases=["Sip <unk>", "Sip water"])


def test_phrases_that_begin_like_ordinary_steps_give_no_target_token_and_are_told(large):
    text = "<|task|>T<|steps|>Take a deep breath<|sep|>Take the bin out<|sep|><|end|>"
    with pytest.raises(InputError, match=r"no first token of a target phrase begins one at 90% of its onsets"):
        first_token_purity([large.encode(text)], tokenizer=large)


def test_a_step_ends_where_a_delimiter_of_several_tokens_begins(small):
    text = "Soup:\n1) Wipe the oven\n2) Sip water\n10) Dry the oven\n"
    ids = small.encode(text)
    rule = OnsetRule(tokens=(), regex=r"\n\d+\)")
    assert [step for _, step in rule.steps(ids, small)] == ["Wipe the oven", "Sip water", "Dry the oven"]
    assert [small.decode(ids[: at + 1])[-2:] for at, _ in rule.steps(ids, small)] == ["1)", "2)", "0)"]
    labels = label_positions(ids, tokenizer=small, rule=rule)
    assert labels.next_is_target[labels.is_onset].tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("phrases", "targets"),
    [
        (["sip WATER"], [False, True, False]),
        (["Sip"], [False, False, False]),
        (["Sip*"], [False, True, False]),
        (["w*", "D*"], [True, False, True]),
        (["/(sip|wipe)\\b/"], [True, True, False]),
        (["/oven/"], [False, False, False]),
        (["/.*oven$/"], [True, False, True]),
    ],
)
def test_a_phrase_may_be_how_a_step_begins_or_a_regular_expression(small, phrases, targets):
    assert [target for *_, target in onsets_of(PLAN, small, phrases=phrases)] == targets


def test_a_phrase_that_does_not_compile_is_told_and_patterns_need_not_be_spelled(small):
    with pytest.raises(InputError, match="target phrase '/\\(/' does not compile"):
        onsets_of(PLAN, small, phrases=["/(/"])
    found = first_token_purity([small.encode(PLAN)], tokenizer=small, phrases=["/sip .*/", "Dry*"])
    assert found.coverage == 1.0
