"""Every folder SAELens reads is read alike: architecture x era of the config x normalisation x dtype of the weights.

The truth is SAELens's own dictionary, its weights as it rounds them, computed in float64.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_steer.errors import InputError
from sae_steer.randomness import generator
from sae_steer.sae.architectures import JumpReLUSAE, TopKSAE
from sae_steer.sae.origin import Origin
from sae_steer.sae.saelens.adapter import SAELensDictionary, sae_lens
from sae_steer.sae.saelens.files import load_sae, save_sae
from sae_steer.sae.saelens.reading import saelens_in_memory

D_IN, D_SAE, K = 12, 40, 5
X = 3 * torch.randn(60, D_IN, generator=generator(9), dtype=torch.float64) + 1
HOOK = "blocks.2.hook_resid_post"
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "standard": ("standard", {}),
    "standard, b_dec added alone": ("standard", {"apply_b_dec_to_input": False}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "jumprelu, b_dec added alone": ("jumprelu", {"apply_b_dec_to_input": False}),
    "topk": ("topk", {"k": K}),
    "topk, b_dec added alone": ("topk", {"k": K, "apply_b_dec_to_input": False}),
    "topk, by decoder norm": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("abstopk", {"k": K}),
    "matching_pursuit": ("matching_pursuit", {"max_iterations": 4}),
}
NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
DTYPES = ("float64", "float32", "bfloat16", "float16")
ERAS = ("6.54", "5, top level", "3, hook_point", "1, prefixed dtype")


@pytest.fixture(scope="module", autouse=True)
def quiet_import() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens()
        yield


def inner_of(name: str, **options):
    """A sae_lens dictionary with random weights, biases and thresholds, in float64."""
    from sae_lens.registry import get_sae_class

    architecture, own = ARCHITECTURES[name]
    kind, config = get_sae_class(architecture)
    inner = kind(config(d_in=D_IN, d_sae=D_SAE, dtype="float64", **own, **options))
    for number, weight in enumerate(inner.parameters()):
        weight.data.normal_(generator=generator(4, number)).mul_(0.5)
    if architecture == "matching_pursuit":
        inner.W_dec.data = torch.nn.functional.normalize(inner.W_dec.data, dim=1)
    inner.cfg.metadata.hook_name = HOOK
    return inner.requires_grad_(False)


def as_written_in(era: str, facts: dict, dtype: str) -> dict:
    """A config as SAELens of that era wrote it."""
    facts = facts | {"dtype": dtype}
    if era == "6.54":
        return facts
    old = {name: value for name, value in facts.items() if name != "metadata"}
    old |= {"hook_name": HOOK, "hook_layer": 2, "finetuning_scaling_factor": False, "activation_fn_str": "relu"}
    if old["architecture"] == "topk":
        old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": old.pop("k")}}
        old["architecture"] = "standard" if era.startswith("3") else "topk"
    if era.startswith(("3", "1")):
        old["hook_point"], old["hook_point_layer"] = old.pop("hook_name"), old.pop("hook_layer")
        if old["normalize_activations"] == "none":
            old["normalize_activations"] = False if era.startswith("3") else None
    if era.startswith("1"):
        old |= {"dtype": f"torch.{dtype}", "hook_point": "blocks.{layer}.hook_resid_post"}
        if old["apply_b_dec_to_input"]:
            del old["apply_b_dec_to_input"]
    return old


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_folder_reads_as_saelens_reads_it(name: str, normalisation: str, tmp_path: Path) -> None:
    inner = inner_of(name, normalize_activations=normalisation)
    weights, facts = inner.state_dict(), inner.cfg.to_dict()
    for era in ERAS:
        for dtype in DTYPES:
            stored = {key: weight.to(getattr(torch, dtype)).contiguous() for key, weight in weights.items()}
            save_file(stored, tmp_path / "sae_weights.safetensors")
            (tmp_path / "cfg.json").write_text(json.dumps(as_written_in(era, facts, dtype)))
            check_alike(tmp_path, f"{era}, {dtype}")


def check_alike(folder: Path, case: str) -> None:
    """Compare codes, scale, site and reconstruction with SAELens's in float64."""
    theirs = sae_lens().SAE.load_from_disk(folder).to(torch.float64)
    ours = load_sae(folder)
    ours.origin.check_stream(2)
    fires, rows = theirs.encode(X) != 0, X.float()
    codes = ours.encode(rows)
    assert torch.equal(codes.dense() != 0, fires), case
    assert torch.equal(codes.firings, fires.sum(0)), case
    torch.testing.assert_close(ours(rows).double(), theirs(X), rtol=1e-4, atol=1e-4, msg=case)
    feature = int(fires.sum(0).argmax())
    silent = theirs.encode(X)
    silent[:, feature] = 0
    added = -theirs.decode(silent) + theirs(X)
    written = ours.activation_of(rows, feature)[:, None] * ours.direction(feature)
    torch.testing.assert_close(written.double(), added, rtol=1e-4, atol=1e-4, msg=case)


@pytest.mark.parametrize("era", ERAS)
def test_what_is_plain_in_the_end_is_read_by_our_own_code(era: str, tmp_path: Path) -> None:
    for name, kind in (("topk", TopKSAE), ("jumprelu", JumpReLUSAE)):
        inner = inner_of(name)
        inner.save_model(tmp_path)
        (tmp_path / "cfg.json").write_text(json.dumps(as_written_in(era, inner.cfg.to_dict(), "float64")))
        assert isinstance(load_sae(tmp_path), kind)


def test_the_case_of_an_old_topk_config(tmp_path: Path) -> None:
    inner_of("topk").save_model(tmp_path)
    old = {
        "architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 6}, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "hook_name": HOOK, "hook_layer": 2, "finetuning_scaling_factor": False,
    }  # fmt: skip
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    loaded = load_sae(tmp_path)
    assert (loaded.config.k, loaded.origin) == (6, Origin(hook=HOOK, layer=2))
    torch.testing.assert_close(loaded(X.float()), sae_lens().SAE.load_from_disk(tmp_path)(X.float()))


def test_the_number_of_codes_saelens_assumes_is_ours_too(tmp_path: Path) -> None:
    inner_of("topk").save_model(tmp_path)
    facts = json.loads((tmp_path / "cfg.json").read_text()) | {"d_sae": D_SAE}
    del facts["k"]
    (tmp_path / "cfg.json").write_text(json.dumps(facts))
    assert sae_lens().SAE.load_from_disk(tmp_path).cfg.k == 100
    with pytest.raises(InputError, match="k at most d_sae; got d_in 12, d_sae 40, k 100"):
        load_sae(tmp_path)


def test_a_scale_of_ones_beside_the_weights_is_left_out_as_saelens_leaves_it_out(tmp_path: Path) -> None:
    inner = inner_of("topk")
    inner.save_model(tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(D_SAE)}, tmp_path / "sae_weights.safetensors")
    torch.testing.assert_close(load_sae(tmp_path).to(torch.float64)(X), inner(X))
    save_file(weights | {"scaling_factor": torch.full((D_SAE,), 2.0)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(InputError, match="scaling_factor"):
        load_sae(tmp_path)


def test_the_whitening_a_saelens_checkpoint_keeps_beside_its_weights_is_folded(tmp_path: Path) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    inner = inner_of("standard", normalize_activations="covariance_whitening")
    inner.save_model(tmp_path)
    with pytest.raises(InputError, match="covariance_whitening, and does not hold that change"):
        load_sae(tmp_path)
    scaler = ActivationScaler()
    scaler.estimate_whitening(D_IN, iter([X, X]), n_batches_for_norm_estimate=2)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    torch.testing.assert_close(load_sae(tmp_path)(X), scaler.unscale(inner(scaler.scale(X))))


def test_a_training_checkpoint_is_read_as_saelens_would_save_it_for_inference(tmp_path: Path) -> None:
    trained = batch_topk()
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "inference")
    checkpoint, inference = (load_sae(tmp_path / name) for name in ("checkpoint", "inference"))
    assert isinstance(checkpoint, JumpReLUSAE)
    assert torch.equal(checkpoint(X.float()), inference(X.float()))


def test_a_training_object_in_memory_fires_row_by_row_and_not_by_its_batch() -> None:
    ours = saelens_in_memory(batch_topk(), "the SAE in memory")
    whole, alone = ours.encode(X.float()).dense(), [ours.encode(row[None]).dense() for row in X.float()]
    torch.testing.assert_close(whole, torch.cat(alone))
    assert 0 < (whole > 0).sum() < whole.numel()


def batch_topk():
    package = sae_lens()
    trained = package.BatchTopKTrainingSAE(package.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    for number, weight in enumerate(trained.parameters()):
        weight.data.normal_(generator=generator(5, number)).mul_(0.5)
    trained.topk_threshold.fill_(1.5)
    return trained


def test_an_object_in_memory_is_read_without_what_is_attached_to_it_and_stays_as_it_is() -> None:
    inner = inner_of("gated").to(torch.float32)
    bare = copy.deepcopy(inner)
    inner.requires_grad_(True)
    inner.hook_sae_acts_post.register_forward_hook(lambda module, inputs, output: 0 * output)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner.use_error_term = True
    ours = saelens_in_memory(inner, "the SAE in memory")
    torch.testing.assert_close(ours(X.float()), bare(X.float()))
    assert not torch.allclose(ours(X.float()), X.float(), atol=0.1), "with the error term rows come back as they are"
    assert all(parameter.requires_grad for parameter in inner.parameters())
    assert ours.origin == Origin(hook=HOOK)


def test_a_feature_with_two_sides_fires_on_both() -> None:
    ours = SAELensDictionary(inner_of("abstopk").to(torch.float32), "abstopk")
    codes = ours.encode(X.float())
    assert (codes.values < 0).any()
    assert int(codes.firings.sum()) == K * len(X)


@pytest.mark.parametrize("name", ["topk", "standard", "abstopk"])
def test_the_site_survives_saving(name: str, tmp_path: Path) -> None:
    inner_of(name).save_model(tmp_path / "theirs")
    save_sae(load_sae(tmp_path / "theirs"), tmp_path / "ours", metadata={})
    assert sae_lens().SAE.load_from_disk(tmp_path / "ours").cfg.metadata.hook_name == HOOK
    assert load_sae(tmp_path / "ours").origin == Origin(hook=HOOK)
