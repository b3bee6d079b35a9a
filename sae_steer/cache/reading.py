"""A finished cache: labels and texts of a split, and the rows of a stream, with which of them count."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from sae_steer.arguments import checked
from sae_steer.cache.checking import damaged_shards, opened
from sae_steer.cache.layout import LABELS, MANIFEST, Manifest, site
from sae_steer.cache.norms import find_or_measure
from sae_steer.cache.rows import ActivationRows
from sae_steer.corpus import TargetTokens, count_first_tokens
from sae_steer.errors import InputError
from sae_steer.files import sha256
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.records import read_record
from sae_steer.row_filter import RowFilter, RowsThatCount


@dataclass(frozen=True)
class ActivationCache:
    """A finished cache. Rows of a split keep one order; labels and streams are read only when asked for."""

    folder: Path
    manifest: dict
    keep_special_tokens: bool = False
    """Whether the rows of special tokens, and rows far longer than the others, count like all others."""

    @classmethod
    @checked
    def open(
        cls, folder: Path, *, pair: ModelPair | None = None, keep_special_tokens: bool = False
    ) -> "ActivationCache":
        """The cache in `folder`; one that is missing, unfinished or short of a shard is an `InputError`.

        Args:
            pair: names the special tokens of a cache that was written before its manifest did.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"no activation cache in {folder}; run `sae-steer cache` first, or name one with --cache")
        manifest = read_record(folder / MANIFEST, Manifest, "write the cache again with --force")
        if not manifest["complete"]:
            raise InputError(f"the cache in {folder} is only half written; repeat `sae-steer cache`, it resumes")
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path} is missing or cut short; repeat `sae-steer cache`, which writes it anew")
        if "special_tokens" not in manifest and pair and pair.tokenizer.sha256 == manifest["tokenizer"]:
            manifest = {**manifest, "special_tokens": list(pair.special_tokens)}
        return cls(folder, manifest, keep_special_tokens)

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

    @property
    def row_filter(self) -> RowFilter:
        """Which rows count."""
        special = self.manifest.get("special_tokens")
        if special is None and not self.keep_special_tokens:
            raise InputError(
                f"the cache in {self.folder} was written before caches named their special tokens; open it with "
                "ActivationCache.open(folder, pair=...), or with keep_special_tokens=True"
            )
        return RowFilter(frozenset(special or ()), self.keep_special_tokens)

    def own_variants(self, model: str) -> tuple[int, ...]:
        """Numbers of the renderings whose onsets count for `model`: the one of its name, or all if none has it."""
        own = tuple(number for number, variant in enumerate(self.variants) if variant == model)
        return own or tuple(range(len(self.variants)))

    def own_texts(self, split: str, model: str) -> list[Text]:
        """The split's texts in the renderings that count for `model`."""
        own = self.own_variants(model)
        return [text for text in self.texts(split) if text.rendering in own]

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
        return self._columns(split, LABELS)

    def _columns(self, split: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
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
                rendering=int(labels["text_variant"][start]),
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
        """One model's stream after one block, over a split's rows, and which of them count."""
        if layer not in self.layers:
            raise InputError(
                f"the cache in {self.folder} holds layers {', '.join(map(str, self.layers))}, not {layer}; "
                f"write one with --layer {layer}"
            )
        if model not in self.manifest["models"]:
            raise InputError(f"the cache in {self.folder} holds {' and '.join(self.manifest['models'])}, not {model!r}")
        dataset = f"{model}/{site(layer)}"
        maps, norms, sums, squares = [], [], 0.0, 0.0
        for shard in self._shards(split):
            with opened(self.folder, self.manifest, shard) as file:
                maps.append(file.rows(model, layer))
                norms.append(file.norms(model, layer))
                moments = file.moments(model, layer)
            sums, squares = sums + moments[0], squares + moments[1]
        fixed = "/".join((*(shard["sha256"] for shard in self._shards(split)), dataset))
        chosen = self._that_count(split, find_or_measure(self.folder, fixed, norms, maps))
        fingerprint = sha256("/".join((fixed, *self._read_otherwise(chosen))).encode())
        return ActivationRows(tuple(maps), np.asarray(sums), np.asarray(squares), fingerprint, chosen)

    def _that_count(self, split: str, norms: np.ndarray) -> RowsThatCount:
        token, is_onset = self._columns(split, ("token", "is_onset")).values()
        return self.row_filter(token, is_onset.astype(bool), norms)

    def _read_otherwise(self, chosen: RowsThatCount) -> list[str]:
        """What sets the rows apart from a plain reading of the shards, which caches once had; nothing if nothing."""
        if self.keep_special_tokens:
            return ["typical scale"] if chosen.long.any() else []
        return [self.row_filter.identity]

    def _shards(self, split: str) -> list[dict]:
        found = [shard for shard in self.manifest["shards"] if shard["split"] == split]
        if not found:
            raise InputError(f"the cache in {self.folder} has no '{split}' rows; write it with texts for that split")
        return found
