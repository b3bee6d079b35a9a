"""The measure: a model's total next-token probability of the target tokens at step onsets, exactly, under edits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.errors import NotDeliveredError
from sae_steer.model.batching import length_batches, pad
from sae_steer.model.decoder import Decoder
from sae_steer.model.readout import target_mass
from sae_steer.model.replay import CleanPass, Edit
from sae_steer.pair.texts import Text

TOKENS_PER_BATCH = 4_096


@dataclass(frozen=True)
class OnsetBatch:
    """Texts of like length and the positions to edit and read; a row with fewer repeats its own, which are not real."""

    tokens: Int[Tensor, "batch pos"]
    positions: Int[Tensor, "batch edit"]
    real: Bool[Tensor, "batch edit"]


@dataclass(frozen=True)
class OnsetRows:
    """Chosen onsets of some texts. Rows are onsets, in the order of the batches."""

    batches: tuple[OnsetBatch, ...]
    prompt: Int[np.ndarray, " row"]
    task: Int[np.ndarray, " row"]
    position: Int[np.ndarray, " row"]
    is_target: Bool[np.ndarray, " row"]
    """Whether the text goes on with a target step there."""

    @classmethod
    def of(cls, texts: Sequence[Text], chosen: Sequence[np.ndarray]) -> "OnsetRows":
        """The onsets `chosen` (positions) of each text; texts without any are left out."""
        kept = [i for i, positions in enumerate(chosen) if len(positions)]
        batches, rows = [], []
        for batch in length_batches([len(texts[i]) for i in kept], TOKENS_PER_BATCH):
            members = [kept[i] for i in batch]
            width = max(len(chosen[i]) for i in members)
            counts = torch.tensor([len(chosen[i]) for i in members])
            padded = np.stack([np.resize(chosen[i], width) for i in members])
            batches.append(
                OnsetBatch(
                    tokens=pad([texts[i].token.tolist() for i in members], 0),
                    positions=torch.from_numpy(padded.astype(np.int64)),
                    real=torch.arange(width) < counts[:, None],
                )
            )
            rows += [(i, int(position)) for i in members for position in chosen[i]]
        return cls(
            tuple(batches),
            prompt=np.array([texts[i].prompt for i, _ in rows]),
            task=np.array([texts[i].task for i, _ in rows]),
            position=np.array([position for _, position in rows]),
            is_target=np.array([texts[i].next_is_target[position] for i, position in rows], dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True)
class Reading:
    """Target mass at each row under each edit, and how far the edit moved the stream there."""

    mass: Float[np.ndarray, "row edit"]
    delivered: Float[np.ndarray, "row edit"]
    """Norm of the change of the residual stream."""


@dataclass(frozen=True)
class Request:
    """Onsets and the edits to read there: each onset edited alone, or, `joint`, all onsets of a text together."""

    onsets: OnsetRows
    edits: Sequence[Edit]
    joint: bool = False
    together: int = 1
    """Edits that share a forward pass. With 1 every edit runs in a batch of the same shape, so equal edits give
    equal bits; more is several times faster and equal to rounding."""

    def read(self, clean: CleanPass, number: int, columns: Int[Tensor, " target"]) -> tuple[Tensor, Tensor]:
        """Target mass and delivered norm in batch `number`, [row, edit] each."""
        batch = self.onsets.batches[number]
        positions, real = batch.positions.to(columns.device), batch.real.to(columns.device)
        before, mass, delivered = clean.at(positions), [], []
        for start in range(0, len(self.edits), self.together):
            after = torch.stack([edit(before) for edit in self.edits[start : start + self.together]])
            logits = clean.read_joint(positions, after, real) if self.joint else clean.read_single(positions, after)
            mass.append(target_mass(logits, columns)[:, real])
            delivered.append((after - before).norm(dim=-1)[:, real])
        return torch.cat(mass).T.cpu(), torch.cat(delivered).T.double().cpu()


def read(model: Decoder, layer: int, requests: Sequence[Request], target: Sequence[int]) -> list[Reading]:
    """What each request asks of the stream after block `layer`: target mass at every onset under every edit.

    The requests' onsets are of the same texts, so that the unedited pass of a batch runs once for all of them.
    """
    columns = torch.tensor(target, device=model.device)
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in requests]
    for number, batch in enumerate(requests[0].onsets.batches):
        assert all(torch.equal(request.onsets.batches[number].tokens, batch.tokens) for request in requests)
        clean = CleanPass.of(model, batch.tokens.to(model.device), layer)
        for request, found in zip(requests, parts, strict=True):
            found.append(request.read(clean, number, columns))
    return [Reading(*(torch.cat(column).numpy() for column in zip(*found, strict=True))) for found in parts]


def unedited(resid: Tensor) -> Tensor:
    """The baseline as an edit."""
    return resid


def check_delivered(reading: Reading, names: Sequence[str]) -> None:
    """Raise `NotDeliveredError` for an edit that moved no row at all."""
    for name, column in zip(names, reading.delivered.T, strict=True):
        if not column.any():
            raise NotDeliveredError(f"{name} moved the residual stream at none of {len(column)} onsets")
