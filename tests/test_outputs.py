"""One writer a folder, and nothing replaced that this package did not make."""

import json
import multiprocessing
import os
import threading

import pytest

from sae_steer.errors import InputError, SteerError
from sae_steer.outputs import LEDGER, writing

WANTED = {"settings": {"k": 4}, "inputs": {"rows": "abc"}}


def refusal(act) -> str:
    with pytest.raises(SteerError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def take(folder, *names, force=False):
    with writing(folder, names, force=force):
        pass


def test_a_second_writer_is_refused_and_the_first_one_may_ask_again(tmp_path):
    told = []
    with writing(tmp_path, ["a.json"]):
        take(tmp_path, "b.json")
        second = threading.Thread(target=lambda: told.append(refusal(lambda: take(tmp_path, "c.json"))))
        second.start()
        second.join()
    assert told == [f"another process is writing into {tmp_path}; wait for it, or use another --out"]
    take(tmp_path, "c.json")


def hold(folder, ready):
    with writing(folder, ["a.json"]):
        ready.set()
        threading.Event().wait(60)


def test_a_kill_frees_the_folder(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    writer = fork.Process(target=hold, args=(tmp_path, ready))
    writer.start()
    assert ready.wait(30)
    assert "another process" in refusal(lambda: take(tmp_path))
    writer.kill()
    writer.join()
    take(tmp_path)


def test_what_others_made_is_refused_and_with_force_put_aside_never_deleted(tmp_path):
    theirs = tmp_path / "cfg.json"
    theirs.write_text('{"architecture": "topk"}')
    (tmp_path / "notes.txt").write_text("mine")
    told = refusal(lambda: take(tmp_path, "cfg.json", "weights"))
    assert told.startswith(f"{theirs} was not made by sae-steer")
    for number in ("", "2"):
        take(tmp_path, "cfg.json", "weights", force=True)
        assert (tmp_path / f"cfg.json.old{number}").read_text() == '{"architecture": "topk"}'
        assert not theirs.exists()
        theirs.write_text('{"architecture": "topk"}')
        (tmp_path / LEDGER).unlink()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_what_was_claimed_once_is_replaced_without_a_word(tmp_path):
    take(tmp_path, "table")
    (tmp_path / "table").write_text("half")  # and then a kill
    take(tmp_path, "table")


@pytest.mark.parametrize(
    "record",
    [
        {"provenance": {"sae_steer": "0.1.0", "settings": {}}},
        {"metadata": {"sae_steer": {"provenance": {}, "settings": {}}}},
    ],
)
def test_an_output_from_before_there_were_lists_is_known_by_its_record(tmp_path, record):
    (tmp_path / "record.json").write_text(json.dumps(record))
    (tmp_path / "table").write_text("")
    take(tmp_path, "record.json", "table")


@pytest.mark.parametrize("content", ["[]", "{", '{"provenance": "me"}', '{"metadata": 3}', "[" * 100_000])
def test_a_record_that_only_looks_alike_is_not_ours(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    assert "was not made by sae-steer" in refusal(lambda: take(tmp_path, "record.json"))


def test_a_link_in_the_place_of_the_list_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("content")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / LEDGER).symlink_to(precious)
    assert "is a link" in refusal(lambda: take(folder))
    assert precious.read_text() == "content"


def test_a_linked_folder_inside_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "training").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refusal(lambda: take(tmp_path, "training/state.safetensors"))


@pytest.mark.parametrize("content", [b"\x00\xff", b"somebody else's\n", b"sae_steer: what\nelse\n"])
def test_a_list_that_is_none_is_refused_and_left_as_it_is(tmp_path, content):
    (tmp_path / LEDGER).write_bytes(content)
    assert "was not made by sae-steer" in refusal(lambda: take(tmp_path))
    assert (tmp_path / LEDGER).read_bytes() == content


@pytest.mark.parametrize("kept", range(0, 95, 7))
def test_a_list_cut_short_by_a_kill_loses_no_more_than_its_last_name(tmp_path, kept):
    take(tmp_path, "first", "second")
    whole = (tmp_path / LEDGER).read_bytes()
    (tmp_path / LEDGER).write_bytes(whole[:kept])
    take(tmp_path, "first", "second", "third")
    assert (tmp_path / LEDGER).read_bytes().splitlines()[0] == whole.splitlines()[0]
    take(tmp_path, "third")


def test_only_leftovers_of_what_is_claimed_are_swept(tmp_path):
    for name in (".table.x7_0.tmp", ".tables.x7_0.tmp", ".mine.tmp", ".cache"):
        (tmp_path / name).write_text("")
    take(tmp_path, "table")
    assert {path.name for path in tmp_path.iterdir()} == {LEDGER, ".tables.x7_0.tmp", ".mine.tmp", ".cache"}


def test_a_forced_run_that_was_cut_off_is_gone_on_with(tmp_path):
    other = {**WANTED, "settings": {"k": 5}}

    def over(wanted, *, force=True):
        with writing(tmp_path) as output:
            anew = output.starts_over(wanted, force=force)
            if anew:
                output.begun(wanted)
            return anew

    assert not over(WANTED, force=False)
    assert over(WANTED)
    assert not over(WANTED)
    with writing(tmp_path) as output:
        output.ended(WANTED)
    assert over(WANTED)
    assert over(other)
    assert over(WANTED), "what is there is the other's"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(lambda: take(tmp_path / "file" / "out"))


def test_without_fcntl_the_package_imports(monkeypatch):
    import subprocess
    import sys

    program = "import sys; sys.modules['fcntl'] = None; import sae_steer.outputs as o; assert o.fcntl is None"
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ})


def test_a_refusal_to_replace_is_an_input_error(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(InputError):
        take(tmp_path, "a")
