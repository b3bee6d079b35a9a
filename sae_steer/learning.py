"""How dictionaries are learned and stored, several over one reading; what a kill leaves is gone on with.

1. Each has a folder, held while it is written, and a provenance by which a finished one is found again.
2. Those not finished are learned together; their checkpoint lies in the first one's folder.
3. Config and weights are stored, then the table of firings, then `training.json`: a folder that has it is whole.
"""

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sae_steer.cache import ActivationCache, site
from sae_steer.capability import capability
from sae_steer.errors import InputError, SteerError
from sae_steer.files import read_facts
from sae_steer.outputs import Output, tidy, writing
from sae_steer.records import already_done, hashes_of, provenance, write_json, write_table
from sae_steer.row_filter import LeftOut
from sae_steer.sae.architectures import SparseDictionary
from sae_steer.sae.evaluation import SAEMetrics, evaluate_groups
from sae_steer.sae.log import Log, Together, jsonl_log
from sae_steer.sae.saelens.files import CONFIG_FILE, WEIGHTS_FILE, save_sae
from sae_steer.sae.stability import RECORD_FILE as STABILITY_FILE
from sae_steer.sae.stability import TABLE_FILE as STABILITY_TABLE
from sae_steer.sae.trackers import tracker
from sae_steer.sae.training import Job, TrainedSAE, train
from sae_steer.settings import SAESettings
from sae_steer.world import World

RECORD_FILE, FIRINGS_FILE = "training.json", "firings.parquet"
STATE_FILE, LOG_FILE = "training/state.safetensors", "training/log.jsonl"
FILES = (
    CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, FIRINGS_FILE, STABILITY_FILE, STABILITY_TABLE, STATE_FILE, LOG_FILE,
)  # fmt: skip
"""What a dictionary's folder is made of."""
SAELENS = "saelens:"
"""How architectures begin that SAELens's own trainer learns: `saelens:gated,l1_coefficient=2`."""


@dataclass(frozen=True)
class Wanted:
    """A dictionary to learn: of whose stream, how, and where it is stored."""

    model: str
    settings: SAESettings
    out: Path


@dataclass
class Part:
    """One of several dictionaries wanted: what it will be made from, and the folder once it is taken."""

    wanted: Wanted
    origin: dict
    output: Output | None = None
    anew: bool = False
    """Whether what is there is thrown away."""

    @property
    def is_foreign(self) -> bool:
        """Whether SAELens's own trainer learns it, alone."""
        return self.wanted.settings.architecture.startswith(SAELENS)

    @property
    def state(self) -> Path:
        """Where the checkpoint lies when it is the first of those learned together."""
        return self.wanted.out / STATE_FILE

    def is_done(self, *, force: bool) -> bool:
        """Whether the finished dictionary is there."""
        return already_done(self.wanted.out / RECORD_FILE, self.origin, force=force)


def origin_of(cache: ActivationCache, wanted: Wanted, layer: int) -> dict:
    """What fixes a dictionary."""
    rows, held_out = (cache.rows(wanted.model, layer, split) for split in ("train", "scan"))
    inputs = {"held_out": held_out.fingerprint, "rows": rows.fingerprint, "model": wanted.model, "layer": str(layer)}
    return provenance(settings=wanted.settings, inputs=inputs)


def learn(
    cache: ActivationCache,
    todo: list[Part],
    every: list[Part],
    layer: int,
    log: Log,
    trackers: Collection[str],
    world: World,
) -> None:
    """Learn the dictionaries of `todo`, some of `every` one wanted, and store them in their folders."""
    together = todo if any(part.anew for part in todo) else _begun_together(todo, every)
    state = together[0].state
    if world.is_first:
        told = {part.wanted.out.name: asdict(part.wanted.settings) for part in together}
        kept = [tracker(kind, state.parent, state.parent.parent.name, told) for kind in dict.fromkeys(trackers)]
        for part in todo:
            (part.wanted.out / STABILITY_FILE).unlink(missing_ok=True)
            (part.wanted.out / RECORD_FILE).unlink(missing_ok=True)
            if part.anew and part.output:  # not before the trackers are there: one that cannot start costs nothing
                part.state.unlink(missing_ok=True)
                part.output.begun(part.origin)
        log = Together(jsonl_log(state.with_name(Path(LOG_FILE).name)), *kept, log)
    world.barrier()
    wanted = [part.wanted for part in together]
    sources = {one.model: cache.rows(one.model, layer, "train") for one in wanted}
    jobs = [Job(sources[one.model], one.settings, one.out.name if len(wanted) > 1 else "") for one in wanted]
    learned_by = _train_foreign if together[0].is_foreign else train
    learned = learned_by(jobs, world=world, log=log if world.is_first else None, checkpoint=state)
    if world.is_first:
        for part, trained in zip(together, learned, strict=True):
            if part in todo:
                _store(cache, part.wanted, part.origin, layer, trained, world)
        state.unlink()
    world.barrier()


def _begun_together(todo: list[Part], every: list[Part]) -> list[Part]:
    """The dictionaries whose common checkpoint was left by a run that was killed, if all of `todo` are in it.

    Some of them may be stored already: a kill between the first record and the last leaves the others to be stored.
    """
    for part in every:
        members = _members(part, every)
        if members and all(one in members for one in todo):
            return members
    return todo


def _members(first: Part, every: list[Part]) -> list[Part]:
    """The dictionaries of the run whose checkpoint lies in the first one's folder, if all of them are wanted."""
    if not first.state.is_file() or first.is_foreign:
        return []
    wanted = {json.dumps([part.origin["settings"], part.origin["inputs"]["rows"]]): part for part in every}
    run = read_facts(first.state).get("identity", {})
    members = zip(run.get("settings", ()), run.get("rows", ()), strict=False)
    found = [wanted.get(json.dumps([settings, rows])) for settings, rows in members]
    return found if found and found[0] is first and None not in found else []


def tidy_up(parts: list[Part]) -> None:
    """What a kill after the last record left in finished folders: the checkpoint, half a file."""
    for part in parts:
        tidy(part.wanted.out, FILES)
        with suppress(SteerError):
            if part.state.is_file() and (part.is_foreign or _members(part, parts)):
                with writing(part.wanted.out, FILES):
                    part.state.unlink(missing_ok=True)


def _train_foreign(jobs: list[Job], *, world: World, log: Log | None, checkpoint: Path) -> list[TrainedSAE]:
    """`train` for one dictionary of a SAELens architecture, by SAELens's own trainer."""
    from sae_steer.sae.saelens.training import parse_architecture, train_saelens

    (job,) = jobs
    if world.size > 1:
        raise InputError(f"SAELens trains in one process, not {world.size}; run without torchrun for {SAELENS} names")
    name, options = parse_architecture(job.settings.architecture)
    sae = train_saelens(job.rows, job.settings, name, options=options, world=world, log=log, checkpoint=checkpoint)
    steps = job.settings.rows // job.settings.batch_size
    return [TrainedSAE(sae=sae, settings=job.settings, steps=steps, rows=job.rows.fingerprint)]


def _store(cache: ActivationCache, one: Wanted, origin: dict, layer: int, trained: TrainedSAE, world: World) -> None:
    train, held_out = (_evaluated(cache, one.model, layer, trained.sae, split) for split in ("train", "scan"))
    record = {
        "provenance": origin,
        "model": one.model,
        "layer": layer,
        "hook": site(layer),
        "model_sha256": cache.manifest["models"][one.model]["sha256"],
        **_figures(train, held_out),
        "steps": trained.steps,
        "computed": capability().facts(world.precision, world.device.type),
    }
    save_sae(trained.sae, one.out, metadata={**record, "settings": asdict(one.settings)})
    firings = {"train": train.counted.firings.numpy(), "heldout": held_out.counted.firings.numpy()}
    write_table(one.out / FIRINGS_FILE, {"feature": np.arange(trained.settings.d_sae), **firings})
    write_json(one.out / RECORD_FILE, {**record, "files": hashes_of(one.out, [FIRINGS_FILE])})


@dataclass(frozen=True)
class Evaluated:
    """A dictionary's figures on one split."""

    counted: SAEMetrics
    """On the rows that count."""
    everything: SAEMetrics
    """On all rows, those left out among them."""
    onsets: SAEMetrics | None
    """At onsets of the model's own renderings."""
    left_out: LeftOut


def _evaluated(cache: ActivationCache, model: str, layer: int, sae: SparseDictionary, split: str) -> Evaluated:
    rows, labels = cache.rows(model, layer, split), cache.labels(split)
    at_onsets = labels["is_onset"].astype(bool) & np.isin(labels["text_variant"], cache.own_variants(model))
    groups = {"counted": rows.counts, "everything": None, **({"onsets": at_onsets} if at_onsets.any() else {})}
    found = evaluate_groups(sae, rows.in_order(), groups, World.local(precision="float32"))
    return Evaluated(found["counted"], found["everything"], found.get("onsets"), rows.selection.left_out)


def _figures(train: Evaluated, fresh: Evaluated) -> dict:
    """How well the dictionary explains the rows it learned from, and rows of tasks it never saw."""
    return {
        "final_fve": fresh.counted.fve,
        "final_l0": fresh.counted.l0,
        "dead_pct_train": 100 * train.counted.dead_share,
        "dead_pct_heldout": 100 * fresh.counted.dead_share,
        "heldout_rows": fresh.counted.rows,
        "train_rows": train.counted.rows,
        "density_heldout": asdict(fresh.counted.density),
        "fve_all_rows": fresh.everything.fve,
        "fve_onsets": fresh.onsets and fresh.onsets.fve,
        "onset_rows": fresh.onsets.rows if fresh.onsets else 0,
        "rows_left_out": {"train": train.left_out.record(), "heldout": fresh.left_out.record()},
    }
