"""Compiled loops are kept where that can be, and run where it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sae_steer

PROGRAM = """
from numba.core import caching
caching.CacheImpl._locator_classes = [caching.UserProvidedCacheLocator]  # the source and home: read-only
from sae_steer.sae.kernels.jit import loop

@loop()
def twice(x):
    return x + x

assert twice(2) == 4
"""


@pytest.mark.parametrize("ours", [True, False])
def test_where_source_and_home_are_read_only_a_private_folder_keeps_what_was_compiled_or_none_does(tmp_path, ours):
    program, scratch = tmp_path / "program.py", tmp_path / "scratch"
    program.write_text(PROGRAM)
    scratch.mkdir()
    usual = scratch / f"sae_steer-{os.getuid()}"
    if not ours:
        usual.mkdir(mode=0o777)  # anybody may have put something there, and numba unpickles it
        usual.chmod(0o777)
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(Path(sae_steer.__file__).parents[1])}
    environment.pop("NUMBA_CACHE_DIR", None)
    ran = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert bool(list(usual.rglob("*.nbi"))) == ours
