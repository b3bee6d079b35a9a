"""Whatever `transformers` makes of a Llama folder, a decoder read from it is, or the folder is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sae_steer.errors import InputError
from sae_steer.model import comparing
from sae_steer.model.comparing import compare
from sae_steer.model.loading import load_decoder, read_decoder
from sae_steer.model.sources import load_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
TOKENS = torch.arange(40)[None]
USUAL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Results of comparisons are kept here, and none is here at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "llama")


def write(folder, seed: int = 0, shards: str = "5GB", **changes):
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(LlamaConfig(**USUAL, **changes))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(6.0) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(folder, max_shard_size=shards)
    return folder


def change_config(folder, *without: str, **changes):
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps({**config, **changes}))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@torch.no_grad()
def check_same(folder):
    theirs = LlamaForCausalLM.from_pretrained(folder).float()
    torch.testing.assert_close(load_decoder(folder)(TOKENS), theirs(TOKENS).logits, **CLOSE)


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(tmp_path):
    folder = write(tmp_path, tie_word_embeddings=True)
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.randn(64, 32)}))
    check_same(folder)
    read = read_decoder(folder)
    assert not read.model.shape.tied
    assert "the head is kept" in read.lines()[0]


def test_of_a_tied_model_the_head_alone_is_enough_and_a_copy_of_the_embedding_stays_tied(tmp_path):
    folder = write(tmp_path, tie_word_embeddings=True)
    change_tensors(folder, lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}))
    check_same(folder)
    assert load_decoder(folder).shape.tied
    change_tensors(folder, lambda found: found.pop("model.embed_tokens.weight"))
    check_same(folder)


def test_a_whole_file_is_read_and_not_the_shards_beside_it_nor_their_index(tmp_path):
    folder, newer = write(tmp_path / "shards", shards="10KB"), write(tmp_path / "newer", seed=1)
    shutil.copy(newer / "model.safetensors", folder)
    check_same(folder)
    torch.testing.assert_close(load_decoder(folder)(TOKENS), load_decoder(newer)(TOKENS))
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    check_same(folder)


def test_a_shard_that_an_index_does_not_name_is_not_read_and_of_two_the_later_counts(tmp_path):
    folder = write(tmp_path, shards="10KB")
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "model-99999-of-99999.safetensors", {"format": "pt"})
    check_same(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-99999-of-99999.safetensors"
    index.write_text(json.dumps(content))
    check_same(folder)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 777.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 777.0, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {**LLAMA3, "rope_theta": 300.0}, "rope_theta": 5e5},
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {"rope_parameters": {**LLAMA3, "type": "linear"}},
        {"rope_parameters": {"type": "default", "factor": 3.0}},
        {"rope_scaling": None, "rope_theta": 50.0},
    ],
    ids=str,
)
def test_rotary_settings_given_in_several_places_count_as_they_do_there(folder, rope):
    change_config(folder, "rope_parameters", **rope)
    check_same(folder)


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 0.3}, {"head_dim": None}, {"num_key_value_heads": None}], ids=str)
def test_other_fields_count_too(folder, changes):
    change_config(folder, **changes)
    check_same(folder)


def test_fields_without_a_meaning_there_have_none_here(folder):
    before = load_decoder(folder)(TOKENS)
    change_config(folder, attention_multiplier=9.0, rope_dim=2, n_layer=7, pretraining_tp=2)
    check_same(folder)
    torch.testing.assert_close(load_decoder(folder)(TOKENS), before)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_weights_are_rounded_to_the_type_that_the_config_states(folder, key):
    change_config(folder, "dtype", **{key: "bfloat16"})
    check_same(folder)
    read = read_decoder(folder)
    assert "more digits than the bfloat16" in read.lines()[0]
    weight = read.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, weight.bfloat16().float())


def test_a_config_that_states_a_finer_type_than_the_file_changes_nothing(tmp_path):
    folder = write(tmp_path, dtype="bfloat16")
    change_tensors(folder, lambda found: found.update({name: tensor.bfloat16() for name, tensor in found.items()}))
    change_config(folder, dtype="float32")
    check_same(folder)
    assert read_decoder(folder).lines() == []


def halve_one(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()


def double_name(tensors):
    tensors["norm.weight"] = tensors["model.norm.weight"].clone()


@pytest.mark.parametrize(
    ("without", "change", "told"),
    [("dtype", halve_one, "states no dtype"), ("", double_name, "with and without 'model.'")],
)
def test_files_with_two_readings_are_refused(folder, without, change, told):
    change_config(folder, without)
    change_tensors(folder, change)
    with pytest.raises(InputError, match=told):
        load_decoder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 8},
        {"layer_types": ["sliding_attention", "full_attention"]},
        {"is_causal": False},
        {"partial_rotary_factor": 0.5},
        {"transformers_weights": "other.safetensors"},
        {"rope_scaling": LINEAR},
        {"tie_word_embeddings": "false"},
        {"rms_norm_eps": 0},
        {"dtype": "int8"},
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        {"per_layer_config": {"0": {}}},
    ],
    ids=str,
)
def test_what_would_be_computed_otherwise_is_refused_by_name(folder, changes):
    change_config(folder, **changes)
    with pytest.raises(InputError, match=next(iter(changes)) if "rope" not in str(changes) else "rotary"):
        load_decoder(folder)


def test_a_folder_that_is_also_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter"):
        load_decoder(folder)


def test_an_index_cannot_name_a_file_elsewhere(tmp_path):
    folder = write(tmp_path, shards="10KB")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(InputError, match="no file of its folder"):
        load_decoder(folder)


def test_the_logits_of_a_folder_are_compared_when_it_is_loaded_and_the_result_is_in_its_source(folder):
    compared = load_model("llama", beside=folder.parent).source["compared"]
    assert compared["tokens"] == 64
    assert 0 <= compared["largest_difference"] < 1e-4 < compared["largest_logit"]


def test_a_model_read_otherwise_is_an_error_with_its_size(folder):
    model = load_decoder(folder)
    model.norm.weight.mul_(1.1)
    with pytest.raises(InputError, match=r"a logit differs by [\d.]+, where the largest is"):
        compare(model, folder)


def test_a_content_is_compared_once_wherever_it_lies(folder, tmp_path, monkeypatch):
    first = compare(load_decoder(folder), folder)
    monkeypatch.setattr(comparing, "_their_logits", None)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert compare(load_decoder(moved), moved) == first
    change_config(moved, rms_norm_eps=1e-5)
    with pytest.raises(TypeError):
        compare(load_decoder(moved), moved)


def test_a_result_of_another_version_of_transformers_is_not_taken(folder, monkeypatch):
    compare(load_decoder(folder), folder)
    monkeypatch.setattr(comparing, "version", lambda package: "9.0")
    monkeypatch.setattr(comparing, "_their_logits", None)
    with pytest.raises(TypeError):
        compare(load_decoder(folder), folder)


@pytest.mark.parametrize("name", ["standard", "adhd"])
def test_the_packaged_models_carry_their_result(name, monkeypatch):
    from tiny_pair import PACKAGED

    monkeypatch.setattr(comparing, "_their_logits", None)
    assert "compared" in load_model(name, beside=PACKAGED).source, "run experiments/compare_packaged.py"
