"""A study's record: one writer, one reader, and what is refused."""

import json

import pytest
from report_records import study, untested

from sae_steer.errors import InputError
from sae_steer.records import write_json
from sae_steer.study.record import SCHEMA, Study, read_study
from sae_steer.typed_json import of_json


@pytest.mark.parametrize(
    "record", [study(7), study(7, sampled=False), untested(25)], ids=["whole", "no plans", "untested"]
)
def test_a_record_is_read_and_written_without_losing_a_key(record, tmp_path):
    found = read_study(write_json(tmp_path / "results.json", record))
    again = json.loads(json.dumps(found.record()))
    assert found.tested == record["tested"]
    assert read_study(write_json(tmp_path / "again.json", again)) == found
    for key, value in record.items():
        assert key in again
        if not isinstance(value, dict | list):
            assert again[key] == value


def test_a_variant_is_found_by_name_and_its_effect_at_the_primary_dose():
    record = study(7)
    evidence = of_json(Study, record).measured
    ablated = evidence.variant("zero_ablate")
    row = next(row for row in record["variants"][2]["joint"]["doses"] if row["dose"] == 1.0)
    assert evidence.primary(ablated, "joint").mean == row["mean"]
    assert evidence.variant("no such") is None


@pytest.mark.parametrize("schema", [None, 1, SCHEMA + 1, "2"])
def test_a_record_of_another_schema_is_refused_with_what_to_do(schema, tmp_path):
    path = write_json(tmp_path / "results.json", study(7) | {"schema": schema})
    with pytest.raises(
        InputError, match=f"schema {schema}, and this version reads {SCHEMA}; make it again with .*--force"
    ):
        read_study(path)


def test_a_record_that_lacks_a_key_or_is_none_is_refused_in_one_line(tmp_path):
    record = study(7)
    del record["variants"][1]["single"]["tests"]["icc"]
    with pytest.raises(InputError, match=r"variants\[1\].single.tests lacks 'icc'") as raised:
        read_study(write_json(tmp_path / "results.json", record))
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="schema None"):
        read_study(write_json(tmp_path / "list.json", []))
