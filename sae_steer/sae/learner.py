"""One dictionary while it is learned: its weights, Adam's moments, its counters, and one step.

A step, for rows x of mean zero and mean square d_in:
1. Choose the codes as the dictionary's rule says (`rules`). On a CPU that is fast at int8, those of a rule that
   looks at each row alone are looked for among the largest of an int8 product and decided in float32
   (`compiled.screened_topk`).
2. Reconstruct, by each prefix of the features that the rule names, and take the slope of the loss along each code.
3. Let the `aux_k` strongest of the dead features reconstruct the error that is left (Gao et al. 2024, A.2). Which
   features are dead is looked up every `LOOK_EVERY` steps, so that no other step waits for the device.
4. Adam on all weights; the decoder's gradient has no part along its rows, which stay at norm one.
5. Raise the encoder bias of features that have been silent for a while, by as much at every step and without a
   gradient, until they are chosen again: what keeps experts equally busy (Wang et al. 2024, 2408.15664) keeps
   features alive. Towards the end it fades with the learning rate, which then could not fit what is raised.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from sae_steer.randomness import Stream, generator
from sae_steer.sae.architectures import LinearSAE
from sae_steer.sae.kernels import portable as kernels
from sae_steer.sae.kernels.cuda_graph import Captured
from sae_steer.sae.kernels.portable import FeatureGradients, Part
from sae_steer.sae.rules import rule_of
from sae_steer.sae.rules.rule import Batch, Chosen, Rule
from sae_steer.settings import SAESettings
from sae_steer.world import World

if TYPE_CHECKING:
    from sae_steer.sae.kernels.cpu import Coarse

MOST_UNSURE = 0.1
"""Share of the rows of `WATCHED` steps that int8 may leave to float32: beyond it a bfloat16 product is faster."""
WATCHED = 100
LOOK_EVERY = 10
"""Steps between two looks at which features are dead, on a device that a look would wait for."""

_BETAS = (0.9, 0.999)
_ADAM_EPS = 6.25e-10  # Gao et al., appendix A.3: gradients of a mean over 4096 rows are small
_WEIGHTS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


@dataclass
class Learner:
    """The state of one dictionary, on rows of mean zero and mean square d_in; `W_enc` by rows, as its transpose."""

    settings: SAESettings
    rule: Rule
    W_enc: Float[Tensor, "d_sae d_in"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"]
    """What a code of each feature must exceed, where the rule has such a thing."""
    silent_rows: Int[Tensor, " d_sae"]
    """Rows read since each feature last fired."""
    precision: torch.dtype
    """Type of the encoder's product."""
    screens: bool
    """Whether TopK finds its candidates by an int8 product first; given up where int8 decides too few rows."""
    unsure: Int[Tensor, ""]
    """Rows that int8 left to float32 since the last `WATCHED` steps began; -1 once it was given up."""
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    low: Tensor = field(init=False)
    """W_enc at the precision of the encoder's product; empty where that is float32."""
    graph: "Captured[Measured] | None" = field(init=False, default=None)
    """What `_measure` does at the final k while no feature is dead, as one CUDA graph."""
    coarse: "Coarse | None" = field(init=False)
    """W_enc in int8 while `screens`."""
    updates: int = 0
    dead: Int[Tensor, " dead"] | None = None
    """The features that took part in the auxiliary loss at the last look; empty for none, None before the first."""

    def __post_init__(self) -> None:
        self.low = torch.empty_like(
            self.W_enc[:0] if self.precision == torch.float32 else self.W_enc, dtype=self.precision
        )
        self.refresh()
        for name in _WEIGHTS:
            self.first.setdefault(name, torch.zeros_like(getattr(self, name)))
            self.second.setdefault(name, torch.zeros_like(getattr(self, name)))

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold, by name; what is copied back into them continues the run."""
        kept = {name: getattr(self, name) for name in (*_WEIGHTS, "silent_rows", "unsure")}
        for moment in ("first", "second"):
            kept |= {f"{moment}.{name}": value for name, value in getattr(self, moment).items()}
        return kept

    @property
    def prefixes(self) -> list[int]:
        """How many features each reconstruction of the loss reads."""
        return self.rule.prefixes(len(self.W_enc))

    def refresh(self) -> None:
        """Renew what is derived from the weights, after they were copied in."""
        self.screens = self.screens and int(self.unsure) >= 0
        self.coarse = _compiled().Coarse.of(self.W_enc, _compiled().int8_product()) if self.screens else None
        self.round_weights()

    def round_weights(self) -> None:
        """Renew `low`, in place: a CUDA graph reads it where it lies."""
        if self.precision != torch.float32:
            self.low.copy_(self.W_enc)

    def count_unsure(self, rows: int, unsure: int) -> None:
        """Note that int8 could not decide `unsure` of `rows`; it is given up beyond a share of `MOST_UNSURE`."""
        if self.updates % WATCHED == 0:
            self.unsure.zero_()
        self.unsure += unsure
        if self.unsure > MOST_UNSURE * rows * WATCHED:
            self.unsure.fill_(-1)
            self.refresh()

    def exported(self, mean: Float[Tensor, " d_in"], scale: float) -> LinearSAE:
        """The dictionary for raw rows, mean and scale folded into its weights."""
        d_sae, d_in = self.W_enc.shape
        sae = self.rule.stored(d_in, d_sae, self.settings.k)
        weights = {name: getattr(self, name) for name in ("W_dec", "b_enc", "b_dec", "threshold")}
        stored = sae.state_dict()
        sae.load_state_dict({"W_enc": self.W_enc.T} | {name: w for name, w in weights.items() if name in stored})
        sae = sae.scaled(scale)
        sae.b_dec.data += mean.to(sae.b_dec)
        return sae


@torch.no_grad()
def new_learner(first: Float[Tensor, "row d_in"], settings: SAESettings, world: World) -> Learner:
    """The state before the first step, fixed by the settings' seed and the standardised first rows.

    W_dec starts at random unit rows, W_enc at the multiple of them that explains the first rows best.
    """
    d_in, d_sae = first.shape[1], settings.d_sae
    W_dec = normalize(torch.randn(d_sae, d_in, generator=generator(settings.seed, Stream.FIRST_WEIGHTS)), dim=1)
    sample = first[:1024].cpu()
    pre = sample @ W_dec.T
    top = pre.topk(min(settings.k, d_sae), dim=1)
    guess = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ W_dec
    W_enc = W_dec * ((sample * guess).sum() / guess.square().sum())
    floor = (top.values[:, -1] * (sample * guess).sum() / guess.square().sum()).mean().clamp_min(0)
    device, rule = world.device, rule_of(settings.architecture)
    may_screen = device.type == "cpu" and world.size == 1 and rule.row_alone
    return Learner(
        settings=settings,
        rule=rule,
        W_enc=W_enc.to(device),
        W_dec=W_dec.to(device),
        b_enc=torch.zeros(d_sae, device=device),
        b_dec=torch.zeros(d_in, device=device),
        threshold=torch.full((d_sae,), float(floor), device=device),
        silent_rows=torch.zeros(d_sae, dtype=torch.long, device=device),
        precision=world.autocast or torch.float32,
        screens=may_screen and _compiled().screening_pays(d_sae, settings.k),
        unsure=torch.zeros((), dtype=torch.long),
    )


@torch.no_grad()
def step(learner: Learner, x: Float[Tensor, "row d_in"], k: int, lr: float, world: World) -> Float[Tensor, ""]:
    """One step in place; returns the share of the variance left unexplained by all features, of this batch.

    Args:
        x: standardised rows, this process's share of the batch.
        k: codes a row at this step.
    """
    if learner.dead is None or x.device.type == "cpu" or learner.updates % LOOK_EVERY == 0:
        dead_for = learner.silent_rows > learner.settings.dead_after_rows
        learner.dead = dead_for.nonzero()[:, 0] if learner.settings.aux_coefficient else dead_for[:0].long()
    plain = learner.rule.row_alone and k == learner.settings.k and not len(learner.dead)
    if x.is_cuda and world.size == 1 and plain:
        if learner.graph is None:
            learner.graph = Captured.of(lambda rows: _measure(learner, rows, k, world), x)
        measured = learner.graph(x)
    else:
        measured = _measure(learner, x, k, world)
    _update(learner, x, measured, lr, world)
    return world.mean(measured.parts[0].fit.squared_errors[-1] / x.numel())


@dataclass(frozen=True)
class Measured:
    """What a batch says of the weights; nothing is changed yet."""

    parts: list[Part]
    threshold: Float[Tensor, " d_sae"] | None
    """The gradient to the thresholds, where the rule has one."""
    gradients: FeatureGradients | None
    """Those of the features, unless the engine makes them when it updates."""


@torch.no_grad()
def _measure(learner: Learner, x: Tensor, k: int, world: World) -> Measured:
    """Codes, reconstruction and gradients of a batch."""
    engine = _engine(x, world)
    rows, d_in = len(x) * world.size, x.shape[1]
    chosen = _choose(learner, x, k, engine, world)
    prefixes = learner.prefixes
    scale = 2 / (rows * d_in * len(prefixes))
    fit = engine.reconstruct(x, learner.W_dec, learner.b_dec, chosen.codes, prefixes, scale)
    pull = chosen.threshold_gradient
    threshold = None if pull is None else pull(fit.errors[0], learner.W_dec)
    parts = [Part(chosen.codes, fit)]
    if len(learner.dead):
        parts.append(_revival(learner, x, -fit.errors[-1] / scale, engine, world))
    if engine is not kernels:
        return Measured(parts, threshold, None)
    gradients = kernels.feature_gradients(x, learner.b_dec, parts, prefixes, len(learner.W_enc))
    return Measured(parts, threshold, gradients)


def _engine(x: Tensor, world: World):
    """The compiled kernels where they serve, else torch's."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and world.size == 1:
        return _compiled()
    return kernels


def _compiled():
    """The kernels for CPUs; numba takes a second to load, so they are loaded where they are used."""
    from sae_steer.sae.kernels import cpu as compiled

    return compiled


def _choose(learner: Learner, x: Tensor, k: int, engine, world: World) -> Chosen:
    """The codes of the step."""
    W = learner.low if len(learner.low) else learner.W_enc
    if learner.screens and k == learner.settings.k:
        codes, unsure = engine.screened_topk(x, W, learner.coarse, learner.b_enc, learner.b_dec, k)
        learner.count_unsure(len(x), unsure)
        return Chosen(codes)
    bias = learner.b_enc - learner.W_enc @ learner.b_dec
    return learner.rule.choose(
        Batch(
            x=x.to(W.dtype),
            W=W,
            bias=bias.to(W.dtype),
            k=k,
            final_k=learner.settings.k,
            threshold=learner.threshold,
            is_first=not learner.updates,
            engine=engine,
            world=world,
        )
    )


def _revival(learner: Learner, x: Tensor, error: Tensor, engine, world: World) -> Part:
    """The dead features' reconstruction of the error x - x_hat, held fixed; lost is a share of the error's variance."""
    dead, settings = learner.dead, learner.settings
    W = learner.W_enc[dead]
    bias = learner.b_enc[dead] - W @ learner.b_dec
    x, W, bias = (part.to(learner.precision) for part in (x, W, bias))
    codes = engine.select_topk(x, W, bias, min(settings.aux_k, len(dead)))
    rows = len(error) * world.size
    mean = world.sum_(error.sum(0)) / rows
    variance = world.sum_((error - mean).square().sum())
    scale = 2 * settings.aux_coefficient / variance.clamp_min(1e-30)
    fit = engine.reconstruct(error, learner.W_dec[dead], torch.zeros_like(learner.b_dec), codes, [len(dead)], scale)
    return Part(codes, fit, dead)


def _update(learner: Learner, x: Tensor, measured: Measured, lr: float, world: World) -> None:
    # Adam's moments start at zero; what they lack of their means is made up for in the rates
    learner.updates += 1
    fix = [1 - beta**learner.updates for beta in _BETAS]
    rates = (lr / fix[0], _ADAM_EPS, 1 / math.sqrt(fix[1]))
    b_dec = measured.parts[0].fit.errors[0].sum(0)
    gradients = {} if measured.threshold is None else {"threshold": world.sum_(measured.threshold)}
    if by_feature := measured.gradients:
        # the decoder's gradient across its rows alone: along them it would only be undone
        for gradient in (by_feature.W_enc, by_feature.W_dec, by_feature.b_enc, by_feature.fired, b_dec):
            world.sum_(gradient)
        b_enc, fired = by_feature.b_enc, by_feature.fired
        through, W_dec = b_enc @ learner.W_enc, learner.W_dec
        across = by_feature.W_dec - (by_feature.W_dec * W_dec).sum(1, keepdim=True) * W_dec
        gradients |= {"W_enc": by_feature.W_enc, "W_dec": across}
    else:
        # the compiled kernels update each feature while its gradients are in cache
        moments = tuple(kept[name] for name in ("W_enc", "W_dec") for kept in (learner.first, learner.second))
        weights = (learner.W_enc, learner.W_dec, learner.low)
        b_enc, fired, through = _engine(x, world).step_features(
            x, learner.b_dec, measured.parts, learner.prefixes, weights, learner.coarse, moments, rates
        )
    # x - b_dec enters the encoder: what its biases are drawn by, b_dec is drawn by the other way
    _adam(learner, gradients | {"b_enc": b_enc, "b_dec": b_dec - through}, rates)
    if "W_dec" in gradients:
        learner.W_dec.copy_(normalize(learner.W_dec, dim=1))
        learner.round_weights()
    learner.threshold.clamp_min_(0)
    # features that stay silent are raised, less as the rate decays
    learner.silent_rows = (learner.silent_rows + len(x) * world.size).masked_fill_(fired > 0, 0)
    settings = learner.settings
    lift = settings.raise_silent * lr / settings.peak_lr
    learner.b_enc += lift * (learner.silent_rows > settings.raise_after_rows)


def _adam(learner: Learner, gradients: dict[str, Tensor], rates: tuple[float, float, float]) -> None:
    """Adam as in `loops`: the step's length and the second moment corrected for their start at zero."""
    length, eps, correction = rates
    slopes = list(gradients.values())
    weights, first, second = (
        [kept[name] for name in gradients] for kept in (vars(learner), learner.first, learner.second)
    )
    torch._foreach_lerp_(first, slopes, 1 - _BETAS[0])
    torch._foreach_mul_(second, _BETAS[1])
    torch._foreach_addcmul_(second, slopes, slopes, value=1 - _BETAS[1])
    roots = torch._foreach_sqrt(second)
    torch._foreach_mul_(roots, correction)
    torch._foreach_add_(roots, eps)
    torch._foreach_addcdiv_(weights, first, roots, value=-length)
