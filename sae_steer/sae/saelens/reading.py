"""Any dictionary SAELens can read, as one of ours, by whichever route it comes.

1. Folders: SAELens's of any version (cfg.json, sae_weights.safetensors; a training checkpoint's scale or whitening
   beside them is folded in) and Gemma Scope's (params.npz). SAELens says what a config means.
2. Released ids (`SAE.from_pretrained`).
3. Objects in memory, inference or training ones, read as SAELens would save and load them for inference: without
   the hooks, the error term or the batch's own threshold that an object in use may have.

What comes out as a plain TopK or JumpReLU is read by this package's own code. Weights of 16 bits are widened, as
they are: SAELens would round the rows and all sums to 16 bits too.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sae_steer.errors import InputError
from sae_steer.sae.architectures import SparseDictionary
from sae_steer.sae.origin import Origin
from sae_steer.sae.saelens.adapter import SAELensDictionary, sae_lens
from sae_steer.sae.saelens.files import CONFIG_FILE, is_plain, native_sae

GEMMA_SCOPE_FILE = "params.npz"
SCALER_FILE = "activation_scaler.json"

_UNREADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError, SafetensorError)
"""What sae_lens raises for files it cannot read, depending on what is wrong with them."""


def load_saelens(folder: Path, *, device: str = "cpu") -> SparseDictionary:
    """The dictionary in a folder of SAELens (any version) or Gemma Scope; nothing is unpickled."""
    folder = Path(folder)
    package = sae_lens()
    converter = {}
    if (folder / GEMMA_SCOPE_FILE).is_file():
        converter = {"converter": _read_gemma_scope}
    with _in_one_line(folder):
        config = {} if converter else json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        family = package.TrainingSAE if _is_of_training_alone(config) else package.SAE
        inner = _wide(family.load_from_disk(folder, device=device, **converter))
        if (folder / SCALER_FILE).is_file():
            _fold_scaler(inner, folder)
        if family is package.TrainingSAE:
            inner = for_inference(inner)
    return _as_ours(inner, str(folder), Origin.of(config))


def _is_of_training_alone(config: dict) -> bool:
    """Whether a folder is a checkpoint of an architecture that SAELens reads as another once it is trained."""
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    name = config.get("architecture")
    return name in SAE_TRAINING_CLASS_REGISTRY and name not in SAE_CLASS_REGISTRY


def pretrained_saelens(release: str, sae_id: str, *, device: str = "cpu") -> SparseDictionary:
    """The released dictionary of `SAE.from_pretrained(release, sae_id)`, fetched from the hub or its local copy."""
    with _in_one_line(f"{release}/{sae_id}"):
        inner = sae_lens().SAE.from_pretrained(release, sae_id, device=device)
    return _as_ours(inner, f"{release}/{sae_id}", Origin.of(inner.cfg.to_dict()))


def saelens_in_memory(subject: nn.Module, name: str) -> SparseDictionary:
    """A sae_lens object as SAELens would save it for inference; the object itself stays as it is."""
    package = sae_lens()
    if not isinstance(subject, package.SAE):
        raise InputError(f"{name}, a {type(subject).__name__}, is no dictionary of sae_lens; give one, or its folder")
    with _in_one_line(name):
        inner = for_inference(subject) if isinstance(subject, package.TrainingSAE) else _bare(subject)
    return _as_ours(inner, name, Origin.of(subject.cfg.to_dict()))


def _bare(subject: nn.Module) -> nn.Module:
    """A module of the same class, config and weights, which are shared; nothing that was attached to the object."""
    config = deepcopy(subject.cfg)
    device, config.device = config.device, "meta"
    bare = type(subject)(config)
    config.device = device
    bare.load_state_dict(subject.state_dict(), assign=True)
    return bare.to(device=subject.device, dtype=subject.dtype)


def for_inference(trained: nn.Module) -> nn.Module:
    """The inference dictionary SAELens makes of a training one: `batchtopk` becomes `jumprelu`, say."""
    weights = {name: weight.detach().clone() for name, weight in trained.state_dict().items()}
    trained.process_state_dict_for_saving_inference(weights)
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are replaced
        inner = sae_lens().SAE.from_dict(deepcopy(trained.cfg.get_inference_sae_cfg_dict()))
    inner.load_state_dict(weights)
    return inner


def _as_ours(inner: nn.Module, name: str, origin: Origin) -> SparseDictionary:
    inner = _wide(inner)
    facts = inner.cfg.to_dict()
    if is_plain(facts) and type(inner) in (sae_lens().TopKSAE, sae_lens().JumpReLUSAE):
        return native_sae(facts, inner.state_dict(), origin, name).to(inner.device)
    return SAELensDictionary(inner, name, origin)


def _wide(inner: nn.Module) -> nn.Module:
    return inner.to(torch.float32) if inner.dtype in (torch.float16, torch.bfloat16) else inner


@contextmanager
def _in_one_line(what: Path | str) -> Iterator[None]:
    """Turns what sae_lens raises into one line about `what`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except _UNREADABLE as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{what} cannot be read as a SAELens dictionary ({type(error).__name__}: {reason}); "
                "it needs cfg.json and sae_weights.safetensors, or params.npz: save it again"
            ) from error


def _fold_scaler(inner: nn.Module, folder: Path) -> None:
    """Fold the scale or whitening a SAELens training checkpoint keeps beside its weights; its loader leaves it out."""
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler = ActivationScaler()
    scaler.load(folder / SCALER_FILE)
    if scaler.scaling_factor is not None and inner.cfg.normalize_activations == "expected_average_only_in":
        inner.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    whitening = scaler.whitening
    if whitening is not None and inner.cfg.normalize_activations == "covariance_whitening":
        inner.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)


def _read_gemma_scope(
    path: str | Path, device: str = "cpu", cfg_overrides: dict | None = None
) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights of Gemma Scope's params.npz (2408.05147), as SAELens' loader of that release makes them."""
    with np.load(Path(path) / GEMMA_SCOPE_FILE, allow_pickle=False) as arrays:
        weights = {
            (f"W_{key[2:]}" if key.startswith("w_") else key): torch.tensor(arrays[key]).float().to(device)
            for key in arrays
        }
    d_in, d_sae = weights["W_enc"].shape
    facts = {
        "architecture": "jumprelu", "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": device,
        "apply_b_dec_to_input": False, "normalize_activations": "none",
    }  # fmt: skip
    return facts | (cfg_overrides or {}), weights
