"""Rows of special tokens and rows of another length do not count; onsets always do."""

import numpy as np
import pytest

from sae_steer.row_filter import LONG, LeftOut, RowFilter, every_row, lengths

NOBODY = np.zeros(100, bool)


@pytest.fixture
def norms():
    return np.random.default_rng(0).uniform(0.5, 2.0, 100).astype(np.float32)


def test_rows_of_one_length_all_count(norms):
    found = RowFilter()(None, NOBODY, norms)
    assert found.counts.all()
    assert not found.long.any()
    median = float(np.median(norms))
    assert found.left_out == LeftOut(rows=100, special_tokens=0, long=0, long_onsets=0, median_norm=median)
    assert found.left_out.sentence("here") is None


def test_special_tokens_go_and_onsets_of_such_tokens_stay(norms):
    token, onset = np.arange(100) % 10, np.arange(100) == 13
    found = RowFilter(frozenset({3, 4}))(token, onset, norms)
    assert np.array_equal(found.counts, ~np.isin(token, (3, 4)) | onset)
    assert (found.left_out.special_tokens, found.left_out.long) == (19, 0)


def test_a_row_beyond_the_stated_multiple_goes_wherever_it_stands_and_a_long_onset_stays_and_is_told(norms):
    norms[[7, 50]] = 1.001 * LONG * np.median(norms)
    found = RowFilter()(None, np.arange(100) == 50, norms)
    assert np.flatnonzero(~found.counts).tolist() == [7]
    assert np.flatnonzero(found.long).tolist() == [7, 50]
    assert not found.typical[50]
    assert (found.left_out.long, found.left_out.long_onsets) == (1, 1)
    assert "CAREFUL: 1 onsets are as long, and stay" in found.left_out.sentence("here")
    norms[7] = 0.99 * LONG * np.median(norms)
    assert RowFilter()(None, NOBODY, norms).counts[7]


def test_the_median_is_that_of_ordinary_rows_however_many_special_ones_there_are(norms):
    token = np.zeros(100, int)
    token[:60], norms[:60] = 9, 500.0
    norms[80] = 100.0
    found = RowFilter(frozenset({9}))(token, NOBODY, norms)
    assert np.array_equal(found.counts, (token == 0) & (np.arange(100) != 80))
    assert found.left_out.median_norm == np.median(norms[60:])


def test_what_is_kept_counts_and_is_still_told(norms):
    norms[7] = 500.0
    found = RowFilter(frozenset({3}), keep=True)(np.arange(100) % 10, NOBODY, norms)
    assert found.counts.all()
    assert np.flatnonzero(~found.typical).tolist() == [7]
    assert (found.left_out.special_tokens, found.left_out.long, found.left_out.kept) == (10, 1, True)
    assert "11 " not in found.left_out.sentence("here")
    assert "10 of 100 rows kept: special tokens" in found.left_out.sentence("here")


def test_two_streams_count_where_both_do(norms):
    other = norms.copy()
    norms[7], other[8] = 500.0, 500.0
    token = np.arange(100) % 10
    one, two = (RowFilter(frozenset({3}))(token, NOBODY, row) for row in (norms, other))
    both = one & two
    assert np.array_equal(both.counts, one.counts & two.counts)
    assert (both.left_out.special_tokens, both.left_out.long, both.left_out.median_norm) == (10, 2, None)
    assert (both & every_row(100)).left_out.long == 2


def test_the_choice_depends_on_no_unit_and_no_order(norms):
    norms[[7, 9]] = 300.0
    plain = RowFilter()(None, NOBODY, norms).counts
    order = np.random.default_rng(1).permutation(100)
    assert np.array_equal(RowFilter()(None, NOBODY, 1000 * norms).counts, plain)
    assert np.array_equal(RowFilter()(None, NOBODY, norms[order]).counts, plain[order])


def test_rows_of_length_zero_are_all_alike():
    assert RowFilter()(None, np.zeros(4, bool), np.zeros(4, np.float32)).counts.all()


def test_lengths_are_numpys_and_independent_of_neighbours():
    rows = np.random.default_rng(0).normal(size=(3_000, 24)).astype(np.float16)
    np.testing.assert_allclose(lengths(rows), np.linalg.norm(rows.astype(np.float64), axis=1), rtol=1e-6)
    assert np.array_equal(lengths(rows)[1_500:], lengths(rows[1_500:]))
