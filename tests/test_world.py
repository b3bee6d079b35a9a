"""Threads, precision, and one process as many."""

import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import sae_steer
from sae_steer.capability import Capability, assumed
from sae_steer.errors import InputError, StaleError
from sae_steer.randomness import generator
from sae_steer.world import World, _own_gpu, in_threads


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


def test_float32_leaves_products_alone_and_bfloat16_does_not():
    a, b = torch.randn(2, 64, 64, generator=generator(1))
    with World.local(precision="float32", device="cpu").compute():
        assert torch.equal(a @ b, torch.mm(a, b))
        assert (a @ b).dtype == torch.float32
    with World.local(precision="bfloat16", device="cpu").compute():
        assert (a @ b).dtype == torch.bfloat16


@pytest.mark.parametrize(("instructions", "precision"), [({"avx2"}, "float32"), ({"avx2", "amx_bf16"}, "bfloat16")])
def test_auto_is_the_precision_that_the_machine_has(instructions, precision):
    with assumed(Capability(frozenset(instructions))):
        world = World.local(device="cpu")
    assert (world.wanted, world.precision) == ("auto", precision)
    with world.compute():
        assert str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype) == f"torch.{precision}"


def test_what_was_begun_is_finished_at_its_precision_and_another_is_refused():
    world = World.local(precision="float32", device="cpu")
    assert World.local(device="cpu").finishing("bfloat16", "it").precision == "bfloat16"
    assert world.finishing(None, "it") is world
    with pytest.raises(StaleError, match="it was begun at bfloat16, and --precision float32 was asked"):
        world.finishing("bfloat16", "it")


@pytest.mark.parametrize("precision", ["float16", "float64", "fast", "nn"])
def test_an_unknown_precision_is_refused(precision):
    with pytest.raises(InputError, match=re.escape(f"no precision '{precision}'; choose auto, float32 or bfloat16")):
        World.local(precision=precision)


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
from sae_steer.world import joined

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
        env={**os.environ, "PYTHONPATH": str(Path(sae_steer.__file__).parents[1])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("process 1 of 2 stops because another one did; what is finished is kept")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _own_gpu(0) == torch.device("cuda", 0)
    with pytest.raises(InputError, match="process 2 of this node finds 1 GPU, and each process takes one; start one"):
        _own_gpu(1)
