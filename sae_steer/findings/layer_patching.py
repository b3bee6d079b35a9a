"""Where in depth the behaviour that differs can be moved: one model's stream put into the other, block by block.

1. At all onsets of a text together, the stream after a block is replaced by the other model's at the same tokens: as
   it is (raw), turned by the nearest rotation, or carried by an affine map, both fitted between onsets on other tasks.
2. The rest of the model runs on, and the target mass at the onsets is read.
3. Its change is given as a share of the gap between the models at the same onsets: 0 is no change, 1 all of it.

After a block where even the whole stream moves nothing, no feature can.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer import stats
from sae_steer.align import choose_ridge, fit_affine, fit_procrustes
from sae_steer.edits.basis import Carry, PairedRows
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.readout import target_mass
from sae_steer.model.rows import padded
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress
from sae_steer.row_filter import RowFilter

Flavour = Literal["raw", "rotated", "affine"]
Map = Callable[[Tensor], Tensor]
LEAST_SHARE = 0.05
"""Of the gap: a block whose stream does not surely move so much moves nothing a verdict could rest on."""


@dataclass(frozen=True)
class Patched:
    """One model with the other's stream after one block."""

    layer: int
    giver: str
    receiver: str
    flavour: Flavour
    share: float
    """Change of the receiver's target mass as a share of the gap to the giver."""
    share_low: float | None
    """None where the gap is too uncertain for a bounded interval, as `share_high`."""
    share_high: float | None
    change: float
    """The same as probability."""

    @property
    def moves(self) -> bool:
        """Whether the interval lies beyond `LEAST_SHARE`."""
        return self.share_low is not None and self.share_low > LEAST_SHARE


@dataclass(frozen=True)
class Depth:
    """What moving the stream does, by block."""

    patched: tuple[Patched, ...]
    onsets: int
    tasks: int

    @classmethod
    def of_record(cls, record: dict) -> "Depth":
        """As `record` wrote it."""
        return cls(tuple(Patched(**row) for row in record["patched"]), record["onsets"], record["tasks"])

    @property
    def movable(self) -> list[int]:
        """Blocks after which the other model's stream moves the behaviour of either model, by some map."""
        return sorted({one.layer for one in self.patched if one.moves})

    def _of(self, receiver: str) -> str:
        """Where the behaviour of one model can be moved, and the largest share of the gap block by block."""
        own = [one for one in self.patched if one.receiver == receiver]
        layers = sorted({one.layer for one in own if one.moves})
        where = f"after block{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else "after no block"
        best = {layer: max(one.share for one in own if one.layer == layer) for layer in sorted({p.layer for p in own})}
        shares = ", ".join(f"{layer}: {share:.0%}" for layer, share in best.items())
        return f"in {receiver} {where} (of the gap, by block, {shares})"

    def sentence(self, studied: int | None = None) -> str:
        """At which layers the behaviour can be moved, and whether the studied one is among them."""
        if not self.patched:
            return "the two models are alike at these onsets: there is nothing to move"
        receivers = dict.fromkeys(one.receiver for one in self.patched)
        text = "the other model's whole stream moves the behaviour " + ", ".join(map(self._of, receivers))
        if studied is not None and studied not in self.movable:
            text += (
                f"; WARNING: layer {studied}, which is studied, is not among them: put in at all onsets there, "
                "even the whole stream leaves the behaviour as it is"
            )
        return text

    def record(self) -> dict:
        """For `layers.json`."""
        return {
            "onsets": self.onsets,
            "tasks": self.tasks,
            "movable": self.movable,
            "summary": self.sentence(),
            "patched": [asdict(one) for one in self.patched],
        }


def patch_by_layer(
    pair: ModelPair,
    texts: Sequence[Text],
    fit: Sequence[Text],
    target: tuple[int, ...],
    *,
    draws: int,
    seed: int,
    on_step: Progress,
    row_filter: RowFilter | None = None,
) -> Depth:
    """Both models with the other's stream at the onsets of `texts`, after every block both have.

    Args:
        fit: texts of other tasks, on which maps between the streams are fitted.
        row_filter: says which of their rows count.
    """
    layers = range(min(model.model.shape.n_layers for model in pair.models))
    models = (pair.target.model, pair.reference.model)
    rows = PairedRows.of(*models, fit, tuple(layers), row_filter)
    sides = [(pair.target, pair.reference, "target", "reference"), (pair.reference, pair.target, "reference", "target")]
    patched: list[Patched] = []
    onsets = tasks = 0
    for done, layer in enumerate(layers):
        for giver, receiver, *names in sides:
            on_step(done, len(layers), f"{giver.name}'s stream after block {layer} into {receiver.name}")
            maps = dict(_maps(rows, layer, *names, receiver.model.device))
            reading = _read(giver.model, receiver.model, texts, layer, maps, target)
            onsets, tasks = len(reading.task), len(np.unique(reading.task))
            patched += _shares(reading, layer, giver, receiver, draws=draws, seed=seed)
    return Depth(tuple(patched), onsets, tasks)


def _maps(
    rows: PairedRows, layer: int, giver: str, receiver: str, device: torch.device
) -> Iterator[tuple[Flavour, Map]]:
    x, y = (getattr(rows, side)[layer][rows.between] for side in (giver, receiver))
    if x.shape[1] == y.shape[1]:
        yield "raw", lambda stream: stream
        yield "rotated", Carry.of(fit_procrustes(x, y), device)
    yield "affine", Carry.of(fit_affine(x, y, ridge=choose_ridge(x, y)), device)


@dataclass(frozen=True)
class _Reading:
    """Target mass at every onset."""

    task: Int[np.ndarray, " row"]
    giver: Float[np.ndarray, " row"]
    receiver: Float[np.ndarray, " row"]
    patched: dict[Flavour, Float[np.ndarray, " row"]]


@torch.no_grad()
def _read(
    giver: LanguageModel,
    receiver: LanguageModel,
    texts: Sequence[Text],
    layer: int,
    maps: dict[Flavour, Map],
    target: tuple[int, ...],
) -> _Reading:
    parts: dict[str, list[Tensor]] = {name: [] for name in ("giver", "receiver", *maps)}
    tasks = []
    columns = torch.tensor(target, device=receiver.device)
    for batch in padded([text.token for text in texts]):
        tokens = batch.tokens.to(receiver.device)
        at = batch.placed([text.is_onset for text in texts]).to(receiver.device)
        tasks += [np.full(int(texts[i].is_onset.sum()), texts[i].task) for i in batch.members]

        def mass(model: LanguageModel, resid: Tensor, at: Tensor = at) -> Tensor:
            return target_mass(model.unembed(model.run(resid, start=layer + 1)[at]), columns).cpu()

        theirs, own = (model.resid_posts(tokens, (layer,))[layer] for model in (giver, receiver))
        parts["giver"].append(mass(giver, theirs))
        parts["receiver"].append(mass(receiver, own))
        for name, carried in maps.items():
            changed = own.clone()
            changed[at] = carried(theirs[at]).to(own)
            parts[name].append(mass(receiver, changed))
    found = {name: torch.cat(part).numpy() for name, part in parts.items()}
    return _Reading(np.concatenate(tasks), found.pop("giver"), found.pop("receiver"), found)


def _shares(
    reading: _Reading, layer: int, giver: NamedModel, receiver: NamedModel, *, draws: int, seed: int
) -> list[Patched]:
    names = list(reading.patched)
    change = np.stack([reading.patched[name] - reading.receiver for name in names], axis=1)
    gap = (reading.giver - reading.receiver)[:, None]
    if not gap.sum():  # the same model twice: there is nothing to move
        return []
    found = stats.cluster_bootstrap_ratio(change, gap, reading.task, draws=draws, seed=seed)
    return [
        Patched(
            layer=layer,
            giver=giver.name,
            receiver=receiver.name,
            flavour=name,
            share=float(found.mean[i]),
            share_low=_finite(found.low[i]),
            share_high=_finite(found.high[i]),
            change=float(change[:, i].mean()),
        )
        for i, name in enumerate(names)
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
