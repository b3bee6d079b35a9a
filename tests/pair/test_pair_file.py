"""What a pair file and a text file may say: everything else is a line that names the nearest right thing."""

import json
import re
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from tiny_pair import SHAPE, lively, pair_facts

from sae_steer.cache import cache_activations
from sae_steer.cli import main
from sae_steer.errors import InputError
from sae_steer.model.loading import save_decoder
from sae_steer.pair.model_pair import ModelPair, NamedModel, load_pair, write_pair_toml
from sae_steer.pair.texts import GeneratedTexts, TextFile
from sae_steer.settings import CorpusSettings


def refusal(folder) -> str:
    with pytest.raises(InputError) as refused:
        load_pair(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"special_token": True}, "has special_token, which is no key of a pair file; did you mean 'special_tokens'?"),
        (
            {"onset": {"tokens": ["<|sep|>"], "special_tokens": True}},
            "has onset.special_tokens, .*; special_tokens stands above the first",
        ),
        (
            {"target": {**pair_facts()["target"], "lenient_words": ["water"]}},
            "target.lenient_words, .*; did you mean 'target.lenient'",
        ),
        ({"onset": {"tokens": ["<|sep|>"], "phrases": ["a"]}}, "onset.phrases, .*; phrases stands in target"),
        ({"onset": {"token": ["<|sep|>"]}}, "onset.token, .*; did you mean 'onset.tokens'"),
        ({"onsets": {"tokens": ["<|sep|>"]}}, "has onsets, .*; did you mean 'onset'"),
        ({"contxt": 512}, "has contxt, .*; did you mean 'context'"),
        ({"name": "mine"}, "has name, .*; name stands in reference or target or twin"),
        ({"context": True}, "context = True, which is no int"),
        ({"onset": {"tokens": ["<|sep|>"], "regex": "a"}}, "has onset.tokens and onset.regex; .* by one of them"),
        ({"onset": {"regex": "("}}, "does not compile"),
        ({"target": {"name": "adhd", "model": "adhd", "phrases": []}}, "no target phrases; list in target.phrases"),
        ({"target": {"name": "adhd", "model": "adhd", "phrases": ["a", " "]}}, "an empty one among its target phrases"),
        ({"reference": {"name": "target", "model": "standard"}}, "the reference model .* is called 'target', which"),
        (
            {"reference": {"name": "twin", "model": "adhd"}, "twin": {"name": "again", "model": "adhd"}},
            "is called 'twin', which means the twin model",
        ),
        ({"reference": {"name": ".", "model": "standard"}}, "letters, digits"),
        ({"reference": {"name": "..", "model": "standard"}}, "letters, digits"),
        ({"twin": {"name": "adhd", "model": "standard"}}, "'standard' and 'adhd' and 'adhd'"),
        ({"twin": {"name": "again"}}, "has no twin.model"),
    ],
)
def test_what_no_pair_file_may_say_is_refused(folder, change, told):
    write_pair_toml(folder, pair_facts(**change))
    assert re.search(told, refusal(folder))


def test_a_file_nested_too_deep_is_refused_in_one_line(folder):
    (folder / "pair.toml").write_text("a = " + "[" * 100_000 + "]" * 100_000)
    assert "nested too deep" in refusal(folder) or "is not a TOML file" in refusal(folder)


def test_info_says_which_key_nobody_knows_and_shows_no_terminal_escape(folder):
    text = (folder / "pair.toml").read_text()
    (folder / "pair.toml").write_text("special_token = true\n" + text)
    result = CliRunner().invoke(main, ["info", str(folder)])
    assert result.exit_code == 1
    assert "special_token, which is no key of a pair file; did you mean 'special_tokens'?" in result.output
    (folder / "pair.toml").write_text(text.replace("phrases = [", 'phrases = [\n"\\u001b[2Jgone",'))
    result = CliRunner().invoke(main, ["info", str(folder)])
    assert "gone" in result.output
    assert "\x1b" not in result.output


def test_a_twin_is_read_when_it_is_asked_for_and_checked_like_the_others(folder):
    plain = load_pair(folder).sha256
    write_pair_toml(folder, pair_facts(twin={"name": "again", "model": "nowhere"}))
    pair = load_pair(folder)
    assert pair.sha256 == plain
    with pytest.raises(InputError, match=r"no config\.json"):
        _ = pair.twin
    save_decoder(lively(SHAPE, 3), folder / "nowhere", dtype=torch.float32)
    assert pair.twin is pair.model("twin") is pair.model("again")
    assert pair.twin.name == "again"
    with pytest.raises(InputError, match="no model 'x'; it has 'standard', 'adhd' and 'again'"):
        pair.model("x")
    save_decoder(lively(replace(SHAPE, d_vocab=1000), 3), folder / "nowhere", dtype=torch.float32)
    with pytest.raises(InputError, match="model 'again' has 1000 embedding rows"):
        _ = load_pair(folder).twin
    assert load_pair(write_pair_toml(folder, pair_facts()).parent).twin is None


def test_a_pair_in_memory_is_held_against_what_its_fields_are(tiny):
    facts = {name: getattr(tiny, name) for name in ("name", "reference", "target", "tokenizer", "onsets", "phrases")}
    third = NamedModel("again", lively(SHAPE, 3))
    pair = ModelPair(**{**facts, "phrases": list(tiny.phrases)}, context=64, third=third)
    assert pair.twin is third
    assert pair.phrases == tiny.phrases
    with pytest.raises(InputError, match=r"ModelPair\.phrases is 'Sip water', and takes a sequence, each text"):
        ModelPair(**{**facts, "phrases": "Sip water"}, context=64)
    with pytest.raises(InputError, match=r"ModelPair.context is 64.5, and takes a whole number"):
        ModelPair(**facts, context=64.5)
    with pytest.raises(InputError, match=r"ModelPair\.reference is .*, and takes a NamedModel"):
        ModelPair(**{**facts, "reference": tiny.reference.model}, context=64)


def write_lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "a", "varient": "adhd"}, "line 2: 'varient' is no key of a text; did you mean 'variant'"),
        ({"text": "a", "split": "train"}, "line 2: 'split' is no key of a text; there is 'rendering', 'task', 'text'"),
        ({"text": "a", "rendering": "adhd", "variant": "adhd"}, 'line 2: "variant" is the older name of "rendering"'),
        ('{"text": "a", "text": "b"}', 'line 2: "text" stands twice'),
        ('{"text": "a \\ud800 b"}', "line 2: half of a surrogate pair"),
        ({"text": "a", "rendering": 3}, 'line 2: "rendering" is no string'),
        ("[" * 100_000 + "]" * 100_000, 'line 2: (nested too deep|not JSON|no "text")'),
    ],
)
def test_what_no_line_of_a_text_file_may_say_is_refused(tmp_path, row, told):
    with pytest.raises(InputError, match=told) as refused:
        TextFile.read(write_lines(tmp_path / "a.jsonl", {"text": "good"}, row))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["Adhd", "base", "target", None])
def test_a_rendering_that_is_no_models_is_refused_with_the_names(tiny, tmp_path, name):
    rows = [{"text": "a", "rendering": "adhd"}, {"text": "b", "rendering": name}]
    source = TextFile.read(write_lines(tmp_path / "a.jsonl", *rows))
    with pytest.raises(InputError, match=r"line 2: .*name the model whose kind of text it is, 'standard' or 'adhd'"):
        cache_activations(tiny, out=tmp_path / "cache", layers=[1], source=source)
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_more_renderings_than_the_labels_can_number_are_refused(tiny, tmp_path):
    source = GeneratedTexts(CorpusSettings(), variants=tuple(map(str, range(257))))
    with pytest.raises(InputError, match="257 renderings, and a cache numbers 256"):
        cache_activations(tiny, out=tmp_path / "cache", layers=[1], source=source)
    assert list(tmp_path.iterdir()) == []
