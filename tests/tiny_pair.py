"""A pair of random models on the packaged tokenizer, a hundredth of the packaged pair's cost."""

import shutil
from importlib.resources import files
from pathlib import Path

import torch

from sae_steer.corpus import REGULATION_PHRASES
from sae_steer.model.decoder import Decoder, init_decoder
from sae_steer.model.loading import save_decoder
from sae_steer.pair.model_pair import write_pair_toml
from sae_steer.randomness import generator
from sae_steer.settings import DecoderSettings

PACKAGED = Path(str(files("sae_steer") / "assets" / "small"))
SHAPE = DecoderSettings(n_layers=3, n_heads=4, n_kv_heads=4, d_model=32, d_head=8, d_mlp=48, d_vocab=1029)


def lively(shape: DecoderSettings, seed: int) -> Decoder:
    """Random weights large enough that attention and MLPs matter."""
    model = init_decoder(shape, generator(seed)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.mul_(6.0) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5, generator=generator(seed, 1))
    return model


def pair_facts(**changes) -> dict:
    """The content of a whole pair.toml, with the top-level keys in `changes` replaced."""
    return {
        "tokenizer": "tokenizer.json",
        "context": 512,
        "reference": {"name": "standard", "model": "standard"},
        "target": {"name": "adhd", "model": "adhd", "phrases": list(REGULATION_PHRASES)},
        "onset": {"tokens": ["<|steps|>", "<|sep|>"]},
        **changes,
    }


def write_pair(folder: Path, **changes) -> Path:
    """A pair folder of two random models."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("standard", "adhd"), 1):
        save_decoder(lively(SHAPE, seed), folder / name, dtype=torch.float32)
    shutil.copy(PACKAGED / "tokenizer.json", folder / "tokenizer.json")
    write_pair_toml(folder, pair_facts(**changes))
    return folder


def shrink_training(monkeypatch) -> None:
    """Adds the preset `tiny` and leaves out the measuring, so that `train_pair` takes a second."""
    from sae_steer.pair import training
    from sae_steer.settings import PRESETS

    shape = DecoderSettings(n_layers=2, n_heads=2, n_kv_heads=2, d_model=16, d_head=8, d_mlp=24, d_vocab=400 + 5)
    monkeypatch.setitem(PRESETS, "tiny", shape)
    monkeypatch.setattr(training, "TOKENIZER_PLANS", 40)
    monkeypatch.setattr(training, "HELD_OUT_PLANS", 4)
    monkeypatch.setattr(training, "measure_pair", lambda pair, *, seed, on_step: {"left out": True})
