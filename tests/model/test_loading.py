"""A folder is read exactly or refused in one line; nothing is unpickled."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pair import SHAPE, lively

from sae_steer.errors import InputError
from sae_steer.model.language_model import fingerprint
from sae_steer.model.loading import load_decoder, save_decoder


@pytest.fixture
def folder(tmp_path):
    return save_decoder(lively(SHAPE, 1), tmp_path / "llama", dtype=torch.float32)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder) -> str:
    """The line a folder is refused with, which names it."""
    with pytest.raises(InputError) as refused:
        load_decoder(folder)
    line = str(refused.value)
    assert "\n" not in line
    assert str(folder) in line
    return line


def test_a_loaded_model_is_float32_and_wants_no_gradients(tmp_path):
    save_decoder(lively(SHAPE, 1), tmp_path, dtype=torch.bfloat16)
    model = load_decoder(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_saving_what_was_loaded_from_bfloat16_gives_the_same_bytes(tmp_path):
    first = save_decoder(lively(SHAPE, 1), tmp_path / "first", dtype=torch.bfloat16, pad_token_id=3)
    again = save_decoder(load_decoder(first), tmp_path / "again", dtype=torch.bfloat16, pad_token_id=3)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_the_fingerprint_is_of_weights_and_shape_alone(folder, tmp_path):
    moved = save_decoder(load_decoder(folder), tmp_path / "moved", dtype=torch.float32)
    assert fingerprint(load_decoder(moved)) == fingerprint(load_decoder(folder))
    other = load_decoder(folder)
    other.norm.weight[3] += 1e-6
    assert fingerprint(other) != fingerprint(load_decoder(folder))
    change_config(moved, rope_parameters={"rope_theta": 9_999.0})
    assert fingerprint(load_decoder(moved)) != fingerprint(load_decoder(folder))


def test_a_sharded_folder_is_the_same_model(folder):
    whole = load_decoder(folder)
    tensors = sorted(load_file(folder / "model.safetensors").items())
    places = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        places |= {tensor: name for tensor, _ in part}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert fingerprint(load_decoder(folder)) == fingerprint(whole)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors" in refusal(folder)


def test_an_index_that_is_none_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "no whole model.safetensors" in refusal(folder)


def test_missing_unknown_and_misshapen_tensors_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 31)
    save_file(tensors, folder / "model.safetensors")
    line = refusal(folder)
    assert "missing: norm.weight" in line
    assert "not known: layers.0.self_attn.q_proj.bias" in line
    assert "misshapen: layers.1.mlp.up_proj.weight (48, 31) instead of (48, 32)" in line


def test_of_many_missing_tensors_five_are_named_and_the_rest_counted(folder):
    save_file({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    assert "and 23 more" in refusal(folder)


def test_stored_rotary_buffers_and_a_tied_head_are_passed_over(folder):
    before = load_decoder(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert fingerprint(load_decoder(folder)) == fingerprint(before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"attention_bias": True}, "has attention_bias True"),
        ({"mlp_bias": True}, "has mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3' without factor, low_freq_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "scaled rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "scaled rotary"),
        ({"num_hidden_layers": -1}, "num_hidden_layers -1, which is no positive integer"),
        ({"hidden_size": "32"}, "hidden_size '32', which is no positive integer"),
        ({"num_key_value_heads": 3}, "must divide evenly"),
        ({"head_dim": 7}, "must divide evenly"),
        ({"num_hidden_layers": 4}, "missing: layers.3."),
    ],
)  # fmt: skip
def test_a_config_of_another_kind_of_model_is_refused(folder, change, told):
    change_config(folder, **change)
    assert told in refusal(folder)


def test_a_config_without_a_size_names_it(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["intermediate_size"]
    path.write_text(json.dumps(config))
    assert "no 'intermediate_size'" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"llama"'])
def test_a_config_that_is_none_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    refusal(folder)


def test_a_folder_without_a_config_is_no_model(tmp_path):
    assert "no config.json" in refusal(tmp_path)
    assert "no config.json" in refusal(tmp_path / "nowhere")


def test_a_cut_or_missing_weight_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "no whole model.safetensors" in refusal(folder)
    path.unlink()
    assert "no whole model.safetensors" in refusal(folder)


class Explosive:
    def __reduce__(self):
        return (pytest.fail, ("the folder was unpickled",))


def test_a_folder_with_pickled_weights_alone_is_refused_and_never_unpickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive()))
    assert "pytorch_model.bin" in refusal(folder)


def test_pickled_weights_beside_safetensors_are_not_looked_at(folder):
    before = load_decoder(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive()))
    assert fingerprint(load_decoder(folder)) == fingerprint(before)
