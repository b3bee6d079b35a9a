"""What each head attends to, said in the structure of a text instead of in positions.

1. A token has a step (counted by the onsets up to it) and an offset in it (0 is the delimiter that opens the step).
2. A query is known by its offset; a key by how many steps back it lies and its own offset, or as the text's first
   token, or as another token before the first step.
3. A head's profile is the attention of each kind of query to each kind of key, the mean over queries from the second
   step on: texts of any length have the same profile if their heads do the same.

Sums are kept by task, so that tasks can be resampled.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.model.heads import read_heads
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.rows import Padded, padded
from sae_steer.pair.texts import Text

OFFSETS = 5
"""Kinds of offset in a step: 0 to 3, and 4 or more."""
BACK = 4
"""Kinds of distance in steps: 0 (the query's own) to 2, and 3 or more."""
BEFORE = 2
"""Kinds of key before the first step: the first token, and the rest."""
KEYS = BEFORE + BACK * OFFSETS
EARLIER_BOUNDARIES = tuple(BEFORE + back * OFFSETS for back in range(1, BACK))
"""The keys that are delimiters which opened earlier steps."""
TOKENS_PER_BATCH = 2_048

Profiles = Float[np.ndarray, "head query key"]


@dataclass(frozen=True)
class Reading:
    """The profiles of all heads of a model over some tasks."""

    profile: Profiles
    """The mean over queries."""
    uniform: Float[np.ndarray, "query key"]
    """That of a head that attends to all tokens alike."""

    @property
    def broadcast(self) -> Float[np.ndarray, " head"]:
        """How persistently each head attends to the delimiters of earlier steps: its attention to them beyond what
        is theirs by number, at the offset in a step where that is least."""
        return (self.profile - self.uniform)[:, :, EARLIER_BOUNDARIES].sum(-1).min(-1)


@dataclass(frozen=True)
class HeadProfiles:
    """Attention of every head of a model by structure, summed by task; heads are numbered through all layers."""

    mass: Float[np.ndarray, "task head query key"]
    """Attention, summed over the queries of a kind."""
    uniform: Float[np.ndarray, "task query key"]
    """The same for a head that attends to all tokens alike."""
    queries: Float[np.ndarray, "task query"]
    """How many queries of each kind."""
    mean_read: Float[np.ndarray, "head d_head"]
    """What each head reads on average, over all tokens."""
    n_heads: int
    """Heads of a layer."""

    @property
    def tasks(self) -> int:
        """Tasks summed over."""
        return len(self.queries)

    def name(self, head: int) -> str:
        """`L3H5`."""
        return f"L{head // self.n_heads}H{head % self.n_heads}"

    def over(self, counts: Float[np.ndarray, " task"] | None = None) -> "Reading":
        """The profiles over all tasks, or with tasks taken as often as `counts` says."""
        counts = np.ones(self.tasks) if counts is None else counts
        queries = np.maximum(counts @ self.queries, 1)[:, None]
        mass, uniform = (np.tensordot(counts, part, axes=1) / queries for part in (self.mass, self.uniform))
        return Reading(mass, uniform)

    def by_task(self) -> Float[np.ndarray, "task head query_key"]:
        """Each task's own profiles; zero for kinds of query it has none of."""
        own = self.mass / np.maximum(self.queries, 1)[:, None, :, None]
        return own.reshape(*own.shape[:2], -1)


def read_profiles(model: LanguageModel, texts: list[Text]) -> HeadProfiles:
    """The profiles of all heads over `texts`, each with its onsets marked."""
    counter = _Counter(model, texts)
    for batch in padded([text.token for text in texts], TOKENS_PER_BATCH):
        counter.read(model, batch, [texts[i] for i in batch.members])
    return counter.profiles()


class _Counter:
    """Sums of attention as batches are read."""

    def __init__(self, model: LanguageModel, texts: list[Text]):
        self.rows = {task: row for row, task in enumerate(sorted({text.task for text in texts}))}
        self.n_layers, self.n_heads = model.shape.n_layers, model.shape.n_heads
        heads, tasks = self.n_layers * self.n_heads, len(self.rows)
        self.mass = torch.zeros(tasks, heads, OFFSETS * KEYS, dtype=torch.float64)
        self.uniform = torch.zeros(tasks, OFFSETS * KEYS, dtype=torch.float64)
        self.queries = torch.zeros(tasks, OFFSETS, dtype=torch.float64)
        self.read_sum = torch.zeros(heads, model.shape.d_head, dtype=torch.float64)
        self.tokens = 0

    def read(self, model: LanguageModel, batch: Padded, texts: list[Text]) -> None:
        kinds = [_kinds(torch.from_numpy(text.is_onset)) for text in texts]
        one_hots = [_one_hot(kind) for _, kind in kinds]
        self.tokens += int(batch.real.sum())
        for text, (places, kind) in zip(texts, kinds, strict=True):
            row, length = self.rows[text.task], len(text)
            share = (1 / torch.arange(1, length + 1, dtype=torch.float64))[:, None].expand(length, length)
            self.uniform[row].index_add_(0, kind, share.reshape(-1)[places])
            self.queries[row] += torch.bincount(_queries(torch.from_numpy(text.is_onset)), minlength=OFFSETS)

        def look(layer: int, pattern: Tensor, heads_read: Tensor) -> None:
            mine = slice(layer * self.n_heads, (layer + 1) * self.n_heads)
            pattern, heads_read = pattern.cpu(), heads_read.cpu().double()
            self.read_sum[mine] += torch.einsum("bhpd,bp->hd", heads_read, batch.real.double())
            for row, text in enumerate(texts):
                own = pattern[row, :, : len(text), : len(text)].reshape(self.n_heads, -1)[:, kinds[row][0]]
                self.mass[self.rows[text.task], mine] += own.float() @ one_hots[row]

        read_heads(model, batch.tokens.to(model.device), look)

    def profiles(self) -> HeadProfiles:
        shape = (OFFSETS, KEYS)
        return HeadProfiles(
            mass=self.mass.numpy().reshape(*self.mass.shape[:2], *shape),
            uniform=self.uniform.numpy().reshape(-1, *shape),
            queries=self.queries.numpy(),
            mean_read=(self.read_sum / max(self.tokens, 1)).numpy(),
            n_heads=self.n_heads,
        )


def _steps(is_onset: Bool[Tensor, " pos"]) -> tuple[Int[Tensor, " pos"], Int[Tensor, " pos"]]:
    """The step of each token (-1 before the first) and its offset there, the larger ones as one kind."""
    place = torch.arange(len(is_onset))
    opened = torch.where(is_onset, place, -1).cummax(0).values
    return is_onset.long().cumsum(0) - 1, (place - opened).clamp(max=OFFSETS - 1)


def _queries(is_onset: Bool[Tensor, " pos"]) -> Int[Tensor, " query"]:
    """The kinds of the queries that count: those from the second step on."""
    step, offset = _steps(is_onset)
    return offset[step >= 1]


def _kinds(is_onset: Bool[Tensor, " pos"]) -> tuple[Int[Tensor, " cell"], Int[Tensor, " cell"]]:
    """Cells of the [query, key] matrix that count, flattened, and the kind of each: query kind times key kind."""
    step, offset = _steps(is_onset)
    back = (step[:, None] - step).clamp(max=BACK - 1)
    key = torch.where(step >= 0, BEFORE + back * OFFSETS + offset, 1)
    key[:, 0] = torch.where(step[0] < 0, 0, key[:, 0])
    causal = torch.ones_like(back, dtype=torch.bool).tril()
    counts = causal & (step >= 1)[:, None]
    return counts.reshape(-1).nonzero()[:, 0], (offset[:, None] * KEYS + key)[counts]


def _one_hot(kind: Int[Tensor, " cell"]) -> Float[Tensor, "cell kind"]:
    return torch.nn.functional.one_hot(kind, OFFSETS * KEYS).float()
