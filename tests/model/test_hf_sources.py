"""A folder or object that the native decoder does not compute is run by `transformers`; what it reads stays native."""

import json
from pathlib import Path

import pytest
import torch
from hf_models import tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from sae_steer.errors import InputError
from sae_steer.info import describe
from sae_steer.model.adapting import adapt
from sae_steer.model.decoder import Decoder
from sae_steer.model.hf.model import HFModel
from sae_steer.model.sources import load_model

TOKENS = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(7))
PLAIN = {"attention_bias": False, "mlp_bias": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def check_as_loaded(ours, folder: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(folder).float()(TOKENS).logits
    assert (ours(TOKENS) - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", ["Qwen2", "Gemma 3", "GPT-2", "Llama with biases"])
def test_a_folder_that_no_decoder_computes_is_run_by_transformers(tmp_path, name):
    save(tiny(name), tmp_path / "model")
    loaded = load_model("model", beside=tmp_path)
    assert isinstance(loaded.model, HFModel)
    check_as_loaded(loaded.model, tmp_path / "model")
    assert loaded.source["replay"] == "masked"
    assert "transformers runs it" in loaded.notes[0]


def test_a_plain_llama_is_read_natively_unless_transformers_is_asked_for(tmp_path):
    folder = save(tiny("Llama with biases", **PLAIN), tmp_path / "model")
    assert isinstance(load_model("model", beside=tmp_path).model, Decoder)
    asked = load_model("hf:model", beside=tmp_path)
    assert isinstance(asked.model, HFModel)
    check_as_loaded(asked.model, folder)


def test_a_repository_is_read_through_transformers_from_the_files_put_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = save(tiny("Qwen3"), tmp_path / "hub/an-org/a-model")
    loaded = load_model("hf:an-org/a-model", beside=tmp_path / "pair")
    check_as_loaded(loaded.model, folder)
    assert loaded.source["from"] == "hub:an-org/a-model"


def test_weights_take_the_type_that_the_config_states(tmp_path):
    folder = save(tiny("Qwen2"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    loaded = load_model("model", beside=tmp_path).model
    assert loaded.dtype == torch.float32
    check_as_loaded(loaded, folder)


def test_info_says_who_runs_a_folder_and_how_a_llama_compares(tmp_path):
    said, whole = describe(save(tiny("Qwen2"), tmp_path / "qwen"))
    assert whole
    assert "3 layers of width 32" in said
    assert "Qwen2ForCausalLM, run by transformers" in said
    said, _ = describe(save(tiny("Llama with biases", **PLAIN), tmp_path / "llama"))
    assert "logits of 64 tokens as transformers" in said


def drop_norm(tensors: dict) -> None:
    del tensors["model.norm.weight"]


def widen(tensors: dict) -> None:
    tensors["model.norm.weight"] = torch.ones(33)


@pytest.mark.parametrize(("change", "told"), [(drop_norm, "missing: model.norm"), (widen, r"model\.norm")])
def test_weights_that_transformers_would_make_up_are_refused(tmp_path, change, told):
    folder = save(tiny("Qwen2"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=told) as refused:
        load_model("model", beside=tmp_path)
    assert "\n" not in str(refused.value)


def test_a_tensor_that_transformers_leaves_out_is_told(tmp_path):
    folder = save(tiny("Qwen2"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.extra.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    loaded = load_model("model", beside=tmp_path)
    assert loaded.source["left_out"] == ["model.extra.weight"]
    assert "left out: model.extra.weight" in loaded.notes[-1]


def test_a_folder_that_neither_reads_is_refused_in_one_line_with_both_reasons(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    with pytest.raises(InputError, match=r"model_type 'unheard-of'.*transformers cannot load") as refused:
        load_model("model", beside=tmp_path)
    assert "\n" not in str(refused.value)


def test_a_plain_llama_in_memory_becomes_a_decoder_and_one_that_is_hooked_stays_itself():
    model = tiny("Llama with biases", **PLAIN)
    native = adapt(model)
    assert isinstance(native, Decoder)
    hook = model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 0.5)
    hooked = adapt(model)
    hook.remove()
    assert isinstance(hooked, HFModel)


@pytest.mark.parametrize("name", ["Qwen2", "GPT-2"])
def test_a_transformer_bridge_is_run_as_what_it_bridges_to(tmp_path, monkeypatch, name):
    from transformer_lens.model_bridge import TransformerBridge

    model = tiny(name)
    with torch.no_grad():
        expected = model(TOKENS).logits
    bridge = TransformerBridge.boot_transformers(str(save(model, tmp_path)), hf_model=model)
    ours = adapt(bridge)
    with torch.no_grad():
        assert (ours(TOKENS) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_is_no_model_is_refused_by_its_kind():
    with pytest.raises(InputError, match="a dict cannot be a model of a pair"):
        adapt({})
