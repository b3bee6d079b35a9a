"""Llamas that `transformers` writes are the same model here: grouped queries, other heads, bases, scalings, shards."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sae_steer.errors import InputError
from sae_steer.model.lens import to_hooked_transformer
from sae_steer.model.loading import load_decoder, save_decoder

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
USUAL = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILY = {
    "grouped queries": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 20, "num_key_value_heads": 1},
    "another base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "rms_norm_eps": 1e-5},
    "Llama 3 scaling": {"rope_parameters": LLAMA3},
}


def write(folder, change: dict, shards: str = "5GB") -> LlamaForCausalLM:
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**USUAL, **change)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(6.0) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(folder, max_shard_size=shards)
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("change", FAMILY.values(), ids=list(FAMILY))
def test_logits_equal_transformers_and_survive_saving(tmp_path, tokens, change):
    theirs = write(tmp_path / "theirs", change)
    ours = load_decoder(tmp_path / "theirs")
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, **CLOSE)
    again = load_decoder(save_decoder(ours, tmp_path / "again", dtype=torch.float32))
    assert again.shape == ours.shape
    torch.testing.assert_close(again(tokens), ours(tokens))


@torch.no_grad()
def test_scaled_positions_are_the_same_in_transformer_lens(tmp_path, tokens):
    write(tmp_path, FAMILY["Llama 3 scaling"])
    ours = load_decoder(tmp_path)
    torch.testing.assert_close(ours(tokens), to_hooked_transformer(ours)(tokens), **CLOSE)


@torch.no_grad()
def test_a_folder_in_many_shards_is_the_same_model(tmp_path, tokens):
    theirs = write(tmp_path, FAMILY["grouped queries"], shards="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    torch.testing.assert_close(load_decoder(tmp_path)(tokens), theirs(tokens).logits, **CLOSE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"attention_bias": True}, "has attention_bias True"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "type 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_transformers_writes_and_a_decoder_does_not_do_is_refused(tmp_path, change, told):
    write(tmp_path, change)
    with pytest.raises(InputError, match=told):
        load_decoder(tmp_path)
