"""A dictionary of one model's stream: learned from a cache, stored where the next command looks, checked on return."""

import json
import re
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch

from sae_steer import budget
from sae_steer.cache import ActivationCache, site
from sae_steer.capability import decide
from sae_steer.errors import InputError
from sae_steer.files import read_facts, sha256
from sae_steer.learning import FILES, FIRINGS_FILE, RECORD_FILE, STATE_FILE, Part, Wanted, learn, origin_of, tidy_up
from sae_steer.model.lens import official_name
from sae_steer.outputs import writing
from sae_steer.pair.model_pair import NamedModel
from sae_steer.records import read_json, read_table
from sae_steer.sae.architectures import SparseDictionary, on_device
from sae_steer.sae.log import Log, Quiet
from sae_steer.sae.origin import Origin
from sae_steer.sae.saelens.files import (
    CONFIG_FILE,
    config_of,
    identity,
    load_sae,
    read_metadata,
)
from sae_steer.sae.stability import MOST_FEATURES, SeedFolder, SeedStability, find_or_compare, load_stability
from sae_steer.settings import AUTO, SAESettings
from sae_steer.shapes import Count, Name, conform
from sae_steer.world import World

__all__ = ["Dictionary", "Wanted", "adopt_dictionary", "check_fits", "load_dictionary", "train_sae", "train_saes"]


class DictionaryFacts(TypedDict):
    """What a dictionary's cfg.json, and its training.json, must say of it."""

    model: Name
    layer: Count
    model_sha256: str
    final_fve: NotRequired[float | None]
    final_l0: NotRequired[float | None]
    dead_pct_train: NotRequired[float | None]
    dead_pct_heldout: NotRequired[float | None]


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
    parts = [Part(one, origin_of(cache, one, layer)) for one in wanted]
    shared, streams = wanted[0].settings, cache.manifest["models"]
    sizes = [(streams[one.model]["d_model"], one.settings.d_sae) for one in wanted]
    budget.dictionaries(sizes, shared.rows, shared.batch_size).check(world.device)
    with ExitStack() as held:
        if world.is_first and not all(part.is_done(force=force) for part in parts):
            for part in parts:
                part.output = held.enter_context(writing(part.wanted.out, FILES, force=force))
        world.barrier()
        for part in parts:
            part.anew = world.any(part.output is not None and part.output.starts_over(part.origin, force=force))
        todo = [part for part in parts if not part.is_done(force=part.anew)]
        own = [part for part in todo if not part.is_foreign]
        for todo_together in (own, *([part] for part in todo if part.is_foreign)):
            if todo_together:
                here = world.at(todo_together[0].wanted.settings.precision)
                learn(cache, todo_together, parts, layer, log or Quiet(), trackers, here)
        if world.is_first:
            if not todo:
                tidy_up(parts)
            _compare_seeds(wanted)
            for part in parts:
                if part.output:
                    part.output.ended(part.origin)
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
    state = folder / STATE_FILE
    if not state.is_file():
        return None
    settings = read_facts(state)["identity"]["settings"]
    return (settings[0] if isinstance(settings, list) else settings)["precision"]


def _made_precision(folder: Path) -> str | None:
    path = folder / RECORD_FILE
    record = read_json(path) if path.is_file() else None
    made = record.get("provenance") if isinstance(record, dict) else None
    return made["settings"].get("precision") if isinstance(made, dict) else None


def _compare_seeds(wanted: Sequence[Wanted]) -> None:
    """Leave the record of seed stability beside every dictionary that has siblings; the widest are too wide for it."""
    siblings: dict[tuple[str, SAESettings], dict[int, Path]] = {}
    for one in wanted:
        if one.settings.d_sae <= MOST_FEATURES:
            siblings.setdefault((one.model, replace(one.settings, seed=0)), {})[one.settings.seed] = one.out
    for folders in siblings.values():
        if len(folders) > 1:
            compared = [SeedFolder(path, seed, identity(path), _alive(path)) for seed, path in folders.items()]
            find_or_compare(compared, [load_sae(path) for path in folders.values()])


def _alive(folder: Path) -> np.ndarray | None:
    path = folder / FIRINGS_FILE
    return read_table(path, of=read_json(folder / RECORD_FILE))["heldout"] > 0 if path.is_file() else None


def load_dictionary(folder: Path, *, model: NamedModel | None = None, layer: int | None = None) -> Dictionary:
    """The dictionary in a folder `train_sae` wrote, or in any SAELens folder.

    One made elsewhere does not say whose stream it reads: `model` and `layer` do, for those that do not say.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no dictionary in {folder}; run `sae-steer train-sae` first, or name one with --sae")
    sae, known = load_sae(folder).requires_grad_(False), read_metadata(folder)
    if {"model", "layer", "model_sha256"} <= known.keys():
        conform(known, DictionaryFacts, f"metadata.sae_steer of {folder / CONFIG_FILE}")
        sae.origin.check_stream(known["layer"])
        own = identity(folder)
        return Dictionary(sae, known["model"], known["layer"], known, own, load_stability(folder, own))
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
    told = json.dumps(config_of(sae), sort_keys=True, default=str)
    return Dictionary(sae, model.name, layer, record, sha256(told.encode(), *parts))


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
