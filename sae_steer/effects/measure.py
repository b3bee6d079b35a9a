"""The measure at step onsets, exactly, under edits of the stream below; and how far each edit moved it.

A `Request` is a few edits in full detail, made at each onset alone or at many places of a text together.
A `FanRequest` is hundreds of directions at each onset alone, of which only the measure is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.edits.edit import Fan, Patch
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.readout import Measure, TargetMass, divergence, nats, off_target_nats
from sae_steer.model.replay import CleanPass, Edit, gather
from sae_steer.model.rows import padded
from sae_steer.pair.texts import Text
from sae_steer.randomness import Stream, random_numbers

ELSEWHERE = "elsewhere"
"""The position control: as many random positions of each text that are no onsets."""


@dataclass(frozen=True)
class OnsetBatch:
    """Texts of like length and the positions to edit and read; a row with fewer repeats its own, which are not real."""

    tokens: Int[Tensor, "batch pos"]
    lengths: Int[Tensor, " batch"]
    positions: Int[Tensor, "batch edit"]
    real: Bool[Tensor, "batch edit"]
    elsewhere: Bool[Tensor, "batch pos"]
    """As many positions as onsets, none of them an onset; of a text with too few of these, all."""

    @property
    def ends(self) -> Bool[Tensor, "batch edit"]:
        """Where a position is its text's last token, which nothing follows."""
        return self.positions + 1 >= self.lengths[:, None]

    @property
    def following(self) -> Int[Tensor, "batch edit"]:
        """The token after each position; at a text's end its own last token, which says nothing."""
        return self.tokens.gather(1, torch.minimum(self.positions + 1, self.lengths[:, None] - 1))

    def marked(self, places: str) -> Bool[Tensor, "batch pos"]:
        """Where a joint edit stands, by the name of the places."""
        at = torch.arange(self.tokens.shape[1])[None]
        inside = at < self.lengths[:, None]
        if places == "all":
            return inside
        if places == "onward":
            return inside & (at >= self.positions.min(1).values[:, None])
        if places == ELSEWHERE:
            return self.elsewhere
        marked = torch.zeros_like(inside)
        rows, slots = self.real.nonzero(as_tuple=True)
        marked[rows, self.positions[rows, slots]] = True
        return marked


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
    def of(cls, texts: Sequence[Text], chosen: Sequence[np.ndarray], *, seed: int = 0) -> "OnsetRows":
        """The onsets `chosen` (positions) of each text; texts without any are left out."""
        random = random_numbers(seed, Stream.ELSEWHERE)
        kept = [i for i, positions in enumerate(chosen) if len(positions)]
        batches, rows = [], []
        for batch in padded([texts[i].token for i in kept]):
            members = [kept[i] for i in batch.members]
            width = max(len(chosen[i]) for i in members)
            counts = torch.tensor([len(chosen[i]) for i in members])
            repeated = np.stack([np.resize(chosen[i], width) for i in members])
            elsewhere = torch.zeros(batch.tokens.shape, dtype=torch.bool)
            for row, i in enumerate(members):
                others = random.permutation(np.flatnonzero(~texts[i].is_onset))[: len(chosen[i])]
                elsewhere[row, torch.from_numpy(others)] = True
            batches.append(
                OnsetBatch(
                    tokens=batch.tokens,
                    lengths=batch.lengths,
                    positions=torch.from_numpy(repeated.astype(np.int64)),
                    real=torch.arange(width) < counts[:, None],
                    elsewhere=elsewhere,
                )
            )
            rows += [(i, int(position)) for i in members for position in chosen[i]]
        return cls(
            tuple(batches),
            prompt=np.array([texts[i].prompt for i, _ in rows], dtype=np.int64),
            task=np.array([texts[i].task for i, _ in rows], dtype=np.int64),
            position=np.array([position for _, position in rows], dtype=np.int64),
            is_target=np.array([texts[i].next_is_target[position] for i, position in rows], dtype=bool),
        )

    def __len__(self) -> int:
        return len(self.task)

    @property
    def tasks(self) -> int:
        """Clusters."""
        return len(np.unique(self.task))


@dataclass(frozen=True)
class Reading:
    """The measure at each row under each edit, how far the edit moved the stream there, and its side effects."""

    value: Float[np.ndarray, "row edit"]
    delivered: Float[np.ndarray, "row edit"]
    """Norm of the change of the residual stream."""
    kl: Float[np.ndarray, "row edit"]
    """From the first edit's prediction, which is the unedited one by convention, in nats."""
    off_target: Float[np.ndarray, "row edit"]
    """Cross-entropy of the following token among those outside the target set; NaN where one of it follows, or none."""


@dataclass(frozen=True)
class Request:
    """Onsets and a few edits to read there, the first of them `unedited`.

    Every edit runs in a batch of the same shape, so equal edits give equal bits.
    """

    onsets: OnsetRows
    edits: Sequence[Edit | Patch]
    joint: bool = False
    """All places of a text edited together, instead of each onset alone."""
    places: str = "onsets"
    """Of a joint edit."""

    def read(self, clean: CleanPass, number: int, measure: Measure) -> tuple[Tensor, ...]:
        """Measure, delivered norm, KL and off-target cross-entropy in batch `number`, [row, edit] each."""
        batch = self.onsets.batches[number]
        device = clean.resid.device
        positions, real = batch.positions.to(device), batch.real.to(device)
        following, ends = batch.following.to(device)[real], batch.ends.to(device)[real]
        read = self._joint if self.joint else self._single
        ids = measure.ids if isinstance(measure, TargetMass) else ()

        def under(edit: Edit | Patch) -> tuple[Tensor, Tensor]:
            logits, moved = read(clean, batch, positions, edit)
            return logits[real], moved[real]

        def column(logits: Tensor, moved: Tensor) -> Tensor:
            prediction = nats(logits)
            others = off_target_nats(prediction, ids, following).masked_fill(ends, float("nan"))
            sides = divergence(base, prediction), others
            return torch.stack([measure(logits).double(), moved.double(), *sides])

        first = clean.model.each(under, self.edits[:1])[0]
        base = nats(first[0])
        others = clean.model.each(lambda edit: column(*under(edit)), self.edits[1:])
        return torch.stack([column(*first), *others], dim=-1).cpu().unbind(0)

    def _single(
        self, clean: CleanPass, batch: OnsetBatch, positions: Tensor, edit: Edit | Patch
    ) -> tuple[Tensor, Tensor]:
        before = clean.at(positions)
        after = gather(edit.stream(batch.tokens), positions) if isinstance(edit, Patch) else edit(before)
        return clean.read_single(positions, after[None])[0], (after - before).norm(dim=-1)

    def _joint(
        self, clean: CleanPass, batch: OnsetBatch, positions: Tensor, edit: Edit | Patch
    ) -> tuple[Tensor, Tensor]:
        at = batch.marked(self.places).to(positions.device)
        before = clean.resid[at]
        after = edit.stream(batch.tokens)[at] if isinstance(edit, Patch) else edit(before)
        moved = torch.zeros(at.shape, device=positions.device)
        moved[at] = (after - before).norm(dim=-1)
        return clean.read_joint(at, after[None], positions)[0], moved.gather(1, positions)


@dataclass(frozen=True)
class FanRequest:
    """Many directions at each onset alone, as far as an edit goes there."""

    onsets: OnsetRows
    fan: Fan

    def read(self, clean: CleanPass, number: int, measure: Measure) -> tuple[Tensor]:
        """The measure in batch `number`, [row, direction]; where the edit moves nothing, nothing is replayed."""
        batch = self.onsets.batches[number]
        before = clean.at(batch.positions.to(clean.resid.device))
        lengths = self.fan.lengths(before)

        def at(place: list[int]) -> Tensor:
            row, slot = place
            here, position = before[row, slot], int(batch.positions[row, slot])
            if lengths[row, slot] > 0:
                return clean.read_many(row, position, self.fan(here, lengths[row, slot]), measure)
            return clean.read_many(row, position, here[None], measure).expand(len(self.fan))

        values = clean.model.each(at, batch.real.nonzero().tolist())
        return (torch.stack(values).double().cpu(),)


def read(model: LanguageModel, layer: int, requests: Sequence[Request | FanRequest], measure: Measure) -> list[Any]:
    """What each request asks of the stream after block `layer`, at every onset under every edit.

    The requests' onsets are of the same texts, so that the unedited pass of a batch runs once for all of them.
    A `Request` comes back as a `Reading`, a `FanRequest` as its [row, direction] values.
    """
    parts: list[list[tuple[Tensor, ...]]] = [[] for _ in requests]
    for number, batch in enumerate(requests[0].onsets.batches):
        assert all(torch.equal(request.onsets.batches[number].tokens, batch.tokens) for request in requests)
        clean = CleanPass.of(model, batch.tokens.to(model.device), layer)
        for request, columns in zip(requests, parts, strict=True):
            columns.append(request.read(clean, number, measure))
    whole = [[torch.cat(column).numpy() for column in zip(*columns, strict=True)] for columns in parts]
    return [
        Reading(*columns) if isinstance(request, Request) else columns[0]
        for request, columns in zip(requests, whole, strict=True)
    ]


def unedited(resid: Tensor) -> Tensor:
    """The baseline as an edit."""
    return resid
