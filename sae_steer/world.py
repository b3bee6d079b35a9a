"""The machine a run happens on: device, precision, its threads, and the processes of one run."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sae_steer.capability import Precision, decide
from sae_steer.errors import InputError, SteerError
from sae_steer.settings import AUTO
from sae_steer.torchrun import processes

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}
Item, Made = TypeVar("Item"), TypeVar("Made")


@dataclass(frozen=True)
class World:
    """Where tensors live, at which precision matrix products run, and which of a run's processes this is.

    One process and many run the same code: the collective methods change nothing when `size` is one. Every
    process must call them in the same order. `joined` makes the World of a process that torchrun started.
    """

    device: torch.device
    autocast: torch.dtype | None = None
    """Type of matrix products inside `world.compute()`; None leaves everything in float32."""
    rank: int = 0
    size: int = 1
    wanted: str = AUTO
    """The precision that was asked: `auto` gives way to the one at which something was begun."""

    @classmethod
    def local(cls, *, precision: str = AUTO, device: str | None = None) -> "World":
        """This process alone on `device`, or on the GPU if there is one."""
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(place, _AUTOCAST[decide(precision, place.type).precision], wanted=precision)

    @property
    def precision(self) -> Precision:
        """That of matrix products inside `world.compute()`."""
        return "float32" if self.autocast is None else "bfloat16"

    def at(self, precision: Precision) -> "World":
        """The same world with matrix products at `precision`, the first process's."""
        low = self.broadcast_(torch.tensor(float(precision == "bfloat16"), device=self.device)) > 0
        return replace(self, autocast=_AUTOCAST["bfloat16" if low else "float32"])

    def finishing(self, begun: str | None, what: str) -> "World":
        """The same world at the precision at which `what` was begun, if it was; an explicit other is a `StaleError`."""
        decision = decide(self.wanted, self.device.type, begun=begun, what=what)
        return self if begun is None else self.at(decision.precision)

    def compute(self) -> AbstractContextManager:
        """A context whose matrix products run at this world's precision."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes shared files and talks to the user."""
        return self.rank == 0

    def share(self, items: int) -> range:
        """The numbers below `items` that fall to this process: every `size`-th."""
        return range(self.rank, items, self.size)

    def sum_(self, x: Tensor) -> Tensor:
        """`x`, replaced by its sum over all processes."""
        if self.size > 1:
            with self._company():
                dist.all_reduce(x)
        return x

    def mean_(self, x: Tensor) -> Tensor:
        """`x`, replaced by its mean over all processes."""
        return self.sum_(x) if self.size == 1 else self.sum_(x).div_(self.size)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over all processes; `x` itself if there is one."""
        return x if self.size == 1 else self.mean_(x.clone())

    def broadcast_(self, x: Tensor) -> Tensor:
        """`x`, replaced by the first process's."""
        if self.size > 1:
            with self._company():
                dist.broadcast(x, src=0)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; alone, nothing waits for the device."""
        if self.size == 1:
            return flag
        return bool(self.sum_(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Return when every process has come here."""
        self.any(False)  # a reduction on this world's own device: the group's barrier would pick a GPU by itself

    @contextmanager
    def _company(self) -> Iterator[None]:
        """Tells the loss of another process in one line."""
        try:
            yield
        except RuntimeError as error:
            raise SteerError(
                f"process {self.rank + 1} of {self.size} stops because another one did; what is finished is kept, "
                "and the same command goes on from there"
            ) from error


@contextmanager
def joined(*, precision: str = AUTO, device: str | None = None) -> Iterator[World]:
    """The `World` of this process among those torchrun started, connected while the block runs.

    Without torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) it is `World.local`. GPUs
    talk by nccl, one a process; CPUs by gloo. A SIGTERM, with which torchrun ends the survivors of a death and a
    cluster its jobs, is a `SteerError`.
    """
    alone = World.local(precision=precision, device=device)
    before = signal.signal(signal.SIGTERM, _told_to_stop)
    try:
        if processes() == 1:
            yield alone
            return
        place = alone.device
        if place.type == "cuda" and place.index is None:
            place = _own_gpu(int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        here = replace(alone, device=place, rank=dist.get_rank(), size=dist.get_world_size())
        yield here.at(here.precision)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)


def _own_gpu(local_rank: int) -> torch.device:
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise InputError(
            f"process {local_rank + 1} of this node finds {gpus} GPU{'s' * (gpus != 1)}, and each process takes one; "
            "start one a GPU, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    return torch.device("cuda", local_rank)


def _told_to_stop(number: int, frame: object) -> None:
    raise SteerError("told to stop; what is finished is kept, and the same command goes on from there")


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to half a gigabyte, where the C library is glibc.

    By default large arrays are mapped afresh, and their pages cleared, each time; a loop that makes the same ones at
    every step, as training a dictionary and filling a cache do, loses up to a tenth of its time to that.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_threshold = -1, -3  # malloc.h; glibc before 2.35 maps all that is larger than 32 MB
    if tune is not None and (tune(mmap_threshold, 2**30) or tune(mmap_threshold, 2**25)):
        tune(trim_threshold, 2**29)


def in_threads(work: Callable[[Item], Made], items: Sequence[Item], device: torch.device) -> list[Made]:
    """[work(item) for every item], on a CPU as many at once as torch has threads, each by one thread alone.

    Small tensors lose more to waking and joining threads within every operation than they gain.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return list(map(work, items) if threads == 1 else _single_threads(threads).map(work, items))


@cache
def _single_threads(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch computes with one thread."""

    def alone() -> None:
        torch.get_num_threads()  # the first call in a thread would undo the next line
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="sae_steer", initializer=alone)
    list(pool.map(time.sleep, [0.01] * threads))  # all are started
    torch.set_num_threads(threads)  # what threads made later begin with
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_single_threads.cache_clear)  # a child has none of its parent's threads
