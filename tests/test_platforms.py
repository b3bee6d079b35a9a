"""What Linux on x86 has and others lack is no import error, and no less right without it."""

import subprocess
import sys

import pytest
import torch

from sae_steer import world
from sae_steer.model import suffix
from sae_steer.randomness import generator

ELSEWHERE = """
import os, pkgutil, sys
import concurrent.futures.thread, logging, random, threading  # the interpreter's own, which know their system
import torch
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # importing it fails, as on Windows
del os.register_at_fork
import sae_steer
names = [module.name for module in pkgutil.walk_packages(sae_steer.__path__, "sae_steer.")]
for name in names:
    if name != "sae_steer.__main__":
        __import__(name)
print(len(names))
"""


def test_every_module_can_be_imported_without_what_other_systems_lack():
    imported = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, check=False)
    assert imported.returncode == 0, imported.stderr[-500:]
    assert int(imported.stdout.split()[-1]) > 100


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_malloc_is_left_alone_where_it_is_not_glibcs(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(world.ctypes, "CDLL", lambda name: pytest.fail("a C library was opened"))
    world.keep_freed_memory()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_over_a_past_is_the_same_without_torchs_own_operator(monkeypatch, masked):
    q, keys, values = (torch.randn(2, 3, n, 8, generator=generator(n)) for n in (4, 9, 9))
    mask = torch.zeros(2, 1, 4, 9).masked_fill(torch.rand(2, 1, 4, 9, generator=generator(1)) < 0.3, -torch.inf)
    mask[..., 0] = 0
    with torch.inference_mode():
        fused = suffix._attend(q, keys, values, mask if masked else None)
        monkeypatch.setattr(suffix, "_FUSED", None)
        plain = suffix._attend(q, keys, values, mask if masked else None)
    for ours, theirs in zip(plain, fused, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
