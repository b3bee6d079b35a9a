"""How much of a model's next-token loss a dictionary keeps when its reconstruction stands in for the stream.

recovered = (ablated - spliced) / (ablated - clean)

clean    cross-entropy of the text's next tokens, nats, read at the chosen positions;
spliced  the same with x_hat in place of x after block L, at all chosen positions of a text together;
ablated  the same with the mean of x over the chosen positions in its place (mean ablation).

1 loses nothing; 0 is no better than a constant (Bricken et al. 2023, "loss recovered"; with the mean instead of
zero, because a zero is no stream the model has ever seen and makes every dictionary look good).

Where mean ablation costs nothing that can be told from zero there is nothing to recover, and the share is undefined:
of 4.10, 4.17 and 4.03 nats (clean, spliced, ablated) it would be 2. Of a text that ends at the position read, the
loss is expected over the clean prediction, which stands in for the token that does not follow.

Positions whose rows do not count (`row_filter`: special tokens, and rows far longer than the others) are neither
replaced nor read: in place of a massive first row the mean wrecks the whole text, and any dictionary looks good beside.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sae_steer import stats
from sae_steer.cache import ActivationCache
from sae_steer.dictionary import Dictionary
from sae_steer.effects.measure import OnsetBatch, OnsetRows
from sae_steer.errors import InputError
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.replay import CleanPass
from sae_steer.model.rows import real_rows
from sae_steer.outputs import writing
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text
from sae_steer.records import already_done, provenance, write_json
from sae_steer.row_filter import LeftOut, RowFilter

RECORD_FILE = "ce_recovered.json"
TEXTS = 100
"""Texts read for the record beside a dictionary."""


@dataclass(frozen=True, kw_only=True)
class SplicedLoss:
    """Cross-entropies in nats a token, and the share a dictionary recovers with its interval over tasks."""

    positions: str
    """`onsets` or `all`: where the stream was replaced and the loss read."""
    clean: float
    spliced: float
    mean_ablated: float
    recovered: float | None
    """None where mean ablation costs nothing that can be told from zero: there is nothing to recover."""
    low: float | None
    high: float | None
    n: int
    """Positions read."""
    tasks: int
    ends: int = 0
    """Of the positions, those at which their text ends, so that the loss is expected over the clean prediction."""
    left_out: LeftOut | None = None
    """The positions that were neither replaced nor read."""

    def record(self) -> dict:
        """The figures for a JSON record."""
        return asdict(self)

    @property
    def losses(self) -> str:
        """The three that the share is made of."""
        return f"{self.clean:.2f} nats clean, {self.spliced:.2f} spliced, {self.mean_ablated:.2f} mean-ablated"


def ce_recovered(
    model: LanguageModel,
    sae: nn.Module,
    texts: Sequence[Text],
    layer: int,
    *,
    only_onsets: bool,
    row_filter: RowFilter | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> SplicedLoss:
    """The loss `sae` recovers when it stands in for the stream after block `layer`, at step onsets or everywhere.

    Args:
        row_filter: says which positions count; by default none but those of long rows are left out.
        sae: anything callable that maps rows [row, d_model] of this stream to their reconstructions.
        draws: bootstrap resamples of the tasks for the interval.
    """
    wanted = "onsets" if only_onsets else "all"
    positions, left_out = _positions(model, texts, layer, row_filter or RowFilter(), only_onsets=only_onsets)
    rows = OnsetRows.of(texts, positions)
    if len(set(rows.task.tolist())) < 2:
        raise InputError(
            f"the {len(texts)} texts hold {len(rows)} positions to read and fewer than two tasks; "
            "cross-entropy recovered needs texts of two tasks or more: cache more texts"
        )
    mean = _mean_row(model, rows.batches, layer)
    losses = np.concatenate([_losses(model, sae, batch, layer, mean) for batch in rows.batches])
    clean, spliced, ablated = losses.T
    share = _share_recovered(clean, spliced, ablated, rows.task, draws=draws, seed=seed)
    return SplicedLoss(
        positions=wanted,
        clean=float(clean.mean()),
        spliced=float(spliced.mean()),
        mean_ablated=float(ablated.mean()),
        recovered=None if share is None else float(share.mean[0]),
        low=None if share is None else float(share.low[0]),
        high=None if share is None else float(share.high[0]),
        n=len(rows),
        tasks=rows.tasks,
        ends=sum(int(batch.ends[batch.real].sum()) for batch in rows.batches),
        left_out=left_out,
    )


def _share_recovered(
    clean: Float[np.ndarray, " row"],
    spliced: Float[np.ndarray, " row"],
    ablated: Float[np.ndarray, " row"],
    task: Int[np.ndarray, " row"],
    *,
    draws: int,
    seed: int,
) -> stats.Estimate | None:
    """(ablated - spliced) / (ablated - clean) with its interval; None where the denominator may as well be zero."""
    cost = (ablated - clean)[:, None]
    if not stats.cluster_bootstrap(cost, task, draws=draws, seed=seed).low[0] > 0:
        return None
    share = stats.cluster_bootstrap_ratio((ablated - spliced)[:, None], cost, task, draws=draws, seed=seed)
    return share if np.isfinite([share.low[0], share.high[0]]).all() else None


def find_or_splice(
    pair: ModelPair, cache: ActivationCache, dictionary: Dictionary, folder: Path, *, force: bool = False
) -> Path:
    """The record of `ce_recovered` beside a dictionary, at onsets and everywhere, made now unless it is there.

    Read on the first texts of the scan split that are the model's own: tasks no dictionary was trained on.
    """
    path, settings = Path(folder) / RECORD_FILE, {"texts": TEXTS, "split": "scan"}
    inputs = {"pair": pair.sha256, "cache": cache.sha256, "dictionary": dictionary.sha256}
    inputs |= {"rows": cache.row_filter.identity}
    wanted = provenance(settings=settings, inputs=inputs)
    if not already_done(path, wanted, force=force):
        model, texts = pair.model(dictionary.model), cache.own_texts("scan", dictionary.model)[:TEXTS]
        sae = dictionary.to(model.model.device).sae
        losses = [
            ce_recovered(
                model.model, sae, texts, dictionary.layer, only_onsets=only_onsets, row_filter=cache.row_filter
            )
            for only_onsets in (True, False)
        ]
        with writing(folder, [RECORD_FILE], force=force):
            write_json(path, {"provenance": wanted} | {one.positions: one.record() for one in losses})
    return path


def _positions(
    model: LanguageModel, texts: Sequence[Text], layer: int, row_filter: RowFilter, *, only_onsets: bool
) -> tuple[list[Int[np.ndarray, " position"]], LeftOut]:
    """Each text's positions that are replaced and read: its onsets, or all that count and have a next token."""
    token, is_onset = (np.concatenate([getattr(text, name) for text in texts]) for name in ("token", "is_onset"))
    chosen = row_filter(token, is_onset, _norms(model, texts, layer))
    wanted = chosen.counts & is_onset if only_onsets else chosen.counts
    parts = np.split(wanted, np.cumsum([len(text) for text in texts])[:-1])
    return [np.flatnonzero(part if only_onsets else part[:-1]) for part in parts], chosen.left_out


@torch.no_grad()
def _norms(model: LanguageModel, texts: Sequence[Text], layer: int) -> Float[np.ndarray, " row"]:
    """The length of the stream at every position, text after text."""

    def run(tokens: Tensor) -> dict[int, Tensor]:
        return {layer: model.resid_posts(tokens.to(model.device), (layer,))[layer].double().norm(dim=-1).float()}

    return real_rows([text.token for text in texts], run)[layer]


@torch.no_grad()
def _mean_row(model: LanguageModel, batches: Sequence[OnsetBatch], layer: int) -> Float[Tensor, " d_model"]:
    total, count = 0.0, 0
    for batch in batches:
        resid = model.resid_posts(batch.tokens.to(model.device), (layer,))[layer]
        index = batch.positions.to(model.device)[..., None].expand(-1, -1, resid.shape[-1])
        chosen = resid.gather(1, index)[batch.real.to(model.device)]
        total, count = total + chosen.double().sum(0), count + len(chosen)
    return (total / count).float()


@torch.no_grad()
def _losses(
    model: LanguageModel, sae: nn.Module, batch: OnsetBatch, layer: int, mean: Float[Tensor, " d_model"]
) -> Float[np.ndarray, "row 3"]:
    """Cross-entropy of the next token at every real position: clean, spliced, mean-ablated.

    Where none follows, it is expected over the clean prediction.
    """
    tokens, positions, real = (part.to(model.device) for part in (batch.tokens, batch.positions, batch.real))
    clean, at = CleanPass.of(model, tokens, layer), batch.marked("onsets").to(model.device)
    before = clean.resid[at]
    logits = clean.read_joint(at, torch.stack([before, sae(before), mean.expand_as(before)]), positions)
    following, ends = batch.following.to(model.device)[real], batch.ends.to(model.device)[real]
    predicted = logits[0][real][ends].double().softmax(-1)
    columns = []
    for copy in logits:
        read = copy[real].double()
        column = cross_entropy(read, following, reduction="none")
        column[ends] = cross_entropy(read[ends], predicted, reduction="none")
        columns.append(column)
    return torch.stack(columns, dim=1).cpu().numpy()
