"""Learning a TopK dictionary (Gao et al. 2024, 2406.04093), resumable bit for bit.

1. Rows are divided by one number, so that their mean squared distance from the mean is d_in;
   at the end the biases are multiplied by it, and the dictionary reads raw rows.
2. b_dec starts at the data's mean, W_dec at random unit rows, W_enc at a multiple of W_dec's transpose.
3. A step: the batch of that step, reconstruction loss, the dead features' loss, Adam;
   the decoder's gradient has no part along its rows, and its rows are put back to norm one.
4. The learning rate rises linearly, stays, and falls linearly to zero.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sae_steer.errors import InputError, NotFiniteError
from sae_steer.runtime import World, generator
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.sae.checkpoint import TrainingState, interrupts_held, last_good
from sae_steer.sae.kernels import decode_codes, encode_topk
from sae_steer.sae.log import Log, Quiet, StepFacts
from sae_steer.sae.losses import auxk_loss, reconstruction_mse
from sae_steer.settings import SAESettings

LOG_EVERY = 10
"""Steps between two looks at the loss: each look waits for the device."""

_MAX_GRADIENT_NORM = 1.0
_ADAM_EPS = 6.25e-10  # Gao et al., appendix A.3: gradients of a mean over 4096 rows are small


@runtime_checkable
class RowSource(Protocol):
    """Where training rows come from: the cache, or a test's synthetic rows."""

    d_in: int
    n_rows: int
    mean: Float[Tensor, " d_in"]
    mean_square: float
    """E||x - mean||^2."""
    fingerprint: str
    """Changes whenever a batch would."""

    def batch(self, step: int, batch_size: int, seed: int) -> Float[Tensor, "batch d_in"]:
        """The float32 rows of a step: a pure function of its arguments."""


@dataclass(frozen=True, kw_only=True)
class TrainedSAE:
    """A finished dictionary and what it came from."""

    sae: TopKSAE
    """On raw rows."""
    settings: SAESettings
    steps: int
    rows: str
    """The row source's fingerprint."""

    @property
    def provenance(self) -> dict:
        """What `save_sae` stores beside the weights."""
        return {"settings": dataclasses.asdict(self.settings), "steps": self.steps, "rows": self.rows}


def train_topk(
    rows: RowSource,
    settings: SAESettings,
    *,
    world: World,
    log: Log | None = None,
    checkpoint: Path | None = None,
) -> TrainedSAE:
    """The dictionary of `settings` for `rows`; goes on from `checkpoint` if that file exists.

    The finished state stays in `checkpoint`: delete it once the dictionary is saved.
    """
    log = log or Quiet()
    steps = settings.rows // settings.batch_size
    scale = _scale(rows)
    identity = {
        "settings": dataclasses.asdict(settings),
        "rows": rows.fingerprint,
        "precision": str(world.autocast),
    }
    state = initial_state(rows, settings, scale, world)
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint, identity)

    def save() -> None:
        if checkpoint is not None:
            state.save(checkpoint, identity)
            log.checkpoint(state.step, checkpoint)

    with interrupts_held() as interrupted:
        while state.step < steps:
            batch = rows.batch(state.step, settings.batch_size, settings.seed).to(world.device) / scale
            mse, loss = train_step(state, batch, settings, steps, world)
            if state.step % LOG_EVERY == 0 or state.step == steps:
                log.step(_facts(state, mse, loss, settings, steps, checkpoint))
            if state.step % settings.checkpoint_every == 0 or state.step == steps or interrupted():
                save()
            if interrupted():
                raise KeyboardInterrupt
    log.done(state.step)
    return TrainedSAE(sae=state.sae.scaled(scale), settings=settings, steps=steps, rows=rows.fingerprint)


def train_step(
    state: TrainingState, batch: Float[Tensor, "batch d_in"], settings: SAESettings, steps: int, world: World
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """One step in place; returns the share of variance left unexplained, and the loss."""
    sae = state.sae
    with world.compute():
        codes = encode_topk(batch, sae.W_enc, sae.b_enc, sae.b_dec, sae.config.k)
    reconstruction = decode_codes(codes, sae.W_dec) + sae.b_dec
    mse = reconstruction_mse(batch, reconstruction) / sae.config.d_in  # of rows with mean square d_in
    loss = mse
    dead = (state.silent_rows > settings.dead_after_rows).nonzero()[:, 0]  # waits for the device
    if len(dead):
        error = (batch - reconstruction).detach()
        error_hat = reconstruct_with(sae, dead, batch, settings.aux_k, world)
        loss = mse + settings.aux_coefficient * auxk_loss(error, error_hat)
    loss.backward()
    _update(state, learning_rate(state.step / steps, settings))
    state.silent_rows = (state.silent_rows + len(batch)).masked_fill(codes.firings > 0, 0)
    state.step += 1
    return mse.detach(), loss.detach()


def reconstruct_with(
    sae: TopKSAE, features: Int[Tensor, " chosen"], x: Float[Tensor, "row d_in"], k: int, world: World
) -> Float[Tensor, "row d_in"]:
    """What the `k` strongest of `features` alone make of each row, without b_dec."""
    with world.compute():
        codes = encode_topk(x, sae.W_enc[:, features], sae.b_enc[features], sae.b_dec, min(k, len(features)))
    return decode_codes(codes, sae.W_dec[features])


def initial_state(rows: RowSource, settings: SAESettings, scale: float, world: World) -> TrainingState:
    """The state before the first step, fixed by the settings' seed and the rows."""
    if settings.rows < settings.batch_size:
        raise InputError(f"{settings.rows} rows do not fill a batch of {settings.batch_size}; raise --rows")
    sae = TopKSAE(TopKConfig(d_in=rows.d_in, d_sae=settings.d_sae, k=settings.k))
    directions = torch.randn(settings.d_sae, rows.d_in, generator=generator(settings.seed, 1))
    with torch.no_grad():
        sae.b_dec.copy_(rows.mean / scale)
        sae.W_dec.copy_(normalize(directions, dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
        first = rows.batch(0, settings.batch_size, settings.seed) / scale
        sae.W_enc.mul_(_best_multiple(first - sae.b_dec, sae(first) - sae.b_dec))
    sae.to(world.device)
    optimiser = torch.optim.Adam(sae.parameters(), lr=settings.lr, eps=_ADAM_EPS, fused=True)
    return TrainingState(sae, optimiser, torch.zeros(settings.d_sae, dtype=torch.long, device=world.device))


def learning_rate(progress: float, settings: SAESettings) -> float:
    """The rate at `progress` from 0 to 1 through the run: up over `warmup`, down to zero over `decay`."""
    rise = (progress + 1e-3) / (settings.warmup + 1e-3)
    fall = (1 - progress) / settings.decay if settings.decay else 1.0
    return settings.lr * min(1.0, rise, fall)


@torch.no_grad()
def _update(state: TrainingState, lr: float) -> None:
    """Adam on decoder rows of norm one: no gradient along a row, and each row back to norm one."""
    W_dec = state.sae.W_dec
    W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
    torch.nn.utils.clip_grad_norm_(state.sae.parameters(), _MAX_GRADIENT_NORM)
    for group in state.optimiser.param_groups:
        group["lr"] = lr
    state.optimiser.step()
    state.optimiser.zero_grad()
    W_dec.copy_(normalize(W_dec, dim=1))


def _scale(rows: RowSource) -> float:
    """What rows are divided by, so that E||x - mean||^2 = d_in."""
    if not (math.isfinite(rows.mean_square) and rows.mean_square > 0):
        raise NotFiniteError(
            f"the rows' mean squared distance from their mean is {rows.mean_square}; "
            f"a dictionary needs rows that are finite and differ: rebuild the cache"
        )
    return math.sqrt(rows.mean_square / rows.d_in)


def _best_multiple(target: Float[Tensor, "row d_in"], guess: Float[Tensor, "row d_in"]) -> float:
    """The a that makes a * guess closest to target."""
    return float((target * guess).sum() / guess.square().sum())


def _facts(
    state: TrainingState,
    mse: Float[Tensor, ""],
    loss: Float[Tensor, ""],
    settings: SAESettings,
    steps: int,
    checkpoint: Path | None,
) -> StepFacts:
    value = float(loss)
    if not math.isfinite(value):
        raise NotFiniteError(f"the loss is {value} at step {state.step}; {last_good(checkpoint)}")
    return StepFacts(
        step=state.step,
        steps=steps,
        loss=value,
        fve=1 - float(mse),
        dead=float((state.silent_rows > settings.dead_after_rows).double().mean()),
        lr=learning_rate((state.step - 1) / steps, settings),
    )
