"""A finished cache: labels and texts of a split, and rows of a stream in order or in shuffled batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.cache.checking import damaged_shards, opened
from sae_steer.cache.layout import BLOCK, FORMAT, LABELS, MANIFEST, site
from sae_steer.cache.shuffle import Shuffle
from sae_steer.cache.storage import decoded
from sae_steer.cache.stored import StoredRows
from sae_steer.corpus import TargetTokens, count_first_tokens
from sae_steer.errors import InputError
from sae_steer.files import sha256
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.randomness import generator
from sae_steer.records import read_json


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
                raise InputError(f"{path} is missing or cut short; repeat `sae-steer cache`, which writes it anew")
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
        texts = ((text.token, text) for text in self.own_texts("train", pair.target.name))
        return count_first_tokens(texts, tokenizer=pair.tokenizer, phrases=pair.phrases)

    def check_pair(self, pair: ModelPair) -> None:
        """Raise `InputError` unless this cache was written from `pair`."""
        if self.manifest["provenance"]["inputs"]["pair"] == pair.sha256:
            return
        stored, own = self.manifest["models"], {model.name: model.sha256 for model in pair.models}
        other = [f"model '{name}'" for name in own if stored.get(name, {}).get("sha256") != own[name]]
        other += ["tokenizer"] * (self.manifest["tokenizer"] != pair.tokenizer.sha256)
        raise InputError(
            f"the cache in {self.folder} was written from another pair than '{pair.name}' (another "
            f"{', '.join(other) or 'onset rule, target or context'}); "
            "write it again, or name the cache of this pair with --cache"
        )

    def verify(self) -> list[str]:
        """What is wrong with the shards, by their checksums and what they say of themselves, one line each."""
        return [wrong for wrong in damaged_shards(self.folder, self.manifest, self.manifest["shards"]) if wrong]

    def labels(self, split: str) -> dict[str, np.ndarray]:
        """{name: [row]} every label of a split's rows."""
        columns: dict[str, list[np.ndarray]] = {name: [] for name in LABELS}
        for shard in self._shards(split):
            with opened(self.folder, self.manifest, shard) as file:
                for name, parts in columns.items():
                    parts.append(file.label(name))
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
            with opened(self.folder, self.manifest, shard) as file:
                maps.append(file.rows(model, layer))
                moments = file.moments(model, layer)
            sums, squares = sums + moments[0], squares + moments[1]
        fixed = "/".join((*(shard["sha256"] for shard in self._shards(split)), dataset))
        return ActivationRows(tuple(maps), np.asarray(sums), np.asarray(squares), sha256(fixed.encode()))

    def _shards(self, split: str) -> list[dict]:
        found = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        if not found:
            raise InputError(f"the cache in {self.folder} has no '{split}' rows; write it with texts for that split")
        return found


@dataclass(frozen=True)
class ActivationRows:
    """Rows of one stream: in order, or in shuffled batches whose whole state is the step."""

    maps: tuple[StoredRows, ...]
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
                yield torch.from_numpy(decoded(part[start : start + size]))

    def take(self, rows: np.ndarray) -> Float[Tensor, "row d_model"]:
        """The rows of these numbers (rising), float32."""
        ends = np.cumsum([len(part) for part in self.maps])
        starts = ends - [len(part) for part in self.maps]
        inside = [rows[(rows >= start) & (rows < end)] - start for start, end in zip(starts, ends, strict=True)]
        chosen = [part[chosen] for part, chosen in zip(self.maps, inside, strict=True)]
        return torch.from_numpy(decoded(np.concatenate(chosen)))

    def batch(self, step: int, batch_size: int, seed: int) -> Float[Tensor, "batch d_model"]:
        """Batch `step` of a seeded shuffle of all blocks of rows, a new one every epoch.

        Left out are a shard's last rows that fill no block, and of each epoch the blocks that fill no batch.
        """
        per_batch, n_blocks = batch_size // BLOCK, int(self._block_ends[-1])
        if batch_size % BLOCK or not 0 < per_batch <= n_blocks:
            raise InputError(
                f"a batch of {batch_size} rows cannot be cut from {self.n_rows} rows in blocks of {BLOCK}; "
                "choose a smaller multiple of it, or cache more texts"
            )
        epoch, within = divmod(step, n_blocks // per_batch)
        key = torch.randint(2**62, (), generator=generator(seed, epoch, 3)).item()
        blocks = Shuffle(n_blocks, key)(np.arange(within * per_batch, (within + 1) * per_batch))
        parts = np.searchsorted(self._block_ends, blocks, side="right")
        starts = (blocks - np.concatenate([[0], self._block_ends])[parts]) * BLOCK
        batch = np.empty((batch_size, self.d_in), dtype=self.maps[0].dtype)
        for slot, (part, start) in enumerate(zip(parts.tolist(), starts.tolist(), strict=True)):
            self.maps[part].read_into(batch[slot * BLOCK : (slot + 1) * BLOCK], start)
        return torch.from_numpy(decoded(batch))

    @cached_property
    def _block_ends(self) -> np.ndarray:
        """Whole blocks in the shards up to each."""
        return np.cumsum([len(part) // BLOCK for part in self.maps])
