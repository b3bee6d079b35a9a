"""The study on the embedded pair with the full protocol: two features, two other directions, all specific features.

    python experiments/embedded_study.py [FOLDER]  # about half an hour on 2 cores; resumes after a kill

Runs in FOLDER (default: a new temporary one) and copies what the README quotes to experiments/results/small/.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results/small"
STUDIES = (("--feature", "2504"), ("--direction", "mean-difference"), ("--direction", "random"), ("--all-specific",))
KEPT = (
    "scan/feature_diff.json",
    "layers/layers.json",
    "saes/adhd_L2_hook_resid_post/training.json",
)


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
    steer(folder, "run", "--full")
    for study in STUDIES:
        steer(folder, "intervene", *study)
    run = steer(folder, "report").parent
    keep_study(run, RESULTS)
    keep(run / "heads/heads.json", RESULTS / "heads.json")
    print(RESULTS)
