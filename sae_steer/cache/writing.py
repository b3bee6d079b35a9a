"""Writing a cache: texts dealt to shards, both models run over them, each shard whole or not at all."""

import fcntl
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import torch

from sae_steer.cache.layout import DTYPES, FORMAT, LABELS, MANIFEST, MOMENTS, site
from sae_steer.cache.reading import ActivationCache
from sae_steer.errors import InputError, NotFiniteError, SteerError
from sae_steer.model.batching import length_batches, pad
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.texts import GeneratedTexts, Text, TextSource
from sae_steer.records import already_done, provenance, read_json, write_json
from sae_steer.runtime import Progress, World, replacing, sha256, silent, sweep
from sae_steer.settings import DEFAULT_LAYER, SPLITS, CacheSettings


def cache_activations(
    pair: ModelPair,
    *,
    out: Path | str,
    layers: Sequence[int] = (DEFAULT_LAYER,),
    settings: CacheSettings | None = None,
    source: TextSource | None = None,
    force: bool = False,
    on_rows: Progress = silent,
) -> "ActivationCache":
    """Store both models' streams after the blocks `layers` over the texts of `source` in `out`.

    A cache begun there is resumed, and one that is whole reused; one made otherwise is a `StaleError`.
    """
    settings, source, out = settings or CacheSettings(), source or GeneratedTexts(), Path(out)
    layers = tuple(sorted(set(layers)))
    _check(pair, layers, settings)
    wanted = provenance(
        settings={**asdict(settings), "layers": layers},
        inputs={"pair": pair.sha256, "texts": json.dumps(source.identity(), sort_keys=True)},
    )
    if already_done(out / MANIFEST, wanted, force=force) and read_json(out / MANIFEST)["complete"]:
        return ActivationCache.open(out)
    with _only_writer(out):
        begun = already_done(out / MANIFEST, wanted, force=force)  # again: another writer may have come first
        plan = list(_deal(pair, source, settings.rows_per_shard))
        _check_plan(plan)
        manifest = read_json(out / MANIFEST) if begun else _new_manifest(pair, layers, settings, source, wanted)
        if force:
            _clear(out, manifest)
        sweep(out)
        done, total = 0, sum(len(text) for _, texts in plan for text in texts)
        for number, (split, texts) in enumerate(plan):
            if number == len(manifest["shards"]):
                shard = _write_shard(out / f"shard-{number:05d}.h5", pair, layers, settings, split, texts)
                manifest["shards"].append(shard)
                write_json(out / MANIFEST, manifest)
            done += sum(map(len, texts))
            on_rows(done, total, f"{split} rows")
        write_json(out / MANIFEST, {**manifest, "complete": True})
    return ActivationCache.open(out)


def _check(pair: ModelPair, layers: tuple[int, ...], settings: CacheSettings) -> None:
    if settings.dtype not in DTYPES:
        raise InputError(f"cannot store activations as {settings.dtype!r}; choose {' or '.join(DTYPES)}")
    if not layers:
        raise InputError("no layer to cache; name one with --layer")
    for layer in layers:
        pair.check_layer(layer)
    for model in pair.models:
        if model.name in (*LABELS, MOMENTS):
            raise InputError(f"a model cannot be called '{model.name}', as one of the cache's data sets is; rename it")


def _new_manifest(
    pair: ModelPair, layers: tuple[int, ...], settings: CacheSettings, source: TextSource, wanted: dict
) -> dict:
    return {
        "format": FORMAT,
        "pair": pair.name,
        "models": {
            model.name: {"sha256": model.sha256, "d_model": model.decoder.shape.d_model} for model in pair.models
        },
        "tokenizer": pair.tokenizer.sha256,
        "layers": list(layers),
        "dtype": settings.dtype,
        "variants": list(source.variants),
        "provenance": wanted,
        "complete": False,
        "shards": [],
    }


def _clear(folder: Path, manifest: dict) -> None:
    """Begin anew: from here on `folder` holds an unfinished cache without shards, whatever was there before."""
    write_json(folder / MANIFEST, manifest)
    for shard in folder.glob("shard-*.h5"):
        shard.unlink()


def _deal(pair: ModelPair, source: TextSource, rows_per_shard: int) -> Iterator[tuple[str, list[Text]]]:
    """(split, texts) a shard: consecutive texts until the next would not fit."""
    for split in SPLITS:
        texts: list[Text] = []
        rows = 0
        for text in source.texts(pair, split):
            if texts and rows + len(text) > rows_per_shard:
                yield split, texts
                texts, rows = [], 0
            texts.append(text)
            rows += len(text)
        if texts:
            yield split, texts


def _check_plan(plan: list[tuple[str, list[Text]]]) -> None:
    if not plan:
        raise InputError("there are no texts to cache; ask for plans, or give a file with texts")
    if not any(text.is_onset.any() for _, texts in plan for text in texts):
        raise InputError("no text has an onset; the pair's [onset] tokens or regex match nothing in these texts")


def _write_shard(
    path: Path, pair: ModelPair, layers: tuple[int, ...], settings: CacheSettings, split: str, texts: list[Text]
) -> dict:
    """Run both models over `texts`, write the shard, and return its line of the manifest."""
    image = io.BytesIO()  # HDF5 that meets a full disk crashes the process; a file in memory cannot
    with h5py.File(image, "w") as file:
        for name, column in _label_columns(texts).items():
            file.create_dataset(name, data=column.astype(LABELS[name]))
        for model in pair.models:
            for layer, resid in _streams(model, layers, texts, settings).items():
                dataset = f"{model.name}/{site(layer)}"
                stored = _stored(resid, texts, model.name, layer, settings.dtype)
                file.create_dataset(dataset, data=stored)
                exact = stored.astype(np.float64)
                file.create_dataset(f"{MOMENTS}/{dataset}", data=np.stack([exact.sum(0), (exact**2).sum(0)]))
    with replacing(path) as scratch:
        scratch.write_bytes(image.getbuffer())
    return {
        "file": path.name,
        "split": split,
        "rows": sum(map(len, texts)),
        "texts": len(texts),
        "bytes": image.getbuffer().nbytes,
        "sha256": sha256(image.getvalue()),
    }


def _label_columns(texts: list[Text]) -> dict[str, np.ndarray]:
    def spread(name: str) -> np.ndarray:
        return np.concatenate([np.full(len(text), getattr(text, name)) for text in texts])

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(text, name) for text in texts])

    return {
        **{name: joined(name) for name in ("token", "is_onset", "step", "next_is_target", "true_p")},
        "prompt": spread("prompt"),
        "task": spread("task"),
        "text_variant": spread("variant"),
        "position": np.concatenate([np.arange(len(text)) for text in texts]),
    }


@torch.no_grad()
def _streams(
    model: NamedModel, layers: tuple[int, ...], texts: list[Text], settings: CacheSettings
) -> dict[int, np.ndarray]:
    """{layer: [row, d_model] float32} over the texts' rows, in order."""
    world = World.local(precision=settings.precision, device=str(model.decoder.device))
    starts = np.cumsum([0, *(len(text) for text in texts)])
    streams = {layer: np.empty((starts[-1], model.decoder.shape.d_model), dtype=np.float32) for layer in layers}
    for batch in length_batches([len(text) for text in texts], settings.tokens_per_batch):
        tokens = pad([texts[i].token.tolist() for i in batch], 0).to(world.device)
        with world.compute():
            found = model.decoder.resid_posts(tokens, layers)
        for layer, resid in found.items():
            values = resid.float().cpu().numpy()
            for row, i in enumerate(batch):
                streams[layer][starts[i] : starts[i + 1]] = values[row, : len(texts[i])]
    return streams


def _stored(resid: np.ndarray, texts: list[Text], model: str, layer: int, dtype: str) -> np.ndarray:
    """The rows as stored; a value the type cannot hold is a `NotFiniteError` that names its place."""
    with np.errstate(over="ignore"):  # told below, with the place
        stored = resid.astype(dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(axis=1))
    if not len(bad):
        return stored
    row = int(bad[0])
    starts = np.cumsum([0, *(len(text) for text in texts)])
    which = int(np.searchsorted(starts, row, side="right")) - 1
    raise NotFiniteError(
        f"model '{model}' has a value {dtype} cannot hold after block {layer}, prompt {texts[which].prompt}, "
        f"position {row - starts[which]}; use --dtype float32, or mend the model if it is not finite there either"
    )


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system drops when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise SteerError(f"cannot write {folder}: {error.strerror}; name a writable folder with --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SteerError(
                f"another process is writing the cache in {folder}; wait for it, or use another --out"
            ) from error
        yield
