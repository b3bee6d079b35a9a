"""How many rows a shard holds follows from the width of the streams alone, and a cache goes on as it began."""

from dataclasses import replace

import pytest
from tiny_cache import SETTINGS, contents, write

from sae_steer.cache.dealing import LEAST_BITS, MOST_ROWS, SHARD_BYTES, rows_that_fit
from sae_steer.settings import CacheSettings


@pytest.mark.parametrize(
    ("values", "rows"),
    [(2 * 128, 65_536), (4 * 2 * 128, 65_536), (2 * 512, 65_536), (2 * 576, 32_768), (2 * 4_096, 8_192)],
    ids=["embedded", "embedded, four layers", "released", "SmolLM2-135M", "7B"],
)
def test_narrow_streams_have_the_shards_they_had_and_wide_ones_fewer_rows(values, rows):
    assert rows_that_fit(values) == rows


def test_a_shard_never_takes_more_memory_than_stated_nor_so_few_rows_that_files_swarm():
    for values in (1, 100, 1_000, 10_000, 65_536):
        rows = rows_that_fit(values)
        assert rows * values * 4 <= SHARD_BYTES
        assert rows == MOST_ROWS or 2 * rows * values * 4 > SHARD_BYTES
    assert rows_that_fit(10**9) == 2**LEAST_BITS


def test_a_cache_is_found_again_and_resumed_at_the_size_it_began_with(tiny, tmp_path):
    write(tiny, tmp_path, settings=SETTINGS)
    before = contents(tmp_path)
    by_default = replace(SETTINGS, rows_per_shard=CacheSettings.rows_per_shard)
    write(tiny, tmp_path, settings=by_default)
    assert contents(tmp_path) == before
    lost = tmp_path / "shard-00001.h5"
    lost.unlink()
    write(tiny, tmp_path, settings=by_default)
    assert contents(tmp_path) == before


def test_by_default_the_manifest_states_the_size_that_was_chosen(tiny, tmp_path):
    cache = write(tiny, tmp_path, settings=replace(SETTINGS, rows_per_shard=None))
    assert cache.manifest["provenance"]["settings"]["rows_per_shard"] == rows_that_fit(2 * 2 * 32) == 65_536
    assert len(cache.manifest["shards"]) == 4
