"""How often the verdict is right, on planted pairs: runs `sae-steer selftest` and keeps its record and figure.

    sae-steer selftest --out FOLDER                                     # 60 of each kind: two hours on one core
    sae-steer selftest --out FOLDER --kind boundary --studies 100       # more at the bound, whose rate is small
    python experiments/selftest.py FOLDER --summary --studies 100       # sums up what FOLDER holds

Without --summary it runs what is missing first. Studies stay in FOLDER and are resumed after a kill; what the README
quotes goes to experiments/results/small/.
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
