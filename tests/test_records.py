"""Records come back as they went, and a finished output is found by what it was made from."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_steer import records
from sae_steer.errors import InputError, StaleError
from sae_steer.records import already_done, provenance, read_json, read_table, write_json, write_table
from sae_steer.settings import CacheSettings, InterveneSettings, ScanSettings

SETTINGS = InterveneSettings(doses=(0.0, 1.0), seed=3)
INPUTS = {"pair": "ab12", "cache": "cd34"}


@dataclass(frozen=True)
class Finding:
    name: str
    means: np.ndarray
    place: Path


def test_a_record_survives_the_round_trip(tmp_path):
    record = {"text": 'é " \n', "none": None, "numbers": [1, -2.5, 1e-300, 0.1], "deep": {"a": {"b": [True, []]}}}
    path = write_json(tmp_path / "record.json", record)
    assert read_json(path) == record


def test_floats_come_back_to_the_last_bit(tmp_path):
    drawn = np.random.default_rng(0).standard_normal(100) * 10.0 ** np.arange(-50, 50)
    assert read_json(write_json(tmp_path / "record.json", {"x": drawn.tolist()}))["x"] == drawn.tolist()


def test_arrays_tensors_paths_and_dataclasses_become_plain(tmp_path):
    record = {
        "finding": Finding("one", np.array([[1.5, 2.0]]), Path("runs/small")),
        "tensor": torch.tensor([1, 2]),
        "scalars": [np.float32(0.5), np.int64(3), np.bool_(True), torch.tensor(2.0)],
    }
    assert read_json(write_json(tmp_path / "record.json", record)) == {
        "finding": {"name": "one", "means": [[1.5, 2.0]], "place": "runs/small"},
        "tensor": [1, 2],
        "scalars": [0.5, 3, True, 2.0],
    }


def test_the_same_record_is_the_same_bytes(tmp_path):
    record = {"provenance": provenance(settings=SETTINGS, inputs=INPUTS), "mean": 1 / 3}
    one, other = (write_json(tmp_path / name, record).read_bytes() for name in "ab")
    assert one == other
    assert one.endswith(b"\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.nan, np.array([1.0, np.nan]), torch.tensor(np.inf)])
def test_numbers_that_are_none_are_refused_and_the_old_record_stays(tmp_path, value):
    path = write_json(tmp_path / "record.json", {"mean": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"mean": value})
    assert read_json(path) == {"mean": 1.0}


def test_a_value_no_record_can_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a set"):
        write_json(tmp_path / "record.json", {"a": {1, 2}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_a_record_that_is_not_whole_is_named(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"record\.json is not a whole record"):
        read_json(path)
    with pytest.raises(InputError, match=r"none\.json is not a whole record"):
        read_json(tmp_path / "none.json")


def test_a_table_survives_the_round_trip(tmp_path):
    columns = {
        "feature": np.arange(5, dtype=np.int32),
        "rate": np.array([0.0, 0.1, 1 / 3, 1.0, 2.0]),
        "name": np.array(list("abcdé"), dtype=object),
        "specific": np.array([True, False, True, False, True]),
    }
    found = read_table(write_table(tmp_path / "deep" / "table.parquet", columns))
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)


def test_a_table_written_in_parts_is_read_whole_or_by_value(tmp_path):
    def part(name: str, start: int) -> dict:
        return {"name": np.full(3, name), "a": np.arange(start, start + 3)}

    path = write_table(tmp_path / "table.parquet", part("", 0), (part(f"n{i}", 10 * i) for i in (1, 2)))
    assert read_table(path)["a"].tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert read_table(path, {"name": "n1"})["a"].tolist() == [10, 11, 12]


def test_a_table_that_is_not_whole_is_named(tmp_path):
    path = write_table(tmp_path / "table.parquet", {"a": np.arange(3)})
    path.write_bytes(path.read_bytes()[:-5])
    for broken in (path, tmp_path / "none.parquet"):
        with pytest.raises(InputError, match=rf"{broken.name} is not a whole table"):
            read_table(broken)


def test_provenance_names_version_commit_settings_and_inputs():
    found = provenance(settings=SETTINGS, inputs=INPUTS)
    assert found["sae_steer"] == records.package_version()
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", found["commit"])
    assert found["settings"] == {**asdict(SETTINGS), "doses": [0.0, 1.0]}
    assert found["inputs"] == INPUTS
    assert provenance(settings=asdict(SETTINGS), inputs=INPUTS) == found


def test_provenance_comes_back_equal_to_what_is_wanted(tmp_path):
    wanted = provenance(settings=SETTINGS, inputs=INPUTS)
    assert read_json(write_json(tmp_path / "record.json", wanted)) == wanted


@pytest.fixture
def made(tmp_path) -> Path:
    return write_json(tmp_path / "record.json", {"provenance": provenance(settings=SETTINGS, inputs=INPUTS)})


def test_what_is_not_there_is_not_done(tmp_path):
    assert not already_done(tmp_path / "record.json", provenance(settings=SETTINGS, inputs=INPUTS))


def test_what_was_made_from_the_same_is_done_unless_forced(made):
    wanted = provenance(settings=SETTINGS, inputs=INPUTS)
    assert already_done(made, wanted)
    assert not already_done(made, wanted, force=True)


def test_another_commit_of_one_version_is_the_same(made):
    wanted = {**provenance(settings=SETTINGS, inputs=INPUTS), "commit": "0" * 40}
    assert already_done(made, wanted)


@pytest.mark.parametrize(
    ("settings", "inputs", "told"),
    [
        (InterveneSettings(doses=(0.0, 1.0), seed=4), INPUTS, "seed: 3, now 4"),
        (InterveneSettings(doses=(0.0, 2.0), seed=3), INPUTS, "doses: [0.0, 1.0], now [0.0, 2.0]"),
        (SETTINGS, {**INPUTS, "pair": "ef56"}, 'pair: "ab12", now "ef56"'),
        (SETTINGS, {"pair": "ab12"}, 'cache: "cd34", now null'),
        (SETTINGS, {**INPUTS, "feature": "3"}, 'feature: null, now "3"'),
        (CacheSettings(), INPUTS, "doses: [0.0, 1.0], now null"),
    ],
)  # fmt: skip
def test_what_was_made_otherwise_is_refused_with_the_first_difference(made, settings, inputs, told):
    before = made.read_bytes()
    wanted = provenance(settings=settings, inputs=inputs)
    with pytest.raises(StaleError, match=re.escape(f"made with other inputs ({told})")):
        already_done(made, wanted)
    assert not already_done(made, wanted, force=True)
    assert made.read_bytes() == before


def test_another_version_is_another_maker(made, monkeypatch):
    wanted = {**provenance(settings=SETTINGS, inputs=INPUTS), "sae_steer": "9.9"}
    with pytest.raises(StaleError, match=r'sae_steer: ".*", now "9\.9"'):
        already_done(made, wanted)


def test_long_differences_are_shortened(tmp_path):
    made = write_json(tmp_path / "r.json", {"provenance": provenance(settings=ScanSettings(), inputs={"a": "x" * 500})})
    with pytest.raises(StaleError) as told:
        already_done(made, provenance(settings=ScanSettings(), inputs={"a": "y" * 500}))
    assert len(str(told.value)) < 300


@pytest.mark.parametrize("content", [[], {}, {"provenance": None}, 3])
def test_a_file_that_does_not_say_what_it_was_made_from_is_refused(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    with pytest.raises(StaleError, match="does not say what it was made from"):
        already_done(path, provenance(settings=SETTINGS, inputs=INPUTS))


def test_an_installed_package_without_a_checkout_has_no_commit(monkeypatch, tmp_path):
    records.commit.cache_clear()
    monkeypatch.setattr(records, "__file__", str(tmp_path / "sae_steer" / "records.py"))
    assert records.commit() is None
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")  # a checkout on a machine without git
    assert records.commit() is None
    records.commit.cache_clear()


def sealed(tmp_path):
    return write_json(tmp_path / "r.json", {"provenance": provenance(settings=SETTINGS, inputs=INPUTS), "share": 0.25})


def test_a_record_is_read_back_without_its_seal_and_layout_does_not_matter(tmp_path):
    path = sealed(tmp_path)
    content = json.loads(path.read_text())
    assert records.read_json(path) == {key: value for key, value in content.items() if key != "seal"}
    path.write_text(json.dumps(content, indent=7, sort_keys=True))
    assert records.read_json(path)["share"] == 0.25


@pytest.mark.parametrize("bit", range(0, 8 * 200, 61))
def test_a_flipped_bit_in_a_record_is_found_or_changes_nothing(tmp_path, bit):
    path = sealed(tmp_path)
    before = records.read_json(path)
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)
    told = None
    try:
        after = records.read_json(path)
    except InputError as error:
        told = str(error)
    if told is None:
        assert {key: value for key, value in after.items() if key in before} == before
    else:
        assert str(path) in told
        assert "\n" not in told


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', '{"a": ' + "9" * 5_000 + "}", "\ufeff{}"],
)
def test_a_file_that_is_no_whole_record_is_one_line(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(InputError, match="is not a whole record"):
        records.read_json(tmp_path / "r.json")


def test_a_key_that_a_record_lacks_is_named_wherever_it_is_asked_for(tmp_path):
    path = sealed(tmp_path)
    with pytest.raises(InputError, match=r"r\.json lacks 'doses'; it was written by another version") as refused:
        records.read_json(path)["provenance"]["doses"]
    assert isinstance(refused.value, KeyError)


def test_a_table_that_is_not_its_records_is_found(tmp_path):
    records.write_table(tmp_path / "t.parquet", {"x": np.arange(3)})
    record = {"files": records.hashes_of(tmp_path, ["t.parquet"])}
    assert records.read_table(tmp_path / "t.parquet", of=record)["x"].tolist() == [0, 1, 2]
    records.write_table(tmp_path / "t.parquet", {"x": np.arange(4)})
    with pytest.raises(InputError, match="is not the table its record was written with"):
        records.read_table(tmp_path / "t.parquet", of=record)


def test_what_errors_quote_cannot_command_a_terminal():
    assert str(InputError("model \x1b[2J'\u202e' is\nnone")) == "model \\x1b[2J'\\u202e' is\nnone"
