"""What a feature fires on: its strongest and random contexts in both models, what it promotes, what lies near it.

1. One pass over a split in each model keeps the firings of the features asked for, sparse.
2. The strongest firing of each text, and firings drawn at random, become contexts: the tokens around them, with the
   feature's activation at every one in both models at the same positions.
3. The decoder row read through the final norm's gain and the unembedding (a logit lens, nostalgebraist 2020) says
   which tokens the feature promotes and suppresses; cosines of decoder rows, which features lie nearest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csc_array
from torch.nn.functional import normalize

from sae_steer.cache import ActivationCache
from sae_steer.dictionary import Dictionary, check_fits
from sae_steer.errors import InputError
from sae_steer.model.language_model import LanguageModel
from sae_steer.pair.model_pair import ModelPair
from sae_steer.progress import Progress, silent
from sae_steer.sae.architectures import SparseDictionary
from sae_steer.settings import ContextSettings

BINS = 20
"""Of the histogram of a feature's activations, between zero and its largest."""


@dataclass(frozen=True)
class Context:
    """A stretch of one text around a firing, and the feature's activation at each of its tokens."""

    text: int
    """The text's number in its split."""
    task: int
    rendering: str
    start: int
    """Position of the first token shown."""
    tokens: tuple[str, ...]
    target: tuple[float, ...]
    """In the model the dictionary was learned from."""
    other: tuple[float, ...]
    """In the other model, at the same positions."""
    at: int
    """Which of the tokens shown is the firing's own."""

    @property
    def activation(self) -> float:
        """Of the firing shown."""
        return self.target[self.at]


@dataclass(frozen=True)
class Weighted:
    """A token or a feature, and by how much."""

    name: str
    weight: float


@dataclass(frozen=True)
class FeatureCard:
    """Everything a reader needs to see what one feature is."""

    feature: int
    rows: int
    """Rows of the split."""
    target_firings: int
    other_firings: int
    histogram: tuple[int, ...]
    """Firings in the dictionary's own model, by `BINS` equal steps of activation up to `largest`."""
    largest: float
    top: tuple[Context, ...]
    """The strongest firing of each text, strongest first."""
    random: tuple[Context, ...]
    """Firings drawn evenly, so that the top ones do not stand for all."""
    promoted: tuple[Weighted, ...]
    suppressed: tuple[Weighted, ...]
    neighbours: tuple[Weighted, ...]
    """The features with the most similar decoder rows, by cosine."""

    def table(self) -> Mapping[str, list]:
        """The contexts as columns, one row a token, ready for a data frame or a Parquet file."""
        columns: dict[str, list] = {}
        for kind, contexts in (("top", self.top), ("random", self.random)):
            for rank, context in enumerate(contexts):
                for offset, token in enumerate(context.tokens):
                    row = {
                        "feature": self.feature, "kind": kind, "rank": rank, "text": context.text,
                        "task": context.task, "rendering": context.rendering, "position": context.start + offset,
                        "token": token, "target": context.target[offset], "other": context.other[offset],
                        "is_firing": offset == context.at,
                    }  # fmt: skip
                    for name, value in row.items():
                        columns.setdefault(name, []).append(value)
        return columns

    @property
    def record(self) -> dict:
        """The card as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SplitTexts:
    """The texts of a split as rows: which belong together, and what they say."""

    labels: dict[str, np.ndarray]
    renderings: tuple[str, ...]
    pair: ModelPair

    @cached_property
    def bounds(self) -> Int[np.ndarray, " text_and_one"]:
        """Where each text's rows begin, and where the last one ends."""
        starts = np.flatnonzero(self.labels["position"] == 0)
        return np.append(starts, len(self.labels["position"]))

    def context(self, row: int, firings: Mapping[str, csc_array], width: int) -> Context:
        """The tokens up to `width` before and half as many after `row`, within its text."""
        text = int(np.searchsorted(self.bounds, row, side="right")) - 1
        first = max(row - width, int(self.bounds[text]))
        last = min(row + width // 2 + 1, int(self.bounds[text + 1]))
        target, other = (_dense(column, first, last) for column in firings.values())
        return Context(
            text=text,
            task=int(self.labels["task"][row]),
            rendering=self.renderings[int(self.labels["text_variant"][row])],
            start=int(self.labels["position"][first]),
            tokens=tuple(spelled(self.pair, self.labels["token"][first:last].tolist())),
            target=target,
            other=other,
            at=row - first,
        )


def read_contexts(
    pair: ModelPair,
    cache: ActivationCache,
    dictionary: Dictionary,
    features: Sequence[int],
    *,
    settings: ContextSettings | None = None,
    split: str = "scan",
    on_rows: Progress = silent,
) -> list[FeatureCard]:
    """A card for each of `features`, from the streams both models have over a split's texts.

    Raises:
        InputError: a feature the dictionary does not have, or a cache of another pair.
    """
    settings, features = settings or ContextSettings(), list(features)
    cache.check_pair(pair)
    check_fits(dictionary, cache)
    for feature in features:
        if not 0 <= feature < dictionary.sae.config.d_sae:
            raise InputError(
                f"feature {feature} is not in {dictionary.name}; it has features 0 to {dictionary.sae.config.d_sae - 1}"
            )
    own = pair.model(dictionary.model)
    names = (own.name, next(model.name for model in pair.models if model.name != own.name))
    texts = SplitTexts(cache.labels(split), cache.variants, pair)
    fires = {
        name: _firings(dictionary.sae, cache, name, dictionary.layer, split, features, number, on_rows)
        for number, name in enumerate(names)
    }
    near = _neighbours(dictionary.sae, features, settings.neighbours)
    promoted = _through_unembedding(dictionary.sae, own.model, pair, features, settings.tokens)
    return [
        _card(feature, {name: matrix[:, [column]] for name, matrix in fires.items()}, texts, near[column],
              promoted[column], settings)
        for column, feature in enumerate(features)
    ]  # fmt: skip


def spelled(pair: ModelPair, ids: Sequence[int]) -> list[str]:
    """Each token's part of the text; a character that tokens share stands with the first of them."""
    read = pair.tokenizer.detokenized(ids)
    ends = [0, *np.maximum.accumulate([end for _, end in read.spans]).tolist()]
    return [read.text[begin:end] for begin, end in pairwise(ends)]


@torch.no_grad()
def _firings(
    sae: SparseDictionary,
    cache: ActivationCache,
    model: str,
    layer: int,
    split: str,
    features: Sequence[int],
    number: int,
    on_rows: Progress,
) -> csc_array:
    """[row, feature] The activations of the features asked for, one model's rows of a split."""
    stream = cache.rows(model, layer, split)
    column = np.full(sae.config.d_sae, -1)
    column[list(features)] = np.arange(len(features))
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    for resid in stream.in_order():
        codes = sae.encode(resid)
        mine, values = column[codes.indices.numpy()], codes.values.numpy()
        wanted = (mine >= 0) & (values > 0)
        kept.append((values[wanted], codes.rows.numpy()[wanted] + start, mine[wanted]))
        start += len(resid)
        on_rows(number * len(stream.counts) + start, 2 * len(stream.counts), f"rows of {model}")
    values, rows, columns = (np.concatenate(part) for part in zip(*kept, strict=True))
    return csc_array((values, (rows, columns)), shape=(start, len(features)))


def _dense(column: csc_array, first: int, last: int) -> tuple[float, ...]:
    return tuple(float(value) for value in column[first:last].toarray()[:, 0])


def _card(
    feature: int,
    firings: Mapping[str, csc_array],
    texts: SplitTexts,
    neighbours: tuple[Weighted, ...],
    through: tuple[tuple[Weighted, ...], tuple[Weighted, ...]],
    settings: ContextSettings,
) -> FeatureCard:
    own, other = firings.values()
    rows, values = own.indices, own.data
    largest = float(values.max()) if len(values) else 0.0
    strongest = rows[_strongest_of_each_text(rows, values, texts.bounds)][: settings.top]
    random = np.random.default_rng([settings.seed, feature])
    drawn = np.sort(random.choice(rows, size=min(settings.random, len(rows)), replace=False))
    shown = [tuple(texts.context(int(row), firings, settings.width) for row in chosen) for chosen in (strongest, drawn)]
    counts = np.histogram(values, bins=BINS, range=(0.0, largest or 1.0))[0]
    return FeatureCard(
        feature=feature,
        rows=own.shape[0],
        target_firings=own.nnz,
        other_firings=other.nnz,
        histogram=tuple(counts.tolist()),
        largest=largest,
        top=shown[0],
        random=shown[1],
        promoted=through[0],
        suppressed=through[1],
        neighbours=neighbours,
    )


def _strongest_of_each_text(
    rows: Int[np.ndarray, " firing"], values: Float[np.ndarray, " firing"], bounds: Int[np.ndarray, " text_and_one"]
) -> Int[np.ndarray, " text"]:
    """Indices of the firings that are the largest of their text, largest first; the earlier of two equal ones."""
    order = np.lexsort((rows, -values))
    texts = np.searchsorted(bounds, rows[order], side="right")
    _, first = np.unique(texts, return_index=True)
    return order[np.sort(first)]


def _neighbours(sae: SparseDictionary, features: Sequence[int], count: int) -> list[tuple[Weighted, ...]]:
    directions = normalize(torch.stack([sae.direction(feature) for feature in range(sae.config.d_sae)]), dim=1)
    cosines = directions[list(features)] @ directions.T
    cosines[torch.arange(len(features)), list(features)] = -2.0
    top = cosines.topk(min(count, cosines.shape[1] - 1), dim=1)
    return [
        tuple(Weighted(str(index), float(cosine)) for index, cosine in zip(*row, strict=True))
        for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


@torch.no_grad()
def _through_unembedding(
    sae: SparseDictionary, model: LanguageModel, pair: ModelPair, features: Sequence[int], count: int
) -> list[tuple[tuple[Weighted, ...], tuple[Weighted, ...]]]:
    """Tokens whose logits a unit of each feature raises and lowers most, the mean over the vocabulary taken off."""
    directions = normalize(torch.stack([sae.direction(feature) for feature in features]), dim=1)
    logits = (directions.to(model.W_U) * model.gain) @ model.W_U.T
    logits -= logits.mean(1, keepdim=True)
    logits = logits[:, : pair.tokenizer.n_vocab].cpu()
    sides = (logits.topk(min(count, logits.shape[1]), dim=1, largest=largest) for largest in (True, False))
    promoted, suppressed = (
        [_weighted(pair, *row) for row in zip(side.indices.tolist(), side.values.tolist(), strict=True)]
        for side in sides
    )
    return list(zip(promoted, suppressed, strict=True))


def _weighted(pair: ModelPair, tokens: Sequence[int], weights: Sequence[float]) -> tuple[Weighted, ...]:
    return tuple(Weighted(pair.tokenizer.decode([t]), w) for t, w in zip(tokens, weights, strict=True))
