"""The package as installed: its layers, its names, and what importing it costs."""

import importlib
import inspect
import re
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import sae_steer

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformer_lens", "sae_lens", "transformers", "matplotlib", "h5py")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_heavy():
    assert python(f"import sae_steer, sys; print([name for name in {HEAVY} if name in sys.modules])") == "[]\n"


def test_every_public_name_is_there():
    for name in sae_steer.__all__:
        assert getattr(sae_steer, name).__doc__, name
    assert dir(sae_steer) == sae_steer.__all__ == sorted(sae_steer.__all__)


def test_the_stub_names_every_public_name_from_where_it_is():
    stub = Path(sae_steer.__file__).with_suffix(".pyi").read_text()
    homes = re.findall(r"^from sae_steer\.([\w.]+) import (\w+) as \2$", stub, re.MULTILINE)
    assert sorted(name for _, name in homes) == sae_steer.__all__
    for home, name in homes:
        assert inspect.unwrap(getattr(sae_steer, name)) is inspect.unwrap(
            getattr(importlib.import_module(f"sae_steer.{home}"), name)
        )


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'steer_everything'"):
        _ = sae_steer.steer_everything


def test_imports_point_down():
    linted = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert linted.returncode == 0, linted.stdout


def test_the_entry_point_is_the_command_line_and_tells_the_installed_version():
    (command,) = (entry for entry in entry_points(group="console_scripts") if entry.name == "sae-steer")
    assert command.load() is importlib.import_module("sae_steer.cli").main
    told = subprocess.run([sys.executable, "-m", "sae_steer", "--version"], capture_output=True, text=True, check=True)
    assert version("sae-steer") in told.stdout
