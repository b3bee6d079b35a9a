"""A tuned lens: the stream after each block carried to the last one by an affine map, then read as the model reads it.

The logit lens reads a stream in a basis it was not written for (Belrose et al. 2023, 2303.08112). The map of each
block is fitted by least squares on train texts, with a ridge, and its error is that on the scan split's, other tasks.
Rows that do not count (`row_filter`: special tokens, and rows far longer than the others) are in neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.align import AffineMap, choose_ridge, fit_affine, identity_r2
from sae_steer.edits.basis import Carry
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.rows import real_streams
from sae_steer.pair.texts import Text
from sae_steer.row_filter import RowFilter

AT_ONCE = 2**30
"""Bytes of streams held while maps are fitted; wide models are read several times instead."""


@dataclass(frozen=True)
class LensMap:
    """The map of one block, and what it is worth."""

    layer: int
    carry: Carry
    r2: float
    """Of the last stream, on rows of other tasks."""
    identity_r2: float
    """The same without a map: the logit lens's own."""
    fit_rows: int
    held_out_rows: int


@dataclass(frozen=True)
class TunedLens:
    """The maps of every block but the last, which needs none."""

    maps: tuple[LensMap, ...]

    def __call__(self, layer: int, resid: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The stream after block `layer` as the last block would leave it."""
        return self.maps[layer].carry(resid) if layer < len(self.maps) else resid

    def record(self) -> list[dict]:
        """A row a block."""
        return [
            {
                "layer": one.layer,
                "r2": one.r2,
                "identity_r2": one.identity_r2,
                "fit_rows": one.fit_rows,
                "held_out_rows": one.held_out_rows,
            }
            for one in self.maps
        ]


def fit_tuned_lens(
    model: LanguageModel, fit: Sequence[Text], held_out: Sequence[Text], row_filter: RowFilter | None = None
) -> TunedLens:
    """Maps from the stream after every block to that after the last, fitted on the rows of `fit` that count."""
    last = model.shape.n_layers - 1
    rows = [_Rows(model, list(texts), row_filter or RowFilter()) for texts in (fit, held_out)]
    step = max(1, AT_ONCE // (4 * model.shape.d_model * sum(map(len, rows))) - 1)
    maps: list[LensMap] = []
    for start in range(0, last, step):
        layers = tuple(range(start, min(start + step, last)))
        streams = [part.pairs(layers, last) for part in rows]
        maps += [_map(layer, *(part[layer] for part in streams), model.device) for layer in layers]
    return TunedLens(tuple(maps))


Pair = tuple[Float[np.ndarray, "_row d_model"], Float[np.ndarray, "_row d_model"]]
"""The stream after a block, and after the last."""


@dataclass(frozen=True)
class _Rows:
    """The positions of some texts."""

    model: LanguageModel
    texts: list[Text]
    row_filter: RowFilter

    def __len__(self) -> int:
        return sum(map(len, self.texts))

    def pairs(self, layers: tuple[int, ...], last: int) -> dict[int, Pair]:
        """{layer: its stream and the last one, at the rows that count in both}."""
        token, is_onset = (
            np.concatenate([getattr(text, name) for text in self.texts]) for name in ("token", "is_onset")
        )
        streams = real_streams(self.model, [text.token for text in self.texts], (*layers, last))
        pairs = {}
        for layer in layers:
            both = [streams[layer], streams[last]]
            counts = self.row_filter.of_streams(token, is_onset.astype(bool), both).counts
            pairs[layer] = (both[0][counts], both[1][counts])
        return pairs


def _map(layer: int, fit: Pair, held_out: Pair, device: torch.device) -> LensMap:
    x, y = fit
    fitted: AffineMap = fit_affine(x, y, ridge=choose_ridge(x, y))
    return LensMap(
        layer=layer,
        carry=Carry.of(fitted, device),
        r2=fitted.r2(*held_out),
        identity_r2=identity_r2(*held_out),
        fit_rows=len(x),
        held_out_rows=len(held_out[0]),
    )
