"""What a pair file calls a model is found as a folder, on the Hub or its cache, or told where its files belong."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_pair import PACKAGED, SHAPE, lively

from sae_steer.errors import InputError
from sae_steer.model.hub import hub_folder
from sae_steer.model.loading import save_decoder
from sae_steer.model.sources import load_model
from sae_steer.pair.model_pair import load_pair


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """An empty current folder, an empty cache, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def write_release(folder: Path, seed: int) -> None:
    """A released folder in small: published keys in its config, fused names, a tokenizer beside."""
    folder.mkdir(parents=True)
    config = {"model_type": "interpgpt", "vocab_size": 1029, "max_seq_len": 512, "n_layers": 3, "n_heads": 4}
    (folder / "config.json").write_text(json.dumps({**config, "d_model": 32, "d_ff": 96, "bias": False}))
    model = lively(SHAPE.__class__(**{**vars(SHAPE), "d_mlp": 64}), seed)
    tensors = {"_orig_mod." + name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layer in range(3):
        at = f"_orig_mod.layers.{layer}.self_attn"
        tensors[f"{at}.qkv_proj.weight"] = torch.cat([tensors.pop(f"{at}.{part}_proj.weight") for part in "qkv"])
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(PACKAGED / "tokenizer.json", folder / "tokenizer.json")


def test_a_repository_that_is_not_there_is_told_with_the_files_to_put_where():
    with pytest.raises(InputError) as refused:
        hub_folder("connaaa/interpgpt-standard-23M")
    line = str(refused.value)
    assert "put config.json, model.safetensors (or a .pt file) and tokenizer.json of " in line
    assert "into hub/connaaa/interpgpt-standard-23M/ here" in line
    assert "\n" not in line


@pytest.mark.parametrize("named", ["gpt2", "a/b/c", "../b", "a/..", "a/b c"])
def test_what_names_no_repository_is_refused(named):
    with pytest.raises(InputError, match="names no repository"):
        hub_folder(named)


def test_the_packaged_interpgpt_pair_loads_the_released_files_put_here_and_prints_its_key_map(capsys):
    for seed, name in enumerate(("standard", "adhd")):
        write_release(Path("hub/connaaa", f"interpgpt-{name}-23M"), seed)
    pair = load_pair("interpgpt")
    assert [model.name for model in pair.models] == ["standard", "adhd"]
    assert pair.target.source["from"] == "hub:connaaa/interpgpt-adhd-23M"
    assert pair.reference.source["key_map"]["_orig_mod.norm.weight"] == ["norm.weight"]
    assert pair.tokenizer.sha256 == load_pair("small").tokenizer.sha256
    told = capsys.readouterr().err
    assert told.count("_orig_mod.layers.*.self_attn.qkv_proj.weight -> layers.*.self_attn.q_proj.weight, ") == 2
    assert "fused projections: blocks, gate-first" in told


def test_a_repository_in_the_hubs_own_cache_is_read_from_there(tmp_path):
    inside = tmp_path / "cache" / "models--me--mine"
    save_decoder(lively(SHAPE, 1), inside / "snapshots" / "c0ffee", dtype=torch.float32)
    (inside / "refs").mkdir()
    (inside / "refs" / "main").write_text("c0ffee")
    loaded = load_model("hub:me/mine", beside=tmp_path)
    assert torch.equal(loaded.model.W_U, lively(SHAPE, 1).W_U)
    assert loaded.tokenizer is None
    shutil.copy(PACKAGED / "tokenizer.json", inside / "snapshots" / "c0ffee" / "plan_tokenizer.json")
    content, name = load_model("hub:me/mine", beside=tmp_path).tokenizer
    assert content == (PACKAGED / "tokenizer.json").read_text()
    assert name.endswith("plan_tokenizer.json")


def test_only_data_is_asked_for_and_bundles_only_where_there_is_nothing_else(tmp_path, monkeypatch):
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub_folder("me/mine@v1")
    assert [(repository, revision) for repository, revision, _ in asked] == [("me/mine", "v1")] * 2
    assert not any(pattern.endswith((".py", ".bin", "*")) for _, _, patterns in asked for pattern in patterns)
    assert ["*.pt" in patterns for _, _, patterns in asked] == [False, True]
    (tmp_path / "model.safetensors").touch()
    hub_folder("me/mine")
    assert len(asked) == 3
