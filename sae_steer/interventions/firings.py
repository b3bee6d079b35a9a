"""Whether a feature fires often enough to be tested, and s: how large it is where it does."""

import numpy as np
from jaxtyping import Float

from sae_steer.cache import ActivationCache
from sae_steer.dictionary import Dictionary
from sae_steer.interventions.measure import OnsetRows
from sae_steer.settings import InterveneSettings


def count_firings(
    cache: ActivationCache,
    dictionary: Dictionary,
    feature: int,
    onsets: OnsetRows,
    single: OnsetRows,
    settings: InterveneSettings,
) -> dict:
    """Onsets and tasks at which the feature fires, also among those edited singly, and s from the tune split.

    s is the median norm of the feature's contribution f * ||W_dec[f]||; None if it is silent there.
    """
    s, share, where = _size(cache, dictionary, feature, settings)
    labels = cache.labels("confirm")
    own = np.isin(labels["text_variant"], cache.own_variants(dictionary.model))
    places = zip(labels["prompt"].tolist(), labels["position"].tolist(), own.tolist(), strict=True)
    read = set(zip(onsets.prompt.tolist(), onsets.position.tolist(), strict=True))
    rows = np.array([i for i, (prompt, position, mine) in enumerate(places) if mine and (prompt, position) in read])
    resid = cache.rows(dictionary.model, dictionary.layer, "confirm").take(rows)
    fires = rows[dictionary.sae.activation_of(resid, feature).numpy() > 0]
    alone = set(zip(single.prompt.tolist(), single.position.tolist(), strict=True))
    fired = zip(labels["prompt"][fires].tolist(), labels["position"][fires].tolist(), strict=True)
    return {
        "onsets": len(fires),
        "of_onsets": len(rows),
        "tasks": len(np.unique(labels["task"][fires])),
        "single_onsets": sum(place in alone for place in fired),
        "of_single_onsets": len(single),
        "s": s,
        "s_from": where,
        "s_share_of_resid_norm": share,
    }


def why_untested(firings: dict, feature: int, dictionary: Dictionary, settings: InterveneSettings) -> str | None:
    """What the feature lacks for a test, with the counts; None if it can be tested."""
    enough = firings["onsets"] >= settings.min_firings and firings["tasks"] >= settings.min_tasks
    if enough and firings["single_onsets"] and firings["s"] is not None:
        return None
    silent = "" if firings["s"] is not None else ", and nowhere in the tune texts that would set its size"
    silent += "" if firings["single_onsets"] else ", none of those drawn to be edited singly"
    return (
        f"feature {feature} of {dictionary.name} fires at {firings['onsets']} onsets of {firings['tasks']} tasks in "
        f"the confirm texts{silent}; a test needs {settings.min_firings} onsets of {settings.min_tasks} tasks"
    )


def _size(
    cache: ActivationCache, dictionary: Dictionary, feature: int, settings: InterveneSettings
) -> tuple[float | None, float | None, str]:
    """s, its share of the median residual norm, and the rows of the tune split it comes from."""
    labels = cache.labels("tune")
    own = np.isin(labels["text_variant"], cache.own_variants(dictionary.model))
    resid = cache.rows(dictionary.model, dictionary.layer, "tune").take(np.flatnonzero(own))
    values = dictionary.sae.activation_of(resid, feature).numpy()
    at_onsets = _active(values[labels["is_onset"][own].astype(bool)])
    if len(at_onsets) >= settings.min_firings:
        active, where = at_onsets, f"{len(at_onsets)} active onsets of the tune split"
    else:
        active = _active(values)
        where = f"{len(active)} active rows of the tune split, {len(at_onsets)} of them onsets"
    if not len(active):
        return None, None, where
    s = float(np.median(active)) * float(dictionary.sae.direction(feature).norm())
    return s, s / float(resid.norm(dim=1).median()), where


def _active(values: Float[np.ndarray, " row"]) -> Float[np.ndarray, " active"]:
    return values[values > 0]
