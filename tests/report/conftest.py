"""The made-up run of `report_records`, on disk."""

from pathlib import Path

import pytest
from report_records import write_run

from sae_steer.report.page import write_report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A whole run without its report."""
    return write_run(tmp_path / "small")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report; not to be written to."""
    folder = write_run(tmp_path_factory.mktemp("reported") / "small")
    write_report(folder, on_step=lambda done, total, note="": None)
    return folder
