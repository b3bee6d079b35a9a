"""Dictionaries in SAELens' own files: a folder with cfg.json and sae_weights.safetensors.

TopK and JumpReLU of SAELens 6 are written and read without importing sae_lens, which takes eight seconds;
`sae_lens.SAE.load_from_disk` reads the same folder to the same numbers. All else SAELens can read, configs of older
versions among them, goes through it.
"""

import json
import re
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_steer.errors import InputError, NotFiniteError
from sae_steer.files import replacing, sha256, write_text
from sae_steer.records import SEAL
from sae_steer.sae.architectures import JumpReLUConfig, JumpReLUSAE, LinearSAE, SparseDictionary, TopKConfig, TopKSAE
from sae_steer.sae.origin import Origin
from sae_steer.shapes import conform

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
NATIVE = {
    "topk": (TopKSAE, TopKConfig, ("d_in", "d_sae", "k")),
    "jumprelu": (JumpReLUSAE, JumpReLUConfig, ("d_in", "d_sae")),
}
"""Architecture -> class, config, and the integers that shape it."""
WEIGHTS_HASH = "weights_sha256"


class ConfigFacts(TypedDict):
    """What every reader of a cfg.json takes for granted, SAELens among them, where it is there."""

    apply_b_dec_to_input: NotRequired[bool]
    rescale_acts_by_decoder_norm: NotRequired[bool]
    metadata: NotRequired[dict | None]


AGAIN = "train or save it again"
DTYPES = ("float32", "float64", "float16", "bfloat16")

_FORMAT_VERSION = "6.54.12"  # the SAELens release whose format this is; below 6.0.0 it drops the metadata
_ASSUMED = {"k": 100}  # what SAELens takes where a config is silent
_UNCHANGED = {  # what SAELens can do to rows and codes, and this package's own dictionaries do not
    "rescale_acts_by_decoder_norm": False,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
}


def save_sae(sae: SparseDictionary, folder: Path, *, metadata: dict) -> Path:
    """Write the dictionary to `folder`; `metadata` is kept under metadata.sae_steer. Returns `folder`.

    cfg.json is removed first and written last, so a folder that has one is whole.
    """
    folder = Path(folder)
    facts = config_of(sae)
    origin = getattr(sae, "origin", Origin())
    stated = {"hook_name": origin.hook or metadata.get("hook"), "model_name": origin.model or metadata.get("model")}
    stated = {name: value for name, value in stated.items() if value}
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    with replacing(folder / WEIGHTS_FILE) as scratch:
        save_file({name: weight.cpu().contiguous() for name, weight in sae.state_dict().items()}, scratch)
    own = {**metadata, WEIGHTS_HASH: sha256(folder / WEIGHTS_FILE)}
    facts["metadata"] = {**facts["metadata"], **stated, "sae_steer": own}
    facts = json.loads(json.dumps(facts))
    facts["metadata"]["sae_steer"][SEAL] = _seal(facts)
    write_text(folder / CONFIG_FILE, json.dumps(facts, indent=2) + "\n")
    return folder


def load_sae(folder: Path) -> SparseDictionary:
    """The dictionary of a SAELens folder, of whatever architecture and version; nothing is unpickled."""
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file():
        raise _not_whole(folder)
    facts = _read_config(folder) if (folder / CONFIG_FILE).is_file() else {}
    _check_weights(folder, facts)
    if _is_of_version_6(facts) and is_plain(facts):
        return _finite(native_sae(facts, _read_weights(folder), Origin.of(facts), str(folder)), folder)
    if not folder.is_dir():
        raise _not_whole(folder)
    from sae_steer.sae.saelens.reading import load_saelens

    return _finite(load_saelens(folder), folder)


def identity(folder: Path) -> str:
    """The hash of what a dictionary computes and of which stream: its config, its weights, the model and layer."""
    folder = Path(folder)
    facts = _read_config(folder)
    metadata = {**(facts.get("metadata") or {})}
    own = metadata.pop("sae_steer", None) or {}
    stream = {key: own.get(key) for key in ("model", "layer", "hook", "model_sha256")}
    told = json.dumps([{**facts, "metadata": metadata}, stream], sort_keys=True)
    return sha256(told.encode(), folder / WEIGHTS_FILE)


def config_of(sae: SparseDictionary) -> dict[str, Any]:
    """What a cfg.json says of a dictionary."""
    return _native_facts(sae) if isinstance(sae, LinearSAE) else sae.facts()


def _seal(facts: dict) -> str:
    """The hash of a config with its metadata, but for the seal itself."""
    metadata = {**facts["metadata"], "sae_steer": {**facts["metadata"]["sae_steer"], SEAL: None}}
    return sha256(json.dumps({**facts, "metadata": metadata}, sort_keys=True).encode())


def _check_weights(folder: Path, facts: dict) -> None:
    """Raise `InputError` if the config knows another hash of the weights than they have."""
    wanted = _own(facts).get(WEIGHTS_HASH)
    if wanted and (folder / WEIGHTS_FILE).is_file() and sha256(folder / WEIGHTS_FILE) != wanted:
        raise InputError(
            f"{folder / WEIGHTS_FILE} is damaged: it does not have the checksum of {CONFIG_FILE}; {AGAIN}, or take "
            f"{SEAL} and {WEIGHTS_HASH} out of its metadata.sae_steer to read it as it is"
        )


def _finite(sae: SparseDictionary, folder: Path) -> SparseDictionary:
    for name, weight in sae.state_dict().items():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise NotFiniteError(f"{name} of the dictionary in {folder} holds a NaN or an infinity; {AGAIN}")
    return sae


def _own(facts: dict) -> dict:
    """What this package wrote into a config's metadata; nothing where it did not."""
    metadata = facts.get("metadata")
    own = metadata.get("sae_steer") if isinstance(metadata, dict) else None
    return own if isinstance(own, dict) else {}


def is_plain(facts: dict) -> bool:
    """Whether a config of SAELens 6 describes what this package has code of its own for."""
    unchanged = all(facts.get(name, usual) == usual for name, usual in _UNCHANGED.items())
    return facts.get("architecture") in NATIVE and unchanged


def _is_of_version_6(facts: dict) -> bool:
    """Whether SAELens takes the config as it stands; it reads older ones by other rules."""
    metadata = facts.get("metadata")
    version = facts.get("sae_lens_version") or (isinstance(metadata, dict) and metadata.get("sae_lens_version"))
    major = re.match(r"(\d+)\.", version) if isinstance(version, str) else None
    return major is not None and int(major[1]) >= 6


def _native_facts(sae: LinearSAE) -> dict[str, Any]:
    config = sae.config
    return {
        "architecture": config.architecture,
        **{name: getattr(config, name) for name in NATIVE[config.architecture][2]},
        "dtype": config.dtype,
        "device": "cpu",
        **_UNCHANGED,
        "metadata": {"sae_lens_version": _FORMAT_VERSION, "sae_lens_training_version": None},
    }


def native_sae(facts: dict, weights: dict[str, Tensor], origin: Origin, name: str) -> LinearSAE:
    """The dictionary that a plain config of SAELens 6 and its weights describe; `name` is what errors call it."""
    kind, config, names = NATIVE[facts["architecture"]]
    dtype = str(facts.get("dtype")).removeprefix("torch.")
    widths = [facts.get(width, _ASSUMED.get(width)) for width in names]
    if not all(type(width) is int for width in widths) or dtype not in DTYPES:
        raise InputError(
            f"the {CONFIG_FILE} of {name} has {', '.join(names)} {widths} and dtype {facts.get('dtype')!r}; "
            f"it needs integers and one of {', '.join(DTYPES)}"
        )
    sae = kind(config(**dict(zip(names, widths, strict=True)), dtype=dtype))
    weights = {key: weight for key, weight in weights.items() if not _is_idle_scale(key, weight)}
    _check_shapes(name, weights, {key: tuple(weight.shape) for key, weight in sae.state_dict().items()})
    sae.load_state_dict(weights)
    sae.origin = origin
    return sae


def _is_idle_scale(key: str, weight: Tensor) -> bool:
    """SAELens once wrote a scale that is one everywhere, and leaves it out on reading."""
    return key == "scaling_factor" and torch.allclose(weight, torch.ones_like(weight))


def read_metadata(folder: Path) -> dict:
    """The metadata a dictionary was saved with; empty for a dictionary made elsewhere."""
    folder = Path(folder)
    own = _own(_read_config(folder)) if (folder / CONFIG_FILE).is_file() else {}
    return {key: value for key, value in own.items() if key not in (SEAL, WEIGHTS_HASH)}


def _read_config(folder: Path) -> dict:
    try:
        facts = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _not_whole(folder) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / CONFIG_FILE} is not JSON ({error}); save it again") from error
    if not isinstance(facts, dict):
        raise InputError(f"{folder / CONFIG_FILE} holds no JSON object; save it again")
    conform(facts, ConfigFacts, str(folder / CONFIG_FILE))
    if SEAL in _own(facts) and _own(facts)[SEAL] != _seal(facts):
        raise InputError(
            f"{folder / CONFIG_FILE} was changed after the dictionary was saved; {AGAIN}, or take metadata.sae_steer."
            f"{SEAL} out of it to read it as it is now"
        )
    return facts


def _not_whole(folder: Path) -> InputError:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    return InputError(
        f"{folder} is not a whole dictionary: {' and '.join(missing)} missing; "
        f"it needs {CONFIG_FILE} and {WEIGHTS_FILE}: train or export it again"
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS_FILE).is_file():
        raise _not_whole(folder)
    try:
        return load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / WEIGHTS_FILE} cannot be read ({error}); save it again") from error


def _check_shapes(name: str, weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    present = {key: tuple(weight.shape) for key, weight in weights.items()}
    if present != expected:
        raise InputError(
            f"the {WEIGHTS_FILE} of {name} holds {_shapes(present)}; its {CONFIG_FILE} calls for {_shapes(expected)}"
        )


def _shapes(tensors: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(tensors.items()))
