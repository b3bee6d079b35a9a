"""One shard as a file: labels, streams, their moments and norms, and which cache it is a part of.

The file is made in memory, written beside, synced and renamed; its line for the manifest follows in a record of its
own. So what has a record is whole, whichever process of a run wrote it.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from sae_steer.cache.checking import damaged_shards
from sae_steer.cache.dealing import ShardTexts
from sae_steer.cache.layout import LABELS, MOMENTS, NORMS, ORIGIN, ShardLine, site
from sae_steer.cache.storage import WIDER, decoded, encoded, moments, norms
from sae_steer.errors import InputError, NotFiniteError
from sae_steer.files import replacing, sha256
from sae_steer.pair.texts import Text
from sae_steer.records import read_record, write_json

Streams = Mapping[str, Mapping[int, np.ndarray]]
"""{model: {layer: [row, d_model] float32}}"""


def write_shard(folder: Path, shard: ShardTexts, streams: Streams, *, dtype: str, origin: dict) -> None:
    """Write the shard and its record into `folder`.

    A value `dtype` cannot hold is a `NotFiniteError` that names its place, and nothing is written.
    """
    image = io.BytesIO()  # HDF5 that meets a full disk crashes the process; a file in memory cannot
    with h5py.File(image, "w") as file:
        file.attrs[ORIGIN] = json.dumps({**origin, "file": shard.file}, sort_keys=True)
        for name, column in _label_columns(shard.texts).items():
            file.create_dataset(name, data=column.astype(LABELS[name]))
        for model, layers in streams.items():
            for layer, resid in layers.items():
                dataset = f"{model}/{site(layer)}"
                stored = encoded(resid, dtype)
                sums = moments(stored)
                if not np.isfinite(sums).all():
                    raise _cannot_hold(resid, stored, shard.texts, f"model '{model}'", layer, dtype)
                file.create_dataset(dataset, data=stored)
                file.create_dataset(f"{MOMENTS}/{dataset}", data=sums)
                file.create_dataset(f"{NORMS}/{dataset}", data=norms(stored))
    content = image.getbuffer()
    with replacing(folder / shard.file) as scratch:
        scratch.write_bytes(content)
    line = {
        "file": shard.file,
        "split": shard.split,
        "rows": shard.rows,
        "texts": len(shard.texts),
        "bytes": content.nbytes,
        "sha256": sha256(content),
    }
    write_json(folder / shard.record, line)


def finished_shards(folder: Path, manifest: dict, dealt: Sequence[ShardTexts]) -> dict[str, dict]:
    """{file: line} of the dealt shards that the manifest or a record of their own lists, and that are whole."""
    listed = {line["file"]: line for line in manifest["shards"]}
    listed |= {shard.file: line for shard in dealt if (line := _own_line(folder, shard))}
    lines = [listed[shard.file] for shard in dealt if shard.file in listed]
    damaged = damaged_shards(folder, manifest, lines)
    return {line["file"]: line for line, wrong in zip(lines, damaged, strict=True) if not wrong}


def _own_line(folder: Path, shard: ShardTexts) -> dict | None:
    """What a shard's own record says; one that cannot be read is none, and the shard is written anew."""
    try:
        line = read_record(folder / shard.record, ShardLine)
    except InputError:
        return None
    return line if line["file"] == shard.file else None


def _label_columns(texts: Sequence[Text]) -> dict[str, np.ndarray]:
    def spread(name: str) -> np.ndarray:
        return np.concatenate([np.full(len(text), getattr(text, name)) for text in texts])

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(text, name) for text in texts])

    return {
        **{name: joined(name) for name in ("token", "is_onset", "step", "next_is_target", "true_p")},
        "prompt": spread("prompt"),
        "task": spread("task"),
        "text_variant": spread("rendering"),
        "position": np.concatenate([np.arange(len(text)) for text in texts]),
    }


def _cannot_hold(
    resid: np.ndarray, stored: np.ndarray, texts: Sequence[Text], model: str, layer: int, dtype: str
) -> NotFiniteError:
    """Names the place of the first row that is not finite as stored, and what to do about it."""
    row = int(np.flatnonzero(~np.isfinite(decoded(stored)).all(axis=1))[0])
    starts = np.cumsum([0, *(len(text) for text in texts)])
    which = int(np.searchsorted(starts, row, side="right")) - 1
    place = f"after block {layer}, prompt {texts[which].prompt}, position {row - starts[which]}"
    if not np.isfinite(resid[row]).all():
        return NotFiniteError(f"{model} has a value that is not finite {place}; mend the model, or leave the text out")
    return NotFiniteError(
        f"{model} has a value {dtype} cannot hold {place}: {np.abs(resid[row]).max():.3g}; use --dtype {WIDER[dtype]}, "
        "with --force if shards are finished"
    )
