"""Typed values to JSON and back: what is written is read again, and what is not as it should be is named."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest

from sae_steer.typed_json import ASIDE, FLAT, NotSuchRecordError, as_json, key, of_json


@dataclass(frozen=True)
class Leaf:
    size: float
    name: str = field(metadata=key("called"))
    kind: Literal["single", "joint"] = "single"


@dataclass(frozen=True)
class Inner:
    leaves: tuple[Leaf, ...]
    by_name: Mapping[str, Leaf]


@dataclass(frozen=True)
class Whole:
    count: int
    held: bool
    facts: Mapping[str, Any] | None = None
    inner: Inner | None = field(default=None, metadata=FLAT)
    rows: np.ndarray | None = field(default=None, compare=False, metadata=ASIDE)


WHOLE = Whole(3, True, {"any": [1, "x"]}, Inner((Leaf(1.5, "a"), Leaf(2, "b", "joint")), {"c": Leaf(0.0, "c")}))


@pytest.mark.parametrize("value", [WHOLE, Whole(0, False), Whole(1, True, rows=np.ones(3))])
def test_a_value_survives_json_unchanged(value):
    assert of_json(Whole, json.loads(json.dumps(as_json(value)))) == value


def test_keys_are_the_names_or_what_is_said_and_flat_parts_stand_among_them():
    record = as_json(WHOLE)
    assert set(record) == {"count", "held", "facts", "leaves", "by_name"}
    assert record["leaves"][1] == {"size": 2, "called": "b", "kind": "joint"}
    assert set(as_json(Whole(1, True))) == {"count", "held", "facts"}


def test_numbers_of_numpy_are_numbers():
    assert json.dumps(as_json({"n": np.int64(2), "x": np.float64(0.5), "v": np.arange(2)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": None}, "the record.count holds a NoneType and should hold a int"),
        ({"count": 1.5}, "the record.count holds a float"),
        ({"held": 1}, "the record.held holds a int"),
        ({"leaves": {}}, "the record.leaves holds a dict"),
        ({"leaves": [{"size": "1", "called": "a"}]}, r"the record.leaves\[0\].size holds a str"),
        ({"leaves": [{"size": 1.0}]}, r"the record.leaves\[0\] lacks 'called'"),
        ({"leaves": [{"size": 1.0, "called": "a", "kind": "both"}]}, "which is none of single, joint"),
        ({"by_name": []}, "the record.by_name holds a list"),
    ],
)
def test_what_is_of_another_type_is_named_with_its_place(change, said):
    with pytest.raises(NotSuchRecordError, match=said):
        of_json(Whole, as_json(WHOLE) | change)


def test_a_part_that_is_half_there_is_an_error_and_no_missing_part():
    record = as_json(WHOLE)
    del record["by_name"]
    with pytest.raises(NotSuchRecordError, match="lacks 'by_name'"):
        of_json(Whole, record)
    with pytest.raises(NotSuchRecordError, match="the record holds a list"):
        of_json(Whole, [])
