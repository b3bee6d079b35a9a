"""Rows as they are stored: float16, float32, or bfloat16, whose bits HDF5 keeps as uint16."""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float, Shaped

from sae_steer.row_filter import lengths

DTYPES = ("float16", "bfloat16", "float32")
WIDER = {"float16": "bfloat16", "bfloat16": "float32"}
"""What holds a value that a type does not."""
AUTO = "auto"
"""The type that `narrowest` finds on the first texts."""
MARGIN = 8.0
"""How far beyond the largest value seen on the first texts a type must reach."""
ROUNDING = 1e-3
"""Relative error of the first texts' rows from which a type counts as too coarse or too short at the small end."""

CHUNK = 256
"""Rows whose moments are taken together."""


def encoded(rows: Float[np.ndarray, "row d_model"], dtype: str) -> Shaped[np.ndarray, "row d_model"]:
    """float32 rows as stored; a value beyond the type's range becomes infinite."""
    narrow = torch.from_numpy(rows).to(getattr(torch, dtype))
    return narrow.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else narrow.numpy()


def decoded(stored: Shaped[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Stored rows as float32, exactly."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if not stored.flags.writeable:  # torch, which converts on all cores, takes no memory that may not be written
        return stored.astype(np.float32)
    return torch.from_numpy(stored).float().numpy()


def moments(stored: Shaped[np.ndarray, "row d_model"]) -> Float[np.ndarray, "2 d_model"]:
    """Sums and sums of squares of the rows in float64, added row after row; not finite where a row is not.

    A few hundred rows at a time stay in the processor's cache: a quarter of the time of whole columns, the same bits.
    """
    found = np.zeros((2, stored.shape[1]))
    with np.errstate(invalid="ignore"):  # infinity less infinity: the caller sees that it is not finite
        for start in range(0, len(stored), CHUNK):
            exact = decoded(stored[start : start + CHUNK]).astype(np.float64)
            found[0] = np.vstack([found[:1], exact]).sum(0)
            found[1] = np.vstack([found[1:], exact**2]).sum(0)
    return found


def norms(stored: Shaped[np.ndarray, "row d_model"]) -> Float[np.ndarray, " row"]:
    """The length of each row as it is stored, in float32."""
    parts = [lengths(decoded(stored[start : start + CHUNK])) for start in range(0, len(stored), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def narrowest(streams: Iterable[Float[np.ndarray, "row d_model"]]) -> str:
    """float16 if it holds these rows with room to spare, else bfloat16, which has float32's range.

    Room: the largest value is `MARGIN` times below float16's largest, and rounding costs each stream less than
    `ROUNDING` of its norm (values under 6e-5 lose bits).
    """
    for rows in streams:
        kept = decoded(encoded(rows, "float16"))
        if np.abs(rows).max() * MARGIN > np.finfo(np.float16).max or not (
            np.linalg.norm(kept - rows) <= ROUNDING * np.linalg.norm(rows)
        ):
            return "bfloat16"
    return "float16"
