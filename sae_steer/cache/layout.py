"""What a shard holds and what its parts are called; what the manifest says of a cache."""

from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np

from sae_steer.shapes import Count, Hash, Matches, Name, Provenance

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


class ShardLine(TypedDict):
    """A finished shard, as the manifest or a record of its own lists it."""

    file: Annotated[str, Matches(r"shard-\d{5}\.h5", "a shard's name")]
    split: Literal["train", "scan", "tune", "confirm"]
    rows: Count
    texts: Count
    bytes: Count
    sha256: Hash


class ModelFacts(TypedDict):
    """A model whose streams are stored."""

    sha256: str
    d_model: Count
    key_map: NotRequired[Any]


class Manifest(TypedDict):
    """`manifest.json`."""

    format: Literal[1]
    pair: Name
    models: dict[Name, ModelFacts]
    tokenizer: str
    layers: list[Count]
    dtype: Literal["float16", "bfloat16", "float32"]
    variants: list[str]
    provenance: Provenance
    complete: bool
    shards: list[ShardLine]


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
