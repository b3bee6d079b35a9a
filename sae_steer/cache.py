"""Residual streams of both models over the same texts, in HDF5 shards that are written whole or not at all.

1. Texts are dealt to shards in order, one split a shard; a shard's rows are a function of its texts alone.
2. Within a shard texts run in batches of like length; padding is neither stored nor computed past a batch's longest.
3. A shard is written beside, synced and renamed; then the manifest, which lists the finished shards, likewise.
   A killed run therefore continues at the first shard the manifest lacks, and ends in the same bytes.
4. Datasets are contiguous and uncompressed, so rows are read through `numpy.memmap` at the dataset's offset.

One row = one token position, the same in both models. The only importer of h5py.
"""

import fcntl
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.corpus import TargetTokens, first_token_purity
from sae_steer.errors import InputError, NotFiniteError, SteerError
from sae_steer.model.training import pad
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.texts import GeneratedTexts, Text, TextSource
from sae_steer.records import already_done, provenance, read_json, write_json
from sae_steer.runtime import Progress, World, generator, replacing, sha256, silent, sweep
from sae_steer.settings import DEFAULT_LAYER, SPLITS, CacheSettings

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("float16", "float32")
LABELS = {
    "token": np.int32,
    "prompt": np.int32,
    "task": np.int32,
    "text_variant": np.uint8,
    "position": np.int32,
    "is_onset": np.uint8,
    "step": np.int32,
    "next_is_target": np.uint8,
    "true_p": np.float32,
}
MOMENTS = "moments"
BLOCK = 16
"""Neighbouring rows that a shuffled batch takes together: one read, and still 256 places of the corpus a batch."""


def site(layer: int) -> str:
    """The TransformerLens name of the residual stream after block `layer`."""
    return f"blocks.{layer}.hook_resid_post"


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


@dataclass(frozen=True)
class ActivationCache:
    """A finished cache. Rows of a split keep one order; labels and streams are read only when asked for."""

    folder: Path
    manifest: dict

    @classmethod
    def open(cls, folder: Path) -> "ActivationCache":
        """The cache in `folder`; one that is missing, unfinished or short of a shard is an `InputError`."""
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"no activation cache in {folder}; run `sae-steer cache` first, or name one with --cache")
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise InputError(
                f"{folder / MANIFEST} is no manifest of format {FORMAT}; write the cache again with --force"
            )
        if not manifest["complete"]:
            raise InputError(f"the cache in {folder} is only half written; repeat `sae-steer cache`, it resumes")
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path} is missing or cut short; write the cache again with --force")
        return cls(folder, manifest)

    @property
    def sha256(self) -> str:
        """The hash of the manifest, which holds those of the shards."""
        return sha256(self.folder / MANIFEST)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks after which the stream is stored."""
        return tuple(self.manifest["layers"])

    @property
    def variants(self) -> tuple[str, ...]:
        """The renderings the texts come in."""
        return tuple(self.manifest["variants"])

    def own_variants(self, model: str) -> tuple[int, ...]:
        """Numbers of the renderings whose onsets count for `model`: the one of its name, or all if none has it."""
        own = tuple(number for number, variant in enumerate(self.variants) if variant == model)
        return own or tuple(range(len(self.variants)))

    def own_texts(self, split: str, model: str) -> list[Text]:
        """The split's texts in the renderings that count for `model`."""
        own = self.own_variants(model)
        return [text for text in self.texts(split) if text.variant in own]

    def target_tokens(self, pair: ModelPair) -> TargetTokens:
        """The tokens whose probability is measured, counted over the train split in the target's rendering."""
        texts = (text.token.tolist() for text in self.own_texts("train", pair.target.name))
        return first_token_purity(texts, tokenizer=pair.tokenizer, rule=pair.onsets, phrases=pair.phrases)

    def check_pair(self, pair: ModelPair) -> None:
        """Raise `InputError` unless this cache was written from `pair`."""
        if self.manifest["provenance"]["inputs"]["pair"] != pair.sha256:
            raise InputError(
                f"the cache in {self.folder} was written from another pair than '{pair.name}'; "
                "write it again, or name the cache of this pair with --cache"
            )

    def verify(self) -> list[str]:
        """What is wrong with the shards, by their checksums; an empty list if nothing is."""
        return [
            f"{self.folder / shard['file']} does not have the checksum of the manifest"
            for shard in self.manifest["shards"]
            if sha256(self.folder / shard["file"]) != shard["sha256"]
        ]

    def labels(self, split: str) -> dict[str, np.ndarray]:
        """{name: [row]} every label of a split's rows."""
        columns: dict[str, list[np.ndarray]] = {name: [] for name in LABELS}
        for shard in self._shards(split):
            with self._open(shard) as file:
                for name, parts in columns.items():
                    parts.append(file[name][:])
        return {name: np.concatenate(parts) for name, parts in columns.items()}

    def texts(self, split: str) -> list[Text]:
        """The split's texts with their labels, in row order."""
        labels = self.labels(split)
        starts = np.flatnonzero(labels["position"] == 0)
        return [
            Text(
                prompt=int(labels["prompt"][start]),
                task=int(labels["task"][start]),
                variant=int(labels["text_variant"][start]),
                split=split,
                token=labels["token"][start:stop],
                is_onset=labels["is_onset"][start:stop].astype(bool),
                step=labels["step"][start:stop],
                next_is_target=labels["next_is_target"][start:stop].astype(bool),
                true_p=labels["true_p"][start:stop],
            )
            for start, stop in pairwise([*starts.tolist(), len(labels["position"])])
        ]

    def rows(self, model: str, layer: int, split: str) -> "ActivationRows":
        """One model's stream after one block, over a split's rows."""
        if layer not in self.layers:
            raise InputError(
                f"the cache in {self.folder} holds layers {', '.join(map(str, self.layers))}, not {layer}; "
                f"write one with --layer {layer}"
            )
        if model not in self.manifest["models"]:
            raise InputError(f"the cache in {self.folder} holds {' and '.join(self.manifest['models'])}, not {model!r}")
        dataset = f"{model}/{site(layer)}"
        maps, sums, squares = [], 0.0, 0.0
        for shard in self._shards(split):
            with self._open(shard) as file:
                stored = file[dataset]
                maps.append(
                    np.memmap(file.filename, stored.dtype, mode="r", offset=stored.id.get_offset(), shape=stored.shape)
                )
                moments = file[f"{MOMENTS}/{dataset}"][:]
            sums, squares = sums + moments[0], squares + moments[1]
        fixed = "/".join((*(shard["sha256"] for shard in self._shards(split)), dataset))
        return ActivationRows(tuple(maps), np.asarray(sums), np.asarray(squares), sha256(fixed.encode()))

    def _shards(self, split: str) -> list[dict]:
        found = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        if not found:
            raise InputError(f"the cache in {self.folder} has no '{split}' rows; write it with texts for that split")
        return found

    @contextmanager
    def _open(self, shard: dict) -> Iterator[h5py.File]:
        path = self.folder / shard["file"]
        try:
            with h5py.File(path, "r") as file:
                yield file
        except (OSError, KeyError, RuntimeError) as error:  # what h5py makes of damage, depending on where it is
            raise InputError(f"{path} is damaged; write the cache again with --force") from error


@dataclass(frozen=True)
class ActivationRows:
    """Rows of one stream: in order, or in shuffled batches whose whole state is the step."""

    maps: tuple[np.ndarray, ...]
    sums: Float[np.ndarray, " d_model"]
    squares: Float[np.ndarray, " d_model"]
    fingerprint: str

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.maps[0].shape[1]

    @cached_property
    def n_rows(self) -> int:
        """Rows in all."""
        return sum(len(part) for part in self.maps)

    @property
    def mean(self) -> Float[Tensor, " d_model"]:
        """The mean row."""
        return torch.from_numpy(self.sums / self.n_rows).float()

    @property
    def mean_square(self) -> float:
        """Mean squared distance of a row from the mean row."""
        return float((self.squares / self.n_rows - (self.sums / self.n_rows) ** 2).sum())

    def in_order(self, size: int = 8_192) -> Iterator[Float[Tensor, "row d_model"]]:
        """Every row, float32, in chunks."""
        for part in self.maps:
            for start in range(0, len(part), size):
                yield torch.from_numpy(part[start : start + size].astype(np.float32))

    def take(self, rows: np.ndarray) -> Float[Tensor, "row d_model"]:
        """The rows of these numbers (rising), float32."""
        ends = np.cumsum([len(part) for part in self.maps])
        starts = ends - [len(part) for part in self.maps]
        inside = [rows[(rows >= start) & (rows < end)] - start for start, end in zip(starts, ends, strict=True)]
        chosen = [part[chosen] for part, chosen in zip(self.maps, inside, strict=True)]
        return torch.from_numpy(np.concatenate(chosen).astype(np.float32))

    def batch(self, step: int, batch_size: int, seed: int) -> Float[Tensor, "batch d_model"]:
        """Batch `step` of a seeded shuffle of all blocks of rows, a new one every epoch.

        Left out are a shard's last rows that fill no block, and of each epoch the blocks that fill no batch.
        """
        per_batch = batch_size // BLOCK
        if batch_size % BLOCK or not 0 < per_batch <= len(self._blocks):
            raise InputError(
                f"a batch of {batch_size} rows cannot be cut from {self.n_rows} rows in blocks of {BLOCK}; "
                "choose a smaller multiple of it, or cache more texts"
            )
        epoch, within = divmod(step, len(self._blocks) // per_batch)
        chosen = self._order(seed, epoch)[within * per_batch : (within + 1) * per_batch]
        batch = np.empty((batch_size, self.d_in), dtype=np.float32)
        for slot, (part, start) in enumerate(self._blocks[chosen]):
            batch[slot * BLOCK : (slot + 1) * BLOCK] = self.maps[part][start : start + BLOCK]
        return torch.from_numpy(batch)

    @cached_property
    def _blocks(self) -> np.ndarray:
        """[block, 2] the shard and first row of every whole block."""
        return np.array(
            [(part, start) for part, rows in enumerate(self.maps) for start in range(0, len(rows) - BLOCK + 1, BLOCK)]
        )

    @cached_property
    def _orders(self) -> dict[tuple[int, int], np.ndarray]:
        return {}

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        if (seed, epoch) not in self._orders:
            self._orders.clear()
            self._orders[seed, epoch] = torch.randperm(len(self._blocks), generator=generator(seed, epoch, 3)).numpy()
        return self._orders[seed, epoch]


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


def length_batches(lengths: list[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices of texts of like length, about `tokens_per_batch` tokens a batch with padding counted."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


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
