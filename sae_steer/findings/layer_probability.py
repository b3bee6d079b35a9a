"""P(target) at step onsets after every block, in both models: where in depth the behaviour is decided.

1. The stream after each block, and between its attention and its MLP, is read through the final norm and the
   unembedding (the logit lens, nostalgebraist 2020); after the last block that is the model's own output.
2. A tuned lens beside it (`tuned_lens`) reads each stream in the basis of the last one.
3. What each block changes (a difference, and a ratio as on the card), and its attention and MLP apart; all intervals
   resample tasks.
4. For generated texts the grammar's own probability at the same onsets: what a perfect model would say.
5. One model's stream put into the other after every block (`layer_patching`): where the behaviour can be moved.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float, Int

from sae_steer import stats
from sae_steer.cache import ActivationCache
from sae_steer.errors import InputError
from sae_steer.findings.layer_patching import patch_by_layer
from sae_steer.findings.tuned_lens import TunedLens, fit_tuned_lens
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.parts import read_parts
from sae_steer.model.readout import target_mass
from sae_steer.model.rows import padded
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress, silent
from sae_steer.records import provenance
from sae_steer.row_filter import RowFilter
from sae_steer.settings import LayersSettings

RECORD_FILE = "layers.json"


def layers_provenance(pair: ModelPair, cache: ActivationCache, settings: LayersSettings) -> dict:
    """What fixes the curves."""
    return provenance(
        settings=settings, inputs={"pair": pair.sha256, "cache": cache.sha256, "rows": cache.row_filter.identity}
    )


def layer_probability(
    pair: ModelPair,
    cache: ActivationCache,
    *,
    settings: LayersSettings | None = None,
    on_step: Progress = silent,
) -> Mapping:
    """A curve over the layers for each model on each rendering of the confirm split's texts, and the patching."""
    settings = settings or LayersSettings()
    cache.check_pair(pair)
    tokens = cache.target_tokens(pair)
    confirm = {variant: _onset_texts(cache, variant, settings.prompts) for variant in range(len(cache.variants))}
    fit, held_out = (_some(cache, split, settings.fit_prompts) for split in ("train", "scan"))
    readings = list(product(pair.models, enumerate(cache.variants)))
    total = len(pair.models) + 2 * len(readings)  # the patching takes about as long as the readings
    lenses: dict[str, TunedLens] = {}
    for done, model in enumerate(pair.models):
        on_step(done, total, f"fitting the tuned lens of {model.name}")
        lenses[model.name] = _lens(model.model, fit, held_out, cache.row_filter)
    curves = []
    for done, (model, (variant, rendering)) in enumerate(readings, len(pair.models)):
        on_step(done, total, f"{model.name} on {rendering} texts")
        if confirm[variant]:
            curve = _curve(model.model, lenses[model.name], confirm[variant], tokens.ids, settings)
            curves.append({"model": model.name, "rendering": rendering, **curve})
    first, share = len(pair.models) + len(readings), len(readings)

    def patched(done: int, of: int, note: str = "") -> None:
        on_step(first + done * share // of, total, note)

    patching = _patching(pair, cache, fit, tokens.ids, settings, patched)
    on_step(total, total, "measured")
    return {
        "provenance": layers_provenance(pair, cache, settings),
        "pair": pair.name,
        "target_tokens": tokens.described(pair.tokenizer),
        "curves": curves,
        "tuned_lens": {name: lens.record() for name, lens in lenses.items()},
        "patching": patching,
    }


def _lens(model: LanguageModel, fit: list[Text], held_out: list[Text], row_filter: RowFilter) -> TunedLens:
    """The tuned lens, or one without maps where there are no texts to fit it on."""
    return fit_tuned_lens(model, fit, held_out, row_filter) if fit and held_out else TunedLens(())


def _some(cache: ActivationCache, split: str, per_rendering: int) -> list[Text]:
    """The split's first texts of every rendering."""
    texts = cache.texts(split)
    chosen = [[text for text in texts if text.rendering == variant] for variant in range(len(cache.variants))]
    return [text for part in chosen for text in part[:per_rendering]]


def _patching(
    pair: ModelPair,
    cache: ActivationCache,
    fit: list[Text],
    target: tuple[int, ...],
    settings: LayersSettings,
    on_step: Progress,
) -> dict | None:
    """Where the behaviour can be moved; None where it was not asked, or no texts are there to fit maps on."""
    texts = [text for text in cache.own_texts("confirm", pair.target.name) if text.is_onset.any()]
    texts = texts[: settings.patch_prompts]
    if not fit or len({text.task for text in texts}) < 2:
        return None
    depth = patch_by_layer(
        pair, texts, fit, target,
        draws=settings.bootstrap_draws, seed=settings.seed, on_step=on_step, row_filter=cache.row_filter,
    )  # fmt: skip
    return depth.record()


def _onset_texts(cache: ActivationCache, variant: int, limit: int) -> list[Text]:
    """A rendering's first confirm texts with onsets; of one task, they are an `InputError`."""
    texts = [text for text in cache.texts("confirm") if text.rendering == variant and text.is_onset.any()][:limit]
    if texts and len({text.task for text in texts}) < 2:
        raise InputError(
            f"the confirm texts in the '{cache.variants[variant]}' rendering are all of one task, and intervals over "
            "tasks need 2 or more; cache more texts, or raise --prompts"
        )
    return texts


def _curve(
    model: LanguageModel, lens: TunedLens, texts: list[Text], target: tuple[int, ...], settings: LayersSettings
) -> dict:
    masses = onset_masses(model, texts, target, lens)
    draws = {"draws": settings.bootstrap_draws, "seed": settings.seed}

    def rows(values: Float[np.ndarray, "row layer"]) -> list[dict]:
        return _estimates(stats.cluster_bootstrap(values, masses.task, **draws))

    after, between, before = masses.after, masses.between, masses.before
    parts = {"tuned": masses.tuned, "jump": after - before}
    if between is not None:
        parts |= {"attention": between - before, "mlp": after - between}
    named = {"attention": [None] * after.shape[1], "mlp": [None] * after.shape[1]}
    named |= {name: rows(values) for name, values in parts.items()}
    named["ratio"] = _estimates(stats.cluster_bootstrap_ratio(after, before, masses.task, **draws))
    layers = [
        {"layer": layer, **row, **{name: own[layer] for name, own in named.items()}}
        for layer, row in enumerate(rows(after))
    ]
    known = np.isfinite(masses.true_p)
    ceiling = None
    if known.all():
        ceiling = rows(masses.true_p[:, None])[0]
    return {"n": len(after), "tasks": len(np.unique(masses.task)), "layers": layers, "ceiling": ceiling}


def _estimates(found: stats.Estimate) -> list[dict]:
    return [
        {"mean": float(mean), "low": _finite(low), "high": _finite(high)}
        for mean, low, high in zip(found.mean, found.low, found.high, strict=True)
    ]


def _finite(value: float) -> float | None:
    """An end without bound is null in a record."""
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class OnsetMasses:
    """Target mass at every onset by the stream at each block's stations."""

    before: Float[np.ndarray, "row layer"]
    between: Float[np.ndarray, "row layer"] | None
    """With the attention's part added; None where it cannot be told apart."""
    after: Float[np.ndarray, "row layer"]
    tuned: Float[np.ndarray, "row layer"]
    """After the block, by the tuned lens."""
    true_p: Float[np.ndarray, " row"]
    """The grammar's; NaN where none is known."""
    task: Int[np.ndarray, " row"]


@torch.no_grad()
def onset_masses(
    model: LanguageModel, texts: list[Text], target: tuple[int, ...], lens: TunedLens | None = None
) -> OnsetMasses:
    """Read at every onset of the texts, in the order of their lengths."""
    lens = lens or TunedLens(())
    columns = torch.tensor(target, device=model.device)
    stations: dict[str, list[np.ndarray]] = {name: [] for name in ("before", "between", "after", "tuned")}
    tasks, truth = [], []
    for batch in padded([text.token for text in texts]):
        chosen = [texts[i] for i in batch.members]
        at = batch.placed([text.is_onset for text in texts]).to(model.device)
        tasks += [np.full(int(text.is_onset.sum()), text.task) for text in chosen]
        truth += [text.true_p[text.is_onset] for text in chosen]
        blocks = read_parts(model, batch.tokens.to(model.device))
        known = ("before", "between", "after") if blocks[0].between is not None else ("before", "after")
        for name in known:
            streams = [getattr(block, name)[at] for block in blocks]
            stations[name].append(_masses(model, streams, columns))
        carried = [lens(layer, block.after[at]) for layer, block in enumerate(blocks)]
        stations["tuned"].append(_masses(model, carried, columns))
    read = {name: np.concatenate(parts) if parts else None for name, parts in stations.items()}
    return OnsetMasses(**read, true_p=np.concatenate(truth).astype(np.float64), task=np.concatenate(tasks))


def _masses(model: LanguageModel, streams: list[torch.Tensor], columns: torch.Tensor) -> Float[np.ndarray, "row layer"]:
    return torch.stack([target_mass(model.unembed(stream), columns) for stream in streams], dim=1).cpu().numpy()
