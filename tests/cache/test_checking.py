"""What is wrong with a cache is found and named."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny_cache import refusal, write
from tiny_pair import SHAPE, lively

from sae_steer.cache import ActivationCache
from sae_steer.errors import InputError, NotFiniteError
from sae_steer.files import sha256
from sae_steer.pair.model_pair import NamedModel
from sae_steer.records import write_json


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
    write_json(mine / "manifest.json", manifest)
    (wrong,) = ActivationCache.open(mine).verify()
    assert f"{mine / second['file']} is a shard of another cache, or of another place in this one (file: " in wrong


@pytest.mark.parametrize(("part", "named"), [("models", "adhd"), ("tokenizer", "tokenizer")])
def test_a_manifest_of_another_model_or_tokenizer_is_found(mine, other, part, named):
    manifest = json.loads((mine / "manifest.json").read_text())
    changed = json.loads((other / "manifest.json").read_text())["models"] if part == "models" else "0" * 64
    write_json(mine / "manifest.json", {**manifest, part: changed})
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


def flip(path: Path, where: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 0x44
    path.write_bytes(content)


@pytest.mark.parametrize("read", ["labels", "texts", "rows"])
def test_flipped_bits_are_found_by_whatever_reads_the_shard(mine, read):
    path = mine / "shard-00000.h5"
    flip(path, path.stat().st_size // 2)
    cache = ActivationCache.open(mine)
    reading = {"rows": lambda: cache.rows("adhd", 2, "train")}.get(read, lambda: getattr(cache, read)("train"))
    assert f"{path} is damaged" in refusal(InputError, reading)
    cache.labels("scan")  # its shards are whole


def test_a_cache_written_again_mends_a_damaged_shard(tiny, mine, whole):
    path = mine / "shard-00001.h5"
    flip(path, 5_000)
    write(tiny, mine)
    assert path.read_bytes() == (whole / path.name).read_bytes()


def test_a_shard_is_hashed_once_and_again_after_it_has_changed(mine, monkeypatch):
    from sae_steer.cache import checking

    hashed = []
    monkeypatch.setattr(checking, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    cache = ActivationCache.open(mine)
    for _ in range(2):
        cache.labels("train")
        cache.rows("adhd", 0, "train")
    assert len(hashed) == len(set(hashed)) == sum(shard["split"] == "train" for shard in cache.manifest["shards"])
    os.utime(mine / hashed[0], ns=(1, 1))
    cache.labels("train")
    assert hashed[-1] == hashed[0]


@pytest.mark.parametrize("wound", ["cut", "replaced"])
def test_a_shard_that_changes_while_it_is_read_is_one_line_and_no_signal(mine, wound):
    cache = ActivationCache.open(mine)
    rows = cache.rows("adhd", 2, "train")
    rows.batch(0, 64, 0)
    for shard in cache.manifest["shards"]:
        path = mine / shard["file"]
        if wound == "cut":
            os.truncate(path, 4_000)
        else:
            path.write_bytes(path.read_bytes()[::-1])
    named = refusal(InputError, lambda: [rows.batch(step, 64, 0) for step in range(40)])
    assert "shard-0" in named
    assert "while it was read" in named


def rewritten(folder: Path, change) -> None:
    """The first shard changed by `change`, and the manifest and its checksum with it."""
    path = folder / "shard-00000.h5"
    with h5py.File(path, "r+") as file:
        change(file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / "manifest.json", manifest)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_found_whatever_their_checksum(mine, value):
    def spoil(file):
        file["adhd/blocks.2.hook_resid_post"][5, 3] = value

    rewritten(mine, spoil)
    cache = ActivationCache.open(mine)
    assert "not finite" in refusal(NotFiniteError, lambda: cache.rows("adhd", 2, "train"))
    cache.rows("standard", 2, "train")


@pytest.mark.parametrize("kind", ["external", "soft link", "external link", "chunked", "virtual", "short", "type"])
def test_data_that_lie_elsewhere_or_otherwise_are_refused(mine, tmp_path, kind):
    (tmp_path / "secret").write_bytes(bytes(100_000))

    def spoil(file):
        rows = len(file["token"])
        del file["token"]
        if kind == "external":
            file.create_dataset("token", (rows,), np.int32, external=[(str(tmp_path / "secret"), 0, 4 * rows)])
        elif kind == "soft link":
            file["token"] = h5py.SoftLink("/step")
        elif kind == "external link":
            file["token"] = h5py.ExternalLink(str(mine / "shard-00001.h5"), "/token")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((rows,), np.int32)
            layout[:] = h5py.VirtualSource(str(mine / "shard-00001.h5"), "token", (rows,))
            file.create_virtual_dataset("token", layout)
        elif kind == "chunked":
            file.create_dataset("token", data=np.zeros(rows, np.int32), chunks=(10,), compression="gzip")
        else:
            file.create_dataset("token", data=np.zeros(rows - (kind == "short"), "i8" if kind == "type" else "i4"))

    rewritten(mine, spoil)
    cache = ActivationCache.open(mine)
    assert "shard-00000.h5 is damaged (token" in refusal(InputError, lambda: cache.labels("train"))


def test_a_shard_that_may_not_be_read_is_not_to_be_deleted(mine):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (mine / "shard-00000.h5").chmod(0)
    assert "make it readable" in refusal(InputError, lambda: ActivationCache.open(mine).labels("train"))
