"""A dictionary of one model's stream: learned from a cache, stored where the next command looks, checked on return."""

import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sae_steer.cache import ActivationCache, site
from sae_steer.capability import capability, decide
from sae_steer.errors import InputError
from sae_steer.files import read_facts, sha256, sweep
from sae_steer.model.lens import official_name
from sae_steer.pair.model_pair import NamedModel
from sae_steer.records import already_done, provenance, read_json, read_table, write_json, write_table
from sae_steer.row_filter import LeftOut
from sae_steer.sae.architectures import SparseDictionary, on_device
from sae_steer.sae.evaluation import SAEMetrics, evaluate_groups
from sae_steer.sae.log import Log, Quiet, Together, jsonl_log
from sae_steer.sae.origin import Origin
from sae_steer.sae.saelens.files import WEIGHTS_FILE, load_sae, read_metadata, save_sae
from sae_steer.sae.stability import MOST_FEATURES, SeedFolder, SeedStability, find_or_compare, load_stability
from sae_steer.sae.stability import RECORD_FILE as STABILITY_FILE
from sae_steer.sae.trackers import tracker
from sae_steer.sae.training import Job, TrainedSAE, train
from sae_steer.settings import AUTO, SAESettings
from sae_steer.world import World

RECORD_FILE, FIRINGS_FILE = "training.json", "firings.parquet"
SAELENS = "saelens:"
"""How architectures begin that SAELens's own trainer learns: `saelens:gated,l1_coefficient=2`."""


@dataclass(frozen=True)
class Dictionary:
    """A sparse autoencoder and the stream it was learned from."""

    sae: SparseDictionary
    model: str
    layer: int
    record: dict
    """Its figures on training and held-out rows, and its provenance."""
    sha256: str
    stability: SeedStability | None = None
    """Its features in dictionaries of other seeds, where it has been compared with some."""

    def to(self, device: torch.device) -> "Dictionary":
        """The same dictionary on `device`."""
        return replace(self, sae=on_device(self.sae, device))

    @property
    def name(self) -> str:
        """As folders and the released study call it."""
        return f"{self.model}_L{self.layer}_hook_resid_post"


def default_folder(model: str, layer: int, settings: SAESettings) -> str:
    """What a dictionary's folder is called: the released study's name, and what differs from the default settings."""
    usual = SAESettings()
    parts = [
        f"{letter}{getattr(settings, knob)}"
        for letter, knob in (("k", "k"), ("d", "d_sae"), ("s", "seed"))
        if getattr(settings, knob) != getattr(usual, knob)
    ]
    if settings.architecture != usual.architecture:
        parts.insert(0, re.sub(r"[^\w.=]+", "-", settings.architecture))
    return "_".join([f"{model}_L{layer}_hook_resid_post", *parts])


@dataclass(frozen=True)
class Wanted:
    """A dictionary to learn: of whose stream, how, and where it is stored."""

    model: str
    settings: SAESettings
    out: Path


def train_sae(
    cache: ActivationCache,
    *,
    model: str,
    layer: int,
    out: Path | str | None = None,
    settings: SAESettings | None = None,
    force: bool = False,
    log: Log | None = None,
    trackers: Collection[str] = (),
    world: World | None = None,
) -> Dictionary:
    """Learn a dictionary of `model`'s stream after block `layer`, or finish one begun in `out`.

    `out` (default: where the command line looks) becomes a SAELens folder with its `training.json` beside;
    `trackers` are `tensorboard` or `wandb`, told beside `log`.
    """
    settings = settings or SAESettings()
    out = Path(out or Path("runs", cache.manifest["pair"], "saes", default_folder(model, layer, settings)))
    wanted = [Wanted(model, settings, out)]
    return train_saes(cache, wanted, layer=layer, force=force, log=log, trackers=trackers, world=world)[0]


def train_saes(
    cache: ActivationCache,
    wanted: Sequence[Wanted],
    *,
    layer: int,
    force: bool = False,
    log: Log | None = None,
    trackers: Collection[str] = (),
    world: World | None = None,
) -> list[Dictionary]:
    """Learn several dictionaries over one reading of the cache; each ends as it would alone.

    Those that are finished are found again; the others are learned together, their checkpoint in the first's folder,
    at the precision at which they were begun.
    Those that differ in their seed alone are compared, and `seed_stability.json` stands beside each.
    """
    world = world or World.local(precision=wanted[0].settings.precision)
    wanted = _decided(wanted, world, force)
    origins = [_origin(cache, one, layer) for one in wanted]
    done = [
        already_done(one.out / RECORD_FILE, origin, force=force) for one, origin in zip(wanted, origins, strict=True)
    ]
    todo = [(one, origin) for one, origin, found in zip(wanted, origins, done, strict=True) if not found]
    own = [part for part in todo if not part[0].settings.architecture.startswith(SAELENS)]
    for together in (own, *([part] for part in todo if part not in own)):
        if together:
            here = world.at(together[0][0].settings.precision)
            _learn(cache, together, layer, force, log or Quiet(), trackers, here)
    if world.is_first:
        _compare_seeds(wanted)
    world.barrier()
    return [load_dictionary(one.out) for one in wanted]


def _decided(wanted: Sequence[Wanted], world: World, force: bool) -> list[Wanted]:
    """The same with a precision for `auto`: that at which each was made or all were begun, else this machine's."""
    begun = None if force else next(filter(None, map(_begun_precision, (one.out for one in wanted))), None)
    decided = []
    for one in wanted:
        asked = one.settings.precision if one.settings.precision != AUTO else world.wanted
        made = None if force else _made_precision(one.out)
        what = f"the dictionary in {one.out}"
        precision = decide(asked, world.device.type, begun=made or begun, what=what).precision
        decided.append(replace(one, settings=replace(one.settings, precision=precision)))
    return decided


def kept_precision(folder: Path) -> str | None:
    """The precision of the dictionary begun or finished in `folder`; None where there is none that says it."""
    return _begun_precision(folder) or _made_precision(folder)


def _begun_precision(folder: Path) -> str | None:
    state = _state_file(folder)
    if not state.is_file():
        return None
    settings = read_facts(state)["identity"]["settings"]
    return (settings[0] if isinstance(settings, list) else settings)["precision"]


def _made_precision(folder: Path) -> str | None:
    path = folder / RECORD_FILE
    record = read_json(path) if path.is_file() else None
    made = record.get("provenance") if isinstance(record, dict) else None
    return made["settings"].get("precision") if isinstance(made, dict) else None


def _state_file(folder: Path) -> Path:
    """Where the checkpoint of dictionaries learned together lies, from the first one's folder."""
    return folder / "training" / "state.safetensors"


def _compare_seeds(wanted: Sequence[Wanted]) -> None:
    """Leave the record of seed stability beside every dictionary that has siblings; the widest are too wide for it."""
    siblings: dict[tuple[str, SAESettings], dict[int, Path]] = {}
    for one in wanted:
        if one.settings.d_sae <= MOST_FEATURES:
            siblings.setdefault((one.model, replace(one.settings, seed=0)), {})[one.settings.seed] = one.out
    for folders in siblings.values():
        if len(folders) > 1:
            compared = [
                SeedFolder(path, seed, sha256(path / WEIGHTS_FILE), _alive(path)) for seed, path in folders.items()
            ]
            find_or_compare(compared, [load_sae(path) for path in folders.values()])


def _alive(folder: Path) -> np.ndarray | None:
    path = folder / FIRINGS_FILE
    return read_table(path)["heldout"] > 0 if path.is_file() else None


def _origin(cache: ActivationCache, wanted: Wanted, layer: int) -> dict:
    rows, held_out = (cache.rows(wanted.model, layer, split) for split in ("train", "scan"))
    inputs = {"held_out": held_out.fingerprint, "rows": rows.fingerprint, "model": wanted.model, "layer": str(layer)}
    return provenance(settings=wanted.settings, inputs=inputs)


def _learn(
    cache: ActivationCache, todo: list, layer: int, force: bool, log: Log, trackers: Collection[str], world: World
) -> None:
    first = todo[0][0].out
    state = _state_file(first)
    if world.is_first:
        sweep(state.parent)
        told = {one.out.name: asdict(one.settings) for one, _ in todo}
        kept = [tracker(kind, state.parent, first.name, told) for kind in dict.fromkeys(trackers)]
        if force:  # not before the trackers are there: one that cannot start costs nothing
            state.unlink(missing_ok=True)
        for one, _ in todo:
            (one.out / STABILITY_FILE).unlink(missing_ok=True)
            (one.out / RECORD_FILE).unlink(missing_ok=True)  # written last: a folder that has it is whole
        log = Together(jsonl_log(state.parent / "log.jsonl"), *kept, log)
    world.barrier()
    sources = {one.model: cache.rows(one.model, layer, "train") for one, _ in todo}
    jobs = [Job(sources[one.model], one.settings, one.out.name if len(todo) > 1 else "") for one, _ in todo]
    learn = _train_foreign if jobs[0].settings.architecture.startswith(SAELENS) else train
    learned = learn(jobs, world=world, log=log if world.is_first else None, checkpoint=state)
    if world.is_first:
        for (one, origin), trained in zip(todo, learned, strict=True):
            _store(cache, one, origin, layer, trained, world)
        state.unlink()
    world.barrier()


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
    write_json(one.out / RECORD_FILE, record)


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


def load_dictionary(folder: Path, *, model: NamedModel | None = None, layer: int | None = None) -> Dictionary:
    """The dictionary in a folder `train_sae` wrote, or in any SAELens folder.

    One made elsewhere does not say whose stream it reads: `model` and `layer` do, for those that do not say.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no dictionary in {folder}; run `sae-steer train-sae` first, or name one with --sae")
    sae, known = load_sae(folder).requires_grad_(False), read_metadata(folder)
    if {"model", "layer", "model_sha256"} <= known.keys():
        sae.origin.check_stream(known["layer"])
        weights = sha256(folder / WEIGHTS_FILE)
        return Dictionary(sae, known["model"], known["layer"], known, weights, load_stability(folder, weights))
    if model is None or layer is None:
        raise InputError(
            f"{folder} does not say which model and layer it was trained on; tell with --layer and the pair, "
            "or train one with `sae-steer train-sae`"
        )
    return adopt_dictionary(sae, model=model, layer=layer)


def adopt_dictionary(sae: SparseDictionary, *, model: NamedModel, layer: int) -> Dictionary:
    """A dictionary made elsewhere, taken as one of `model`'s stream after block `layer`."""
    origin = getattr(sae, "origin", Origin())
    origin.check_stream(layer)
    _check_model(origin, model)
    weights = sorted(sae.state_dict().items())
    parts = (part for name, weight in weights for part in (name.encode(), weight.float().cpu().numpy().tobytes()))
    record = {"model": model.name, "layer": layer, "model_sha256": model.sha256, "hook": site(layer), "adopted": True}
    return Dictionary(sae, model.name, layer, record, sha256(*parts))


def _check_model(origin: Origin, model: NamedModel) -> None:
    """Raise `InputError` if the dictionary and the model are both known to the public, by different names."""
    names = [name for name in (origin.model, model.published_as) if name]
    if len({name.rsplit("/", 1)[-1].lower() for name in names}) < 2:
        return
    stated, own = (official_name(name) for name in names)
    if None not in (stated, own) and stated != own:
        raise InputError(
            f"this dictionary says it was trained on {origin.model}, and model '{model.name}' is "
            f"{model.published_as}; give a dictionary of that model, or take model_name out of the metadata in its "
            "cfg.json to read another model with it all the same"
        )


def check_fits(dictionary: Dictionary, cache: ActivationCache) -> None:
    """Raise `InputError` unless the dictionary was trained on one of this cache's models, on a layer it holds."""
    models = cache.manifest["models"]
    if dictionary.model not in models:
        raise InputError(
            f"the dictionary {dictionary.name} is of model '{dictionary.model}', and this cache holds "
            f"{' and '.join(models)}; train one on this cache"
        )
    width = models[dictionary.model]["d_model"]
    if dictionary.sae.config.d_in != width:
        raise InputError(
            f"the dictionary {dictionary.name} reads {dictionary.sae.config.d_in} dimensions and model "
            f"'{dictionary.model}' has {width}; train one on this cache"
        )
    if dictionary.record["model_sha256"] != models[dictionary.model]["sha256"]:
        raise InputError(
            f"the dictionary {dictionary.name} was trained on another model called '{dictionary.model}'; "
            "train one on this cache"
        )
    if dictionary.layer not in cache.layers:
        raise InputError(
            f"the dictionary {dictionary.name} is of layer {dictionary.layer}, and this cache holds layers "
            f"{', '.join(map(str, cache.layers))}; cache that layer too"
        )
