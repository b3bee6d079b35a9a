"""How long the full protocol takes for one feature: 300 confirm prompts, 4 onsets each, 199 directions of every
control family, four variants. One record holds every shape timed; a run replaces its own shape's part.

    python experiments/benchmarks/protocol_time.py RUN_FOLDER CACHE_FOLDER  # of a finished `sae-steer run`
    python experiments/benchmarks/protocol_time.py --shape 23M              # random weights, its own small cache
    python experiments/benchmarks/protocol_time.py --shape 23M --device cuda

Of the embedded pair the scan's first feature is timed without sampled plans and with them. Random weights write plans
without end, so at the 23M shape nothing is sampled; its dictionary is random too, and its feature the one that fires
nearest to 30 % of the onsets, so that zero-ablation has rows to replay.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from cache_rows import random_pair
from isa import as_asked, machine, record_path

from sae_steer.cache import ActivationCache, cache_activations
from sae_steer.dictionary import Dictionary, adopt_dictionary, load_dictionary
from sae_steer.pair.model_pair import ModelPair, load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.randomness import generator
from sae_steer.records import provenance, read_json, write_json
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.scan import load_scan
from sae_steer.settings import PRESETS, CorpusSettings, InterveneSettings
from sae_steer.study.of_pair import intervene
from sae_steer.study.record import Study

RECORD = record_path(__file__)
EXACT, SAMPLED = "exact", "with_sampled_plans"
TEXTS = CorpusSettings(train_plans=300, scan_plans=1, tune_plans=300, confirm_plans=300)
RATE = 0.3


def timed(pair: ModelPair, dictionary: Dictionary, cache: ActivationCache, settings: InterveneSettings, **named):
    """The study, its seconds in all, and those of every stage."""
    start, stages = time.perf_counter(), []

    def on_step(done: int, total: int, note: str = "") -> None:
        stages.append((note, time.perf_counter() - start))

    study = intervene(pair, dictionary, cache=cache, settings=settings, on_step=on_step, **named)
    study.save(Path(tempfile.mkdtemp()))
    seconds = time.perf_counter() - start
    ends = [at for _, at in stages[1:]] + [seconds]
    by_stage = {note: round(end - at, 1) for (note, at), end in zip(stages, ends, strict=True)}
    return study, round(seconds, 1), {"before the first arm": round(stages[0][1], 1), **by_stage}


def write(shape: str, study: Study, settings: InterveneSettings, inputs: dict, seconds: dict) -> None:
    """Put one shape's figures into the record."""
    edits = [len(variant.controls) * settings.controls * variant.single.n for variant in study.variants]
    origin = provenance(settings=settings, inputs=inputs)
    found = {
        "provenance": origin,
        "machine": machine(),
        "control_edits": sum(edits),
        **seconds,
    }
    known = read_json(RECORD) if RECORD.is_file() else {}
    print(write_json(RECORD, known | {shape: found}), seconds)


def embedded(run: Path, cache: ActivationCache) -> None:
    """The packaged pair, the scan's first feature."""
    pair, dictionary = load_pair("small"), load_dictionary(run / "saes" / "adhd_L2_hook_resid_post")
    scan, settings, seconds = load_scan(run / "scan", dictionary), InterveneSettings(), {}
    named = {"feature": scan.top(1)[0], "leave_out": scan.specific_features}
    for name, chosen in ((EXACT, replace(settings, generations=0)), (SAMPLED, settings)):
        study, whole, stages = timed(pair, dictionary, cache, chosen, **named)
        seconds |= {f"seconds_{name}": whole, f"stages_{name}": stages}
        write("embedded", study, settings, {"pair": pair.sha256, "dictionary": dictionary.sha256}, seconds)


def random_23m(folder: Path, device: str) -> None:
    """Random weights of the 23M shape."""
    shape, settings = PRESETS["interpgpt-23m"], replace(InterveneSettings(), generations=0)
    pair = random_pair(shape).to(device)
    cache = cache_activations(pair, layers=(1, 2), out=folder, source=GeneratedTexts(TEXTS))
    sae = TopKSAE(TopKConfig(d_in=shape.d_model, d_sae=4096, k=40)).requires_grad_(False)
    rows = torch.randn(4096, shape.d_model, generator=generator(3))
    sae.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    labels = cache.labels("confirm")
    own = labels["is_onset"].astype(bool) & (labels["text_variant"] == cache.variants.index(pair.target.name))
    codes = sae.encode(cache.rows(pair.target.name, 2, "confirm").take(own.nonzero()[0]))
    feature = int((codes.firings / codes.n_rows - RATE).abs().argmin())
    dictionary = adopt_dictionary(sae, model=pair.target, layer=2)
    study, whole, stages = timed(pair, dictionary, cache, settings, feature=feature)
    inputs = {"pair": pair.sha256, "dictionary": dictionary.sha256}
    name = "23M" if device == "cpu" else f"23M on {torch.cuda.get_device_name()}"
    write(name, study, settings, inputs, {f"seconds_{EXACT}": whole, f"stages_{EXACT}": stages})


if __name__ == "__main__":
    as_asked()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run folder of the embedded pair")
    parser.add_argument("cache", nargs="?", type=Path, help="its cache")
    parser.add_argument("--shape", choices=("embedded", "23M"), default="embedded")
    parser.add_argument("--device", default="cpu", help="of the 23M shape")
    asked = parser.parse_args()
    if asked.shape == "23M":
        with tempfile.TemporaryDirectory() as scratch:
            random_23m(Path(scratch) / "cache", asked.device)
    else:
        embedded(asked.run, ActivationCache.open(asked.cache))
