"""The study at the size of the released one: two 23M models trained here, the full protocol on their layer-2 streams.

    python experiments/real_size_study.py [FOLDER]  # ten minutes on an H100; resumes after a kill

The pair is `sae-steer train-pair --preset interpgpt-23m`, six million tokens a model, as the embedded pair; it is too
large for git. The feature studied is the one nearest to the released phenotype. Everything else is as in
embedded_study.py; what the README quotes goes to experiments/results/interpgpt-23m/.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from embedded_study import keep, keep_study, steer

from sae_steer.records import write_json

RESULTS = Path(__file__).parent / "results/interpgpt-23m"
PAIR = ("--preset", "interpgpt-23m", "--lr", "1e-3")
STUDIES = (
    ("--direction", "mean-difference"),
    ("--direction", "random"),
    ("--all-specific",),
    ("--feature", "2504"),
)

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="real-size-study-"))
    seconds, named = {}, ("--pair", "pairs/interpgpt-23m")
    for name, command in [
        ("train-pair", ("train-pair", *PAIR, "--out", named[1])),
        ("run --full", ("run", "--full", "--feature", "like-2504", *named)),
        *((" ".join(("intervene", *study)), ("intervene", *study, *named)) for study in STUDIES),
        ("report", ("report", *named)),
    ]:
        start = time.perf_counter()
        try:
            steer(folder, *command)
        except subprocess.CalledProcessError:
            if command[0] != "intervene":  # which may be refused: no feature is specific, say
                raise
            print(f"{name} was refused")
            continue
        seconds[name] = round(time.perf_counter() - start, 1)
        print(json.dumps({name: seconds[name]}), flush=True)
        if name == "train-pair":
            keep(folder / named[1] / "training.json", RESULTS / "pair.json")
            continue
        keep_study(folder / "runs/interpgpt-23m", RESULTS)
        write_json(RESULTS / "run.json", {"seconds": seconds})
