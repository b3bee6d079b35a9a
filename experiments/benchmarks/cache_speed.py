"""Tokens a second of `cache_activations` against TransformerLens's `run_with_cache` and an h5py write.

Two random models of the 23M shape read the same generated plans (both renderings, their real lengths). Ours is one
whole call: texts, both models, labels, checksums, files. A peer gets the token ids for nothing, runs both models to
block 2 (`names_filter`, `stop_at_layer`), and writes the rows that are not padding as float16 into one contiguous
HDF5 data set a model. Its batches hold 16 texts, either in the texts' order or, as a careful user would,
sorted by length; its precision is its default, or bfloat16 autocast.

    python experiments/benchmarks/cache_speed.py            # cache_speed.json
"""

import json
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch
from cache_rows import random_pair

from sae_steer import cache_activations
from sae_steer.cache import ActivationCache, site
from sae_steer.files import write_text
from sae_steer.model.batching import pad
from sae_steer.model.lens import to_hooked_transformer
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import GeneratedTexts, Text
from sae_steer.records import commit
from sae_steer.settings import PRESETS, SPLITS, CacheSettings, CorpusSettings

LAYER = 2
TEXTS = GeneratedTexts(CorpusSettings(train_plans=104, scan_plans=16, tune_plans=8, confirm_plans=8))
REPEATS = 2
PEER_BATCH = 16


def ours(pair: ModelPair, folder: Path, precision: str) -> ActivationCache:
    """The whole command."""
    return cache_activations(
        pair, out=folder, layers=[LAYER], source=TEXTS, settings=CacheSettings(precision=precision), force=True
    )


def transformer_lens(models: list, texts: list[Text], path: Path, *, by_length: bool, autocast: bool) -> None:
    """What its user writes."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i])) if by_length else list(range(len(texts)))
    rows = sum(map(len, texts))
    name = site(LAYER)
    with h5py.File(path, "w") as file, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for number, model in enumerate(models):
            out = file.create_dataset(f"{number}/{name}", (rows, model.cfg.d_model), dtype="float16")
            done = 0
            for start in range(0, len(order), PEER_BATCH):
                chosen = [texts[i] for i in order[start : start + PEER_BATCH]]
                tokens = pad([text.token.tolist() for text in chosen], 0)
                _, cache = model.run_with_cache(tokens, names_filter=name, stop_at_layer=LAYER + 1, return_type=None)
                real = torch.arange(tokens.shape[1]) < torch.tensor([[len(text)] for text in chosen])
                values = cache[name][real].to(torch.float16).numpy()
                out[done : done + len(values)] = values
                done += len(values)


def seconds(run: Callable[[], object]) -> float:
    """The faster of two runs."""
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def errors(exact: ActivationCache, found: ActivationCache, model: str) -> dict:
    """How far the stored rows of `found` are from those of `exact`."""
    rows = [
        np.concatenate([part[:] for part in cache.rows(model, LAYER, "scan").maps]).astype(np.float64)
        for cache in (exact, found)
    ]
    away = rows[1] - rows[0]
    rms = np.sqrt((rows[0] ** 2).mean(axis=1, keepdims=True))
    return {
        "relative_frobenius": float(np.linalg.norm(away) / np.linalg.norm(rows[0])),
        "max_of_row_rms": float((np.abs(away) / rms).max()),
    }


def main() -> None:
    """Time every case and write the record."""
    pair = random_pair(PRESETS["interpgpt-23m"])
    hooked = [to_hooked_transformer(model.model) for model in pair.models]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = [text for split in SPLITS for text in TEXTS.texts(pair, split)]
        tokens = 2 * sum(map(len, texts))  # both models read them
        taken = {}
        for by_length in (False, True):
            for autocast in (False, True):
                case = f"{'sorted' if by_length else 'in_order'}_{'autocast' if autocast else 'float32'}"
                taken[f"transformer_lens_{case}"] = seconds(
                    lambda by_length=by_length, autocast=autocast: transformer_lens(
                        hooked, texts, folder / "peer.h5", by_length=by_length, autocast=autocast
                    )
                )
        ours(pair, folder / "warm", "bfloat16")  # from here on the process keeps what it frees
        for precision in ("bfloat16", "float32"):
            taken[f"ours_{precision}"] = seconds(lambda precision=precision: ours(pair, folder / precision, precision))
        exact = cache_activations(
            pair, out=folder / "exact", layers=[LAYER], source=TEXTS,
            settings=CacheSettings(precision="float32", dtype="float32"),
        )  # fmt: skip
        rough = cache_activations(
            pair, out=folder / "rough", layers=[LAYER], source=TEXTS,
            settings=CacheSettings(precision="bfloat16", dtype="float32"),
        )  # fmt: skip
        record = {
            "commit": commit(),
            "what": "caching the stream after block 2 of two 23M models, writes included",
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {name: version(name) for name in ("torch", "transformer-lens", "h5py")},
            "tokens": tokens,
            "mean_text": float(np.mean([len(text) for text in texts])),
            "seconds": taken,
            "tokens_per_second": {name: tokens / time_ for name, time_ in taken.items()},
            **{
                f"ratio_to_transformer_lens_{name.removeprefix('transformer_lens_')}": time_ / taken["ours_bfloat16"]
                for name, time_ in taken.items()
                if name.startswith("transformer_lens")
            },
            "ratio_to_transformer_lens_both_float32": taken["transformer_lens_sorted_float32"] / taken["ours_float32"],
            "bfloat16_error": {model.name: errors(exact, rough, model.name) for model in pair.models},
        }
    print(json.dumps(record, indent=1))
    write_text(Path(__file__).with_suffix(".json"), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
