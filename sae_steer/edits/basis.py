"""From one model's residual stream to the other's: maps fitted on paired rows, judged on rows of other tasks.

Two trainings share no basis (2506.06609), so a direction of the target model means something in the reference
only through a map. Rows are positions of the same texts read in both models; y = x @ weight + bias is fitted by
ridge, and its R2 on held-out tasks stands beside that of the identity and of a rotation.

Rows that do not count (`row_filter`: special tokens, and rows far longer than the others) are left out of the fit and
of R2, which is reported with them beside: one massive row makes two unrelated streams look like one.

Rows are taken between onsets, where the models are not asked to differ. A map that has seen them predicts what
the other model *would* hold there, and so takes away the very difference it should carry: of a feature that one
model alone writes at onsets, nothing arrives (planted, `selftest`: cosine .21 with the truth, .71 without them).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.align import AffineMap, BasisCheck, basis_check, choose_ridge, fit_affine, fit_procrustes
from sae_steer.model.batching import length_batches
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.rows import TOKENS_PER_BATCH, real_streams
from sae_steer.pair.texts import Text
from sae_steer.randomness import Stream, generator
from sae_steer.row_filter import RowFilter, RowsThatCount

FIT_ROWS = 30_000
"""Rows a map is fitted on at most."""


@dataclass(frozen=True)
class Carry:
    """An affine map as tensors: rows x -> x @ weight + bias; a direction moves by the linear part."""

    weight: Float[Tensor, "d_x d_y"]
    bias: Float[Tensor, " d_y"]

    @classmethod
    def of(cls, fitted: AffineMap, device: torch.device) -> "Carry":
        """The fitted map in float32."""
        return cls(*(torch.from_numpy(part).float().to(device) for part in (fitted.weight, fitted.bias)))

    def __call__(self, rows: Float[Tensor, "*rows d_x"]) -> Float[Tensor, "*rows d_y"]:
        """The rows as the other stream would hold them."""
        return rows.to(self.weight.device) @ self.weight + self.bias

    def direction(self, unit: Float[Tensor, "*rows d_x"]) -> Float[Tensor, "*rows d_y"]:
        """Directions carried over, at length one."""
        carried = unit.to(self.weight.device) @ self.weight
        return carried / carried.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class Bridge:
    """A fitted map and how well it and its simpler rivals predict rows of other tasks."""

    carry: Carry
    rotation: Carry | None
    """The rotation nearest to it, where the widths allow: unlike a ridge it carries directions that no fitted row
    shows, such as what both models hold at delimiters alone."""
    check: BasisCheck

    @property
    def transported(self) -> bool:
        """Whether the map's gain over the raw basis makes the transported direction the primary one."""
        return self.check.gain > TRANSPORT_GAIN

    @property
    def r2(self) -> float:
        """Held-out R2 of the basis that is used."""
        return self.check.affine_r2 if self.transported else float(self.check.identity_r2)


TRANSPORT_GAIN = 0.05
"""Held-out R2 that the affine map must gain over the identity before a direction is carried through it."""


@dataclass(frozen=True)
class PairedRows:
    """Both models' streams at the same positions of some texts, after some layers."""

    target: Mapping[int, Float[np.ndarray, "row d_target"]]
    reference: Mapping[int, Float[np.ndarray, "row d_reference"]]
    is_onset: Bool[np.ndarray, " row"]
    next_is_target: Bool[np.ndarray, " row"]
    opens: Bool[np.ndarray, " row"]
    """Tokens that open a step somewhere in the texts."""
    task: Int[np.ndarray, " row"]
    selection: RowsThatCount
    """Rows that count in both models after all the layers."""

    @classmethod
    def of(
        cls,
        target: LanguageModel,
        reference: LanguageModel,
        texts: Sequence[Text],
        layers: tuple[int, ...],
        row_filter: RowFilter | None = None,
    ) -> "PairedRows":
        """Every position of the texts, in the order of their lengths.

        Args:
            row_filter: says which rows count; by default none but the long ones are left out.
        """
        order = [i for batch in length_batches([len(text) for text in texts], TOKENS_PER_BATCH) for i in batch]
        ordered = [texts[i] for i in order]
        token, is_onset = (np.concatenate([getattr(text, name) for text in ordered]) for name in ("token", "is_onset"))
        tokens = [text.token for text in ordered]
        streams = [real_streams(model, tokens, layers) for model in (target, reference)]
        chosen = (row_filter or RowFilter()).of_streams(token, is_onset, [*streams[0].values(), *streams[1].values()])
        return cls(
            target=streams[0],
            reference=streams[1],
            selection=chosen,
            is_onset=is_onset,
            next_is_target=np.concatenate([text.next_is_target for text in ordered]),
            opens=np.isin(token, np.unique(token[is_onset])),
            task=np.concatenate([np.full(len(text), text.task) for text in ordered]),
        )

    @cached_property
    def between(self) -> Int[np.ndarray, " chosen"]:
        """At most `FIT_ROWS` rows that count and whose tokens open no step, spread evenly.

        Of all rows that count if every one of their tokens opens a step.
        """
        return self._spread(self.selection.counts)

    @cached_property
    def between_all(self) -> Int[np.ndarray, " chosen"]:
        """As `between`, of all rows."""
        return self._spread(np.ones(len(self.opens), bool))

    def _spread(self, among: Bool[np.ndarray, " row"]) -> Int[np.ndarray, " chosen"]:
        eligible = np.flatnonzero(among & ~self.opens)
        if not len(eligible):
            eligible = np.flatnonzero(among)
        return eligible[np.unique(np.linspace(0, len(eligible) - 1, min(FIT_ROWS, len(eligible))).astype(np.int64))]


def bridge(
    x_fit: Float[np.ndarray, "fit d_x"],
    y_fit: Float[np.ndarray, "fit d_y"],
    x_test: Float[np.ndarray, "test d_x"],
    y_test: Float[np.ndarray, "test d_y"],
    device: torch.device,
    every: tuple[Float[np.ndarray, "all d_x"], Float[np.ndarray, "all d_y"]] | None = None,
) -> Bridge:
    """The affine map from x to y, and the basis check on the test rows, and on `every` one, left out or not."""
    fitted = fit_affine(x_fit, y_fit, ridge=choose_ridge(x_fit, y_fit))
    turned = fit_procrustes(x_fit, y_fit) if x_fit.shape[1] == y_fit.shape[1] else None
    return Bridge(
        Carry.of(fitted, device),
        None if turned is None else Carry.of(turned, device),
        basis_check(x_fit, y_fit, x_test, y_test, every=every),
    )


def embedding_check(
    target: LanguageModel, reference: LanguageModel, *, seed: int, row_filter: RowFilter | None = None
) -> BasisCheck:
    """The basis check of the two embedding tables: rows are tokens, fitted on a random half of those that count."""
    tables = [model.W_E.detach().cpu().double().numpy() for model in (target, reference)]
    rows = min(map(len, tables))
    tables = [table[:rows] for table in tables]
    chosen = (row_filter or RowFilter()).of_streams(np.arange(rows), np.zeros(rows, bool), tables)
    order = torch.randperm(rows, generator=generator(seed, Stream.EMBEDDING_HALVES)).numpy()
    halves = [half[chosen.counts[half]] for half in (order[: rows // 2], order[rows // 2 :])]
    fit, test = ([table[half] for table in tables] for half in halves)
    every = tables[0][order[rows // 2 :]], tables[1][order[rows // 2 :]]
    return basis_check(*fit, *test, every=every)
