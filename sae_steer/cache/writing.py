"""Writing a cache: texts dealt to shards, both models run over them, each shard whole or not at all.

1. The first process takes the folder's lock and writes a manifest without shards, or finds the one of a run before.
2. The shards that are missing are dealt to the processes. Each runs the models over the next shard's texts while a
   thread writes the one before.
3. When all are there, the first process lists them in the manifest.
"""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from sae_steer import budget
from sae_steer.cache.checking import damaged_shards
from sae_steer.cache.dealing import ShardTexts, deal_texts, rows_that_fit
from sae_steer.cache.layout import FORMAT, LABELS, MANIFEST, MOMENTS, NORMS, Manifest, origin
from sae_steer.cache.reading import ActivationCache
from sae_steer.cache.shard import finished_shards, write_shard
from sae_steer.cache.storage import AUTO, DTYPES, narrowest
from sae_steer.capability import capability, decide
from sae_steer.errors import InputError, StaleError
from sae_steer.model.rows import real_rows
from sae_steer.model.streams import stream_reader
from sae_steer.outputs import Output, is_ours, writing
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.texts import GeneratedTexts, Text, TextSource
from sae_steer.progress import Progress, silent
from sae_steer.records import already_done, provenance, read_json, read_record, write_json
from sae_steer.settings import DEFAULT_LAYER, CacheSettings
from sae_steer.world import World, keep_freed_memory

ON_GPU = 32
"""How many times the settings' batch a GPU reads at once."""
MOST_VARIANTS = 256
"""Renderings that the labels number, one byte each."""
SHARD_NAME = re.compile(r"shard-\d{5}\.(h5|json)")
TRIED = 64
"""Texts at most on which `dtype="auto"` is decided."""


def cache_activations(
    pair: ModelPair,
    *,
    out: Path | str,
    layers: Sequence[int] = (DEFAULT_LAYER,),
    settings: CacheSettings | None = None,
    source: TextSource | None = None,
    force: bool = False,
    on_rows: Progress = silent,
    world: World | None = None,
) -> ActivationCache:
    """Store both models' streams after the blocks `layers` over the texts of `source` in `out`.

    A cache begun there is resumed at the precision it was begun at, and one that is whole reused; one made otherwise
    is a `StaleError`, and so is a half made one whose other half this machine would compute to other last bits.

    Args:
        world: the processes that share the work, each with the same arguments, and the device the models are moved
            to; by default this process alone, and the models stay where they are.
    """
    settings, source, out = settings or CacheSettings(), source or GeneratedTexts(), Path(out)
    if len(source.variants) > MOST_VARIANTS:
        raise InputError(f"the texts come in {len(source.variants)} renderings, and a cache numbers {MOST_VARIANTS}")
    layers = tuple(sorted(set(layers)))
    _check(pair, layers, settings)
    if isinstance(source, GeneratedTexts):
        each = 2 * sum(model.model.shape.d_model for model in pair.models) * len(layers)
        budget.streams(source.count, each).check(torch.device("cpu"), out)
    if settings.rows_per_shard is None:
        begun = None if force else _rows_begun(out)
        settings = replace(settings, rows_per_shard=begun or rows_that_fit(_width(pair) * len(layers)))
    if world:
        for model in pair.models:
            model.model.to(world.device)
    world = world or World.local(device="cpu")
    keep_freed_memory()
    device = pair.target.model.device.type
    begun = None if force else begun_precision(out)
    decision = decide(settings.precision, device, begun=begun, what=f"the cache in {out}")
    settings = replace(settings, precision=decision.precision)
    wanted = provenance(
        settings={**asdict(settings), "layers": layers},
        inputs={"pair": pair.sha256, "texts": json.dumps(source.identity(), sort_keys=True)},
    )
    if world.any(world.is_first and _is_whole(out, _begun(out, wanted, force=force))):
        return ActivationCache.open(out, pair=pair)
    with writing(out) if world.is_first else nullcontext() as output:
        shards = deal_texts(pair, source, settings.rows_per_shard)
        if output:

            def begin() -> dict:
                dtype = _type_for(shards, pair, layers, settings) if settings.dtype == AUTO else settings.dtype
                manifest = _new_manifest(pair, layers, dtype, source, wanted)
                if cut := sum(text.cut > 0 for shard in shards for text in shard.texts):
                    manifest["texts_cut"] = cut
                return {**manifest, "computed": capability().facts(settings.precision, device)}

            _prepare(output, shards, wanted, begin, force)
        world.barrier()
        manifest = read_record(out / MANIFEST, Manifest)
        done = finished_shards(out, manifest, shards)
        world.barrier()  # nobody writes before all have seen what is missing
        missing = [shard for shard in shards if shard.file not in done]
        mine = [missing[i] for i in world.share(len(missing))]
        settings = replace(settings, precision=manifest["provenance"]["settings"]["precision"])  # the first process's
        if mine:
            _check_machine(out, manifest, settings.precision, device)
        _write_shards(out, mine, pair, layers, settings, manifest, _telling(out, shards, done, on_rows, world))
        world.barrier()
        if output:
            _finish(out, manifest, shards)
            output.ended(wanted)
        world.barrier()  # the others open what the first has listed
    return ActivationCache.open(out, pair=pair)


def begun_precision(out: Path) -> str | None:
    """The precision of the cache in `out`, whole or not; None where not a shard is finished."""
    manifest = _left(Path(out))
    made = manifest.get("provenance") if isinstance(manifest, dict) else None
    return made["settings"].get("precision") if isinstance(made, dict) else None


def _check_machine(out: Path, manifest: dict, precision: str, device: str) -> None:
    """Raise a `StaleError` if this machine's products differ in their last bits from those of the shards there."""
    first, here = manifest.get("computed", {}).get("instructions"), capability().products(precision, device)
    if first not in (None, here):
        raise StaleError(
            f"the cache in {out} was begun with {precision} products on {first}, and this machine's ({here}) differ in "
            "their last bits; finish it on a machine like the first, choose another --out, or --force to begin anew"
        )


def _check(pair: ModelPair, layers: tuple[int, ...], settings: CacheSettings) -> None:
    if settings.dtype not in (*DTYPES, AUTO):
        raise InputError(f"cannot store activations as {settings.dtype!r}; choose {', '.join(DTYPES)} or {AUTO}")
    if not layers:
        raise InputError("no layer to cache; name one with --layer")
    for layer in layers:
        pair.check_layer(layer)
    for model in pair.models:
        if model.name in (*LABELS, MOMENTS, NORMS):
            raise InputError(f"a model cannot be called '{model.name}', as one of the cache's data sets is; rename it")


def _width(pair: ModelPair) -> int:
    return sum(model.model.shape.d_model for model in pair.models)


def _rows_begun(out: Path) -> int | None:
    """The rows a shard of the cache in `out` holds, which goes on as it began; None where there is none."""
    manifest = read_json(out / MANIFEST) if (out / MANIFEST).is_file() else None
    settings = manifest.get("provenance", {}).get("settings", {}) if isinstance(manifest, dict) else {}
    return settings.get("rows_per_shard")


def _new_manifest(pair: ModelPair, layers: tuple[int, ...], dtype: str, source: TextSource, wanted: dict) -> dict:
    return {
        "format": FORMAT,
        "pair": pair.name,
        "models": {
            model.name: {"sha256": model.sha256, "d_model": model.model.shape.d_model, **model.names_read}
            for model in pair.models
        },
        "tokenizer": pair.tokenizer.sha256,
        "special_tokens": list(pair.special_tokens),
        "layers": list(layers),
        "dtype": dtype,
        "variants": list(source.variants),
        "provenance": wanted,
        "complete": False,
        "shards": [],
    }


def _type_for(shards: Sequence[ShardTexts], pair: ModelPair, layers: tuple[int, ...], settings: CacheSettings) -> str:
    """The narrowest type that holds both models' streams over some texts from all over the cache."""
    texts = [text for shard in shards for text in shard.texts]
    some = texts[:: -(-len(texts) // TRIED)]
    return narrowest(rows for model in pair.models for rows in _streams(model, layers, some, settings).values())


def _begun(out: Path, wanted: dict, *, force: bool) -> dict | None:
    """The manifest of a cache in `out` with these inputs, finished or not.

    One made otherwise is a `StaleError`, unless `force` or not a single shard of it is there.
    """
    if force or _left(out) is None:
        return None
    already_done(out / MANIFEST, wanted)
    return read_record(out / MANIFEST, Manifest)


def _left(out: Path) -> dict | None:
    """The manifest in `out`, if a shard of it is finished."""
    path = out / MANIFEST
    manifest = read_json(path) if path.is_file() else None
    finished = any(record.with_suffix(".h5").is_file() for record in out.glob("shard-*.json"))
    if isinstance(manifest, dict) and manifest.get("shards") == [] and not finished:
        return None
    return manifest


def _is_whole(out: Path, manifest: dict | None) -> bool:
    return bool(manifest) and manifest["complete"] and not any(damaged_shards(out, manifest, manifest["shards"]))


def _prepare(
    output: Output, shards: Sequence[ShardTexts], wanted: dict, begin: Callable[[], dict], force: bool
) -> None:
    """Take the folder for these shards: go on with the cache begun there, or begin one with the manifest of `begin`."""
    out, before = output.folder, output.made("shard-*")
    anew = output.starts_over(wanted, force=force)
    if before and not force and not (out / MANIFEST).is_file():
        raise InputError(f"{out} has shards and no {MANIFEST}; put it back, or write them anew with --force")
    if is_ours(out / MANIFEST) and not output.made(MANIFEST):  # of a version that left no list
        output.claim([MANIFEST, *(path.name for path in out.glob("shard-*.*") if SHARD_NAME.fullmatch(path.name))])
        before = output.made("shard-*")
    output.claim([MANIFEST, *(shard.file for shard in shards), *(shard.record for shard in shards)], force=force)
    if _begun(out, wanted, force=anew):
        return
    manifest = begin()
    for record in before:  # records first: the new manifest must not find them
        if record.suffix == ".json":
            record.unlink()
    write_json(out / MANIFEST, manifest)
    for shard in before:
        shard.unlink(missing_ok=True)
    if anew:
        output.begun(wanted)


def _write_shards(
    out: Path,
    shards: Sequence[ShardTexts],
    pair: ModelPair,
    layers: tuple[int, ...],
    settings: CacheSettings,
    manifest: dict,
    tell: Callable[[ShardTexts], None],
) -> None:
    """The models run over one shard's texts while a thread writes the shard before; two are in memory at most."""
    written: tuple[ShardTexts, Future] | None = None

    def settle() -> None:
        if written:
            written[1].result()
            tell(written[0])

    with ThreadPoolExecutor(1) as writer:
        for shard in shards:
            streams = {model.name: _streams(model, layers, shard.texts, settings) for model in pair.models}
            settle()
            made = {"dtype": manifest["dtype"], "origin": origin(manifest)}
            written = shard, writer.submit(write_shard, out, shard, streams, **made)
        settle()


def _telling(
    out: Path, shards: Sequence[ShardTexts], done: dict, on_rows: Progress, world: World
) -> Callable[[ShardTexts], None]:
    """Tells `on_rows` what all processes together have finished; only the first process speaks."""
    total = sum(shard.rows for shard in shards)

    def tell(last: ShardTexts) -> None:
        if world.is_first:
            there = (shard.rows for shard in shards if shard.file in done or (out / shard.record).is_file())
            on_rows(sum(there), total, f"{last.split} rows")

    if done:
        tell(shards[0])
    return tell


def _finish(out: Path, manifest: dict, shards: Sequence[ShardTexts]) -> None:
    done = finished_shards(out, manifest, shards)
    whole = {**manifest, "shards": [done[shard.file] for shard in shards]}
    write_json(out / MANIFEST, {**whole, "complete": False})
    for shard in shards:
        (out / shard.record).unlink(missing_ok=True)
    write_json(out / MANIFEST, {**whole, "complete": True})


def _streams(
    model: NamedModel, layers: tuple[int, ...], texts: Sequence[Text], settings: CacheSettings
) -> dict[int, np.ndarray]:
    """{layer: [row, d_model] float32} over the texts' rows, in order."""
    world = World.local(precision=settings.precision, device=str(model.model.device))
    read = stream_reader(model.model, layers, world)
    together = settings.tokens_per_batch * (1 if world.device.type == "cpu" else ON_GPU)
    return real_rows([text.token for text in texts], read, each=model.model.each, tokens_per_batch=together)
