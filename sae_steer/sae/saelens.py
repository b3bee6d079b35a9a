"""Dictionaries in SAELens' own files: a folder with cfg.json and sae_weights.safetensors.

Written and read without importing sae_lens, which takes eight seconds; `sae_lens.SAE.load_from_disk` reads
the same folder to the same numbers.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_steer.errors import InputError
from sae_steer.runtime import replacing, write_text
from sae_steer.sae.architectures import TopKConfig, TopKSAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
ARCHITECTURES = ("topk",)
DTYPES = ("float32", "float64", "float16", "bfloat16")

_FORMAT_VERSION = "6.54.12"  # the SAELens release whose format this is; below 6.0.0 it drops the metadata
_UNCHANGED = {  # what SAELens can do to rows and codes, and this package's dictionaries do not
    "rescale_acts_by_decoder_norm": False,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}


def save_sae(sae: TopKSAE, folder: Path, *, metadata: dict) -> Path:
    """Write the dictionary to `folder`; `metadata` is kept under metadata.sae_steer. Returns `folder`.

    cfg.json is removed first and written last, so a folder that has one is whole.
    """
    folder = Path(folder)
    config = sae.config
    facts = {
        "architecture": config.architecture,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "k": config.k,
        "dtype": config.dtype,
        "device": "cpu",
        **_UNCHANGED,
        "metadata": {
            "sae_lens_version": _FORMAT_VERSION,
            "sae_lens_training_version": None,
            "sae_steer": metadata,
        },
    }
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS_FILE) as scratch:
        save_file({name: weight.cpu().contiguous() for name, weight in sae.state_dict().items()}, scratch)
    write_text(folder / CONFIG_FILE, json.dumps(facts, indent=2) + "\n")
    return folder


def load_sae(folder: Path) -> TopKSAE:
    """The TopK dictionary of a SAELens folder, ours or another's; nothing is unpickled."""
    folder = Path(folder)
    facts = _read_config(folder)
    dtype = str(facts.get("dtype")).removeprefix("torch.")
    widths = [facts.get(name) for name in ("d_in", "d_sae", "k")]
    if not all(isinstance(width, int) for width in widths) or dtype not in DTYPES:
        raise InputError(
            f"{folder / CONFIG_FILE} has d_in, d_sae, k {widths} and dtype {facts.get('dtype')!r}; "
            f"it needs three integers and one of {', '.join(DTYPES)}"
        )
    sae = TopKSAE(TopKConfig(d_in=facts["d_in"], d_sae=facts["d_sae"], k=facts["k"], dtype=dtype))
    weights = _read_weights(folder)
    _check_shapes(folder, weights, {name: tuple(weight.shape) for name, weight in sae.state_dict().items()})
    sae.load_state_dict(weights)
    return sae


def read_metadata(folder: Path) -> dict:
    """The metadata a dictionary was saved with; empty for a dictionary made elsewhere."""
    return _read_config(Path(folder)).get("metadata", {}).get("sae_steer", {})


def _read_config(folder: Path) -> dict:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} is not a whole dictionary: {' and '.join(missing)} missing; "
            f"it needs {CONFIG_FILE} and {WEIGHTS_FILE}: train or export it again"
        )
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / CONFIG_FILE} is not JSON ({error}); save it again") from error
    architecture = facts.get("architecture") if isinstance(facts, dict) else None
    if architecture not in ARCHITECTURES:
        raise InputError(f"{folder} is of architecture {architecture!r}; this version reads {', '.join(ARCHITECTURES)}")
    for name, value in _UNCHANGED.items():
        if facts.get(name, value) != value:
            raise InputError(
                f"{folder} has {name} {facts[name]!r}; this version reads {value!r}: fold it into the weights"
            )
    return facts


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE} cannot be read ({error}); save it again") from error


def _check_shapes(folder: Path, weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        raise InputError(
            f"{folder / WEIGHTS_FILE} holds {_shapes(found)}; its {CONFIG_FILE} calls for {_shapes(expected)}"
        )


def _shapes(tensors: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(tensors.items()))
