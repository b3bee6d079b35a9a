"""A pair folder is whole and consistent, or refused in a line that names the fault."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from lens_models import gpt2_like
from tiny_pair import PACKAGED, SHAPE, lively, pair_facts

from sae_steer.corpus import PlanTokenizer
from sae_steer.errors import InputError
from sae_steer.info import describe
from sae_steer.model.loading import load_decoder, save_decoder
from sae_steer.pair.model_pair import NamedModel, load_pair, write_pair_toml


def refusal(folder) -> str:
    with pytest.raises(InputError) as refused:
        load_pair(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def without(facts: dict, key: str) -> dict:
    *path, last = key.split(".")
    inner = facts
    for part in path:
        inner = inner[part]
    del inner[last]
    return facts


def test_a_packaged_pair_is_found_by_name_and_by_folder(pair):
    by_folder = load_pair(PACKAGED)
    assert (pair.name, pair.reference.name, pair.target.name) == ("small", "standard", "adhd")
    assert by_folder.sha256 == pair.sha256
    assert pair.context == 512
    assert len(pair.phrases) >= 60


def test_models_are_found_by_name_and_by_role(tiny):
    assert tiny.model("adhd") is tiny.model("target") is tiny.target
    assert tiny.model("standard") is tiny.model("reference") is tiny.reference
    with pytest.raises(InputError, match="no model 'base'; it has 'standard' and 'adhd'"):
        tiny.model("base")


def test_a_layer_only_one_model_has_is_refused(folder):
    save_decoder(lively(replace(SHAPE, n_layers=2), 1), folder / "standard", dtype=torch.float32)
    pair = load_pair(folder)
    pair.check_layer(1)
    with pytest.raises(InputError, match="model 'standard' has no layer 2; it has layers 0 to 1"):
        pair.check_layer(2)


def test_the_hash_changes_with_whatever_a_result_depends_on_and_with_nothing_else(folder, tiny, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    assert load_pair(moved).sha256 == load_pair(folder).sha256 == tiny.sha256
    hashes = {tiny.sha256}
    for change in (
        {"context": 256},
        {"onset": {"tokens": ["<|sep|>"]}},
        {"onset": {"regex": "a"}},
        {"target": {**pair_facts()["target"], "phrases": ["Sip water"]}},
        {"reference": {"name": "standard", "model": "adhd"}},
        {"reference": {"name": "base", "model": "standard"}},
    ):
        write_pair_toml(folder, pair_facts(**change))
        hashes.add(load_pair(folder).sha256)
    assert len(hashes) == 7


@pytest.mark.parametrize(
    "key", ["tokenizer", "context", "reference", "target", "reference.name", "reference.model", "target.model",
            "target.phrases"],
)  # fmt: skip
def test_a_missing_key_is_named(folder, key):
    write_pair_toml(folder, without(pair_facts(), key))
    assert f"pair.toml has no {key}" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"context": "512"}, "context = '512', which is no int"),
        ({"reference": "standard"}, "no reference.name"),
        ({"onset": {"tokens": "<|sep|>"}}, "onset.tokens = '<|sep|>', which is no list"),
        ({"onset": {"tokens": [1]}}, "onset.tokens = [1], which is no list of strings"),
        ({"onset": {}}, "neither onset.tokens nor onset.regex"),
        ({"onset": {"tokens": ["<|step|>"]}}, "no token '<|step|>'"),
        ({"context": 513}, "context 513, and model 'standard' reads 1 to 512"),
        ({"context": 0}, "context 0, and model"),
        ({"reference": {"name": "adhd", "model": "standard"}}, "two different names"),
        ({"reference": {"name": "a/b", "model": "standard"}}, "two different names"),
        ({"tokenizer": "none.json"}, "none.json"),
        ({"reference": {"name": "standard", "model": "nowhere"}}, "no config.json"),
    ],
)  # fmt: skip
def test_a_fault_in_pair_toml_is_named(folder, change, told):
    write_pair_toml(folder, pair_facts(**change))
    assert told in refusal(folder)


def test_what_is_no_toml_and_what_is_no_pair_is_refused(folder, tmp_path):
    (folder / "pair.toml").write_text("tokenizer = ")
    assert "is not a TOML file" in refusal(folder)
    assert "a packaged pair (interpgpt, small" in refusal(tmp_path / "nowhere")
    assert "give a folder with a pair.toml" in refusal("no-such-pair")


def test_a_tokenizer_with_more_ids_than_embedding_rows_is_refused(folder):
    save_decoder(lively(replace(SHAPE, d_vocab=1000), 1), folder / "adhd", dtype=torch.float32)
    told = refusal(folder)
    assert "makes ids up to 1028" in told
    assert "model 'adhd' has 1000 embedding rows" in told


def swap(path, first: str, second: str) -> None:
    """Exchange the ids of two tokens of a tokenizer.json."""
    facts = json.loads(path.read_text())
    vocab = facts["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(facts))


def test_a_models_own_tokenizer_that_disagrees_is_refused(folder):
    own = folder / "adhd" / "tokenizer.json"
    shutil.copy(folder / "tokenizer.json", own)
    assert load_pair(folder).target.name == "adhd"
    swap(own, "a", "b")
    ids = sorted(json.loads(own.read_text())["model"]["vocab"][token] for token in "ab")
    assert f"disagrees with the pair's on ids {ids[0]}, {ids[1]};" in refusal(folder)


def test_disagreements_are_ids_both_have_for_different_tokens(tmp_path):
    ours = PlanTokenizer.load(PACKAGED / "tokenizer.json")
    assert ours.disagreements(ours) == []
    path = ours.save(tmp_path / "tokenizer.json")
    facts = json.loads(path.read_text())
    facts["added_tokens"].append({**facts["added_tokens"][-1], "id": ours.n_vocab, "content": "<|new|>"})
    path.write_text(json.dumps(facts))
    longer = PlanTokenizer.load(path)
    assert longer.n_vocab == ours.n_vocab + 1
    assert ours.disagreements(longer) == longer.disagreements(ours) == []
    swap(path, "x", "y")
    both = sorted(facts["model"]["vocab"][token] for token in "xy")
    assert PlanTokenizer.load(path).disagreements(ours) == ours.disagreements(PlanTokenizer.load(path)) == both


def test_a_pair_of_one_model_twice_is_the_same_model_under_two_names(folder):
    write_pair_toml(folder, pair_facts(reference={"name": "standard", "model": "adhd"}))
    pair = load_pair(folder)
    assert pair.reference.sha256 == pair.target.sha256
    assert torch.equal(pair.reference.model.W_U, load_decoder(folder / "adhd").W_U)


def test_a_pair_is_made_of_transformer_lens_models_in_memory_and_checked_alike(tiny):
    base, tuned = (NamedModel.of(name, gpt2_like(seed=seed)) for seed, name in enumerate(("base", "tuned")))
    made = replace(tiny, name="lens", reference=base, target=tuned)
    again = replace(made, target=NamedModel.of("tuned", gpt2_like(seed=1)))
    assert made.sha256 == again.sha256 != replace(made, target=NamedModel.of("tuned", gpt2_like(seed=2))).sha256
    with pytest.raises(InputError, match="model 'base' has no layer 3; it has layers 0 to 2"):
        made.check_layer(3)
    with pytest.raises(InputError, match="model 'base' has 1000 embedding rows"):
        replace(made, reference=NamedModel.of("base", gpt2_like(d_vocab=1000)))


def test_a_pair_file_names_a_transformer_lens_model(folder, monkeypatch):
    from transformer_lens import HookedTransformer

    def loads(name):
        return gpt2_like(seed={"a/base": 0, "a/tuned": 1}[name])

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", loads)
    changed = pair_facts(reference={"name": "base", "model": "tl:a/base"})
    changed["target"]["model"] = "tl:a/tuned"
    write_pair_toml(folder, changed)
    pair = load_pair(folder)
    assert pair.reference.sha256 == NamedModel.of("base", gpt2_like(seed=0)).sha256
    assert pair.target.source == {"from": "tl:a/tuned"}


def test_info_says_what_a_pair_is_and_what_keeps_it_from_being_whole(folder):
    said, whole = describe(folder)
    assert whole
    assert "reference standard: standard, 3 layers of width 32, 1029 rows, context 512" in said
    assert "a step begins after <|steps|> or <|sep|>" in said
    assert f"{len(pair_facts()['target']['phrases'])} target phrases" in said
    assert describe(folder / "adhd")[0].startswith("model: 3 layers of width 32")
    (folder / "adhd" / "model.safetensors").unlink()
    said, whole = describe(folder)
    assert not whole
    assert "not whole" in said
    assert "no whole model.safetensors" in said
