"""The plan is fixed before the test, and what changes it is refused or listed."""

import pytest

from sae_steer.errors import InputError, StaleError
from sae_steer.study.plan import PLAN_FILE, check_unedited, fix_plan, read_plan

WANTED = {
    "direction": "feature 7",
    "settings": {"seed": 0, "doses": (0.0, 1.0), "nothing": None},
    "target_tokens": [3, 5],
}


def test_the_same_plan_is_found_again_with_the_same_hash_and_bytes(tmp_path):
    first = fix_plan(tmp_path, WANTED)
    written = (tmp_path / PLAN_FILE).read_bytes()
    assert fix_plan(tmp_path, WANTED).hash == first.hash
    assert (tmp_path / PLAN_FILE).read_bytes() == written
    found, known = read_plan(tmp_path / PLAN_FILE)
    assert found.hash == known == first.hash
    assert first.record()["changes"] == []


def test_a_plan_edited_after_its_hash_is_refused_and_forced_it_is_listed(tmp_path):
    fix_plan(tmp_path, WANTED)
    path = tmp_path / PLAN_FILE
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(InputError, match=r"edited after its hash; .*--force"):
        fix_plan(tmp_path, WANTED)
    changes = fix_plan(tmp_path, WANTED, force=True).record()["changes"]
    assert [change["key"] for change in changes] == ["plan.toml", "settings.seed"]
    assert fix_plan(tmp_path, WANTED).record()["changes"] == changes


def test_another_plan_is_refused_and_forced_its_changes_are_listed(tmp_path):
    fix_plan(tmp_path, WANTED)
    other = {**WANTED, "settings": {"seed": 4, "doses": (0.0, 1.0)}}
    with pytest.raises(StaleError, match=r"plans another study \(settings.seed: 0, now 4\)"):
        fix_plan(tmp_path, other)
    fix_plan(tmp_path, other, force=True)
    again = fix_plan(tmp_path, {**other, "direction": "random"}, force=True)
    assert [change["key"] for change in again.changes] == ["settings.seed", "direction"]


def test_a_file_that_is_no_plan_is_refused_in_one_line(tmp_path):
    (tmp_path / PLAN_FILE).write_text("hash = 3")
    with pytest.raises(InputError, match="is no plan") as caught:
        fix_plan(tmp_path, WANTED)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "hash = 3", "[" * 50_000, 'hash = "a"\nplan = 3', "\x00", None])
def test_a_plan_that_cannot_be_read_is_replaced_by_force_which_lists_it(tmp_path, content):
    fix_plan(tmp_path, WANTED)
    path = tmp_path / PLAN_FILE
    path.write_text(path.read_text()[:60] if content is None else content)
    with pytest.raises(InputError, match=r"is no plan .*--force"):
        fix_plan(tmp_path, WANTED)
    made = fix_plan(tmp_path, WANTED, force=True)
    assert [change["was"] for change in made.changes] == ["cut or damaged"]
    assert fix_plan(tmp_path, WANTED).changes == made.changes


def test_a_plan_edited_after_the_study_ended_is_noticed(tmp_path):
    recorded = fix_plan(tmp_path, WANTED).record()
    check_unedited(tmp_path, recorded["hash"])
    check_unedited(tmp_path, None)
    path = tmp_path / PLAN_FILE
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(InputError, match="was edited after the study ended"):
        check_unedited(tmp_path, recorded["hash"])
