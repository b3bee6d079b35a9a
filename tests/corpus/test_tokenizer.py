import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sae_steer.corpus import SPECIALS, PlanTokenizer
from sae_steer.errors import InputError, SteerError

NASTY = [
    "",
    " ",
    "  two  spaces ",
    "\n\t\r\n",
    "nul \0 inside",
    "emoji 👩‍👩‍👧‍👦 and 😀",
    "漢字かな交じり文",
    "é e\u0301 ﷺ \u202e",
    "a <|sep|> in a title<|end|>",
    "<|sep|",
    " unused 1533",
    "x" * 3000,
]


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_survives_the_round_trip(small, large, text):
    for tokenizer in (small, large):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode_text(text)) == text


@given(text=st.text())
def test_any_text_survives_the_round_trip(small, text):
    assert small.decode(small.encode_text(text)) == text


@given(text=st.text() | st.lists(st.sampled_from([*SPECIALS, "<|", "|>", "a "])).map("".join))
def test_typed_text_never_becomes_a_control_token(small, text):
    assert not set(small.encode_text(text)) & set(small.specials.values())


def test_corpus_texts_survive_the_round_trip_and_parse_their_delimiters(small, large, train_texts):
    for tokenizer in (small, large):
        text = train_texts["adhd"][0]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert ids.count(tokenizer.token_id("<|sep|>")) == text.count("<|sep|>")
        assert tokenizer.encode_batch(train_texts["adhd"][:20]) == [
            tokenizer.encode(text) for text in train_texts["adhd"][:20]
        ]


def test_specials_follow_the_merges_and_pad_is_last(small, large):
    for tokenizer, merges in ((small, 1024), (large, 8192)):
        assert tokenizer.n_vocab == merges + 5
        assert tokenizer.specials == {token: merges + row for row, token in enumerate(SPECIALS)}
        assert tokenizer.pad_id == merges + 4


def test_rows_without_a_merge_are_filled_and_unreachable(small, large, train_texts):
    assert small.unused == 0
    assert 3000 < large.unused < 7000
    fillers = range(8192 - large.unused, 8192)
    assert all(large.decode([row]) == f" unused {row}" for row in fillers)
    used = {row for text in train_texts["adhd"] + NASTY for row in large.encode(text) + large.encode_text(text)}
    assert used.isdisjoint(fillers)
    assert all(row not in fillers for row in large.encode_text("".join(f" unused {row}" for row in fillers)))


def test_training_twice_gives_the_same_bytes(small, train_texts):
    again = PlanTokenizer.train((t for texts in train_texts.values() for t in texts), merges_vocab=1024)
    assert again.content == small.content


def test_no_merge_crosses_a_special_token(small):
    crossing = PlanTokenizer.train(["a<|sep|>b"] * 50, merges_vocab=300)
    assert crossing.unused == 300 - 256
    assert "sep" not in Tokenizer.from_str(crossing.content).get_vocab()


def test_saved_and_loaded_it_is_the_same(small, tmp_path):
    path = small.save(tmp_path / "deep" / "tokenizer.json")
    loaded = PlanTokenizer.load(path)
    assert loaded.content == small.content
    assert loaded.sha256 == small.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_prompt_ends_where_the_plan_begins(small):
    title = "Clean <|sep|> the kitchen"
    ids = small.encode_prompt(title)
    assert small.decode(ids) == f"<|task|>{title}<|steps|>"
    assert [row for row in ids if row >= 1024] == [small.token_id("<|task|>"), small.token_id("<|steps|>")]


@given(st.data())
def test_ends_count_the_characters_each_token_finishes(small, data):
    text = data.draw(st.text(max_size=30) | st.sampled_from(NASTY[:-1]))
    ids = small.encode(text)
    ends = [end for _, end in small.detokenized(ids).spans]
    whole = [small.decode(ids[: at + 1]) for at in range(len(ids))]
    assert [end for end, part in zip(ends, whole, strict=True) if "\ufffd" not in part] == [
        len(part) for part in whole if "\ufffd" not in part
    ]
    assert ends == sorted(ends)


def test_another_models_tokenizer_loads_without_our_specials(tmp_path):
    other = Tokenizer(models.WordLevel({"[UNK]": 0, "▁Sip": 1, "▁water": 2}, unk_token="[UNK]"))
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    other.decoder = decoders.Metaspace()
    other.add_special_tokens(["<s>"])
    other.enable_padding(length=20)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = PlanTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.specials == {}
    assert loaded.pad_id is None
    assert loaded.control_ids == {3}
    assert loaded.encode("Sip water") == [1, 2]
    assert loaded.decode([1, 2]) == "Sip water"
    assert loaded.detokenized([1, 2]).spans == ((0, 3), (3, 9))
    with pytest.raises(InputError, match=r"no token '<\|sep\|>'"):
        loaded.token_id("<|sep|>")


@pytest.mark.parametrize("content", [b"", b"not json", b"{}", b"[]", b"\xff\xfe", json.dumps({"model": 3}).encode()])
def test_a_bad_file_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(SteerError, match=r"tokenizer\.json"):
        PlanTokenizer.load(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        PlanTokenizer.load(tmp_path / "tokenizer.json")


def test_fewer_rows_than_bytes_are_refused():
    with pytest.raises(InputError, match="256"):
        PlanTokenizer.train(["a"], merges_vocab=100)
