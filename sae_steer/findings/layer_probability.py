"""P(target) at step onsets after every block, in both models: where in depth the behaviour is decided.

The stream after each block is read through the final norm and the unembedding (the logit lens,
nostalgebraist 2020); after the last block that is the model's own output. Intervals resample tasks.
"""

from collections.abc import Mapping
from itertools import product

import numpy as np
import torch
from jaxtyping import Float

from sae_steer import stats
from sae_steer.cache import ActivationCache
from sae_steer.errors import InputError
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.readout import target_mass
from sae_steer.model.rows import padded
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress, silent
from sae_steer.records import provenance
from sae_steer.settings import LayersSettings

RECORD_FILE = "layers.json"


def layers_provenance(pair: ModelPair, cache: ActivationCache, settings: LayersSettings) -> dict:
    """What fixes the curves."""
    return provenance(settings=settings, inputs={"pair": pair.sha256, "cache": cache.sha256})


def layer_probability(
    pair: ModelPair,
    cache: ActivationCache,
    *,
    settings: LayersSettings | None = None,
    on_step: Progress = silent,
) -> Mapping:
    """A curve over the layers for each model on each rendering of the confirm split's texts."""
    settings = settings or LayersSettings()
    cache.check_pair(pair)
    tokens = cache.target_tokens(pair)
    texts = cache.texts("confirm")
    readings = list(product(pair.models, enumerate(cache.variants)))
    curves = []
    for done, (model, (variant, rendering)) in enumerate(readings):
        on_step(done, len(readings), f"{model.name} on {rendering} texts")
        chosen = [text for text in texts if text.rendering == variant and text.is_onset.any()][: settings.prompts]
        if chosen:
            _check_tasks(chosen, rendering)
            curve = _curve(model.model, chosen, tokens.ids, settings)
            curves.append({"model": model.name, "rendering": rendering, **curve})
    on_step(len(readings), len(readings), "measured")
    return {
        "provenance": layers_provenance(pair, cache, settings),
        "pair": pair.name,
        "target_tokens": tokens.described(pair.tokenizer),
        "curves": curves,
    }


def _check_tasks(texts: list[Text], rendering: str) -> None:
    if len({text.task for text in texts}) < 2:
        raise InputError(
            f"the confirm texts in the '{rendering}' rendering are all of one task, and intervals over tasks need 2 or "
            "more; cache more texts, or raise --prompts"
        )


def _curve(model: LanguageModel, texts: list[Text], target: tuple[int, ...], settings: LayersSettings) -> dict:
    mass, task = onset_masses(model, texts, target)
    found = stats.cluster_bootstrap(mass, task, draws=settings.bootstrap_draws, seed=settings.seed)
    layers = [
        {"layer": layer, "mean": float(mean), "low": float(low), "high": float(high)}
        for layer, (mean, low, high) in enumerate(zip(found.mean, found.low, found.high, strict=True))
    ]
    return {"n": found.n, "tasks": found.clusters, "layers": layers}


@torch.no_grad()
def onset_masses(
    model: LanguageModel, texts: list[Text], target: tuple[int, ...]
) -> tuple[Float[np.ndarray, "row layer"], np.ndarray]:
    """Target mass at every onset after every block, and the task of each row."""
    columns, layers = torch.tensor(target, device=model.device), tuple(range(model.shape.n_layers))
    parts, tasks = [], []
    for batch in padded([text.token for text in texts]):
        onset = batch.placed([text.is_onset for text in texts])
        tasks += [np.full(int(texts[i].is_onset.sum()), texts[i].task) for i in batch.members]
        streams = model.resid_posts(batch.tokens.to(model.device), layers)
        masses = [target_mass(model.unembed(streams[layer][onset.to(model.device)]), columns) for layer in layers]
        parts.append(torch.stack(masses, dim=1).cpu().numpy())
    return np.concatenate(parts), np.concatenate(tasks)
