"""Files are written whole or not at all."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sae_steer
from sae_steer.errors import SteerError
from sae_steer.files import read_facts, read_tensors, replacing, sha256, sweep, timed, write_tensors, write_text
from sae_steer.randomness import generator


def full(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "deep" / "er" / "note.txt"
    assert write_text(path, "é\n") == path
    assert path.read_text(encoding="utf-8") == "é\n"
    assert [found.name for found in path.parent.iterdir()] == ["note.txt"]


def test_a_written_file_has_the_mode_of_any_other(tmp_path):
    (tmp_path / "usual").write_text("")
    write_text(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, failure):
    path = write_text(tmp_path / "note.txt", "old")

    def write_half() -> None:
        with replacing(path) as scratch:
            scratch.write_text("half")
            raise failure

    with pytest.raises(failure):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_until_the_block_ends_readers_see_the_old_file(tmp_path):
    path = write_text(tmp_path / "note.txt", "old")
    with replacing(path) as scratch:
        scratch.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_full_disk_is_a_steer_error_and_the_old_file_stays(tmp_path, monkeypatch):
    path = write_text(tmp_path / "note.txt", "old")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SteerError, match=r"cannot write .*note\.txt: No space left on device; free space"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_on_a_full_disk_is_a_steer_error(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs leave to mount a small disk")
    try:
        path = write_tensors(tmp_path / "state", {"a": torch.ones(3)}, {"step": 1})
        with pytest.raises(SteerError, match=r"cannot write .*No space left on device.*free space") as told:
            write_tensors(path, {"a": torch.ones(10**6)}, {"step": 2})
        assert "\n" not in str(told.value)
        assert read_tensors(path)[1] == {"step": 1}
        assert list(tmp_path.iterdir()) == [path]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_path_under_a_file_is_a_steer_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SteerError, match=r"cannot write .* name a writable folder"):
        write_text(tmp_path / "file" / "note.txt", "")


def test_what_killed_processes_leave_is_swept_and_nothing_else(tmp_path):
    kept = [tmp_path / name for name in ("note.txt", ".lock", "note.tmp")]
    for path in (*kept, tmp_path / ".note.txt.ab12.tmp"):
        path.write_text("")
    sweep(tmp_path / "note.txt")
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    sweep(tmp_path / "nowhere" / "note.txt")


def test_the_unfinished_file_of_a_killed_process_is_what_sweep_looks_for(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from sae_steer.files import replacing\n"
        "with replacing(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    root = str(Path(sae_steer.__file__).parents[1])
    command = [sys.executable, "-c", script, str(tmp_path / "note.txt")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, check=False)
    assert len(list(tmp_path.iterdir())) == 1
    sweep(tmp_path / "note.txt")
    assert not list(tmp_path.iterdir())


def test_tensors_and_facts_survive_the_round_trip(tmp_path):
    tensors = {"a": torch.randn(3, 4, generator=generator(1)).T, "step": torch.tensor(3), "b": torch.ones(2).bfloat16()}
    facts = {"step": 3, "log": [{"loss": 1 / 3}]}
    found, told = read_tensors(write_tensors(tmp_path / "state", tensors, facts))
    assert told == facts
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype


@pytest.mark.parametrize("content", [b"", b"half a checkpoint", b"\0" * 100])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(SteerError, match="state is not a whole checkpoint"):
        read_tensors(path)


def test_a_hash_is_of_the_parts_one_after_another(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(b"bc")
    assert sha256(b"a", path) == sha256(b"ab", b"c") == sha256(b"abc")
    assert sha256(b"abc") != sha256(b"abd")


def test_timing_stands_in_a_file_of_its_own(tmp_path):
    with timed(tmp_path):
        pass
    assert json.loads((tmp_path / "timing.json").read_text())["seconds"] >= 0


def test_the_same_tensors_and_facts_are_the_same_bytes_every_time(tmp_path):
    facts, tensors = {"step": 3, "identity": {"seed": 0}}, {"a": torch.ones(2, 3), "b": torch.zeros(1)}
    written = {write_tensors(tmp_path / str(n), tensors, facts).read_bytes() for n in range(16)}
    assert len(written) == 1
    assert read_tensors(tmp_path / "0")[1] == read_facts(tmp_path / "0") == facts
