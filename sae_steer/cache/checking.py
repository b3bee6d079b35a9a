"""Whether a shard is the one its manifest lists: there, of its length, of this cache, and every bit as written."""

import json
from pathlib import Path

import h5py

from sae_steer.cache.layout import ORIGIN, origin
from sae_steer.cache.shard import has_length
from sae_steer.files import sha256
from sae_steer.records import first_difference


def what_is_wrong(folder: Path, manifest: dict, line: dict) -> str | None:
    """What is wrong with the shard of a manifest's line, as a sentence that names it; None if nothing is."""
    path = folder / line["file"]
    if not has_length(folder, line):
        return f"{path} is missing or cut short"
    damaged = f"{path} does not have the checksum of the manifest"
    try:
        with h5py.File(path, "r") as file:
            wrong = stranger(file, manifest, line)
    except (OSError, ValueError, RuntimeError):  # what h5py and json make of damage
        return damaged
    return wrong or (None if sha256(path) == line["sha256"] else damaged)


def stranger(file: h5py.File, manifest: dict, line: dict) -> str | None:
    """How an open shard shows that it is no part of the manifest's cache, or another part of it; None if it is not.

    A shard from before shards said so passes; its checksum must do.
    """
    wanted = {**origin(manifest), "file": line["file"]}
    found = json.loads(file.attrs.get(ORIGIN, "{}"))
    difference = found and first_difference(found, wanted, parts=tuple(wanted))
    return (
        f"{file.filename} is a shard of another cache, or of another place in this one ({difference})"
        if difference
        else None
    )
