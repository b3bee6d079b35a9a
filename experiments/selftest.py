"""How often the verdict is right, on planted pairs: runs `sae-steer selftest` and keeps its record and figure.

    python experiments/selftest.py FOLDER [--summary]  # hours on one core; resumes after a kill

Studies stay in FOLDER; what the README quotes goes to experiments/results/small/. With --summary it only sums
up the studies that FOLDER holds.
"""

import subprocess
import sys
from pathlib import Path

from sae_steer.records import read_json, write_json
from sae_steer.report.drawing import png_and_svg
from sae_steer.report.selftest_figure import selftest_figure

RESULTS = Path(__file__).parent / "results/small"

if __name__ == "__main__":
    folder, *options = sys.argv[1:]
    command = [sys.executable, "-m", "sae_steer", "selftest", "--out", folder, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record = read_json(Path(done.stdout.strip()))
    write_json(RESULTS / "selftest.json", record)
    (RESULTS / "figures/selftest.png").write_bytes(png_and_svg(selftest_figure(record))[0])
    print(RESULTS)
