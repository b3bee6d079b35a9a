import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_steer.corpus import SPECIALS, ParsedPlan, parse_plan, write_plans

GOOD = "<|task|>Clean<|steps|>Wipe<|sep|>Sip water<|sep|><|end|>"


def test_what_was_written_is_read_back():
    for plan in write_plans("scan", "adhd", count=200, seed=0):
        assert parse_plan(plan.text) == ParsedPlan(plan.task.title, tuple(s.text for s in plan.steps), True)


def test_padding_at_the_end_is_ignored():
    assert parse_plan(GOOD + "<|pad|><|pad|>") == ParsedPlan("Clean", ("Wipe", "Sip water"), True)


@pytest.mark.parametrize(
    ("text", "title", "steps"),
    [
        ("", "", ()),
        ("just words", "just words", ()),
        ("<|task|>Clean<|steps|>", "Clean", ()),
        ("<|task|>Clean<|steps|><|end|>", "Clean", ()),
        ("<|task|><|steps|>Wipe<|sep|><|end|>", "", ("Wipe",)),
        ("<|task|>Clean<|steps|>Wipe<|sep|>Sip", "Clean", ("Wipe", "Sip")),
        ("<|task|>Clean<|steps|>Wipe<|end|>", "Clean", ("Wipe",)),
        ("<|task|>Clean<|steps|>Wipe<|sep|><|sep|>Dry<|sep|><|end|>", "Clean", ("Wipe", "Dry")),
        ("<|task|>Clean<|steps|>Wipe<|sep|><|end|><|end|>", "Clean", ("Wipe",)),
        ("<|task|>Clean<|steps|>Wipe<|sep|><|end|>more", "Clean", ("Wipe",)),
        ("<|task|>Clean<|steps|>Wipe<|steps|>Dry<|sep|><|end|>", "Clean", ("Wipe", "Dry")),
        ("Clean<|steps|>Wipe<|sep|><|end|>", "Clean", ("Wipe",)),
        ("<|task|>Clean<|steps|> <|sep|>Wipe<|sep|><|end|>", "Clean", ("Wipe",)),
        ("<|end|><|task|>Clean<|steps|>Wipe<|sep|><|end|>", "Clean", ("Wipe",)),
    ],
)
def test_malformed_texts_are_read_as_far_as_they_go(text, title, steps):
    assert parse_plan(text) == ParsedPlan(title, steps, False)


@given(st.lists(st.sampled_from([*SPECIALS, "Wipe", " ", "<|", ""])).map("".join))
def test_any_text_is_parsed_and_only_whole_plans_are_well_formed(text):
    plan = parse_plan(text)
    assert all(step.strip() for step in plan.steps)
    if plan.well_formed:
        assert text.count("<|end|>") == text.count("<|task|>") == 1
        assert text.count("<|sep|>") == len(plan.steps) > 0
