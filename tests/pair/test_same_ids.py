"""Both models read the same ids, or the pair is refused with the ids; widths and depths may differ where they can."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_pair import SHAPE, lively, pair_facts

from sae_steer.cache import cache_activations
from sae_steer.dictionary import train_sae
from sae_steer.errors import InputError
from sae_steer.findings.layer_probability import layer_probability
from sae_steer.model.loading import save_decoder
from sae_steer.pair.model_pair import load_pair, write_pair_toml
from sae_steer.pair.quality import basis_by_layer
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.scan import scan_features
from sae_steer.settings import CorpusSettings, LayersSettings, SAESettings

CORPUS = CorpusSettings(train_plans=30, scan_plans=10, tune_plans=4, confirm_plans=6)


def change_tokenizer(path, change) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


def own_tokenizer(folder, change, model: str = "adhd"):
    """Give a model its own tokenizer, changed."""
    own = folder / model / "tokenizer.json"
    shutil.copy(folder / "tokenizer.json", own)
    change_tokenizer(own, change)
    return load_pair(folder)


def test_rows_that_only_one_tokenizer_has_change_nothing(folder):
    save_decoder(lively(replace(SHAPE, d_vocab=1031), 2), folder / "adhd", dtype=torch.float32)

    def chat(facts):
        facts["added_tokens"].append({**facts["added_tokens"][-1], "id": 1029, "content": "<|im_start|>"})

    pair = own_tokenizer(folder, chat)
    text = "<|task|>Clean the kitchen<|steps|>Sip water<|sep|><|end|>"
    assert pair.encode(text, "a text") == pair.tokenizer.encode(text)
    with pytest.raises(InputError, match=r"a text is read as ids \[.*1029.*\] by that of model 'adhd'|as \[1029"):
        pair.encode("<|im_start|>" + text, "a text")


def test_merges_that_give_other_ids_are_refused_where_a_text_is_read(folder):
    pair = own_tokenizer(folder, lambda facts: facts["model"].update(merges=facts["model"]["merges"][:50]))
    with pytest.raises(InputError) as refused:
        cache_activations(pair, layers=[1], out=folder / "cache", source=GeneratedTexts(CORPUS))
    line = str(refused.value)
    assert "plan 0 of 'train'" in line
    assert "as ids [" in line
    assert "both models must read the same ids" in line


def test_a_delimiter_with_another_id_is_refused(folder):
    save_decoder(lively(replace(SHAPE, d_vocab=1200), 2), folder / "adhd", dtype=torch.float32)
    write_pair_toml(folder, pair_facts(onset={"tokens": ["a"]}))
    here = load_pair(folder).tokenizer.token_id("a")
    with pytest.raises(InputError, match=f"'a' is id {here} in .* and id 1100 in that of model 'adhd'"):
        own_tokenizer(folder, lambda facts: facts["model"]["vocab"].update(a=1100))


def test_without_a_named_tokenizer_the_reference_models_own_is_read(folder):
    facts = pair_facts()
    del facts["tokenizer"]
    write_pair_toml(folder, facts)
    with pytest.raises(InputError, match="no tokenizer, and model 'standard' came without one"):
        load_pair(folder)
    shutil.move(folder / "tokenizer.json", folder / "standard" / "tokenizer.json")
    assert load_pair(folder).tokenizer.n_vocab == 1029


def test_the_tokenizers_own_template_is_put_around_texts_if_asked_for_and_changes_the_hash(folder):
    def template(facts):
        begin = {"id": "<|task|>", "ids": [1024], "tokens": ["<|task|>"]}
        facts["post_processor"] = {
            "type": "TemplateProcessing", "special_tokens": {"<|task|>": begin}, "pair": [],
            "single": [{"SpecialToken": {"id": "<|task|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        }  # fmt: skip

    change_tokenizer(folder / "tokenizer.json", template)
    plain = load_pair(folder)
    write_pair_toml(folder, pair_facts(special_tokens=True))
    framed = load_pair(folder)
    assert framed.encode("ab", "a text") == [1024, *plain.encode("ab", "a text")]
    assert framed.sha256 != plain.sha256


def test_models_of_other_width_and_depth_share_what_needs_one_model_and_are_refused_elsewhere(folder, tmp_path):
    wide = replace(SHAPE, d_model=40, n_layers=2, d_head=10)
    save_decoder(lively(wide, 1), folder / "standard", dtype=torch.float32)
    pair = load_pair(folder)
    with pytest.raises(InputError, match="model 'standard' has no layer 2; it has layers 0 to 1"):
        cache_activations(pair, layers=[2], out=tmp_path / "none", source=GeneratedTexts(CORPUS))
    cache = cache_activations(pair, layers=[1], out=tmp_path / "cache", source=GeneratedTexts(CORPUS))
    settings = SAESettings(d_sae=48, k=6, rows=2_000, batch_size=208, precision="float32")
    for model, width in (("standard", 40), ("adhd", 32)):
        dictionary = train_sae(cache, model=model, layer=1, out=tmp_path / model, settings=settings)
        assert dictionary.sae.config.d_in == width
    with pytest.raises(InputError, match="reads 32 dimensions, and model 'standard' has 40"):
        scan_features(cache, dictionary)
    curves = layer_probability(pair, cache, settings=LayersSettings(prompts=3, bootstrap_draws=20))["curves"]
    assert {curve["model"]: len(curve["layers"]) for curve in curves} == {"standard": 2, "adhd": 3}
    assert [row["identity_r2"] for row in basis_by_layer(pair, seed=0)] == [None, None]
