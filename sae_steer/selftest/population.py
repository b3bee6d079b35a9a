"""The texts that studies draw from, and the exact effect of every edit on all of them: a planted pair's truth.

Readers are planted in the last block alone, so all below it is the same for every pair of one body. What each
edit makes of that block's input, and of the keys and values its attention finds there, is computed once
(`Edited`); a pair's truth then costs the last block at the onsets read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.edits.arms import Arm
from sae_steer.effects.measure import OnsetBatch, OnsetRows, unedited
from sae_steer.model.decoder import Decoder, Heads, KVHeads, Rope, Storing
from sae_steer.model.readout import Measure
from sae_steer.model.replay import CleanPass, Edit, gather
from sae_steer.model.suffix import DecoderSuffix, Stored
from sae_steer.pair.texts import Text
from sae_steer.randomness import Stream, random_numbers
from sae_steer.settings import MODES

BASE = "base"
READ = 2
"""Onsets of each text at which effects are read, drawn once."""


@dataclass(frozen=True)
class Population:
    """All texts that studies of a selftest draw from."""

    texts: tuple[Text, ...]
    every: OnsetRows
    """All onsets of every text: the places of a joint edit."""
    read: OnsetRows
    """Up to `READ` of them: where truth is measured."""
    weight: Float[np.ndarray, " row"]
    """Of the read onsets in a joint effect, so that every onset of a text counts alike."""

    @classmethod
    def of(cls, texts: Sequence[Text], seed: int) -> "Population":
        """The texts, each cut after the last onset read: nothing later can change what is measured."""
        random, kept, chosen = random_numbers(seed, Stream.POPULATION_READ), [], []
        for text in texts:
            places = np.flatnonzero(text.is_onset)
            chosen.append(np.sort(random.permutation(places)[:READ]))
            kept.append(_cut(text, int(chosen[-1][-1]) + 1))
        every = OnsetRows.of(kept, [np.flatnonzero(text.is_onset) for text in kept])
        read = OnsetRows.of(kept, chosen)
        onsets = {text.prompt: int(text.is_onset.sum()) for text in texts}
        counts = {text.prompt: len(places) for text, places in zip(texts, chosen, strict=True)}
        weight = np.array([onsets[prompt] / counts[prompt] for prompt in read.prompt.tolist()])
        return cls(tuple(texts), every, read, weight)

    def mean(self, values: Float[np.ndarray, " row"], mode: str) -> float:
        """Mean over the read onsets: texts count alike for single edits (each gives as many), onsets for joint ones."""
        return float(np.average(values, weights=self.weight if mode == "joint" else None))


def _cut(text: Text, stop: int) -> Text:
    columns = ("token", "is_onset", "step", "next_is_target", "true_p")
    return replace(text, **{name: getattr(text, name)[:stop] for name in columns})


@dataclass(frozen=True)
class Edited:
    """One condition's input of the last block, batch by batch."""

    rows: tuple[Float[Tensor, "_batch _edit d_model"], ...]
    """The stream at the onsets read."""
    stored: tuple[Storing, ...]
    """Keys and values of the last block."""
    replaced: tuple[Float[Tensor, "_batch _onset d_model"], ...] | None = None
    """The stream at all onsets, where an edit changed it there alone: their keys and values are made anew."""

    @torch.no_grad()
    def values(self, model: Decoder, population: Population, measure: Measure) -> Float[np.ndarray, " row"]:
        """The measure at every onset read, with `model`'s last block above this input."""
        last, measured = model.shape.n_layers - 1, []
        for number, batch in enumerate(population.read.batches):
            stored = self.stored[number]
            if self.replaced is not None:
                places = population.every.batches[number].positions
                stored = _with_replaced(model, last, stored, places, self.replaced[number])
            rows = DecoderSuffix(model, last, stored).single(batch.positions, self.rows[number][None])[0]
            logits = model.unembed(rows)
            measured.append(measure(logits)[batch.real].double())
        return torch.cat(measured).numpy()


@dataclass
class _Growing:
    """An `Edited` in the making."""

    rows: list[Tensor]
    stored: list[Storing]
    replaced: list[Tensor]

    def done(self) -> Edited:
        return Edited(tuple(self.rows), tuple(self.stored), tuple(self.replaced) or None)


Inputs = dict[tuple[str, str], Edited]
"""{(variant, mode): its input of the last block}; the mode is BASE for the unedited one."""


@torch.no_grad()
def edited_inputs(arms: Sequence[Arm], population: Population, dose: float) -> Inputs:
    """What every arm's edit at a dose makes of the last block's input, each onset alone and all of a text together."""
    inputs: Inputs = {}
    for model, layer in dict.fromkeys((arm.model.model, arm.layer) for arm in arms):
        group = [arm for arm in arms if (arm.model.model, arm.layer) == (model, layer)]
        growing = {(arm.variant.name, mode): _Growing([], [], []) for arm in group for mode in (BASE, *MODES)}
        for read, every in zip(population.read.batches, population.every.batches, strict=True):
            clean = CleanPass.of(model, read.tokens, layer)
            base = _single(clean, read.positions, unedited)
            for arm in group:
                edit = arm.edit(dose)
                for mode, (rows, stored, replaced) in {
                    BASE: base,
                    "single": _single(clean, read.positions, edit),
                    "joint": _joint(clean, read.positions, every, edit),
                }.items():
                    kept = growing[arm.variant.name, mode]
                    kept.rows.append(rows)
                    kept.stored.append(stored)
                    kept.replaced += [] if replaced is None else [replaced]
        inputs |= {name: kept.done() for name, kept in growing.items()}
    return inputs


def effects(
    inputs: Mapping[tuple[str, str], Edited], variant: str, model: Decoder, population: Population, measure: Measure
) -> dict[str, float]:
    """{base, single, joint}: a planted model's mean measure unedited, and the mean effect of each mode."""
    base = inputs[variant, BASE].values(model, population, measure)
    means = {BASE: population.mean(base, "single")}
    for mode in MODES:
        means[mode] = population.mean(inputs[variant, mode].values(model, population, measure) - base, mode)
    return means


def _single(clean: CleanPass, positions: Int[Tensor, "batch edit"], edit: Edit) -> tuple[Tensor, Storing, None]:
    rows, last = edit(clean.at(positions)), clean.model.shape.n_layers - 1
    attend = Stored(_stored(clean), positions)
    rows = clean.model.run(rows, start=clean.layer + 1, stop=last, attend=attend, positions=positions)
    return rows, _of_layer(_stored(clean), last), None


def _joint(
    clean: CleanPass, positions: Int[Tensor, "batch edit"], every: OnsetBatch, edit: Edit
) -> tuple[Tensor, Storing, Tensor | None]:
    """Right below the last block only the onsets' own keys change; from further down, everything does."""
    last, model = clean.model.shape.n_layers - 1, clean.model
    if clean.layer == last - 1:
        return edit(clean.at(positions)), _of_layer(_stored(clean), last), edit(clean.at(every.positions))
    at, whole, stored = every.marked("onsets"), clean.resid.clone(), Storing()
    whole[at] = edit(clean.resid[at])
    whole = model.run(whole, start=clean.layer + 1, stop=last)
    model.run(whole, start=last, attend=stored)
    return gather(whole, positions), stored, None


def _stored(clean: CleanPass) -> Storing:
    assert isinstance(clean.above, DecoderSuffix), "planted models are native decoders"
    return clean.above.stored


def _of_layer(stored: Storing, layer: int) -> Storing:
    return Storing({layer: stored.keys[layer]}, {layer: stored.values[layer]})


def _with_replaced(
    model: Decoder, layer: int, stored: Storing, places: Int[Tensor, "batch onset"], rows: Tensor
) -> Storing:
    """The keys and values with those at `places` made from `rows`."""
    block, written = model.layers[layer], {}

    def remember(layer: int, q: Heads, k: KVHeads, v: KVHeads) -> Heads:
        written.update(k=k, v=v)
        return q

    block.self_attn(block.input_layernorm(rows), Rope.at(places, model.shape), remember)
    index = places[:, None, :, None].expand_as(written["k"])
    return Storing(
        {layer: stored.keys[layer].scatter(2, index, written["k"])},
        {layer: stored.values[layer].scatter(2, index, written["v"])},
    )
