"""Saved dictionaries are SAELens dictionaries, and a broken folder says what is wrong with it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_steer.errors import InputError
from sae_steer.randomness import generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.sae.saelens.files import load_sae, read_metadata, save_sae

X = torch.randn(200, 16, generator=generator(9))
PROVENANCE = {"seed": 0, "rows": "abc", "settings": {"k": 5}}


@pytest.fixture
def folder(random_sae: TopKSAE, tmp_path: Path) -> Path:
    return save_sae(random_sae, tmp_path / "dictionary", metadata=PROVENANCE)


def change(folder: Path, **facts: object) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    for hash_of_its_own in ("seal", "weights_sha256"):
        config["metadata"]["sae_steer"].pop(hash_of_its_own, None)
    (folder / "cfg.json").write_text(json.dumps(config | facts))


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_dictionary_survives_save_and_load_unchanged(dtype: str, tmp_path: Path) -> None:
    sae = TopKSAE(TopKConfig(d_in=16, d_sae=64, k=5, dtype=dtype))
    for number, weight in enumerate(sae.parameters()):
        weight.data.normal_(generator=generator(3, number))
    loaded = load_sae(save_sae(sae, tmp_path, metadata={}))
    assert loaded.config == sae.config
    for name, weight in sae.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])


def test_provenance_survives(folder: Path) -> None:
    assert read_metadata(folder) == PROVENANCE


def test_saelens_reads_our_folder_to_the_same_numbers(folder: Path, random_sae: TopKSAE) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third parties' deprecations
        from sae_lens import SAE

    theirs = SAE.load_from_disk(folder)
    ours = random_sae.encode(X)
    torch.testing.assert_close(theirs.encode(X), ours.dense(), rtol=0, atol=1e-5)
    assert torch.equal(theirs.encode(X) > 0, ours.dense() > 0)
    torch.testing.assert_close(theirs(X), random_sae(X), rtol=0, atol=1e-5)
    assert theirs.cfg.metadata.sae_steer.items() >= PROVENANCE.items()


def test_we_read_a_folder_saelens_wrote(folder: Path, random_sae: TopKSAE, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

    SAE.load_from_disk(folder).save_model(tmp_path / "theirs")
    assert torch.equal(load_sae(tmp_path / "theirs")(X), random_sae(X))


def test_saving_does_not_import_sae_lens() -> None:
    import subprocess
    import sys

    code = "import sys; import sae_steer.sae.saelens.files; assert 'sae_lens' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_killed_save_leaves_no_folder_that_loads(folder: Path, random_sae: TopKSAE, monkeypatch) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("killed here")

    monkeypatch.setattr("sae_steer.sae.saelens.files.save_file", killed)
    with pytest.raises(RuntimeError, match="killed here"):
        save_sae(random_sae, folder, metadata={})
    with pytest.raises(InputError, match=r"not a whole dictionary: cfg\.json missing"):
        load_sae(folder)


def remove_weights(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])


def pickle_weights(folder: Path) -> None:
    torch.save({"W_enc": torch.zeros(2)}, folder / "sae_weights.safetensors")


def cut_config(folder: Path) -> None:
    (folder / "cfg.json").write_text('{"architecture": "to')


def transpose_encoder(folder: Path) -> None:
    change(folder)
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"W_enc": weights["W_enc"].T.contiguous()}, folder / "sae_weights.safetensors")


def add_threshold(folder: Path) -> None:
    change(folder)
    weights = load_file(folder / "sae_weights.safetensors")
    save_file(weights | {"threshold": torch.zeros(64)}, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (remove_weights, "sae_weights.safetensors missing"),
        (cut_weights, "is damaged: it does not have the checksum of cfg.json"),
        (pickle_weights, "is damaged: it does not have the checksum of cfg.json"),
        (lambda folder: (change(folder), pickle_weights(folder)), "cannot be read"),
        (cut_config, "is not JSON"),
        (transpose_encoder, r"W_enc \[64, 16\].*calls for.*W_enc \[16, 64\]"),
        (add_threshold, r"threshold \[64\]"),
        (lambda folder: change(folder, architecture="gated"), "cannot be read as a SAELens dictionary"),
        (lambda folder: change(folder, architecture=None), "cannot be read as a SAELens dictionary"),
        (lambda folder: change(folder, k=None), r"d_in, d_sae, k \[16, 64, None\]"),
        (lambda folder: change(folder, k=65), "k at most d_sae"),
        (lambda folder: change(folder, dtype="float7"), "dtype 'float7'; it needs"),
        (lambda folder: change(folder, dtype=None), "dtype None; it needs"),
    ],
)
def test_a_broken_folder_is_told_in_one_line(harm: Callable[[Path], object], line: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(InputError, match=line) as caught:
        load_sae(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it needs cfg.json and sae_weights.safetensors"):
        load_sae(tmp_path / "nowhere")
