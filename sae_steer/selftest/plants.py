"""What the feature of a body does: the readers that make planted pairs of known kinds.

causal, rotated, boundary, graded   a neuron of the last block reads the feature and writes the target tokens
low mass    the same, in a reference whose target mass is tiny
redundant   a neuron that reads the feature and its twin, and writes the same for one of them as for both
broadcast   a head reads the feature at earlier delimiters, and writes the target tokens
inert       nothing reads it
"""

import copy

import torch

from sae_steer.edits.directions import unembedding
from sae_steer.model.decoder import Decoder
from sae_steer.selftest.bodies import CONSTANT, FEATURE, SHARP, TWIN, Body
from sae_steer.selftest.surgery import plant_neuron

ENOUGH = 0.5
"""Of one feature, at which the reader of redundant pairs is saturated."""


@torch.no_grad()
def planted(body: Body, model: Decoder, kind: str, strength: float, ids: tuple[int, ...]) -> Decoder:
    """A copy of one of the body's models that reads the feature.

    Args:
        strength: length of what is written along the target's unembedding where the feature is whole, as a
            share of the stream's.
    """
    model = copy.deepcopy(model)
    block, what = model.layers[-1], strength * body.stream * unembedding(model, ids)
    one, feature, twin = (body.along(lane) / body.scale[lane] for lane in (CONSTANT, FEATURE, TWIN))
    if kind == "inert":
        return model
    if kind == "broadcast":
        first = block.self_attn.o_proj.weight.shape[1] - model.shape.d_head
        block.self_attn.o_proj.weight[:, first] = what / body.scale[FEATURE]
    elif kind == "redundant":
        for neuron, (threshold, sign) in enumerate(((0.0, 1), (ENOUGH, -1))):
            gate, down = SHARP * (feature + 2 * twin - threshold * one), sign * what / (SHARP * ENOUGH)
            plant_neuron(block, neuron, gate=gate, up=one, down=down)
    else:
        plant_neuron(block, 0, gate=SHARP * one, up=feature, down=what / SHARP)
    return model
