"""What does not fit its annotation is refused in one line, by settings and by every public function alike."""

import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from jaxtyping import Bool, Int
from torch import Tensor

import sae_steer as ss
from sae_steer import settings as page
from sae_steer.arguments import Checked, Count, Positive, Range, check, checked, nearest
from sae_steer.cli import main
from sae_steer.errors import InputError, SteerError, visible


def refusal(hint, value) -> str:
    with pytest.raises(InputError) as refused:
        check("it", value, hint)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("hint", "value", "taken"),
    [
        (int, np.int64(3), 3),
        (float, 3, 3.0),
        (Positive, np.float32(0.5), 0.5),
        (tuple[float, ...], [1, 2.5], (1.0, 2.5)),
        (tuple[int, str], [1, "a"], (1, "a")),
        (Path, "a/b", Path("a/b")),
        (int | None, None, None),
        (int | str, "top", "top"),
        (Literal["a", "b"], "b", "b"),
    ],
)
def test_what_is_meant_is_taken(hint, value, taken):
    result = check("it", value, hint)
    assert result == taken
    assert type(result) is type(taken)


@pytest.mark.parametrize("value", [True, 2.5, "3", None, [1], math.nan, np.ones(2)])
def test_no_whole_number_is_none(value):
    assert refusal(int, value).endswith(", and takes a whole number")


@pytest.mark.parametrize("value", [True, math.nan, math.inf, "1e-3", None, 1j])
def test_no_finite_number_is_none(value):
    assert refusal(float, value).endswith(", and takes a number")


def test_ranges_say_what_they_hold():
    assert refusal(Count, 0) == "it is 0, and takes a whole number of at least 1"
    assert refusal(Positive, 0.0) == "it is 0.0, and takes a number above 0"
    assert refusal(Annotated[float, Range(0, 1)], 1.5) == "it is 1.5, and takes a number from 0 to 1"
    assert refusal(Annotated[float, Range(0, 1, above=True)] | None, -1) == (
        "it is -1, and takes a number above 0 and at most 1 or None"
    )


def test_a_word_is_answered_with_the_nearest():
    kinds = Literal["onsets", "all", "onward"]
    assert refusal(kinds, "onset").endswith("one of 'onsets', 'all', 'onward'; did you mean 'onsets'?")
    assert refusal(kinds, "ONWARD").endswith("did you mean 'onward'?")
    assert refusal(kinds, "nowhere else").endswith("takes one of 'onsets', 'all', 'onward'")
    assert nearest("lenient_words", ["lenient", "phrases"]) == "; did you mean 'lenient'?"
    assert nearest("q", ["lenient", "phrases"]) == "; there is 'lenient', 'phrases'"


def test_sequences_are_looked_into_and_text_is_none():
    assert "each a whole number" in refusal(Sequence[int], "12")
    assert "each a whole number" in refusal(Sequence[int], [1, "2"])
    assert "a Mapping" in refusal(Mapping, [1])
    assert refusal(Callable, 3).endswith("a Callable")
    assert refusal(tuple[int, int], (1, 2, 3)).endswith("2 values: a whole number, a whole number")


def test_tensors_are_shown_by_type_and_shape():
    told = refusal(Bool[Tensor, "text pos"], torch.zeros(2, 3))
    assert told == "it is a Tensor of float32 [2, 3], and takes a tensor Bool[Tensor, 'text pos']"
    assert "[2]" in refusal(Int[Tensor, "text pos"], torch.zeros(2, dtype=torch.long))


def test_an_argument_nobody_knows_or_forgot_is_told_before_anything_runs():
    ran = []

    @checked
    def bake(flour: Count, *, sugar: float = 1.0, **rest: int) -> None:
        ran.append((flour, sugar, rest))

    @checked
    def boil(water: Count, *, minutes: int = 3) -> None:
        ran.append(water)

    bake(np.int32(2), sugar=1, salt=3)
    assert ran == [(2, 1.0, {"salt": 3})]
    with pytest.raises(InputError, match="boil has no argument 'minute'; did you mean 'minutes'"):
        boil(1, minute=2)
    with pytest.raises(
        InputError, match=r"boil: missing a required argument: 'water'; call it as boil\(water, minutes"
    ):
        boil(minutes=3)
    with pytest.raises(InputError, match="water of boil is 0, and takes a whole number of at least 1"):
        boil(0)
    assert len(ran) == 1


SETTINGS = [
    kind for kind in vars(page).values() if isinstance(kind, type) and issubclass(kind, Checked) and kind is not Checked
]


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_number_of_the_settings_has_a_range_and_refuses_nan_and_what_is_below(kind):
    for field in dataclasses.fields(kind):
        default = getattr(kind, field.name, None)
        if isinstance(default, bool) or not isinstance(default, int | float):
            continue
        for bad in (
            math.nan,
            math.inf,
            -1,
            "1",
            None if default is None else [default],
            10**30 if field.name.endswith("seed") else -0.5,
        ):
            with pytest.raises(InputError, match=rf"{kind.__name__}\.{field.name} is "):
                kind(**{field.name: bad})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (page.InterveneSettings, "bound_share", 0),
        (page.InterveneSettings, "bound_share", math.nan),
        (page.InterveneSettings, "doses", (0.0, math.nan)),
        (page.InterveneSettings, "temperature", 0),
        (page.SAESettings, "lr", 0),
        (page.SAESettings, "lr", math.nan),
        (page.SAESettings, "warmup", -0.1),
        (page.PairTrainingSettings, "init", "seperate"),
        (page.PairTrainingSettings, "lr", -1e-3),
    ],
)
def test_values_that_went_through_before_are_refused(kind, field, value):
    with pytest.raises(InputError, match=rf"{kind.__name__}\.{field} is "):
        kind(**{field: value})


def test_a_misspelt_setting_is_answered_with_the_nearest():
    with pytest.raises(InputError, match="SAESettings has no argument 'd_saes'; did you mean 'd_sae'"):
        page.SAESettings(d_saes=3)


def test_settings_take_numpy_numbers_and_lists_as_what_they_mean():
    assert page.SAESettings(k=np.int64(3), d_sae=np.int32(9)) == page.SAESettings(k=3, d_sae=9)
    assert page.InterveneSettings(doses=[0, 1]).doses == (0.0, 1.0)


PUBLIC = [name for name in ss.__all__ if inspect.isfunction(getattr(ss, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_refuses_an_unknown_argument_and_annotates_its_own(name):
    function = getattr(ss, name)
    with pytest.raises(InputError, match=r"has no argument 'nonsense'|missing a required argument"):
        function(nonsense=1)
    plain = inspect.unwrap(function)
    for parameter in inspect.signature(plain).parameters.values():
        assert parameter.annotation is not parameter.empty
        assert not isinstance(parameter.annotation, str), "an annotation in quotes is held against nothing"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_refuses_a_strange_first_argument_in_one_line(name):
    function = getattr(ss, name)
    parameters = inspect.signature(function).parameters.values()
    needed = [one for one in parameters if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
    with pytest.raises(SteerError) as refused:
        function(**{parameter.name: object() for parameter in needed})
    assert "\n" not in str(refused.value)


def test_what_reaches_the_screen_moves_no_cursor():
    assert visible("a\x1b[2Jb\r\x07\n é漢") == "a\\x1b[2Jb\\r\\x07\n é漢"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("train-sae --lr nan", "--lr is nan, and takes a number above 0"),
        ("train-sae --warmup -1", "--warmup is -1.0, and takes a number from 0 to 1"),
        ("train-pair --lr 0", "--lr is 0.0, and takes a number above 0"),
        ("intervene --bound -1", "--bound is -1.0, and takes a number above 0 and at most 1"),
        ("intervene --bound nan", "--bound is nan, and takes"),
        ("scan --max-q 2", "--max-q is 2.0, and takes a number from 0 to 1"),
        ("cache --split-shares 0.5,0.5", "0.5,0.5 is no four numbers; give such as 0.4,0.15,0.1,0.35"),
        ("cache --split-shares 0.5,0.5,0.5,0.5 --texts a.txt", "sum to 2; give four that sum to 1"),
        ("cache --split-shares 0.4,0.2,0.1,0.3", "--split-shares means nothing without --texts"),
        ("cache --texts a.txt --train-plans 9", "--train-plans means nothing with --texts, whose tasks are dealt by"),
        ("scan --min-rate x", "--min-rate is 'x', and takes a number from 0 to 1"),
    ],
)
def test_the_command_line_refuses_by_the_same_ranges_under_its_own_names(command, told):
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 2
    assert told in result.stderr


def test_public_values_are_held_against_their_fields_too():
    assert ss.OnsetRule(tokens=["<|sep|>"]).tokens == ("<|sep|>",)
    for make, told in (
        (lambda: ss.OnsetRule(tokens="<|sep|>"), "OnsetRule.tokens is '<|sep|>', and takes a sequence, each text"),
        (lambda: ss.OnsetRule(regexp="a"), "OnsetRule has no argument 'regexp'; did you mean 'regex'?"),
        (lambda: ss.NamedModel("a", None), "NamedModel.model is None, and takes a LanguageModel"),
        (
            lambda: ss.GeneratedTexts(variants="adhd"),
            "GeneratedTexts.variants is 'adhd', and takes a sequence, each text",
        ),
    ):
        with pytest.raises(InputError) as refused:
            make()
        assert str(refused.value) == told
