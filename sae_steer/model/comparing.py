"""Whether our reading of a Llama folder is `transformers`' own: the logits of a few tokens, compared once a content.

The first time a content is met, `transformers` loads the folder on the CPU, as it does by itself, and reads the same
tokens; a difference is an error with its size. The result is kept under the hash of config and weights, for the
packaged models in `assets/compared/`, for others in the user's cache, so that no second command pays for it.
"""

import json
import os
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.errors import InputError, SteerError
from sae_steer.files import sha256, write_text
from sae_steer.model.decoder import Decoder
from sae_steer.model.loading.tensors import INDEX, WHOLE
from sae_steer.randomness import Stream, generator

TOKENS = 64
"""Read in one text: enough that bases and scalings of positions show."""
SHARE = 1e-3
"""Of the largest logit: how far two computations in float32 may part; faults of reading are a hundredfold."""
LARGE = 2_000_000_000
"""Parameters from which on `transformers` computes in the folder's own type, to halve its memory."""
SHARE_ROUNDED = 0.05
"""`SHARE` where it does."""
READING = "1"
"""Of this package; another number compares everything anew."""


@dataclass(frozen=True)
class Comparison:
    """What came of it."""

    transformers: str
    """The version compared with."""
    tokens: int
    largest_difference: float
    """Of any logit."""
    largest_logit: float


def compare(model: Decoder, folder: Path) -> Comparison | None:
    """`model`, as read from `folder`, beside what `transformers` reads there; None where it reads nothing.

    A difference is an `InputError`.
    """
    key = _content(folder)
    kept = _kept(key)
    if kept is not None:
        return kept
    tokens = torch.randint(
        0, model.shape.d_vocab, (1, min(TOKENS, model.shape.n_ctx)), generator=generator(0, Stream.PROBE_TOKENS)
    )
    large = model.n_parameters > LARGE
    theirs = _their_logits(folder, tokens, rounded=large)
    if theirs is None or not theirs.isfinite().all():  # weights that are not finite: what runs them says where
        return None
    with torch.inference_mode():
        ours = model(tokens.to(model.device)).float().cpu()
    result = Comparison(
        version("transformers"), tokens.numel(), float((ours - theirs).abs().max()), float(theirs.abs().max())
    )
    share = SHARE_ROUNDED if large else SHARE
    if not result.largest_difference <= share * max(result.largest_logit, 1.0):
        raise InputError(
            f"{folder} is read otherwise than transformers {result.transformers} reads it: a logit differs by "
            f"{result.largest_difference:.3g}, where the largest is {result.largest_logit:.3g}; name it "
            f"hf:{folder} to have transformers run it, and report this folder's config.json"
        )
    _keep(key, result)
    return result


def _their_logits(
    folder: Path, tokens: Int[Tensor, "batch pos"], *, rounded: bool
) -> Float[Tensor, "batch pos vocab"] | None:
    """Logits of the weights as `transformers` reads them, computed in their own type if `rounded`, or in float32."""
    from sae_steer.model.hf.quiet import REFUSALS, quietly

    with quietly():
        from transformers import LlamaForCausalLM

        try:
            theirs = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except REFUSALS:
            return None
    with torch.inference_mode():
        return (theirs if rounded else theirs.float()).eval()(tokens).logits.float()


def _content(folder: Path) -> str:
    """The hash of all that a reading depends on."""
    config, whole = folder / "config.json", folder / WHOLE
    weights = [whole] if whole.is_file() else [folder / INDEX, *sorted(folder.glob("*.safetensors"))]
    return sha256(READING.encode(), *(part for path in (config, *weights) for part in (path.name.encode(), path)))


def _kept(key: str) -> Comparison | None:
    """A result from an earlier comparison; the packaged models' hold for any version of `transformers`."""
    packaged = Path(str(files("sae_steer") / "assets" / "compared" / f"{key}.json"))
    for path in (packaged, _own_cache() / f"{key}.json"):
        try:
            result = Comparison(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if path == packaged or result.transformers == version("transformers"):
            return result
    return None


def _keep(key: str, result: Comparison) -> None:
    try:
        write_text(_own_cache() / f"{key}.json", json.dumps(asdict(result)) + "\n")
    except SteerError:  # a home that cannot be written costs the next command the comparison, nothing else
        return


def _own_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sae_steer", "compared")
