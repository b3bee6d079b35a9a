"""Two trained language models that differ in training, and a causal verdict about a feature.

    import sae_steer as ss

    pair = ss.load_pair("small")
    cache = ss.cache_activations(pair, layers=[2], out="activations/small")
    sae = ss.train_sae(cache, model="adhd", layer=2)
    scan = ss.scan_features(cache, sae)
    study = ss.intervene(pair, sae, feature=scan.top(1)[0], cache=cache)
    print(study.table())

What needs a folder (`out=`) writes there and is found again there by its inputs: `cache_activations`, `train_sae`,
`find_or_scan`, `find_or_intervene`. `scan_features` and `intervene` compute the same and write nothing.

Names are imported on first use, so that `import sae_steer` costs nothing. Functions are handed out with their arguments
checked (`arguments.checked`): what does not fit its annotation is refused in one line before anything runs.
"""

from importlib import import_module
from inspect import isfunction
from typing import Any

from sae_steer.arguments import checked, nearest

_HOME = {
    "ActivationCache": "cache",
    "CacheSettings": "settings",
    "ContextSettings": "settings",
    "CorpusSettings": "settings",
    "Dictionary": "dictionary",
    "FeatureCard": "findings.contexts",
    "FeatureScan": "scan",
    "GeneratedTexts": "pair.texts",
    "HeadsSettings": "settings",
    "Inject": "edits.edit",
    "InterveneSettings": "settings",
    "JumpReLUSAE": "sae.architectures",
    "LayersSettings": "settings",
    "ModelPair": "pair.model_pair",
    "NamedModel": "pair.model_pair",
    "OnsetRule": "corpus",
    "PairTrainingSettings": "settings",
    "PlanTokenizer": "corpus",
    "SAESettings": "settings",
    "ScanSettings": "settings",
    "SteerError": "errors",
    "SteerSettings": "settings",
    "Study": "study.record",
    "Subtract": "edits.edit",
    "TextFile": "pair.texts",
    "TopKSAE": "sae.architectures",
    "ZeroAblate": "edits.edit",
    "adopt_dictionary": "dictionary",
    "cache_activations": "cache",
    "ce_recovered": "effects.splicing",
    "edited": "model.replay",
    "find_or_intervene": "pipeline",
    "find_or_scan": "pipeline",
    "intervene": "study.in_memory",
    "layer_probability": "findings.layer_probability",
    "load_dictionary": "dictionary",
    "load_pair": "pair.model_pair",
    "load_sae": "sae.saelens.files",
    "pretrained_saelens": "sae.saelens.reading",
    "read_contexts": "findings.contexts",
    "sample_plans": "pair.quality",
    "save_sae": "sae.saelens.files",
    "scan_features": "scan",
    "seed_stability": "sae.stability",
    "steer": "findings.steering",
    "study_heads": "findings.heads",
    "to_hooked_transformer": "model.lens",
    "train_pair": "pair.training",
    "train_sae": "dictionary",
    "write_report": "report.page",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sae_steer' has no attribute {name!r}{nearest(name, __all__)}")
    value = getattr(import_module(f"sae_steer.{_HOME[name]}"), name)
    return checked(value) if isfunction(value) else value


def __dir__() -> list[str]:
    return __all__
