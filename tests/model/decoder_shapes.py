"""Three shapes of small decoders."""

import dataclasses

from sae_steer.settings import PRESETS

TINY = dataclasses.replace(PRESETS["small"], n_layers=4, d_vocab=64, d_mlp=96)
SHAPES = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tied=False),
    "grouped queries": dataclasses.replace(TINY, n_kv_heads=2, rope_base=500_000.0),
}
