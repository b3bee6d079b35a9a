"""Learning dictionaries (Gao et al. 2024, 2406.04093), one or many over one reading, resumable bit for bit.

1. The data's mean is taken from the rows, and they are divided by one number, so that their mean square is d_in;
   at the end both are folded into the weights, and the dictionary reads raw rows. Rows far longer than the others
   (`row_filter`), where they are kept, decide neither number and are read at the usual length.
2. Every dictionary takes a step (`learner`) on the batch of that step, which is read and standardised once for all
   that learn from the same rows. Alone or beside others, a dictionary ends with the same bytes.
3. The learning rate rises linearly, stays, and falls linearly to zero.
4. Among several processes each reads its share of every batch, and gradients are summed.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.errors import InputError, NotFiniteError
from sae_steer.row_filter import LONG
from sae_steer.sae.architectures import SparseDictionary
from sae_steer.sae.checkpoint import TrainingState, interrupts_held, last_good
from sae_steer.sae.learner import new_learner, step
from sae_steer.sae.log import Log, Quiet, StepFacts
from sae_steer.sae.rules import rule_of
from sae_steer.sae.schedule import Plateau, codes_a_row, learning_rate
from sae_steer.settings import SAESettings
from sae_steer.world import World, keep_freed_memory

LOG_EVERY = 10
"""Steps between two looks at the loss: each look waits for the device."""

FORMAT = 2
"""Of checkpoints; one of another is of other code, and not gone on from."""
_EXPLODED = 1e4
DECIDED = 2.0
"""From this many times the typical rows' mean square on, a source's own is taken to be that of a few long rows."""
DAMAGED = 1e5
"""Usual lengths beyond which a row is damage: the longest that models are known to make have some thousands."""
_SHARED = ("rows", "batch_size", "order_seed", "precision", "warmup", "decay", "patience", "checkpoint_every")


@runtime_checkable
class RowSource(Protocol):
    """Where training rows come from: the cache, or a test's synthetic rows."""

    d_in: int
    n_rows: int
    mean: Float[Tensor, " d_in"]
    """Of the rows that are not far longer than the others."""
    mean_square: float
    """E||x - mean||^2 of those."""
    fingerprint: str
    """Changes whenever a batch would."""

    def batch(self, step: int, batch_size: int, seed: int) -> Float[Tensor, "batch d_in"]:
        """The float32 rows of a step: a pure function of its arguments."""


@dataclass(frozen=True, kw_only=True)
class TrainedSAE:
    """A finished dictionary and what it came from."""

    sae: SparseDictionary
    """On raw rows."""
    settings: SAESettings
    steps: int
    rows: str
    """The row source's fingerprint."""

    @property
    def provenance(self) -> dict:
        """What `save_sae` stores beside the weights."""
        return {"settings": dataclasses.asdict(self.settings), "steps": self.steps, "rows": self.rows}


@dataclass(frozen=True)
class Job:
    """A dictionary to learn: from which rows, and how."""

    rows: RowSource
    settings: SAESettings
    name: str = ""


class Training:
    """Dictionaries part-way: `step` takes the batch of every source and moves all dictionaries by one step."""

    def __init__(self, jobs: Sequence[Job], world: World) -> None:
        _check(jobs, world)
        if world.device.type == "cpu":
            keep_freed_memory()
        self.jobs, self.world, self.shared = jobs, world, jobs[0].settings
        self.steps = self.shared.rows // self.shared.batch_size
        self.sources = list({id(job.rows): job.rows for job in jobs}.values())
        moments = [typical_moments(rows, self.batch(number, 0)) for number, rows in enumerate(self.sources)]
        self.scales = [_scale(rows.d_in, square) for rows, (_, square) in zip(self.sources, moments, strict=True)]
        self.means = [mean.to(world.device) for mean, _ in moments]
        self._source_of = [next(i for i, rows in enumerate(self.sources) if rows is job.rows) for job in jobs]
        first = [self._standard(number, self.batch(number, 0)) for number in range(len(self.sources))]
        learners = [
            new_learner(first[source], job.settings, world) for source, job in zip(self._source_of, jobs, strict=True)
        ]
        self.state = TrainingState(learners, Plateau(self.shared, self.steps))

    def batch(self, source: int, number: int) -> Float[Tensor, "row d_in"]:
        """The rows of step `number`, all of them."""
        return self.sources[source].batch(number, self.shared.batch_size, self.shared.order_seed)

    def ahead(self) -> Iterator[list[Float[Tensor, "row d_in"]]]:
        """The batches of every source from the next step on; for a GPU each is read while the step before it runs."""
        on_gpu, steps = self.world.device.type != "cpu", count(self.state.step)

        def read(number: int) -> list[Tensor]:
            found = [self.batch(source, number) for source in range(len(self.sources))]
            return [batch.pin_memory() if on_gpu and not batch.is_cuda else batch for batch in found]

        if not on_gpu:
            yield from map(read, steps)
        with ThreadPoolExecutor(1) as reader:
            coming = reader.submit(read, next(steps))
            while True:
                now, coming = coming.result(), reader.submit(read, next(steps))
                yield now

    def _standard(self, source: int, batch: Tensor) -> Float[Tensor, "row d_in"]:
        rows = (batch.to(self.world.device, non_blocking=True) - self.means[source]).mul_(1 / self.scales[source])
        return shorten_(rows, math.sqrt(rows.shape[1]))

    def step(self, batches: Sequence[Float[Tensor, "row d_in"]]) -> list[Float[Tensor, ""]]:
        """One step of every dictionary on raw rows, a batch a source; returns what each leaves unexplained."""
        world, state = self.world, self.state
        share = self.shared.batch_size // world.size
        mine = slice(world.rank * share, (world.rank + 1) * share)
        rows = [self._standard(source, batch[mine]) for source, batch in enumerate(batches)]
        progress, lost = state.plateau.progress(state.step), []
        for source, learner in zip(self._source_of, state.learners, strict=True):
            settings = learner.settings
            k, lr = codes_a_row(progress, settings), learning_rate(progress, settings)
            lost.append(step(learner, rows[source], k, lr, world))
        state.step += 1
        return lost

    def facts(self, lost: Sequence[Float[Tensor, ""]], checkpoint: Path | None) -> list[StepFacts]:
        """How each dictionary stands; a loss that is not finite or has exploded is an error."""
        state, progress, found = self.state, self.state.plateau.progress(self.state.step - 1), []
        for job, learner, value in zip(self.jobs, state.learners, map(float, lost), strict=True):
            if not value < _EXPLODED:
                raise NotFiniteError(f"the loss is {value:.4g} at step {state.step}; {last_good(checkpoint)}")
            settings = learner.settings
            can_be_dead = self.state.step * settings.batch_size > settings.dead_after_rows
            dead = (learner.silent_rows > settings.dead_after_rows).double().mean()
            found.append(
                StepFacts(
                    name=job.name,
                    step=state.step,
                    steps=state.plateau.last,
                    loss=value,
                    fve=1 - value,
                    dead=float(dead) if can_be_dead else None,
                    lr=learning_rate(progress, settings),
                )
            )
        return found

    def finished(self) -> list[TrainedSAE]:
        """The dictionaries as they are now, on raw rows."""
        return [
            TrainedSAE(
                sae=learner.exported(self.means[source], self.scales[source]),
                settings=job.settings,
                steps=self.state.step,
                rows=job.rows.fingerprint,
            )
            for source, job, learner in zip(self._source_of, self.jobs, self.state.learners, strict=True)
        ]


def train(
    jobs: Sequence[Job], *, world: World, log: Log | None = None, checkpoint: Path | None = None
) -> list[TrainedSAE]:
    """The dictionaries of `jobs`; goes on from `checkpoint` if that file exists.

    The finished state stays in `checkpoint`: delete it once the dictionaries are saved.
    """
    log = log or Quiet()
    training = Training(jobs, world)
    state, shared = training.state, training.shared
    identity = {
        "settings": [dataclasses.asdict(job.settings) for job in jobs],
        "rows": [job.rows.fingerprint for job in jobs],
        "precision": str(world.autocast),
        "format": FORMAT,
    }
    identity = {name: _plain(value) for name, value in identity.items()}
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, identity)

    def save() -> None:
        if checkpoint is not None and world.is_first:
            state.save(checkpoint, identity)
            log.checkpoint(state.step, checkpoint)
        world.barrier()

    with interrupts_held() as asked, closing(training.ahead()) as batches:
        while state.step < state.plateau.last:
            lost = training.step(next(batches))
            if state.step % LOG_EVERY == 0 or state.step == state.plateau.last:
                told = training.facts(lost, checkpoint)
                state.plateau.look(state.step, min(facts.fve for facts in told))
                for facts in told:
                    log.step(facts)
            interrupted = world.any(asked())
            if state.step % shared.checkpoint_every == 0 or state.step == state.plateau.last or interrupted:
                save()
            if interrupted:
                raise KeyboardInterrupt
    log.done(state.step)
    return training.finished()


def train_dictionary(
    rows: RowSource, settings: SAESettings, *, world: World, log: Log | None = None, checkpoint: Path | None = None
) -> TrainedSAE:
    """The dictionary of `settings` for `rows`, as `train` makes it."""
    return train([Job(rows, settings)], world=world, log=log, checkpoint=checkpoint)[0]


def _plain(value: object) -> object:
    """As it comes back from JSON."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _check(jobs: Sequence[Job], world: World) -> None:
    shared = jobs[0].settings
    for job in jobs:
        settings = job.settings
        rule_of(settings.architecture)
        if not 1 <= settings.k <= settings.d_sae:
            raise InputError(f"k is {settings.k} and d_sae {settings.d_sae}; a dictionary needs 1 <= k <= d_sae")
        other = [name for name in _SHARED if getattr(settings, name) != getattr(shared, name)]
        if other:
            raise InputError(f"dictionaries learned together share {', '.join(other)}; run these one after another")
    if shared.rows < shared.batch_size:
        raise InputError(f"{shared.rows} rows do not fill a batch of {shared.batch_size}; raise --rows")
    if shared.batch_size % world.size:
        raise InputError(f"a batch of {shared.batch_size} rows cannot be shared evenly by {world.size} processes")


def typical_moments(rows: RowSource, first: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, " d_in"], float]:
    """The mean and E||x - mean||^2 by which rows are standardised.

    They are the source's own, unless a few long rows make them: then those of the typical rows of the first batch.
    """
    typical = typical_rows(first).double()
    if len(typical) < len(first) // 2:  # rows that are not finite, which a loss will tell
        return rows.mean, rows.mean_square
    mean = typical.mean(0)
    square = float((typical - mean).square().sum(1).mean())
    if square > 0 and rows.mean_square > DECIDED * square:
        return mean.float(), square
    return rows.mean, rows.mean_square


def typical_rows(rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "typical d_in"]:
    """The rows that are not far longer than the others."""
    norms = torch.linalg.vector_norm(rows, dim=1)
    return rows[norms <= LONG * norms.median()]


def shorten_(rows: Float[Tensor, "row d_in"], usual: float) -> Float[Tensor, "row d_in"]:
    """The rows, those beyond `LONG` times the `usual` length brought to it, so that none outweighs a batch.

    A TopK code grows with its row, so that what explains a row at one length explains it at another. A row beyond
    `DAMAGED` lengths is of no model and stays as it is: the loss will tell.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    long = (lengths > LONG * usual) & (lengths < DAMAGED * usual)
    return rows.mul_(torch.where(long, usual / lengths, 1.0))


def _scale(d_in: int, mean_square: float) -> float:
    """What rows are divided by, so that E||x - mean||^2 = d_in."""
    if not (math.isfinite(mean_square) and mean_square > 0):
        raise NotFiniteError(
            f"the rows' mean squared distance from their mean is {mean_square}; "
            f"a dictionary needs rows that are finite and differ: rebuild the cache"
        )
    return math.sqrt(mean_square / d_in)
