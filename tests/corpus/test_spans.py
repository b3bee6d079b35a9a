"""Onsets from character offsets: every family of tokenizers, scripts and delimiters, held against a search of one's
own through the offsets that `tokenizers` gives."""

import re
import time

import pytest
from foreign_tokenizers import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from sae_steer.corpus import OnsetRule, PlanTokenizer, count_first_tokens, label_positions
from sae_steer.errors import InputError

TOKENIZERS = {name: make() for name, make in FAMILIES.items()}
EMOJI = "Dish 👍\nChop 👍\nTaste it"
TEXTS = {
    "emoji before a line break": (EMOJI, r"\n"),
    "a family of joined emoji": ("Dish 👩‍👩‍👧\nChop 👩‍👩‍👧\nTaste it", r"\n"),
    "CJK, full stop": ("料理。切る。味見。Taste it。", "。"),
    "CJK, a delimiter out of the vocabulary": ("料理・切る・味見・Taste it", "・"),
    "ideographic space": ("料理\u3000切る\u3000Taste it", "\u3000"),
    "Arabic, right to left": ("Step|مرحبا|Taste it|שלום", r"\|"),
    "Devanagari with combining vowels": ("Dish » नमस्ते » Taste it", "»"),
    "decomposed accents": ("Cafe\u0301 ; e\u0301t\u00e9 ; Taste it", ";"),
    "a delimiter of several tokens": ("Dish\n10) Chop\n11) Taste it\n", r"\n\d+\)"),
    "tabs and blank lines": ("Dish\n\n\tChop\n\n\tTaste it", r"\n\n\t"),
    "special tokens in the text": ("Dish<s>|Chop<s>|Taste it", r"\|"),
}


def by_offsets(tokenizer: Tokenizer, text: str, regex: str) -> tuple[list[int], list[str]]:
    """(onsets, steps): the last token that reaches no further than the delimiter, and covers some of it or all up to
    it; by a plain search through every token for every delimiter."""
    read = tokenizer.encode(text)
    matches = list(re.finditer(regex, text))
    onsets, steps = [], []
    for number, match in enumerate(matches):
        ends_there = [at for at, (start, end) in enumerate(read.offsets) if start < end and end == match.end()]
        nearer = [at for at, (start, end) in enumerate(read.offsets)
                  if start < end < match.end() and not text[end : match.end()].strip()]  # fmt: skip
        stop = matches[number + 1].start() if number + 1 < len(matches) else len(text)
        step = re.split(r"<s>|\[SEP\]", text[match.end() : stop])[0].strip()
        if step:
            onsets.append(max(ends_there or nearer))
            steps.append(step)
    return onsets, steps


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("template", [False, True])
def test_onsets_and_steps_are_those_of_the_tokenizers_own_offsets(family, kind, template):
    text, regex = TEXTS[kind]
    text = text.replace("<s>", "[SEP]") if family == "WordPiece" else text
    tokenizer, rule = PlanTokenizer(TOKENIZERS[family].to_str(), template=template), OnsetRule(tokens=(), regex=regex)
    onsets, steps = by_offsets(TOKENIZERS[family], text, regex)
    read = tokenizer.tokenized(text)
    assert [at + (not template) for at, _ in rule.steps(read, tokenizer)] == onsets
    assert [step for _, step in rule.steps(read, tokenizer)] == steps
    labels = label_positions(read, tokenizer=tokenizer, rule=rule, phrases=("Taste it",))
    assert labels.next_is_target[labels.is_onset].tolist() == [step == "Taste it" for step in steps]


@pytest.mark.parametrize("family", ["byte fallback", "byte level"])
@pytest.mark.parametrize("kind", TEXTS)
def test_ids_alone_give_the_onsets_of_their_text(family, kind):
    text, regex = TEXTS[kind]
    tokenizer, rule = PlanTokenizer(TOKENIZERS[family].to_str()), OnsetRule(tokens=(), regex=regex)
    assert rule.steps(tokenizer.encode(text), tokenizer) == rule.steps(tokenizer.tokenized(text), tokenizer)


@given(text=st.text(alphabet="ab \n👍切é\u0301|", max_size=25))
@pytest.mark.parametrize("family", ["byte fallback", "byte level"])
def test_ids_decoded_one_by_one_end_where_the_offsets_end(family, text):
    tokenizer = PlanTokenizer(TOKENIZERS[family].to_str())
    read = tokenizer.tokenized("a" + text)  # no letter shares the blank that is put before a text
    scrambled = tokenizer.detokenized([*read.ids, 1, *read.ids])  # a second text begins without its prefix
    whole = tokenizer.detokenized(read.ids)
    assert whole.text == "a" + text
    assert [end for _, end in whole.spans] == [end for _, end in read.spans]
    assert [end for _, end in scrambled.spans[: len(read.ids)]] == [end for _, end in read.spans]
    assert scrambled.text == tokenizer.decode(scrambled.ids)


def test_ids_that_no_text_is_read_as_have_their_onsets_too():
    tokenizer = PlanTokenizer(TOKENIZERS["byte level"].to_str())
    spelled = [token for char in "Dish 👍\nChop\nTaste it" for token in tokenizer.encode(char)]
    assert spelled != tokenizer.encode("Dish 👍\nChop\nTaste it")
    steps = OnsetRule(tokens=(), regex=r"\n").steps(spelled, tokenizer)
    assert [step for _, step in steps] == ["Chop", "Taste it"]
    assert [tokenizer.decode(spelled[: at + 1]) for at, _ in steps] == ["Dish 👍\n", "Dish 👍\nChop\n"]


def test_a_delimiter_in_the_middle_of_a_token_has_no_onset():
    tokenizer = PlanTokenizer(TOKENIZERS["byte level"].to_str())
    text = "Dish Chop"
    assert [tokenizer.decode([token]) for token in tokenizer.encode(text)] == ["Di", "sh", " Ch", "op"]
    assert OnsetRule(tokens=(), regex="C").steps(tokenizer.tokenized(text), tokenizer) == []


def test_white_space_that_a_step_takes_from_its_delimiter_leaves_the_onset_before_it():
    tokenizer = PlanTokenizer(TOKENIZERS["byte level"].to_str())
    text = "Dish\n- Chop it"
    ((at, step),) = OnsetRule(tokens=(), regex=r"\n- ").steps(tokenizer.tokenized(text), tokenizer)
    assert (tokenizer.decode(tokenizer.encode(text)[: at + 1]), step) == ("Dish\n-", "Chop it")


def test_an_unknown_character_ends_no_step_though_its_token_is_special():
    tokenizer = PlanTokenizer(TOKENIZERS["WordPiece"].to_str())
    read = tokenizer.tokenized("soup ; chop 👍 it ; taste it")
    assert [step for _, step in OnsetRule(tokens=(), regex=";").steps(read, tokenizer)] == ["chop 👍 it", "taste it"]
    assert tokenizer.control_ids == {1, 2}


def test_a_token_put_after_the_text_opens_no_step():
    tokenizer = PlanTokenizer(TOKENIZERS["WordPiece"].to_str(), template=True)
    read = tokenizer.tokenized("dish chop")
    assert read.spans == ((0, 0), (0, 4), (5, 9), (9, 9))
    assert OnsetRule(tokens=("[SEP]",)).steps(read, tokenizer) == []
    assert OnsetRule(tokens=("[CLS]",)).steps(read, tokenizer) == [(0, "dish chop")]


def test_target_tokens_follow_the_labels_of_the_text_where_the_tokenizer_loses_its_case():
    tokenizer = PlanTokenizer(TOKENIZERS["WordPiece"].to_str())
    rule, phrases = OnsetRule(tokens=(), regex=";"), ("Stir-Chop it",)
    text = tokenizer.tokenized("Soup ; Stir-Chop it ; Heat the pan")
    labels = label_positions(text, tokenizer=tokenizer, rule=rule, phrases=phrases)
    tokens = count_first_tokens([(text.ids, labels)], tokenizer=tokenizer, phrases=phrases)
    assert tokenizer.decode(tokens.ids) == "stir"
    with pytest.raises(InputError, match="cannot make 1 of the 2 target phrases, the first 'Ω'"):
        count_first_tokens([], tokenizer=tokenizer, phrases=("Stir", "Ω"))


def test_a_tokenizer_with_dropout_is_refused():
    tokenizer = FAMILIES["byte level"]()
    tokenizer.model.dropout = 0.1
    with pytest.raises(InputError, match=r"tokenizer.json has dropout 0.1: .*; set model.dropout to null"):
        PlanTokenizer.read(tokenizer.to_str(), "tokenizer.json")


def test_half_a_surrogate_pair_is_refused_in_one_line():
    tokenizer = PlanTokenizer(TOKENIZERS["byte level"].to_str())
    for read in (
        tokenizer.encode,
        tokenizer.encode_text,
        tokenizer.tokenized,
        lambda text: tokenizer.encode_batch([text]),
    ):
        with pytest.raises(InputError, match="half of a surrogate pair"):
            read("a \ud800 b")


def test_time_grows_with_the_length_of_the_text_not_with_its_square():
    tokenizer, rule = PlanTokenizer(TOKENIZERS["byte fallback"].to_str()), OnsetRule(tokens=(), regex=r"\n")

    def seconds(repeats: int) -> float:
        ids = tokenizer.encode("Dish 👍\n" + "Chop 👍 it\n切る\n" * repeats)
        times = []
        for _ in range(5):
            start = time.process_time()
            rule.steps(ids, tokenizer)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(800) < 24 * seconds(100)  # 8 times the text; in quadratic time it would be 64
