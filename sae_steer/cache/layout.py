"""What a shard holds and what its parts are called."""

import numpy as np

FORMAT = 1
MANIFEST = "manifest.json"
LABELS = {
    "token": np.int32,
    "prompt": np.int32,
    "task": np.int32,
    "text_variant": np.uint8,
    "position": np.int32,
    "is_onset": np.uint8,
    "step": np.int32,
    "next_is_target": np.uint8,
    "true_p": np.float32,
}
MOMENTS = "moments"
NORMS = "norms"
"""Rows' lengths, by which `reading` leaves out those far longer than the others; older shards have none."""
ORIGIN = "origin"
"""The attribute of a shard that says which cache it is a part of."""
BLOCK = 16
"""Neighbouring rows that a shuffled batch takes together: one read, and still 256 places of the corpus a batch."""


def site(layer: int) -> str:
    """The TransformerLens name of the residual stream after block `layer`."""
    return f"blocks.{layer}.hook_resid_post"


def origin(manifest: dict) -> dict:
    """What fixes the content of a manifest's cache: models, tokenizer, settings and texts."""
    made = manifest["provenance"]
    return {
        "models": {name: model["sha256"] for name, model in manifest["models"].items()},
        "tokenizer": manifest["tokenizer"],
        "settings": made["settings"],
        "inputs": made["inputs"],
    }
