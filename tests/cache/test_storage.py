"""Rows are stored as their rounding; a value a type cannot hold is named with its place."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_cache import SETTINGS, refusal, write

from sae_steer.cache import writing
from sae_steer.cache.storage import decoded, encoded, moments, narrowest
from sae_steer.errors import NotFiniteError
from sae_steer.model.decoder import Decoder
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.texts import TextFile


def spoilt(pair: ModelPair, value: float) -> ModelPair:
    """The pair, its target with an embedding that blows up at the token "x"."""
    decoder = Decoder(pair.target.model.shape)
    decoder.load_state_dict(pair.target.model.state_dict())
    decoder.eval().requires_grad_(False)
    decoder.embed_tokens.weight[pair.tokenizer.encode("x")[0]] = value
    return replace(pair, target=NamedModel("adhd", decoder))


@pytest.fixture
def with_x(tmp_path) -> TextFile:
    """Texts of which one has an x, at position 6 of prompt 1."""
    path = tmp_path / "plans.jsonl"
    plans = [f"<|task|>a<|steps|>b<|sep|>{rest}<|end|>" for rest in ("Sip water<|sep|>", "bx<|sep|>Sip water<|sep|>")]
    path.write_text("\n".join(json.dumps({"text": plan, "task": "one"}) for plan in plans))
    return TextFile.read(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (1e5, "float16", "has a value float16 cannot hold"),
        (float("nan"), "float16", "has a value that is not finite"),
        (float("nan"), "bfloat16", "has a value that is not finite"),
        (float("inf"), "float32", "has a value that is not finite"),
        (float("nan"), "auto", "has a value that is not finite"),
    ],
)
def test_a_value_that_cannot_be_stored_is_named_with_its_place(tiny, with_x, tmp_path, value, dtype, told):
    settings = replace(SETTINGS, dtype=dtype)
    broken = spoilt(tiny, value)
    ids = tiny.tokenizer.encode(with_x.lines[1].text)
    position = ids.index(tiny.tokenizer.encode("x")[0]) if value == 1e5 else 0  # attention spreads a NaN: 0 * NaN
    line = refusal(
        NotFiniteError, lambda: write(broken, tmp_path / "mine", layers=(0,), settings=settings, source=with_x)
    )
    assert f"model 'adhd' {told} after block 0, prompt 1, position {position}" in line
    assert ("use --dtype bfloat16" in line) == (value == 1e5)
    assert not list((tmp_path / "mine").glob("*.h5"))
    repaired = write(tiny, tmp_path / "mine", layers=(0,), settings=settings, source=with_x)
    assert repaired.verify() == []


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "bfloat16")])
def test_a_value_too_large_for_float16_is_kept_in_a_wider_type(tiny, with_x, tmp_path, dtype, stored):
    settings = replace(SETTINGS, dtype=dtype)
    cache = write(spoilt(tiny, 1e5), tmp_path / "mine", layers=(0,), settings=settings, source=with_x)
    (split,) = {shard["split"] for shard in cache.manifest["shards"]}
    assert cache.manifest["dtype"] == stored
    assert max(float(rows.max()) for rows in cache.rows("adhd", 0, split).in_order()) > 9e4


def test_auto_keeps_float16_where_it_fits_and_decides_alike_on_resuming(tiny, tmp_path):
    auto = write(tiny, tmp_path / "auto", settings=replace(SETTINGS, dtype="auto"))
    assert auto.manifest["dtype"] == "float16"
    assert auto.manifest["provenance"]["settings"]["dtype"] == "auto"
    (auto.folder / "shard-00001.h5").unlink()
    before = auto.manifest
    assert write(tiny, tmp_path / "auto", settings=replace(SETTINGS, dtype="auto")).manifest == before


def test_a_value_beyond_what_auto_chose_says_which_type_to_use(tiny, with_x, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "TRIED", 1)  # only the first text, which has no x
    settings = replace(SETTINGS, dtype="auto")
    line = refusal(
        NotFiniteError,
        lambda: write(spoilt(tiny, 1e5), tmp_path / "mine", layers=(0,), settings=settings, source=with_x),
    )
    assert "float16 cannot hold after block 0, prompt 1" in line
    assert "use --dtype bfloat16" in line


def test_bfloat16_rows_are_the_float32_rows_rounded(tiny, tmp_path):
    kept, exact = (
        write(tiny, tmp_path / dtype, settings=replace(SETTINGS, dtype=dtype)).rows("adhd", 2, "train")
        for dtype in ("bfloat16", "float32")
    )
    for read in (
        lambda rows: torch.cat(list(rows.in_order())),
        lambda rows: rows.take(np.array([0, 5, rows.n_rows - 1])),
        lambda rows: rows.batch(1, 64, 3),
    ):
        assert torch.equal(read(kept), read(exact).bfloat16().float())
    torch.testing.assert_close(kept.mean, torch.cat(list(kept.that_count())).mean(0), rtol=1e-4, atol=1e-5)


def test_stored_and_read_back_a_row_is_its_rounding(tmp_path):
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-3, 5)
    for dtype in ("float16", "bfloat16", "float32"):
        expected = rows.to(getattr(torch, dtype)).float().numpy()
        np.testing.assert_array_equal(decoded(encoded(rows.numpy(), dtype)), expected)


@pytest.mark.parametrize(
    ("scale", "type_"), [(1.0, "float16"), (7e3, "float16"), (9e3, "bfloat16"), (1e-7, "bfloat16")]
)
def test_auto_leaves_room_above_and_bits_below(scale, type_):
    assert narrowest([np.full((4, 4), scale, dtype=np.float32)]) == type_


def test_moments_are_those_of_whole_columns_bit_for_bit():
    rows = np.random.default_rng(0).normal(size=(1_000, 8)).astype(np.float16)
    exact = rows.astype(np.float64)
    np.testing.assert_array_equal(moments(rows), [exact.sum(0), (exact**2).sum(0)])
