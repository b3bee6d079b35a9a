"""Every SAELens inference architecture as one of our dictionaries, and every training one through its trainer."""

import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sae_steer.errors import InputError
from sae_steer.randomness import generator
from sae_steer.sae.architectures import SparseDictionary
from sae_steer.sae.codes import SparseCodes
from sae_steer.sae.saelens.adapter import SAELensDictionary, sae_lens
from sae_steer.sae.saelens.files import load_sae, read_metadata, save_sae
from sae_steer.sae.saelens.reading import load_saelens

D_IN, D_SAE = 16, 48
X = torch.randn(300, D_IN, generator=generator(9))
CASES = {
    "standard": {},
    "gated": {},
    "jumprelu": {"apply_b_dec_to_input": False},
    "topk": {"k": 5, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 5},
    "matching_pursuit": {"max_iterations": 4},
    "standard, layer_norm": {"normalize_activations": "layer_norm"},
    "topk, constant_norm_rescale": {"k": 5, "normalize_activations": "constant_norm_rescale"},
}


def theirs(case: str):
    """A sae_lens dictionary with random weights, biases and thresholds."""
    from sae_lens.registry import get_sae_class

    package, (kind, config) = sae_lens(), get_sae_class(case.split(",")[0])
    assert package is not None
    sae = kind(config(d_in=D_IN, d_sae=D_SAE, **CASES[case]))
    for number, weight in enumerate(sae.parameters()):
        weight.data.normal_(generator=generator(4, number)).mul_(0.5)
    if case == "matching_pursuit":
        sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=1)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def quiet_import():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens()
        yield


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_any_architecture_gives_saelens_own_numbers(case: str, tmp_path: Path) -> None:
    inner = theirs(case)
    inner.save_model(tmp_path)
    loaded = load_saelens(tmp_path)
    assert isinstance(loaded, SparseDictionary)
    codes, dense = loaded.encode(X), inner.encode(X)
    assert torch.equal(codes.dense() != 0, dense != 0)
    if "," not in case:
        torch.testing.assert_close(codes.dense(), dense)
        torch.testing.assert_close(loaded.decode(codes), inner(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded(X), inner(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_activation_times_direction_is_what_the_feature_adds_to_the_row(case: str, tmp_path: Path) -> None:
    inner = theirs(case)
    loaded = SAELensDictionary(inner, case)
    feature = int((inner.encode(X) != 0).sum(0).argmax())
    codes = inner.encode(X)
    without = codes.clone()
    without[:, feature] = 0
    added = inner(X) - decoded_after_reading(inner, without)
    found = loaded.activation_of(X, feature)[:, None] * loaded.direction(feature)
    assert added.abs().max() > 0.1
    torch.testing.assert_close(found, added, rtol=1e-4, atol=1e-4)


def decoded_after_reading(inner, codes: torch.Tensor) -> torch.Tensor:
    """sae_lens's decode, which leans on what the last `encode` of the same rows left behind."""
    inner.encode(X)
    return inner.decode(codes)


def test_a_row_normalising_dictionary_says_why_codes_alone_are_not_enough() -> None:
    loaded = SAELensDictionary(theirs("standard, layer_norm"), "that folder")
    with pytest.raises(InputError, match="that folder normalises each row"):
        loaded.decode(loaded.encode(X))


def test_our_loader_reads_what_it_has_no_code_for_through_sae_lens(tmp_path: Path) -> None:
    theirs("gated").save_model(tmp_path)
    assert load_sae(tmp_path).config.architecture == "saelens:gated"


def test_an_old_config_is_read_as_saelens_reads_it(tmp_path: Path) -> None:
    inner = theirs("standard")
    inner.save_model(tmp_path)
    old = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu",
        "hook_point": "blocks.3.hook_resid_pre",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}, "normalize_activations": False,
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    loaded = load_sae(tmp_path)
    assert loaded.origin.hook == "blocks.3.hook_resid_pre"
    assert (loaded.encode(X).starts.diff() <= 7).all()


def test_gemma_scope_arrays_are_read_without_pickle(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "W_enc": rng.normal(size=(D_IN, D_SAE)), "W_dec": rng.normal(size=(D_SAE, D_IN)),
        "b_enc": rng.normal(size=D_SAE), "b_dec": rng.normal(size=D_IN), "threshold": rng.uniform(size=D_SAE),
    }  # fmt: skip
    np.savez(tmp_path / "params.npz", **arrays)
    loaded = load_sae(tmp_path)
    pre = X.double().numpy() @ arrays["W_enc"] + arrays["b_enc"]
    expected = torch.from_numpy(pre * (pre > arrays["threshold"])).float()
    torch.testing.assert_close(loaded.encode(X).dense(), expected, rtol=1e-4, atol=1e-4)


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="cannot be read as a SAELens dictionary"):
        load_sae(tmp_path)


def test_the_scale_a_saelens_checkpoint_keeps_beside_its_weights_is_folded(tmp_path: Path) -> None:
    inner = theirs("standard")
    inner.cfg.normalize_activations = "expected_average_only_in"
    inner.save_model(tmp_path)
    with pytest.raises(InputError, match="does not hold that change"):
        load_sae(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    torch.testing.assert_close(load_sae(tmp_path)(X), inner(X * 0.25) / 0.25)


@pytest.mark.parametrize(
    ("architecture", "options", "line"),
    [
        ("transcoder", {"d_out": 8, "apply_b_dec_to_input": False}, "reads one site and writes another"),
        ("temporal", {"n_heads": 1, "bottleneck_factor": 4}, "reads whole texts, not rows"),
        ("standard", {"reshape_activations": "hook_z"}, "reads attention heads"),
    ],
)
def test_what_reads_no_rows_of_one_stream_is_refused(architecture, options, line, tmp_path: Path) -> None:
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(architecture)
    kind(config(d_in=D_IN, d_sae=D_SAE, **options)).save_model(tmp_path)
    with pytest.raises(InputError, match=line):
        load_sae(tmp_path)


def test_a_foreign_dictionary_is_saved_as_saelens_would_with_our_metadata(tmp_path: Path) -> None:
    inner = theirs("gated")
    save_sae(SAELensDictionary(inner, "gated"), tmp_path / "ours", metadata={"model": "adhd", "layer": 2})
    inner.save_model(tmp_path / "theirs")
    ours, original = (load_file(tmp_path / name / "sae_weights.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in ours)
    assert torch.equal(sae_lens().SAE.load_from_disk(tmp_path / "ours")(X), inner(X))
    assert read_metadata(tmp_path / "ours") == {"model": "adhd", "layer": 2}


def test_a_foreign_dictionary_names_what_it_does_not_have() -> None:
    loaded = SAELensDictionary(theirs("standard"), "that folder")
    with pytest.raises(InputError, match="features 0 to 47"):
        loaded.direction(48)
    with pytest.raises(InputError, match="15 dimensions and the dictionary reads 16"):
        loaded.encode(X[:, 1:])
    assert isinstance(loaded.encode(X[:1]), SparseCodes)


@pytest.mark.parametrize("name", ["standard, layer_norm", "topk, constant_norm_rescale"])
def test_threads_that_share_a_row_normalised_dictionary_get_what_each_would_alone(name):
    loaded = SAELensDictionary(theirs(name), "that folder")
    rows = [scale * torch.randn(300, loaded.config.d_in, generator=generator(9, scale)) for scale in range(1, 25)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda x: loaded.encode(x).dense(), rows))
    for x, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, loaded.encode(x).dense())
