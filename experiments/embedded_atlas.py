"""The atlas of the embedded pair's specific features, its figure, and how long it takes.

    python experiments/embedded_atlas.py RUN_FOLDER CACHE_FOLDER  # about 10 minutes on 2 cores

RUN_FOLDER is one that `sae-steer run` made (`runs/small`), CACHE_FOLDER its cache (`activations/small`). Writes
atlas.json, atlas_timing.json and figures/atlas.png to experiments/results/small/.

The time is asked for 300 features. Where fewer are specific, the next ones that lean most to the target model, among
those that fire at 1 % of its onsets, are read too, for the time alone.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sae_steer.atlas.atlas import RECORD_FILE, Atlas
from sae_steer.cache import ActivationCache
from sae_steer.dictionary import load_dictionary
from sae_steer.pair.model_pair import load_pair
from sae_steer.pipeline import Places, find_or_make_atlas
from sae_steer.records import write_json
from sae_steer.report.atlas_figure import atlas_figure
from sae_steer.report.drawing import png_and_svg
from sae_steer.scan import FeatureScan, load_scan
from sae_steer.settings import DEFAULT_LAYER

RESULTS = Path(__file__).parent / "results/small"
FEATURES = 300


def leaning(scan: FeatureScan, count: int) -> list[int]:
    """The specific features, and after them those that lean most to the target model."""
    fires = np.flatnonzero((scan.target_rate >= scan.settings.min_rate) & ~scan.specific)
    others = fires[np.argsort(-scan.log_odds.log_odds[fires], kind="stable")]
    return [*scan.specific_features, *others.tolist()][:count]


if __name__ == "__main__":
    places = Places(cache=Path(sys.argv[2]), run=Path(sys.argv[1]))
    pair, cache = load_pair("small"), ActivationCache.open(places.cache)
    dictionary = load_dictionary(places.dictionary(pair.target.name, DEFAULT_LAYER))
    scan = load_scan(places.scan, dictionary)

    def timed(features: list[int], out: Path) -> tuple[Atlas, float]:
        """An atlas made anew, and the seconds it took."""
        start = time.perf_counter()
        made = find_or_make_atlas(pair, cache, dictionary, scan, out, features=features, force=True)
        return made, round(time.perf_counter() - start, 1)

    atlas, seconds = timed(scan.specific_features, places.atlas)
    with tempfile.TemporaryDirectory() as folder:
        wide, seconds_wide = timed(leaning(scan, FEATURES), Path(folder))
    shutil.copyfile(places.atlas / RECORD_FILE, RESULTS / RECORD_FILE)
    timing = {
        "features": atlas.record["tested"],
        "seconds": seconds,
        f"features_{FEATURES}": wide.record["tested"],
        f"seconds_{FEATURES}": seconds_wide,
        f"estimate_{FEATURES}": {found["variant"]: found["estimate"] for found in wide.record["variants"]},
        "cores": os.cpu_count(),
    }
    write_json(RESULTS / "atlas_timing.json", timing)
    png, _ = png_and_svg(atlas_figure(atlas.record, atlas.table))
    (RESULTS / "figures" / "atlas.png").write_bytes(png)
    print(atlas.summary())
