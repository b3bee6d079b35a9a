"""Two models that differ in what one block writes at step onsets, ready for a reader to be planted above.

Both are the embedded target model, widened (`surgery.widened`), with the same edits but for what block `WRITER`
writes at delimiters:

reference   minus the target's unembedding, which takes the target mass down: the gap between the two
target      the feature, along lane `FEATURE`, and its like along lane `TWIN`

Both also write the feature at some other tokens, so that a map between the two streams, fitted where no step
begins, can carry it. The last block is as trained: what the feature does is planted there (`plants`).
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.edits.directions import unembedding
from sae_steer.model.decoder import Decoder
from sae_steer.model.rows import Padded
from sae_steer.pair.texts import Text
from sae_steer.randomness import Stream, random_numbers
from sae_steer.selftest.surgery import plant_neuron, widened

LANES = CONSTANT, MARK, FEATURE, TWIN = range(4)
"""Spare dimensions, counted from the embedded model's width: a constant, the mark of the tokens at which both
models write the feature, the feature studied, and the one that carries the same in redundant pairs."""
NEURONS, HEADS = 4, 1
ENLARGER, AT_MARKED, AT_ONSETS = 0, 1, (2, 3)
"""Which spare neuron of its block does what."""
EMBEDDED = 0.2
"""What an embedding holds in a lane: a sixth of its length."""
ENLARGES, WRITER = 0, 2
"""The block that makes the constant large, and the block that writes."""
CONSTANT_SIZE = 5.0
"""What that is made: ten times what a control direction of the feature's length has there."""
SHARP = 100.0
"""Slope of a planted gate: silu is a hinge where it is large."""
MARKED_SHARE = 0.08
"""Share of the tokens at which both models write the feature."""
CONTENT = 0.1
"""Spread that the stream's content gives the writer's gate at delimiters, in units of its height there."""
PEAK, PAIR = 20.0, 1
"""Score at which the spare head attends to a delimiter ten tokens back, and its rotary pair, of 20 tokens a turn."""


@dataclass(frozen=True)
class Body:
    """The two models before a reader is planted, and what a planter must know of them."""

    reference: Decoder
    target: Decoder
    lane: int
    """Where the spare dimensions begin."""
    scale: Float[Tensor, " lane"]
    """What each lane holds in the normed stream that the last block's MLP reads at onsets."""
    stream: float
    """Median length of the target's stream before the last block at onsets."""
    size: float
    """Of the feature where it is written."""

    @property
    def d_model(self) -> int:
        """Width of the stream."""
        return self.target.shape.d_model

    def along(self, lane: int) -> Float[Tensor, " d_model"]:
        """A unit vector along a lane."""
        return torch.eye(self.d_model)[self.lane + lane]


@torch.no_grad()
def build_body(
    trained: Decoder,
    texts: Sequence[Text],
    ids: tuple[int, ...],
    *,
    size: float,
    coverage: float,
    suppression: float,
    seed: int,
) -> Body:
    """The trained model as two, told apart by what block 2 writes at delimiters.

    Args:
        texts: on which what is written is sized.
        ids: the target tokens.
        size: of the feature, as a share of the median stream before the last block at onsets.
        coverage: share of the onsets at which it is written; under 1, the stream's content decides which.
        suppression: length of what the reference writes, as a share of its stream.
        seed: of the tokens at which both write the feature, and of the content that decides.
    """
    random = random_numbers(seed, Stream.PLANTED_BODY)
    sample = _Sample.of(texts)
    lane, model = trained.shape.d_model, widened(trained, lanes=len(LANES), heads=HEADS, neurons=NEURONS)
    model.embed_tokens.weight[:, lane + CONSTANT] = EMBEDDED
    model.embed_tokens.weight[sample.marked(random), lane + MARK] = EMBEDDED
    _enlarge_constant(model, lane, sample)
    stream = sample.length(model, model.shape.n_layers - 1)
    _write_where_marked(model, lane, sample, size * stream)
    _aim_spare_head(model, lane, sample)
    reference, target = copy.deepcopy(model), model
    down = unembedding(reference, ids) * -suppression * sample.length(reference, WRITER)
    _OnsetWriter.of(reference, lane, sample, 1.0, random).write(reference, sample, down)
    feature = size * stream * (torch.eye(lane + len(LANES))[lane + FEATURE] + torch.eye(lane + len(LANES))[lane + TWIN])
    _OnsetWriter.of(target, lane, sample, coverage, random).write(target, sample, feature)
    seen = _read_by(target, target.shape.n_layers - 1, sample.ids)[sample.onset][:, lane:]
    written = seen[:, FEATURE] > seen[:, FEATURE].max() / 2
    return Body(reference, target, lane, seen[written].mean(0).clamp_min(1e-6), stream, size * stream)


@dataclass(frozen=True)
class _Sample:
    """Texts to size things on, as one padded batch."""

    ids: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    onset: Bool[Tensor, "batch pos"]
    delimiter: Bool[Tensor, "batch pos"]
    """Onsets, and the same tokens where no step follows."""

    @classmethod
    def of(cls, texts: Sequence[Text]) -> "_Sample":
        batch = Padded.of([text.token for text in texts])
        ids, real, onset = batch.tokens, batch.real, batch.placed([text.is_onset for text in texts])
        return cls(ids, real, onset, real & torch.isin(ids, ids[onset].unique()))

    def marked(self, random: np.random.Generator) -> list[int]:
        """Tokens drawn until they make up `MARKED_SHARE` of the texts, no delimiter among them."""
        tokens, counts = self.ids[self.real & ~self.delimiter].unique(return_counts=True)
        order = random.permutation(len(tokens))
        enough = int((counts[order].cumsum(0) < MARKED_SHARE * int(self.real.sum())).sum()) + 1
        return tokens[order[:enough]].tolist()

    def length(self, model: Decoder, before: int) -> float:
        """Median length at onsets of the stream before a block."""
        return float(model.run(model.embed(self.ids), stop=before)[self.onset].norm(dim=-1).median())


@dataclass(frozen=True)
class _OnsetWriter:
    """A gate that opens at delimiters: hinge(gate . n - low) - hinge(gate . n - high), n what block `WRITER` reads.

    The difference of two hinges is all or nothing, so what is written has nearly one size.
    """

    gate: Float[Tensor, " d_model"]
    one: Float[Tensor, " d_model"]
    """Reads 1 at delimiters off the constant."""
    low: float
    high: float

    @classmethod
    def of(
        cls, model: Decoder, lane: int, sample: _Sample, coverage: float, random: np.random.Generator
    ) -> "_OnsetWriter":
        read = _read_by(model, WRITER, sample.ids)
        gate, one = _delimiter_probe(read, lane, sample), _unit_reading(read[sample.delimiter], lane + CONSTANT)
        if coverage == 1:
            return cls(gate, one, 0.35, 0.65)
        content = torch.zeros_like(gate)
        content[:lane] = torch.from_numpy(random.standard_normal(lane)).float()
        here = read[sample.onset] @ content
        gate = gate + CONTENT / here.std() * (content - here.mean() * one)
        low = float((read[sample.onset] @ gate).quantile(1 - coverage))
        return cls(gate, one, low, low + CONTENT / 4)

    def write(self, model: Decoder, sample: _Sample, what: Float[Tensor, " d_model"]) -> None:
        """Let block `WRITER` add `what` where the gate is open."""
        block, down = model.layers[WRITER], what / (SHARP * (self.high - self.low))
        for neuron, threshold, sign in zip(AT_ONSETS, (self.low, self.high), (1, -1), strict=True):
            plant_neuron(block, neuron, gate=SHARP * (self.gate - threshold * self.one), up=self.one, down=sign * down)


def _read_by(model: Decoder, layer: int, ids: Int[Tensor, "batch pos"], part: str = "mlp") -> Tensor:
    """The normed stream that a block's `mlp` or `self_attn` reads."""
    seen: list[Tensor] = []
    hook = getattr(model.layers[layer], part).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model.run(model.embed(ids), stop=layer + 1)
    finally:
        hook.remove()
    return seen[0]


def _unit_reading(rows: Float[Tensor, "row d_model"], dimension: int) -> Float[Tensor, " d_model"]:
    """The vector that reads one dimension as 1 on the rows' mean."""
    return torch.eye(rows.shape[1])[dimension] / rows[:, dimension].mean()


def _delimiter_probe(read: Float[Tensor, "batch pos d_model"], lane: int, sample: _Sample) -> Float[Tensor, " d_model"]:
    """Least squares on the trained dimensions and the constant: 1 at delimiters, 0 at other tokens."""
    rows = read[sample.real].double()
    rows[:, lane + MARK :] = 0
    gram = rows.T @ rows + 1e-3 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)
    probe = torch.linalg.solve(gram, rows[sample.delimiter[sample.real]].sum(0))
    probe[lane + MARK :] = 0
    return (probe / (rows[sample.delimiter[sample.real]] @ probe).mean()).float()


def _enlarge_constant(model: Decoder, lane: int, sample: _Sample) -> None:
    """One block makes the constant large; embeddings then take a share of it that makes it equal for all tokens."""
    one = _unit_reading(_read_by(model, ENLARGES, sample.ids)[sample.delimiter], lane + CONSTANT)
    down = {lane + CONSTANT: (CONSTANT_SIZE - EMBEDDED) / SHARP}
    plant_neuron(model.layers[ENLARGES], ENLARGER, gate=SHARP * one, up=one, down=down)
    tokens, where, counts = sample.ids[sample.real].unique(return_inverse=True, return_counts=True)
    constant = model.run(model.embed(sample.ids), stop=ENLARGES + 1)[sample.real][:, lane + CONSTANT]
    mean = torch.zeros(len(tokens)).index_add(0, where, constant) / counts
    model.embed_tokens.weight[tokens, lane + CONSTANT] *= (CONSTANT_SIZE / mean).sqrt()  # it is made of a square


def _write_where_marked(model: Decoder, lane: int, sample: _Sample, size: float) -> None:
    read = _read_by(model, WRITER, sample.ids)[sample.real]
    here = read[:, lane + MARK] > 0
    mark, one = (_unit_reading(read[here], lane + where) for where in (MARK, CONSTANT))
    plant_neuron(model.layers[WRITER], AT_MARKED, gate=SHARP * mark, up=one, down={lane + FEATURE: size / SHARP})


def _aim_spare_head(model: Decoder, lane: int, sample: _Sample) -> None:
    """The last block's spare head reads the feature at delimiters 5 to 15 tokens back; nothing of it is written yet.

    Queries and keys lie in one rotary pair, opposite at distance 0, so that no delimiter attends to itself.
    """
    last = model.shape.n_layers - 1
    attention, d_head = model.layers[last].self_attn, model.shape.d_head
    read = _read_by(model, last, sample.ids, "self_attn")
    first, probe = attention.q_proj.weight.shape[0] - d_head, _delimiter_probe(read, lane, sample)
    height = (PEAK * d_head**0.5) ** 0.5
    attention.q_proj.weight[first + PAIR] = -height * probe
    attention.k_proj.weight[first + PAIR] = height * probe
    attention.v_proj.weight[first, lane + FEATURE] = 1.0
