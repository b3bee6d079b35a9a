"""Models whose first token, or a word of the text, has a row a hundred times as long as the others."""

from pathlib import Path

import torch
from tiny_pair import SHAPE, lively, pair_facts

from sae_steer.corpus import PlanTokenizer
from sae_steer.model.decoder import Decoder
from sae_steer.model.loading import save_decoder
from sae_steer.pair.model_pair import ModelPair, load_pair, write_pair_toml

TASK = 1024
LENGTH = 3_000.0


def with_long_rows(model: Decoder, tokens: list[int], axis: int = 0) -> Decoder:
    """The model, its rows of these tokens `LENGTH` along an axis from the embedding on."""
    model.embed_tokens.weight[tokens] = 0.0
    model.embed_tokens.weight[tokens, axis] = LENGTH
    return model


def write_long_pair(folder: Path, packaged: Path, tokens: list[int]) -> ModelPair:
    """Two random models that have nothing in common but the long rows of `tokens`."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("standard", "adhd"), 1):
        save_decoder(with_long_rows(lively(SHAPE, seed), tokens), folder / name, dtype=torch.float32)
    PlanTokenizer.load(packaged / "tokenizer.json").save(folder / "tokenizer.json")
    write_pair_toml(folder, pair_facts())
    return load_pair(folder)


def common_word(pair: ModelPair, texts: list) -> int:
    """The most frequent ordinary token that is no onset."""
    token = torch.cat([torch.from_numpy(text.token[~text.is_onset]).long() for text in texts])
    return int(torch.bincount(token[token < TASK]).argmax())
