"""Named tensors from a file or a folder: safetensors, whole or sharded, or a `.pt` bundle of plain containers.

A bundle is read with `weights_only=True`: tensors, numbers, strings, lists and dictionaries. One that holds
anything else is refused, never unpickled.
"""

import json
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sae_steer.errors import InputError

INDEX, WHOLE, HOOKED = "model.safetensors.index.json", "model.safetensors", "hooked_transformer.pt"
BUNDLES = (".pt", ".pth")
WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state", "module", "weights", "params", "net")
CONFIGS = ("config", "cfg", "model_config", "hooked_transformer_config", "model_args", "args")


@dataclass(frozen=True)
class Stored:
    """What a weight file holds."""

    file: Path
    tensors: dict[str, torch.Tensor]
    config: dict = field(default_factory=dict)
    """The configuration a bundle wraps its weights with, if it does."""


def read_folder(folder: Path) -> Stored:
    """The weights of a model folder: its safetensors, or else its one bundle that is not `hooked_transformer.pt`,
    or else that one.
    """
    bundles = sorted(path for path in folder.glob("*") if path.suffix in BUNDLES)
    own = [path for path in bundles if path.name != HOOKED] or bundles
    if (folder / INDEX).is_file() or (folder / WHOLE).is_file():
        return read_safetensors(folder)
    if len(own) == 1:
        return read_bundle(own[0])
    if own:
        raise InputError(
            f"{folder} has several weight files ({', '.join(path.name for path in own)}); name the one that is meant, "
            f'as in model = "{folder.name}/{own[0].name}"'
        )
    pickles = sorted(folder.glob("*.bin"))
    if pickles:
        raise InputError(
            f"{folder} has its weights in {pickles[0].name} alone, a pickle, which can run code and is not read; "
            "save the model as safetensors"
        )
    return read_safetensors(folder)


def read_safetensors(folder: Path) -> Stored:
    """`model.safetensors`; only without one, the shards that its index names: an index beside it is of older days."""
    whole, index = folder / WHOLE, folder / INDEX
    try:
        if whole.is_file() or not index.is_file():
            return Stored(whole, load_file(whole))
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if outside := [shard for shard in shards if Path(shard).name != shard]:
            raise InputError(f"{index} names {outside[0]!r}, which is no file of its folder; save the model again")
        tensors = {name: tensor for shard in shards for name, tensor in load_file(folder / shard).items()}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder} has no whole {WHOLE} ({error}); copy the folder again") from error
    return Stored(index, tensors)


def read_bundle(path: Path) -> Stored:
    """The state dict of a `.pt` file, bare or inside dictionaries such as `{"model": ..., "config": ...}`."""
    try:
        with warnings.catch_warnings(action="ignore"):  # remarks on a pickle that is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0].split(". ")[0]
        raise InputError(
            f"{path} holds more than tensors and plain containers ({reason[:160]}), which can run code and is not "
            "read; save its state dict alone, best as safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = str(error).split("\n")[0][:160]
        raise InputError(f"{path} is no whole file of torch.save ({told}); copy it again") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a state dict; save the model's state_dict()")
    tensors, config = _unwrap(content)
    if not tensors:
        keys = ", ".join(sorted(map(str, content))[:8])
        raise InputError(f"{path} holds no named tensors, but {keys or 'nothing'}; save the model's state_dict()")
    return Stored(path, tensors, config)


def _unwrap(content: Mapping) -> tuple[dict[str, torch.Tensor], dict]:
    """The named tensors of a bundle, under the wrapper that holds them, and the configuration beside them."""
    config = next((dict(content[key]) for key in CONFIGS if isinstance(content.get(key), Mapping)), {})
    tensors = {name: tensor for name, tensor in content.items() if isinstance(tensor, torch.Tensor)}
    if tensors:
        return tensors, config
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            tensors, inner = _unwrap(content[key])
            if tensors:
                return tensors, config or inner
    return {}, config
