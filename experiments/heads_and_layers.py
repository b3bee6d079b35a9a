"""The card's first two findings: which heads match across a pair, and where in depth its behaviour is decided.

    python experiments/heads_and_layers.py RUN_FOLDER CACHE_FOLDER [PAIR]  # about 5 minutes on 2 cores

RUN_FOLDER is where `sae-steer run` writes (`runs/small`), CACHE_FOLDER the pair's cache (`activations/small`), PAIR
`small` unless named. Writes heads.json, causal_nulls_per_seed.json, layers.json and the figures heads.png and
depth.png to experiments/results/PAIR/.
"""

import shutil
import sys
from pathlib import Path

from sae_steer.cache import ActivationCache
from sae_steer.findings.heads import PER_SEED_FILE
from sae_steer.pair.model_pair import load_pair
from sae_steer.pipeline import Places, find_or_read_layers, find_or_study_heads, where_it_moves
from sae_steer.records import read_json
from sae_steer.report.depth_figure import depth_figure
from sae_steer.report.drawing import png_and_svg
from sae_steer.report.heads_figure import heads_figure
from sae_steer.terminal import Bar

if __name__ == "__main__":
    places = Places(cache=Path(sys.argv[2]), run=Path(sys.argv[1]))
    pair = load_pair(sys.argv[3] if len(sys.argv) > 3 else "small")
    cache = ActivationCache.open(places.cache, pair=pair)
    heads = find_or_study_heads(pair, cache, places.heads, on_step=Bar("heads"))
    layers = find_or_read_layers(pair, cache, places.layers, on_step=Bar("layers"))
    results = Path(__file__).parent / "results" / pair.name
    (results / "figures").mkdir(parents=True, exist_ok=True)
    for record in (heads, heads.parent / PER_SEED_FILE, layers):
        shutil.copyfile(record, results / record.name)
    for name, figure in (("heads", heads_figure(read_json(heads))), ("depth", depth_figure(read_json(layers)))):
        png, _ = png_and_svg(figure)
        (results / "figures" / f"{name}.png").write_bytes(png)
    print(read_json(heads)["summary"])
    print(where_it_moves(layers))
