"""The lengths of a stream's rows: read from the shards, or measured once where shards were written without them."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from sae_steer.cache.layout import NORMS
from sae_steer.cache.storage import norms
from sae_steer.cache.stored import StoredRows
from sae_steer.errors import SteerError
from sae_steer.files import read_tensors, sha256, write_tensors


def find_or_measure(
    folder: Path, fixed: str, stored: Sequence[np.ndarray | None], maps: Sequence[StoredRows]
) -> Float[np.ndarray, " row"]:
    """The rows' lengths over all shards of a split.

    Args:
        fixed: names the rows; what is measured is kept in `folder` under its hash, where that can be written.
        stored: each shard's, None for one from before shards had them.
        maps: each shard's rows.
    """
    if all(part is not None for part in stored):
        return np.concatenate(stored)
    path, rows = Path(folder) / f"norms-{sha256(fixed.encode())[:16]}.safetensors", sum(map(len, maps))
    kept = _read(path, rows)
    if kept is not None:
        return kept
    measured = np.concatenate([_measured(part) for part in maps])
    with suppress(SteerError):  # a cache in a folder that cannot be written is measured again
        write_tensors(path, {NORMS: torch.from_numpy(measured)}, {})
    return measured


def _measured(rows: StoredRows) -> Float[np.ndarray, " row"]:
    each = rows.rows_together
    return np.concatenate([norms(rows[start : start + each]) for start in range(0, len(rows), each)])


def _read(path: Path, rows: int) -> np.ndarray | None:
    """What was kept for as many rows; None if it is not there or not whole."""
    try:
        kept = read_tensors(path)[0][NORMS].numpy()
    except (SteerError, KeyError):
        return None
    return kept if kept.shape == (rows,) and kept.dtype == np.float32 else None
