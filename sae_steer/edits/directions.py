"""Where a direction can come from: a feature, a difference of means, the unembedding, chance, or the user.

All are vectors of the target model's stream after the block studied. A feature's size (dose 1) is how large it
is where it is active; a difference of means and a user's vector have a length of their own; the unembedding and
a random direction have none, and are given the length of the difference of means.
"""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor

from sae_steer.edits.variants import Direction
from sae_steer.errors import InputError, NotFiniteError, SteerError
from sae_steer.model.language_model import LanguageModel
from sae_steer.randomness import Stream, generator
from sae_steer.sae.architectures import SparseDictionary

SOURCES = ("mean-difference", "unembedding", "random")
FILES = (".npy", ".pt", ".safetensors", ".json")
ENOUGH_ONSETS = 50
"""Active onsets of the tune split from which s is read; with fewer, all its active rows are."""


def feature_direction(
    sae: SparseDictionary,
    feature: int,
    rows: Float[Tensor, "row d_model"],
    is_onset: Bool[np.ndarray, " row"],
) -> Direction | None:
    """The decoder row of a feature, s the median norm of f * W_dec[f] where it is active; None if it is silent.

    Args:
        rows: the target model's stream over tune texts.
    """
    return feature_directions(sae, [feature], rows, is_onset)[0]


def feature_directions(
    sae: SparseDictionary,
    features: Sequence[int],
    rows: Float[Tensor, "row d_model"],
    is_onset: Bool[np.ndarray, " row"],
) -> list[Direction | None]:
    """`feature_direction` of each feature, from one reading of the rows."""
    codes = sae.encode(rows)
    fires = codes.values != 0
    order = codes.indices[fires].argsort(stable=True)
    index, value, row = (part[fires][order].cpu().numpy() for part in (codes.indices, codes.values, codes.rows))
    return [
        _of_feature(sae, feature, value[mine], is_onset[row[mine]])
        for feature in features
        for mine in [slice(*np.searchsorted(index, [feature, feature + 1]))]
    ]


def _of_feature(
    sae: SparseDictionary, feature: int, active: Float[np.ndarray, " firing"], at_onset: Bool[np.ndarray, " firing"]
) -> Direction | None:
    row = sae.direction(feature)  # an index outside the dictionary ends here
    if not len(active):
        return None
    where = f"{len(active)} active rows of the tune split, {int(at_onset.sum())} of them onsets"
    if at_onset.sum() >= ENOUGH_ONSETS:
        active, where = active[at_onset], f"{int(at_onset.sum())} active onsets of the tune split"
    side = -1.0 if (active < 0).mean() > 0.5 else 1.0  # a feature with two sides points where it mostly fires
    s = float(np.median(np.abs(active))) * float(row.norm())
    return Direction(f"feature {feature}", side * row / row.norm(), s, where, sae, feature)


def mean_difference(
    rows: Float[Tensor, "row d_model"], is_onset: Bool[np.ndarray, " row"], is_target: Bool[np.ndarray, " row"]
) -> Direction:
    """Mean stream at onsets before a target step minus the mean at the others; dose 1 is its own length."""
    before, others = (torch.from_numpy(is_onset & chosen) for chosen in (is_target, ~is_target))
    if not (before.any() and others.any()):
        raise InputError(
            f"the tune texts have {int(before.sum())} onsets before a target step and {int(others.sum())} before "
            "others, and a difference of means needs both; cache more tune texts, or check target.phrases"
        )
    rows = rows.cpu()
    return of_vector("mean-difference", rows[before].double().mean(0) - rows[others].double().mean(0), None)


def unembedding(model: LanguageModel, ids: tuple[int, ...]) -> Float[Tensor, " d_model"]:
    """What the final norm and the unembedding read as the target tokens, at length one.

    The rows of the tokens are summed, less the mean row (a shift of all logits changes nothing), times the norm's
    gain.
    """
    table = model.W_U.detach().float()
    summed = (table[list(ids)] - table.mean(0)).sum(0) * model.gain.detach().float()
    return summed / summed.norm()


def random_direction(d_model: int, seed: int) -> Float[Tensor, " d_model"]:
    """Uniform on the sphere."""
    drawn = torch.randn(d_model, generator=generator(seed, Stream.RANDOM_DIRECTION))
    return drawn / drawn.norm()


def of_vector(name: str, vector: Float[Tensor, " d_model"], s: float | None) -> Direction:
    """Any vector as a direction; `s` None takes its own length."""
    vector = vector.detach().double().cpu()
    if not torch.isfinite(vector).all():
        raise NotFiniteError(f"the direction {name} holds a NaN or an infinity; give a vector of numbers")
    length = float(vector.norm())
    if not length > 0:
        raise InputError(f"the direction {name} is zero; give a vector that points somewhere")
    s_from = "its own length" if s is None else "the length of the difference of means"
    return Direction(name, (vector / length).float(), length if s is None else s, s_from)


def read_vector(path: Path | str, d_model: int) -> Float[Tensor, " d_model"]:
    """A user's vector from a .npy, .pt (nothing is unpickled), .safetensors or .json file with one vector in it."""
    path = Path(path)
    if not path.is_file() or path.suffix not in FILES:
        raise InputError(
            f"no direction {str(path)!r}: give {', '.join(SOURCES)}, or a {', '.join(FILES)} file with one vector"
        )
    try:
        numbers = _READERS[path.suffix](path)
        vector = torch.as_tensor(numbers).double()
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{path} holds no vector of numbers that can be read safely ({reason})") from error
    if vector.numel() != d_model:
        raise InputError(
            f"{path} holds {list(vector.shape)} numbers and the stream has {d_model} dimensions; give one vector of "
            f"{d_model}"
        )
    return vector.reshape(d_model)


def _pt(path: Path) -> Tensor:
    return _only(torch.load(path, map_location="cpu", weights_only=True))


def _safetensors(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return _only(load_file(path))


def _json(path: Path) -> list:
    from sae_steer.records import read_json

    return _only(read_json(path))


def _only(content: Any) -> Any:
    """A file's one entry, named or not."""
    if isinstance(content, dict):
        if len(content) != 1:
            raise ValueError(f"{len(content)} entries, not one: {', '.join(map(str, content))}")
        return next(iter(content.values()))
    return content


_UNREADABLE = (
    OSError,
    ValueError,
    TypeError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    BadZipFile,
    SafetensorError,
    SteerError,
)
_READERS = {
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".pt": _pt,
    ".safetensors": _safetensors,
    ".json": _json,
}
