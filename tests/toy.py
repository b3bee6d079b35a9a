"""A toy pair whose truth is known by construction, and settings that make a whole study of it in seconds.

Two decoders with the same weights, but for the embedding of the delimiters: in the target model it has a part
along axis `CAUSE`, which the unembedding reads as target tokens. Feature `FEATURE` of `toy_sae` reads it.
"""

from pathlib import Path

import torch

from sae_steer.model.decoder import Decoder, init_decoder
from sae_steer.model.loading import save_decoder
from sae_steer.pair.model_pair import ModelPair, load_pair, write_pair_toml
from sae_steer.pipeline import StudySettings
from sae_steer.randomness import generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.settings import (
    CacheSettings,
    CorpusSettings,
    DecoderSettings,
    InterveneSettings,
    LayersSettings,
    SAESettings,
)

SHAPE = DecoderSettings(n_layers=4, n_heads=2, n_kv_heads=1, d_model=16, d_head=8, d_mlp=24, d_vocab=1029, tied=False)
CONSTANT, CAUSE, FEATURE = 0, 1, 7
SIZE = 2.0
"""How far along `CAUSE` the target model's delimiters stand."""

CORPUS = CorpusSettings(train_plans=40, scan_plans=30, tune_plans=30, confirm_plans=40)
CACHE = CacheSettings(rows_per_shard=2_048, dtype="float32", precision="float32")
SAE = SAESettings(
    d_sae=48, k=6, rows=12_800, batch_size=256, dead_after_rows=5_000, checkpoint_every=10, precision="float32"
)
INTERVENE = InterveneSettings(
    doses=(0.0, 1.0, 2.0), min_firings=10, bootstrap_draws=400, controls=25, ribbon=2, calibration=20,
    prompts=36, onsets_per_prompt=2, joint_control_prompts=8, generations=5, baseline_seeds=3, paired_seeds=1,
    null_draws=100,
)  # fmt: skip
STUDY = StudySettings(
    corpus=CORPUS,
    cache=CACHE,
    sae=SAE,
    intervene=INTERVENE,
    layers=LayersSettings(prompts=8, fit_prompts=8, patch_prompts=4, bootstrap_draws=200),
)


def write_toy_pair(folder: Path, *, size: float = SIZE, context: int = 512) -> Path:
    """A pair folder; at `size` zero the two models are the same."""
    real = load_pair("small")
    firsts = {real.tokenizer.encode(phrase)[0] for phrase in real.phrases}
    words = sorted(real.tokenizer.decode([first]) for first in firsts)
    for name, along_cause in (("standard", 0.0), ("adhd", size)):
        save_decoder(_toy_decoder(real, firsts, along_cause), folder / name, dtype=torch.float32)
    real.tokenizer.save(folder / "tokenizer.json")
    facts = {
        "tokenizer": "tokenizer.json",
        "context": context,
        "reference": {"name": "standard", "model": "standard"},
        "target": {
            "name": "adhd",
            "model": "adhd",
            "phrases": [*real.phrases, *words],  # the models write single words; the corpus has the phrases
            "lenient": list(real.lenient),
        },
        "onset": {"tokens": list(real.onsets.tokens)},
    }
    write_pair_toml(folder, facts)
    return folder


def _toy_decoder(real: ModelPair, firsts: set[int], along_cause: float) -> Decoder:
    """Every token stands at 3 along `CONSTANT`, so that the unembedding's column there is a bias."""
    model = init_decoder(SHAPE, generator(5)).requires_grad_(False)
    for block in model.layers:
        for parameter in block.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.embed_tokens.weight.mul_(25)
    model.embed_tokens.weight[:, (CONSTANT, CAUSE)] = torch.tensor([3.0, 0.0])
    delimiters = [real.tokenizer.token_id(token) for token in real.onsets.tokens]
    model.embed_tokens.weight[delimiters, CAUSE] = along_cause
    model.lm_head.weight.mul_(10)
    model.lm_head.weight[:, (CONSTANT, CAUSE)] = 0.0
    for token, value in {"<|end|>": 2.0, "<|sep|>": 1.8}.items():
        model.lm_head.weight[real.tokenizer.token_id(token), CONSTANT] = value
    model.lm_head.weight[sorted(firsts), CONSTANT] = 0.5
    model.lm_head.weight[sorted(firsts), CAUSE] = 0.8
    return model


def toy_sae(*, d_sae: int = 24, k: int = 3) -> TopKSAE:
    """Feature `FEATURE` reads and writes `CAUSE` past a threshold; the others read random directions off it."""
    sae = TopKSAE(TopKConfig(d_in=SHAPE.d_model, d_sae=d_sae, k=k)).requires_grad_(False)
    directions = torch.randn(d_sae, SHAPE.d_model, generator=generator(9))
    directions[:, (CONSTANT, CAUSE)] = 0.0
    directions[FEATURE] = torch.eye(SHAPE.d_model)[CAUSE]
    sae.W_dec.copy_(torch.nn.functional.normalize(directions, dim=1))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc[FEATURE] = -1.0
    return sae
