"""The study at the size of the released one: two 23M models trained here, the full protocol on their layer-2 streams.

    python experiments/real_size_study.py [FOLDER]  # ten minutes on an H100; resumes after a kill

The pair is `sae-steer train-pair --preset interpgpt-23m`, ten million tokens a model, the first third in common; it is
too large for git. Everything else is as in embedded_study.py; what the README quotes goes to
experiments/results/interpgpt-23m/.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from embedded_study import keep, keep_study, steer

from sae_steer.records import write_json

RESULTS = Path(__file__).parent / "results/interpgpt-23m"
PAIR = ("--preset", "interpgpt-23m", "--tokens", "10000000", "--lr", "1e-3")
STUDIES = (
    ("--feature", "like-2504"),
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
        ("run --full", ("run", "--full", *named)),
        *((" ".join(("intervene", *study)), ("intervene", *study, *named)) for study in STUDIES),
        ("report", ("report", *named)),
    ]:
        start = time.perf_counter()
        steer(folder, *command)
        seconds[name] = round(time.perf_counter() - start, 1)
        print(json.dumps({name: seconds[name]}), flush=True)
        keep(folder / named[1] / "training.json", RESULTS / "pair.json")
        keep_study(folder / "runs/interpgpt-23m", RESULTS)
        write_json(RESULTS / "run.json", {"seconds": seconds})
