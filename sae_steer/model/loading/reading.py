"""From a model folder or a `.pt` bundle to a decoder: config -> shape, weight file -> tensors, names -> places."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from sae_steer.errors import InputError, NotNativeError
from sae_steer.model.decoder import Decoder
from sae_steer.model.loading.interpgpt import hooked_shape, interpgpt_shape
from sae_steer.model.loading.key_map import FusedOrders, KeyMap, match_names
from sae_steer.model.loading.llama_config import llama_shape, stated_dtype
from sae_steer.model.loading.llama_tensors import match_llama
from sae_steer.model.loading.tensors import BUNDLES, HOOKED, Stored, read_bundle, read_folder
from sae_steer.settings import DecoderSettings

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DecoderFile:
    """A decoder, and how the file it came from was read."""

    model: Decoder
    file: Path
    key_map: KeyMap | None = None
    """None for a Hugging Face Llama, whose names are known."""
    fused: str = ""
    """How the order of fused projections was decided, if there are any."""
    notes: tuple[str, ...] = ()
    """How a Llama's weights differ from what its config leads one to expect."""

    @property
    def record(self) -> dict:
        """The names read, for a record."""
        if self.key_map is None:
            return {"file": self.file.name, **({"notes": list(self.notes)} if self.notes else {})}
        read = {theirs: list(ours) for theirs, ours in self.key_map.read.items()}
        fused = {"fused": self.fused} if self.fused else {}
        return {"file": self.file.name, "key_map": read, "left_out": list(self.key_map.left_out), **fused}

    def lines(self) -> list[str]:
        """The names read, for people; of a Hugging Face Llama, only what is odd about it."""
        if self.key_map is None:
            return list(self.notes)
        fused = [f"fused projections: {self.fused}"] if self.fused else []
        return [f"{self.file}: names were read as", *(f"  {line}" for line in (*self.key_map.lines(), *fused))]


def load_decoder(path: Path) -> Decoder:
    """The decoder of a folder or bundle, in float32, ready to read (`eval`, no gradients)."""
    return read_decoder(path).model


def read_decoder(path: Path, *, qkv: str | None = None, gate_up: str | None = None) -> DecoderFile:
    """The decoder of a folder (Hugging Face Llama, InterpGPT) or of a `.pt` bundle, with the map of its names.

    Args:
        qkv, gate_up: the orders of fused projections (`FusedOrders`); None decides by the `hooked_transformer.pt`
            beside the weights, which has them apart, or else takes the documented order.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    config_path, config = _read_config(folder, path)
    if config.get("model_type") == "llama":
        llama_shape(config_path, config)  # what is refused is refused before gigabytes are read
    stored = read_bundle(path) if path.is_file() else read_folder(folder)
    shape = _shape(config_path, config, stored)
    if config.get("model_type") == "llama" and stored.file.suffix not in BUNDLES:
        llama = match_llama(stored.tensors, stored.file, tied=shape.tied, dtype=stated_dtype(config_path, config))
        model = _filled(replace(shape, tied=llama.tied), llama.tensors, stored.file)
        return DecoderFile(model, stored.file, notes=llama.notes)
    found, key_map, fused = _match(stored, shape, folder, qkv, gate_up)
    found, key_map = _without_tied_head(found, key_map, shape, stored.file)
    return DecoderFile(_filled(shape, found, stored.file), stored.file, key_map, fused)


def _read_config(folder: Path, path: Path) -> tuple[Path, dict]:
    """The folder's `config.json`; without one, only a bundle may bring its own."""
    file = folder / "config.json"
    if not file.is_file():
        if path.is_file() or any(found.suffix in BUNDLES for found in folder.glob("*")):
            return file, {}
        raise InputError(f"{folder} is not a model folder: it has no config.json; give a Hugging Face Llama folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(config, dict) or config.get("model_type") not in ("llama", "interpgpt"):
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise NotNativeError(f"{file} has model_type {kind!r}; the decoder reads 'llama' and 'interpgpt'")
    return file, config


def _shape(path: Path, config: dict, stored: Stored) -> DecoderSettings:
    if config:
        return (llama_shape if config["model_type"] == "llama" else interpgpt_shape)(path, config)
    if not stored.config:
        raise InputError(
            f"{stored.file} holds weights without a config, and there is no config.json beside it; put the release's "
            "config.json there"
        )
    return (hooked_shape if "n_ctx" in stored.config else interpgpt_shape)(stored.file, stored.config)


def _match(
    stored: Stored, shape: DecoderSettings, folder: Path, qkv: str | None, gate_up: str | None
) -> tuple[Tensors, KeyMap, str]:
    """The tensors under our names, the map, and how the orders of fused projections were decided."""
    orders = list(_orders(qkv, gate_up))
    found, key_map, wrong = match_names(stored.tensors, shape, orders[0])
    if wrong:
        raise InputError(f"the weights in {stored.file} do not fit its config ({_some(wrong)}); see their names")
    parts = {len(ours) for ours in key_map.read.values()}
    if parts <= {1}:
        return found, key_map, ""
    if len(orders) == 1 or not (folder / HOOKED).is_file() or stored.file.name == HOOKED:
        how = "as set" if qkv or gate_up else "the usual order; fused_qkv and fused_gate_up set another"
        return found, key_map, f"{orders[0].qkv}, {orders[0].gate_up} ({how})"
    known, _, wrong = match_names(read_bundle(folder / HOOKED).tensors, shape, orders[0])
    for tried in () if wrong else orders:
        found, key_map, _ = match_names(stored.tensors, shape, tried)
        if all(name in found and _same(found[name], tensor) for name, tensor in known.items() if "layers" in name):
            return found, key_map, f"{tried.qkv}, {tried.gate_up} (as {HOOKED} has them)"
    raise InputError(
        f"{stored.file} has fused projections, and in no order are they those of {HOOKED} beside it; set fused_qkv "
        f"({' or '.join(FusedOrders.QKV)}) and fused_gate_up ({' or '.join(FusedOrders.GATE_UP)}) in the pair.toml"
    )


def _orders(qkv: str | None, gate_up: str | None) -> Iterator[FusedOrders]:
    """The orders left open by what is set, the documented one first."""
    for given, known, key in ((qkv, FusedOrders.QKV, "fused_qkv"), (gate_up, FusedOrders.GATE_UP, "fused_gate_up")):
        if given not in (None, *known):
            raise InputError(f"{key} is {given!r}; it is {' or '.join(known)}")
    for pair in product([qkv] if qkv else FusedOrders.QKV, [gate_up] if gate_up else FusedOrders.GATE_UP):
        yield FusedOrders(*pair)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal up to what storing in bfloat16 does."""
    first, second = first.float(), second.float()
    return first.shape == second.shape and bool((first - second).norm() <= 0.01 * second.norm())


def _without_tied_head(found: Tensors, key_map: KeyMap, shape: DecoderSettings, file: Path) -> tuple[Tensors, KeyMap]:
    """A stored copy of a tied head is left out; one that is no copy is an error."""
    if not shape.tied or "lm_head.weight" not in found:
        return found, key_map
    head, table = found["lm_head.weight"], found.get("embed_tokens.weight")
    if table is not None and not torch.equal(head.float(), table.float()):
        raise InputError(
            f"{file} stores a head that is not its embedding, though the config ties the two; set "
            '"tie_word_embeddings": false in its config.json if it was trained so'
        )
    stored = tuple(name for name, ours in key_map.read.items() if ours == ("lm_head.weight",))
    read = {name: ours for name, ours in key_map.read.items() if name not in stored}
    kept = {name: tensor for name, tensor in found.items() if name != "lm_head.weight"}
    return kept, KeyMap(read, (*key_map.left_out, *stored))


def _filled(shape: DecoderSettings, found: Tensors, file: Path) -> Decoder:
    """The decoder with the tensors in place, if they are all there and nothing else is."""
    with _Unfilled():
        model = Decoder(shape)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {size}"
        for name, size in wanted.items()
        if name in found and tuple(found[name].shape) != size
    ]
    faults = (("missing", sorted(set(wanted) - set(found))), ("not known", sorted(set(found) - set(wanted))))
    wrong = [f"{what}: {_some(names)}" for what, names in (*faults, ("misshapen", misshapen)) if names]
    if wrong:
        raise InputError(f"the weights in {file} do not fit its config.json ({'; '.join(wrong)}); copy both again")
    model.load_state_dict({name: tensor.float().contiguous() for name, tensor in found.items()}, assign=True)
    return model.eval().requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """Parameters made inside are not filled, as they are replaced at once; torch's meta device costs 5 s of imports."""

    FILLS = ("kaiming_uniform_", "uniform_", "normal_", "ones_", "fill_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
