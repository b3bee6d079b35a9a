"""A folder or disk that cannot be written is told in one line, and finished shards stay."""

import os
import re
import resource
import subprocess
from pathlib import Path

import pytest
from tiny_cache import contents, refusal, write

from sae_steer.errors import SteerError


def test_a_file_that_may_not_grow_is_told_in_one_line_and_finished_shards_stay(tiny, whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(done: int, total: int, note: str = "") -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))

    try:
        told = refusal(SteerError, lambda: write(tiny, tmp_path / "mine", on_rows=limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large; free space" in told
    assert list((tmp_path / "mine").glob("shard-*.json"))
    assert not list((tmp_path / "mine").glob(".*.tmp"))
    write(tiny, tmp_path / "mine")
    assert contents(tmp_path / "mine") == contents(whole)


@pytest.fixture
def disk(tmp_path) -> Path:
    """A disk of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    ask = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    if subprocess.run(ask, capture_output=True, check=False).returncode:
        pytest.skip("needs leave to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk_is_refused_in_one_line(tiny, disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    told = refusal(SteerError, lambda: write(tiny, disk / "mine"))
    assert told == f"cannot write {disk / 'mine'}: Read-only file system; name a writable folder with --out"


def test_a_folder_one_may_not_write_is_refused_in_one_line(tiny, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("no mode stops root")
    (tmp_path / "mine").mkdir(mode=0o500)
    assert "Permission denied; name a writable folder" in refusal(SteerError, lambda: write(tiny, tmp_path / "mine"))


def test_a_path_under_a_file_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(SteerError, lambda: write(tiny, tmp_path / "file" / "cache"))


def test_a_disk_too_small_for_the_whole_is_refused_before_anything_is_written(tiny, disk):
    told = refusal(SteerError, lambda: write(tiny, disk / "mine"))
    assert re.search(r"needs [\d.]+ MB of disk, and [\d.]+ MB are free", told)
    assert list(disk.iterdir()) == []


def test_a_full_disk_is_told_in_one_line_and_finished_shards_stay(tiny, whole, disk, monkeypatch):
    monkeypatch.setattr("sae_steer.budget._free", lambda folder: 1e12)  # as where another program fills it meanwhile
    told = refusal(SteerError, lambda: write(tiny, disk / "mine"))
    assert "No space left on device; free space" in told
    kept = [path.name for path in sorted((disk / "mine").glob("*.h5"))]
    assert 0 < len(kept) < len(list(whole.glob("*.h5")))
    assert not list((disk / "mine").glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    write(tiny, disk / "mine")
    assert contents(disk / "mine") == contents(whole)
