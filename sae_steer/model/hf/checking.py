"""Whether what was found in a model is what it computes: every stream, the logits and replay, against its own outputs.

streams    after each block, against `output_hidden_states`; after the last, what the final norm makes of it
logits     of the whole run, and of the readout of the last stream, against its own
causality  no stream depends on later tokens
replay     one edited token by stored keys and values, against the full pass with the edit in it
"""

import torch
from jaxtyping import Int
from torch import Tensor

from sae_steer.errors import InputError
from sae_steer.model.hf.model import HFModel
from sae_steer.model.hf.places import Run
from sae_steer.model.hf.quiet import REFUSALS
from sae_steer.model.hf.replaying import masked_or_by_prefix
from sae_steer.randomness import Stream, generator

LENGTH = 16
SHARE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""By type: how far, as a share of the largest value, two ways to compute the same may part."""


@torch.no_grad()
def check(model: HFModel) -> HFModel:
    """`model`, its way to replay settled; what does not hold is an `InputError` that names it."""
    tokens = torch.randint(
        0, min(model.W_E.shape[0], model.shape.d_vocab), (2, LENGTH), generator=generator(0, Stream.PROBE_TOKENS)
    )
    tokens = tokens.to(model.device)
    own = model.hf(tokens, output_hidden_states=True, use_cache=False)
    if getattr(own, "logits", None) is None or getattr(own, "hidden_states", None) is None:
        raise InputError(f"{_name(model)} puts out no logits or no hidden states; it cannot be a model of a pair")
    streams = model.resid_posts(tokens, tuple(range(model.shape.n_layers)))
    _check_streams(model, streams, own.hidden_states)
    last = streams[model.shape.n_layers - 1]
    _expect(model, "its logits", model(tokens), own.logits)
    _expect(model, "its readout of the stream", model.unembed(last), own.logits)
    if model.equation is not None:
        _expect(model, "its final norm", model.unembed_frozen(last, torch.zeros_like(last)), own.logits)
    _expect(model, "its blocks from the second on", model.run(streams[0], start=1), last)
    earlier = model.resid_posts(tokens[:, :-1], (model.shape.n_layers - 1,))[model.shape.n_layers - 1]
    _expect(model, "attending to earlier tokens alone", earlier, last[:, :-1])
    model.replays_masked = _way_to_replay(model, tokens, streams[0])
    return model


def _check_streams(model: HFModel, streams: dict[int, Tensor], own: tuple[Tensor, ...]) -> None:
    if len(own) != model.shape.n_layers + 1:
        raise InputError(f"{_name(model)} puts out {len(own)} hidden states for {model.shape.n_layers} blocks")
    for layer, stream in streams.items():
        wanted = own[layer + 1]
        if layer + 1 == model.shape.n_layers and model.parts.norm is not None:
            if _off(stream, wanted) <= _share(model):
                continue  # some models put out the last stream as it is
            stream = model.parts.norm(stream)
        _expect(model, f"the stream after block {layer}", stream, wanted)


def _way_to_replay(model: HFModel, tokens: Int[Tensor, "batch pos"], resid: Tensor) -> bool:
    """Whether edited tokens can follow their text under a mask; if neither that nor a prefix will do, an error."""
    if model.shape.n_layers == 1:
        return True
    off = float("inf")
    for masked in masked_or_by_prefix(model):
        model.replays_masked = masked
        try:
            suffix = model.suffix(resid, 1)
            off = max(_off_at(model, suffix, resid, position) for position in (0, LENGTH // 2, LENGTH - 1))
        except REFUSALS:  # what keeps a state of another kind fails on a cache of keys and values
            continue
        if off <= _share(model):
            return masked
    raise InputError(
        f"{_name(model)} keeps more than keys and values of earlier tokens: a token replayed after its prefix is off "
        f"by {off:.2g} of its stream; it cannot be a model of a pair"
    )


def _off_at(model: HFModel, suffix, resid: Tensor, position: int) -> float:
    """How far two replays of one token are from full passes over the edited text."""
    edits = torch.stack([resid[1, position], resid[0, position] * 1.5])
    whole = resid[:1].repeat(2, 1, 1)
    whole[:, position] = edits
    run = Run(start=1, stop=model.shape.n_layers, resid=whole)
    model.go(run, model.no_tokens(whole))
    return _off(suffix.many(0, position, edits), run.last[:, position])


def _expect(model: HFModel, what: str, ours: Tensor, theirs: Tensor) -> None:
    if not (off := _off(ours, theirs)) <= _share(model):
        raise InputError(
            f"{_name(model)} cannot be a model of a pair: {what}, as its parts give it, is off by {off:.2g} of what "
            "the model itself puts out"
        )


def _off(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _share(model: HFModel) -> float:
    return SHARE.get(model.dtype, 1e-4)


def _name(model: HFModel) -> str:
    return f"a {type(model.hf).__name__}"
