"""How long the full protocol takes for one feature of the embedded pair: 300 confirm prompts, 4 onsets each, 199
directions of every control family, four variants; exact effects, gates and tests, and the sampled plans apart.

    python experiments/benchmarks/protocol_time.py RUN_FOLDER CACHE_FOLDER  # of a finished `sae-steer run`
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from sae_steer.cache import ActivationCache
from sae_steer.dictionary import load_dictionary
from sae_steer.interventions.study import intervene
from sae_steer.pair.model_pair import load_pair
from sae_steer.records import provenance, write_json
from sae_steer.scan import load_scan
from sae_steer.settings import InterveneSettings

RECORD = Path(__file__).parent / "protocol_time.json"

if __name__ == "__main__":
    run, cache = Path(sys.argv[1]), ActivationCache.open(Path(sys.argv[2]))
    pair = load_pair("small")
    dictionary = load_dictionary(run / "saes" / "adhd_L2_hook_resid_post")
    scan, settings, seconds = load_scan(run / "scan", dictionary), InterveneSettings(), {}
    for name, chosen in (("exact", replace(settings, generations=0)), ("with_sampled_plans", settings)):
        start = time.perf_counter()
        study = intervene(
            pair, dictionary, feature=scan.top(1)[0], cache=cache, settings=chosen, leave_out=scan.specific_features
        )
        seconds[f"seconds_{name}"] = round(time.perf_counter() - start, 1)
        edits = [len(v["controls"]) * settings.controls * v["single"]["n"] for v in study.record["variants"]]
        origin = provenance(settings=chosen, inputs={"pair": pair.sha256, "dictionary": dictionary.sha256})
        record = {"provenance": origin, "cores": os.cpu_count(), "control_edits": sum(edits), **seconds}
        print(write_json(RECORD, record), seconds)
