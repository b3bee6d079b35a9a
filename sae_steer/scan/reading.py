"""Counting a dictionary's firings over a cache, in both models at the same positions."""

import numpy as np

from sae_steer.cache import ActivationCache
from sae_steer.dictionary import Dictionary, check_fits
from sae_steer.errors import InputError
from sae_steer.progress import Progress, silent
from sae_steer.scan.counting import FiringCounter
from sae_steer.scan.features import FeatureScan
from sae_steer.settings import ScanSettings


def scan_features(
    cache: ActivationCache,
    dictionary: Dictionary,
    *,
    settings: ScanSettings | None = None,
    split: str = "scan",
    on_rows: Progress = silent,
) -> FeatureScan:
    """Count the dictionary's firings over a split of the cache, in both models."""
    check_fits(dictionary, cache)
    target = dictionary.model
    reference = next(name for name in cache.manifest["models"] if name != target)
    _check_widths(cache, dictionary, reference)
    labels = cache.labels(split)
    onset, rendering = labels["is_onset"].astype(bool), labels["text_variant"].astype(np.int64)
    among = onset & np.isin(rendering, cache.own_variants(target))
    tasks, task = np.unique(labels["task"][among], return_inverse=True)
    if len(tasks) < 2:
        raise InputError(
            f"the '{split}' texts have onsets of {len(tasks)} tasks, and intervals over tasks need 2 or more; "
            "cache more texts, or check the pair's [onset]"
        )
    by_task = np.full(len(onset), -1)
    by_task[among] = task
    streams = {model: cache.rows(model, dictionary.layer, split) for model in (target, reference)}
    counted = streams[target].selection & streams[reference].selection
    cell, names = (
        np.where(counted.counts, rendering * 2 + ~onset, -1),
        [f"{v}/{place}" for v in cache.variants for place in ("onset", "elsewhere")],
    )
    counters = {}
    for done, model in enumerate((target, reference)):
        counters[model] = FiringCounter(dictionary.sae.config.d_sae, len(names), len(tasks))
        start = 0
        for resid in streams[model].in_order():
            here = slice(start, start + len(resid))
            counters[model].update(dictionary.sae, resid, cell[here], by_task[here])
            start = here.stop
            on_rows(done * len(cell) + start, 2 * len(cell), f"rows of {model}")
    sizes = np.bincount(cell[cell >= 0], minlength=len(names)).tolist()
    return FeatureScan(
        dictionary=dictionary.name,
        target=target,
        reference=reference,
        cells={f"{model}/{name}": size for model in counters for name, size in zip(names, sizes, strict=True)},
        hits={
            f"{model}/{name}": kept.hits[i].numpy() for model, kept in counters.items() for i, name in enumerate(names)
        },
        target_hits=counters[target].task_hits,
        reference_hits=counters[reference].task_hits,
        trials=np.bincount(task),
        settings=settings or ScanSettings(),
        record=dictionary.record,
        stability=dictionary.stability,
        left_out=counted.left_out,
    )


def _check_widths(cache: ActivationCache, dictionary: Dictionary, reference: str) -> None:
    ours, theirs = dictionary.sae.config.d_in, cache.manifest["models"][reference]["d_model"]
    if ours != theirs:
        raise InputError(
            f"a scan reads both models through one dictionary: {dictionary.name} reads {ours} dimensions, and model "
            f"'{reference}' has {theirs}; take a pair of one width"
        )
