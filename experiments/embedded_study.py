"""The study on the embedded pair with the full protocol, for two features and two other directions.

    python experiments/embedded_study.py [FOLDER]  # about half an hour on 2 cores; resumes after a kill

Runs in FOLDER (default: a new temporary one) and copies what the README quotes to experiments/results/small/.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sae_steer.records import write_json

RESULTS = Path(__file__).parent / "results/small"
STUDIES = (("--feature", "2504"), ("--direction", "mean-difference"), ("--direction", "random"))
KEPT = ("scan/feature_diff.json", "layers/layers.json", "saes/adhd_L2_hook_resid_post/training.json")


def steer(folder: Path, *arguments: str) -> Path:
    """Run `sae-steer` in `folder`; the path it printed."""
    command = [sys.executable, "-m", "sae_steer", *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return folder / done.stdout.strip()


def keep(source: Path, target: Path) -> None:
    """Copy one file into the results."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def keep_study(run: Path, results: Path) -> None:
    """Copy a finished run's records and figures."""
    for name in KEPT:
        keep(run / name, results / (Path(name).name if "training" not in name else "adhd_L2.json"))
    for record in sorted(run.glob("intervene/*/*.json")):
        if record.name in ("results.json", "atlas.json"):
            keep(record, results / f"{record.parent.name}.json")
    for figure in sorted(run.glob("figures/*.png")):
        keep(figure, results / f"figures/{figure.name}")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="embedded-study-"))
    start = time.perf_counter()
    steer(folder, "run", "--full")
    seconds = round(time.perf_counter() - start, 1)
    write_json(RESULTS / "run.json", {"command": "sae-steer run --full", "seconds": seconds, "cores": os.cpu_count()})
    for study in STUDIES:
        steer(folder, "intervene", *study)
    keep_study(steer(folder, "report").parent, RESULTS)
    print(RESULTS)
