"""What is wrong with a cache is found and named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_cache import refusal, write
from tiny_pair import SHAPE, lively

from sae_steer.cache import ActivationCache
from sae_steer.errors import InputError
from sae_steer.pair.model_pair import NamedModel


def test_a_missing_or_cut_shard_is_named(mine):
    path = mine / "shard-00001.h5"
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path} is missing or cut short" in refusal(InputError, lambda: ActivationCache.open(mine))
    path.unlink()
    assert f"{path} is missing or cut short" in refusal(InputError, lambda: ActivationCache.open(mine))


def test_a_flipped_bit_is_found_by_its_checksum_and_named(mine):
    assert ActivationCache.open(mine).verify() == []
    path = mine / "shard-00001.h5"
    content = bytearray(path.read_bytes())
    content[-1000] ^= 4
    path.write_bytes(content)
    (wrong,) = ActivationCache.open(mine).verify()
    assert str(path) in wrong


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory) -> Path:
    """A cache of the same texts from another target model; not to be spoilt."""
    changed = replace(tiny, target=NamedModel("adhd", lively(SHAPE, 9)))
    return write(changed, tmp_path_factory.mktemp("other") / "cache").folder


def test_a_shard_of_another_cache_is_named_as_one(mine, other):
    path = Path(shutil.copy(other / "shard-00001.h5", mine))
    cache = ActivationCache.open(mine)
    (wrong,) = cache.verify()
    assert wrong.startswith(f"{path} is a shard of another cache")
    assert "adhd: " in wrong
    assert f"{path} is a shard of another cache" in refusal(InputError, lambda: cache.rows("adhd", 2, "train"))


def test_a_shard_in_the_place_of_another_is_named(mine):
    manifest = json.loads((mine / "manifest.json").read_text())
    first, second, *_ = manifest["shards"]
    shutil.copy(mine / first["file"], mine / second["file"])
    second |= {"bytes": first["bytes"], "sha256": first["sha256"]}
    (mine / "manifest.json").write_text(json.dumps(manifest))
    (wrong,) = ActivationCache.open(mine).verify()
    assert f"{mine / second['file']} is a shard of another cache, or of another place in this one (file: " in wrong


@pytest.mark.parametrize(("part", "named"), [("models", "adhd"), ("tokenizer", "tokenizer")])
def test_a_manifest_of_another_model_or_tokenizer_is_found(mine, other, part, named):
    manifest = json.loads((mine / "manifest.json").read_text())
    changed = json.loads((other / "manifest.json").read_text())["models"] if part == "models" else "0" * 64
    (mine / "manifest.json").write_text(json.dumps({**manifest, part: changed}))
    wrong = ActivationCache.open(mine).verify()
    assert len(wrong) == len(manifest["shards"])
    assert all(f"({named}: " in line for line in wrong)


def test_the_pair_a_cache_was_not_written_from_is_told_what_differs(tiny, mine, other):
    assert "(another model 'adhd');" in refusal(InputError, lambda: ActivationCache.open(other).check_pair(tiny))
    longer = replace(tiny, context=256)
    assert "(another onset rule, target or context);" in refusal(
        InputError, lambda: ActivationCache.open(mine).check_pair(longer)
    )


@pytest.mark.parametrize("damage", [slice(0, 8), slice(0, 4_000)])
def test_a_shard_that_is_no_hdf5_any_more_is_named(mine, damage):
    path = mine / "shard-00000.h5"
    content = bytearray(path.read_bytes())
    content[damage] = bytes(len(content[damage]))
    path.write_bytes(content)
    cache = ActivationCache.open(mine)
    assert f"{path} is damaged" in refusal(InputError, lambda: cache.rows("adhd", 2, "train"))
    assert f"{path} is damaged" in refusal(InputError, lambda: cache.labels("train"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 0}'])
def test_a_manifest_that_is_none_is_named(mine, content):
    (mine / "manifest.json").write_text(content)
    assert str(mine / "manifest.json") in refusal(InputError, lambda: ActivationCache.open(mine))


def test_a_folder_without_a_cache_says_how_to_make_one(tmp_path):
    assert "sae-steer cache" in refusal(InputError, lambda: ActivationCache.open(tmp_path))


def test_what_a_cache_does_not_hold_is_named(whole, pair, tiny):
    cache = ActivationCache.open(whole)
    assert "holds layers 0, 2, not 1" in refusal(InputError, lambda: cache.rows("adhd", 1, "train"))
    assert "standard and adhd, not 'base'" in refusal(InputError, lambda: cache.rows("base", 2, "train"))
    assert "no 'test' rows" in refusal(InputError, lambda: cache.rows("adhd", 2, "test"))
    cache.check_pair(tiny)
    assert "from another pair than 'small'" in refusal(InputError, lambda: cache.check_pair(pair))
