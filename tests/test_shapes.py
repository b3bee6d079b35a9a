"""What was read is of the type its reader counts on, or the first place that is not is named."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from sae_steer.errors import InputError
from sae_steer.shapes import Count, Hash, Matches, Name, conform


@dataclass(frozen=True)
class Criteria:
    rate: float = 0.1


@dataclass(frozen=True)
class Counted:
    rows: int
    long: int = 0


class Line(TypedDict):
    file: Annotated[str, Matches(r"shard-\d+", "a shard's name")]
    rows: Count
    kind: NotRequired[Literal["a", 3]]


class Record(TypedDict):
    name: Name
    lines: list[Line]
    share: float | None
    of: dict[Name, Hash]
    criteria: Criteria
    counted: NotRequired[Counted]
    rest: NotRequired[Any]


RIGHT = {
    "name": "small", "lines": [{"file": "shard-1", "rows": 3, "kind": 3}, {"file": "shard-2", "rows": 0}],
    "share": None, "of": {"adhd": "0" * 64}, "criteria": {"rate": 1}, "rest": object(), "more": 1,
}  # fmt: skip


def test_what_is_right_passes():
    conform(RIGHT, Record, "here")
    conform({**RIGHT, "share": 0.5}, Record, "here")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": ".."}, "here.name is '..', not a name without a path"),
        ({"name": "../../etc"}, "here.name is '../../etc'"),
        ({"name": "a\x1b[2J"}, "here.name is"),
        ({"name": 3}, "here.name is 3, not a string"),
        ({"lines": {}}, "here.lines is {}, not a list"),
        ({"lines": [{"file": "shard-1", "rows": True}]}, "here.lines[0].rows is True, not a whole number"),
        ({"lines": [{"file": "shard-1", "rows": -1}]}, "here.lines[0].rows is -1, not a number from 0 on"),
        ({"lines": [{"file": "shard-1", "rows": 1.0}]}, "here.lines[0].rows is 1.0, not a whole number"),
        ({"lines": [{"file": "shard-1/..", "rows": 1}]}, "here.lines[0].file is 'shard-1/..'"),
        ({"lines": [{"rows": 1}]}, "here.lines[0] lacks 'file'"),
        ({"lines": [{"file": "shard-1", "rows": 1, "kind": "b"}]}, "not one of a, 3"),
        ({"share": "half"}, "here.share is 'half', not a finite number or null"),
        ({"share": float("nan")}, "here.share is nan"),
        ({"of": {"..": "0" * 64}}, "a key of here.of is '..'"),
        ({"of": {"a": "0" * 63}}, "not a SHA-256"),
        ({"criteria": {"ratio": 1}}, "here.criteria has 'ratio', which is none of rate"),
        ({"criteria": {"rate": None}}, "here.criteria.rate is None, not a finite number"),
        ({"counted": {"long": 1}}, "here.counted lacks 'rows'"),
        ({"criteria": []}, "here.criteria is [], not an object"),
    ],
)
def test_the_first_place_that_is_wrong_is_named(change, told):
    with pytest.raises(InputError) as refused:
        conform({**RIGHT, **change}, Record, "here")
    assert told in str(refused.value)
