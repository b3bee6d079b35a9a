"""Tokens a second of `cache_activations` against TransformerLens's `run_with_cache` and an h5py write.

Two random models of the 23M shape read the same generated plans (both renderings, their real lengths). Ours is one
whole call: texts, both models, labels, checksums, files. A peer gets the token ids for nothing, runs both models to
block 2 (`names_filter`, `stop_at_layer`), and writes the rows that are not padding as float16 into one contiguous
HDF5 data set a model. Its batches hold 16 texts, either in the texts' order or, as a careful user would,
sorted by length; its precision is its default, or bfloat16 autocast. Where bfloat16 is emulated only two texts are
run in it.

    python experiments/benchmarks/cache_speed.py            # cache_speed.json
    python experiments/benchmarks/cache_speed.py --isa avx2 # cache_speed_avx2.json
"""

import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch
from cache_rows import random_pair
from isa import as_asked, machine, record_path

from sae_steer import cache_activations
from sae_steer.cache import ActivationCache, site
from sae_steer.capability import capability
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


def rounding(pair: ModelPair, folder: Path) -> dict:
    """How far rows computed in bfloat16 are from those computed in float32, by model."""
    exact, rough = (
        cache_activations(
            pair, out=folder / name, layers=[LAYER], source=TEXTS,
            settings=CacheSettings(precision=precision, dtype="float32"),
        )
        for name, precision in (("exact", "float32"), ("rough", "bfloat16"))
    )  # fmt: skip
    return {model.name: errors(exact, rough, model.name) for model in pair.models}


def main() -> None:
    """Time every case and write the record."""
    pair = random_pair(PRESETS["interpgpt-23m"])
    hooked = [to_hooked_transformer(model.model) for model in pair.models]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        texts = [text for split in SPLITS for text in TEXTS.texts(pair, split)]
        tokens = 2 * sum(map(len, texts))  # both models read them
        taken, one_batch = {}, {}
        precisions = ("float32", "bfloat16") if capability().bfloat16 else ("float32",)
        for autocast in (False, True):  # where bfloat16 is emulated a batch tells, and the whole would take an hour
            one_batch["bfloat16" if autocast else "float32"] = seconds(
                lambda autocast=autocast: transformer_lens(
                    hooked, texts[:2], folder / "peer.h5", by_length=False, autocast=autocast
                )
            )
        for by_length in (False, True):
            for autocast in [precision == "bfloat16" for precision in precisions]:
                case = f"{'sorted' if by_length else 'in_order'}_{'autocast' if autocast else 'float32'}"
                taken[f"transformer_lens_{case}"] = seconds(
                    lambda by_length=by_length, autocast=autocast: transformer_lens(
                        hooked, texts, folder / "peer.h5", by_length=by_length, autocast=autocast
                    )
                )
        ours(pair, folder / "warm", precisions[-1])  # from here on the process keeps what it frees
        for precision in precisions:
            taken[f"ours_{precision}"] = seconds(lambda precision=precision: ours(pair, folder / precision, precision))
        best = min(taken[f"ours_{precision}"] for precision in precisions)
        record = {
            "commit": commit(),
            "what": "caching the stream after block 2 of two 23M models, writes included",
            "machine": machine(),
            "versions": {name: version(name) for name in ("torch", "transformer-lens", "h5py")},
            "tokens": tokens,
            "mean_text": float(np.mean([len(text) for text in texts])),
            "seconds": taken,
            "tokens_per_second": {name: tokens / time_ for name, time_ in taken.items()},
            **{
                f"ratio_to_transformer_lens_{name.removeprefix('transformer_lens_')}": time_ / best
                for name, time_ in taken.items()
                if name.startswith("transformer_lens")
            },
            "ratio_to_transformer_lens_both_float32": taken["transformer_lens_sorted_float32"] / taken["ours_float32"],
            "ratio_to_transformer_lens_in_order_each_at_its_faster": min(
                time_ for name, time_ in taken.items() if name.startswith("transformer_lens_in_order")
            )
            / best,
            "transformer_lens_seconds_of_two_texts": one_batch,
            **({} if precisions == ("float32",) else {"bfloat16_error": rounding(pair, folder)}),
        }
    print(json.dumps(record, indent=1))
    write_text(record_path(__file__), json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    as_asked()
    main()
