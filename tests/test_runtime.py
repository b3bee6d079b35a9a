"""Files are written whole or not at all, and generators follow their seeds."""

import errno
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from sae_steer import runtime
from sae_steer.errors import InputError, SteerError
from sae_steer.runtime import (
    World,
    generator,
    in_threads,
    read_tensors,
    replacing,
    sha256,
    sweep,
    timed,
    write_tensors,
    write_text,
)


def full(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_work_in_threads_keeps_its_order_and_computes_each_item_by_one_thread(three_threads):
    together = threading.Barrier(3, timeout=20)

    def work(item):
        together.wait()  # three at once, or this breaks
        return item, torch.get_num_threads()

    assert in_threads(work, range(9), torch.device("cpu")) == [(item, 1) for item in range(9)]
    assert torch.get_num_threads() == 3
    inside = []
    fresh = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert inside == [3], "threads made later begin with torch's own number"


def test_what_fails_in_a_thread_fails_outside(three_threads):
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda item: 1 // item, [1, 0, 1], torch.device("cpu"))


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
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    sweep(tmp_path / "nowhere")


def test_the_unfinished_file_of_a_killed_process_is_what_sweep_looks_for(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from sae_steer.runtime import replacing\n"
        "with replacing(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    root = str(Path(runtime.__file__).parents[1])
    command = [sys.executable, "-c", script, str(tmp_path / "note.txt")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, check=False)
    assert len(list(tmp_path.iterdir())) == 1
    sweep(tmp_path)
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


def test_a_seed_path_gives_one_stream_and_no_two_paths_the_same():
    paths = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (-1,), (2**40,)]
    draws = [tuple(torch.rand(4, generator=generator(*path)).tolist()) for path in paths]
    assert draws == [tuple(torch.rand(4, generator=generator(*path)).tolist()) for path in paths]
    assert len(set(draws)) == len(paths)


def test_neighbouring_seeds_are_unlike():
    draws = torch.stack([torch.randn(1_000, generator=generator(seed, 7)) for seed in range(20)])
    correlations = torch.corrcoef(draws) - torch.eye(20)
    assert correlations.abs().max() < 0.2


def test_a_hash_is_of_the_parts_one_after_another(tmp_path):
    path = tmp_path / "part"
    path.write_bytes(b"bc")
    assert sha256(b"a", path) == sha256(b"ab", b"c") == sha256(b"abc")
    assert sha256(b"abc") != sha256(b"abd")


def test_float32_leaves_products_alone_and_bfloat16_does_not():
    a, b = torch.randn(2, 64, 64, generator=generator(1))
    with World.local(precision="float32", device="cpu").compute():
        assert torch.equal(a @ b, torch.mm(a, b))
        assert (a @ b).dtype == torch.float32
    with World.local(precision="bfloat16", device="cpu").compute():
        assert (a @ b).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["float16", "float64", "fast", "nn"])
def test_an_unknown_precision_is_refused(precision):
    with pytest.raises(InputError, match=re.escape(f"no precision '{precision}'; choose float32 or bfloat16")):
        World.local(precision=precision)


def test_timing_stands_in_a_file_of_its_own(tmp_path):
    with timed(tmp_path):
        pass
    assert json.loads((tmp_path / "timing.json").read_text())["seconds"] >= 0


# Processes


def test_alone_the_collective_methods_change_nothing():
    world, x = World.local(device="cpu"), torch.tensor([1.0, 2.0])
    assert world.mean(x) is world.mean_(x) is world.sum_(x) is world.broadcast_(x) is x
    assert x.tolist() == [1.0, 2.0]
    assert (world.any(True), world.any(False), world.is_first, list(world.share(3))) == (True, False, True, [0, 1, 2])
    world.barrier()


TWO = """
import os, sys
import torch
from sae_steer.errors import SteerError
from sae_steer.runtime import joined

os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
rank = 0 if (child := os.fork()) else 1  # nothing has run in torch yet, so a fork is safe
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
torch.set_num_threads(1)
with joined(device="cpu") as world:
    assert (world.rank, world.size, world.is_first) == (rank, 2, rank == 0)
    assert list(world.share(5)) == [[0, 2, 4], [1, 3]][rank]
    x = torch.tensor([1.0, 10.0 * rank])
    assert world.mean(x).tolist() == [1.0, 5.0] and x.tolist() == [1.0, 10.0 * rank]
    assert world.sum_(x) is x and x.tolist() == [2.0, 10.0]
    assert world.broadcast_(torch.tensor([rank, 7])).tolist() == [0, 7]
    assert world.any(rank == 1) and not world.any(False)
    world.barrier()
    if rank == 1:
        os._exit(0)
    try:
        world.barrier()
    except SteerError as error:
        print(error)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_two_processes_agree_and_the_loss_of_one_is_told_in_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ran = subprocess.run(
        [sys.executable, "-c", TWO, str(port)], capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(runtime.__file__).parents[1])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("process 1 of 2 stops because another one did; what is finished is kept")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert runtime._own_gpu(0) == torch.device("cuda", 0)
    with pytest.raises(InputError, match="process 2 of this node finds 1 GPU, and each process takes one; start one"):
        runtime._own_gpu(1)
