"""Token tensors are taken as what they mean, whatever their type, or refused in one line."""

import numpy as np
import pytest
import torch

from sae_steer.errors import InputError
from sae_steer.study.token_texts import token_texts

N, T, VOCAB = 12, 9, 50


@pytest.fixture
def tokens():
    return torch.randint(3, VOCAB, (N, T), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def marked():
    mask = torch.zeros(N, T, dtype=torch.bool)
    mask[:, 4] = mask[:, 7] = True
    return mask


def read(tokens, positions, **options):
    return token_texts(tokens, positions, d_vocab=VOCAB, **options)


def same(one, other) -> bool:
    """Equal in every id, mark, cluster and split."""
    facts = [[(t.token.tolist(), t.is_onset.tolist(), t.task, t.split) for t in texts] for texts in (one, other)]
    return facts[0] == facts[1]


@pytest.mark.parametrize("kind", [torch.Tensor.int, torch.Tensor.numpy, torch.Tensor.tolist])
def test_arrays_and_lists_mean_what_tensors_mean(tokens, marked, kind):
    lengths, clusters = torch.arange(N) % 3 + T - 2, torch.arange(N) // 2
    plain = read(tokens, marked, lengths=lengths, clusters=clusters)
    assert same(plain, read(kind(tokens), kind(marked), lengths=kind(lengths), clusters=kind(clusters)))
    assert [len(text) for text in plain] == lengths.tolist()


def test_a_mask_of_zeros_and_ones_indices_and_negative_indices_mark_the_same(tokens, marked):
    plain = read(tokens, marked)
    for positions in (marked.long(), marked.tolist(), marked.int().numpy(), [[4, 7]] * N, torch.tensor([[4, -2]] * N)):
        assert same(plain, read(tokens, positions))
    last = read(tokens, -1)
    assert all(text.is_onset.nonzero()[0].tolist() == [T - 1] for text in last)
    assert same(last, read(tokens, [T - 1] * N))


def test_the_last_token_is_the_texts_own_not_the_paddings(tokens):
    lengths = torch.arange(N) % 4 + 3
    for text, end in zip(read(tokens, -1, lengths=lengths), lengths.tolist(), strict=True):
        assert text.is_onset.nonzero()[0].tolist() == [end - 1]


def test_padding_on_the_left_is_cut_off_where_a_mask_tells_of_it(tokens, marked):
    gone = torch.arange(N) % 4
    mask = torch.arange(T) >= gone[:, None]
    padded = tokens.masked_fill(~mask, -100)
    texts = read(padded, marked, attention_mask=mask)
    for number, (text, start) in enumerate(zip(texts, gone.tolist(), strict=True)):
        assert text.token.tolist() == tokens[number, start:].tolist()
        assert text.is_onset.tolist() == marked[number, start:].tolist()
    assert same(texts, read(padded.tolist(), marked.tolist(), attention_mask=mask.int().tolist()))
    right = torch.arange(T) < (T - gone)[:, None]
    assert same(read(tokens, marked, attention_mask=right), read(tokens, marked, lengths=T - gone))


def test_rows_of_different_lengths_are_texts_without_padding(tokens, marked):
    lengths = [T - number % 3 for number in range(N)]
    rows = [row[:end] for row, end in zip(tokens.tolist(), lengths, strict=True)]
    marks = [row[:end] for row, end in zip(marked.tolist(), lengths, strict=True)]
    assert same(read(rows, marks), read(tokens, marked, lengths=lengths))
    assert same(read(rows, -1), read(tokens, -1, lengths=lengths))


def test_clusters_may_have_names(tokens, marked):
    numbered = read(tokens, marked, clusters=[number // 2 for number in range(N)])
    assert same(numbered, read(tokens, marked, clusters=[f"task {number // 2}" for number in range(N)]))


def test_what_follows_a_mark_is_the_behaviour_where_it_is_one_of_the_ids(tokens, marked):
    targets = sorted({int(tokens[0, 5]), int(tokens[3, 8])})
    for number, text in enumerate(read(tokens, marked, target=targets)):
        expected = [at for at in (4, 7) if int(tokens[number, at + 1]) in targets]
        assert np.flatnonzero(text.next_is_target).tolist() == expected


def left_padded(tokens):
    return tokens.masked_fill(torch.arange(T) < 3, 0)


def right_padded(tokens):
    return tokens.masked_fill(torch.arange(T) >= torch.arange(N)[:, None] % 3 + 5, 1)


REFUSED = {
    "padding on the left": ({"tokens": left_padded}, "begin with several tokens 0, .* on the left; .*attention_mask="),
    "padding on the right": ({"tokens": right_padded}, "end with several tokens 1, .* on the right; .*lengths="),
    "-100 as padding": (
        {"tokens": lambda t: t.masked_fill(torch.arange(T) > 7, -100)},
        "token -100 of text 0 at position 8 is no id of both models, which have 0 to 49; if it is padding",
    ),
    "a token beyond the vocabulary": (
        {"tokens": lambda t: t.masked_fill(torch.arange(T) == 3, 500)},
        "token 500 of text 0",
    ),
    "numbers with fractions": (
        {"tokens": lambda t: t.float()},
        "tokens is a Tensor of float32 .*; give whole numbers",
    ),
    "one text without its axis": ({"tokens": lambda t: t[0]}, r"tokens is .* \[9\]; give \[text, pos\]"),
    "words": ({"tokens": lambda t: ["Wash your hands"] * N}, "tokens is .*; give whole numbers"),
    "no text": ({"tokens": lambda t: t[:0]}, r"give \[text, pos\]"),
    "a mask of another shape": (
        {"positions": torch.ones(N, T - 1, dtype=torch.bool)},
        r"positions \(12, 8\); mark every",
    ),
    "a mask of floats": ({"positions": torch.ones(N, T)}, "give whole numbers"),
    "a mask of twos": ({"positions": torch.full((N, T), 2)}, "other than 0 and 1"),
    "indices beyond the text": ({"positions": [T] * N}, "position 9 of text 0 is none of its 9 tokens"),
    "indices before the text": ({"positions": [-T - 1] * N}, "position -10 of text 0"),
    "indices for other texts": ({"positions": [1, 2]}, "give a mask of the tokens' shape, or indices from 0 to 8"),
    "an index on padding": ({"positions": [8] * N, "lengths": [5] * N}, "position 8 of text 0 is none of its 5 tokens"),
    "no mark": ({"positions": torch.zeros(N, T, dtype=torch.bool)}, "marks no token; mark those to edit"),
    "marks on padding alone": ({"lengths": [4] * N}, "marks no token"),
    "no mark in what sets sizes": (
        {"positions": None},
        "no token in the texts that (fit|set|carry).*in every cluster",
    ),
    "lengths of zero": ({"lengths": [0] * N}, "lengths are 12 from 0 to 0, and there are 12 texts of 1 to 9"),
    "lengths beyond": ({"lengths": [T + 1] * N}, "lengths are 12 from 10 to 10"),
    "too few lengths": ({"lengths": [T]}, "lengths are 1 from 9 to 9, and there are 12"),
    "a mask with a hole": (
        {"attention_mask": torch.ones(N, T).long().index_fill(1, torch.tensor([4]), 0)},
        "of text 0 marks no run",
    ),
    "an empty mask": ({"attention_mask": torch.zeros(N, T).long()}, "of text 0 marks no run"),
    "two tellings": ({"lengths": [T] * N, "attention_mask": torch.ones(N, T).long()}, "give one of them"),
    "one cluster for all": ({"clusters": torch.zeros(N).long()}, "of 1 cluster; .*60 clusters at least"),
    "clusters with fractions": ({"clusters": torch.rand(N)}, "a whole number or a name each"),
    "too few clusters named": ({"clusters": [1, 2]}, "there are 12 texts; give"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_line(tokens, marked, fault):
    change, told = REFUSED[fault]
    given = {"tokens": lambda t: t, "positions": marked, **change}
    if given["positions"] is None:  # one text alone is marked
        given["positions"] = marked & (torch.arange(N) == 0)[:, None]
    with pytest.raises(InputError, match=told) as refused:
        read(given.pop("tokens")(tokens), given.pop("positions"), **given)
    assert "\n" not in str(refused.value)


def test_a_run_that_every_text_really_begins_with_is_read_where_lengths_say_so(tokens, marked):
    begun = left_padded(tokens)
    assert [text.token.tolist() for text in read(begun, marked, lengths=[T] * N)] == begun.tolist()
