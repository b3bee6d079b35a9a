"""Where an edit goes: what each block above carries of it, and how much of that the target's unembedding reads.

    difference[l] = difference[l - 1] + attention's change + MLP's change           exactly, at every block

It turns a null into "decays", "is overwritten" (the blocks write against it) or "is not read" (its projection on
the summed target unembedding stays small). With norms and attention frozen nothing above adds to the edit: what the
final norm and the unembedding make of it alone, on the clean stream, is its direct effect.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sae_steer.effects.estimates import Effect, estimates
from sae_steer.effects.measure import OnsetRows
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.readout import Measure
from sae_steer.model.replay import CleanPass, Edit
from sae_steer.settings import Draws

PARTS = ("resid", "attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class TraceBlock:
    """What an edit changes at one block: mean length, and mean projection on what the target's unembedding reads."""

    block: int
    n: int
    """Onsets that the edit moves."""
    resid_norm: float | None
    """Of the stream after the block; None if no onset is moved."""
    resid_projection: float | None
    attention_norm: float | None
    """Of what the block's attention adds to the change; None for the block of the edit itself."""
    attention_projection: float | None
    mlp_norm: float | None
    mlp_projection: float | None

    def of(self, part: str, what: str) -> float | None:
        """One of `PARTS`, its `norm` or its `projection`."""
        norms = {"resid": self.resid_norm, "attention": self.attention_norm, "mlp": self.mlp_norm}
        projections = {
            "resid": self.resid_projection, "attention": self.attention_projection, "mlp": self.mlp_projection
        }  # fmt: skip
        return norms[part] if what == "norm" else projections[part]


@dataclass(frozen=True, kw_only=True)
class DirectEffect(Effect):
    """The change of the measure if nothing above read the edit, and the whole one at the same onsets."""

    whole: Effect


@dataclass(frozen=True)
class Trace:
    """Where an edit goes, block by block, and what it does without them."""

    blocks: tuple[TraceBlock, ...]
    direct: DirectEffect


@torch.no_grad()
def trace(
    model: LanguageModel, layer: int, edit: Edit, onsets: OnsetRows, unit: Float[Tensor, " d_model"]
) -> tuple[TraceBlock, ...]:
    """Per block from `layer` on: mean norm and mean projection on `unit` of what the edit changes, and its parts.

    Each onset is edited alone and followed at its own position; those that the edit does not move are left out.
    The first row is the edit itself.

    Args:
        unit: what the target's unembedding reads (`directions.unembedding`), of length one.
    """
    changes_by_place: dict[tuple[int, str], list[Tensor]] = {}
    for batch in onsets.batches:
        clean = CleanPass.of(model, batch.tokens.to(model.device), layer)
        positions, real = batch.positions.to(model.device), batch.real.to(model.device)
        before = clean.at(positions)
        changes = differences(clean, positions, before, edit(before))
        moved = (changes[layer, "resid"].norm(dim=-1) > 0) & real.flatten()
        for key, change in changes.items():
            changes_by_place.setdefault(key, []).append(change[moved])
    rows = {key: torch.cat(parts) for key, parts in changes_by_place.items()}
    return tuple(
        TraceBlock(block=block, n=len(rows[block, "resid"]), **_means(rows, block, unit))
        for block in range(layer, model.shape.n_layers)
    )


@torch.no_grad()
def direct_effect(
    model: LanguageModel, layer: int, edit: Edit, onsets: OnsetRows, measure: Measure, draws: Draws
) -> DirectEffect:
    """The change of the measure if no block above read the edit and the final norm kept its scale, with its interval;
    and the whole effect at the same onsets, each edited alone.
    """
    parts = []
    for batch in onsets.batches:
        clean = CleanPass.of(model, batch.tokens.to(model.device), layer)
        positions, real = batch.positions.to(model.device), batch.real.to(model.device)
        before = clean.at(positions)
        after = edit(before)
        last, edited = clean.above.single(positions, torch.stack([before, after]))
        logits = model.unembed(last), model.unembed_frozen(last, after - before), model.unembed(edited)
        parts.append(torch.stack([measure(under[real]).double() for under in logits], dim=1).cpu())
    value = torch.cat(parts).numpy()
    direct, whole = estimates(value[:, 1:] - value[:, :1], onsets, draws)
    return DirectEffect(**vars(direct), whole=whole)


@torch.no_grad()
def differences(
    clean: CleanPass,
    positions: Int[Tensor, "batch edit"],
    before: Float[Tensor, "batch edit d_model"],
    after: Float[Tensor, "batch edit d_model"],
) -> dict[tuple[int, str], Float[Tensor, "row d_model"]]:
    """{(block, part): what replacing `before` by `after` changes there}, rows in the order of the positions."""
    layers = range(clean.layer + 1, clean.model.shape.n_layers)
    seen = []
    for resid in before, after:
        with _written(clean.model, layers) as written:
            clean.above.single(positions, resid[None])
        seen.append({key: torch.cat(parts) for key, parts in written.items()})
    edit = rearrange(after - before, "batch edit d_model -> (batch edit) d_model")
    return {(clean.layer, "resid"): edit, **{key: seen[1][key] - seen[0][key] for key in seen[0]}}


@contextmanager
def _written(model: LanguageModel, layers: Sequence[int]) -> Iterator[dict[tuple[int, str], list[Tensor]]]:
    """Collects what the blocks and their parts put out while it lasts, rows flattened."""
    written: dict[tuple[int, str], list[Tensor]] = {}

    def collect(key):
        def hook(module, inputs, output):
            written.setdefault(key, []).append(output.reshape(-1, output.shape[-1]))

        return hook

    hooks = [
        module.register_forward_hook(collect((layer, part)))
        for layer in layers
        for part, module in zip(PARTS, (model.resid_post(layer), *model.writers(layer)), strict=True)
    ]
    try:
        yield written
    finally:
        for hook in hooks:
            hook.remove()


def _means(rows: dict[tuple[int, str], Tensor], block: int, unit: Float[Tensor, " d_model"]) -> dict:
    """Mean norm and projection of each part at one block; None for the parts of the edit itself."""
    means: dict[str, float | None] = {}
    for part in PARTS:
        change = rows.get((block, part))
        changed = change is not None and len(change) > 0
        means[f"{part}_norm"] = float(change.norm(dim=-1).mean()) if changed else None
        means[f"{part}_projection"] = float((change @ unit.to(change)).mean()) if changed else None
    return means
