"""Next-token training of one decoder, resumable bit for bit.

1. A step's batch is a pure function of the step, so the data cursor is the step.
2. The learning rate rises linearly, then falls on a cosine to a tenth.
3. A checkpoint is one file: weights, AdamW's moments, the step, the log so far.
4. A model may start from another's checkpoint: that is how two models come to share a basis.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sae_steer.errors import NotFiniteError, StaleError
from sae_steer.files import read_tensors, write_tensors
from sae_steer.model.batching import Tokens
from sae_steer.model.decoder import Decoder, init_decoder
from sae_steer.progress import Progress, silent
from sae_steer.randomness import generator
from sae_steer.settings import DecoderSettings, PairTrainingSettings
from sae_steer.world import World

IGNORE = -100


@dataclass
class TrainingState:
    """A model part-way through its training: what a checkpoint holds."""

    model: Decoder
    optimiser: torch.optim.AdamW
    step: int = 0
    log: list[dict] = field(default_factory=list)
    """An entry a checkpoint: the step, the mean training loss since the one before, and the held-out loss."""

    @classmethod
    def fresh(
        cls, shape: DecoderSettings, settings: PairTrainingSettings, *, stream: int, world: World
    ) -> "TrainingState":
        """Random weights of `settings.seed` and `stream`."""
        model = init_decoder(shape, generator(settings.seed, stream)).to(world.device)
        return cls(model, _optimiser(model, settings))

    def save(self, path: Path, identity: dict) -> None:
        """Write the checkpoint; `identity` says what run it belongs to, log included."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimiser.state.get(parameter, {})
            tensors |= {f"{key}.{name}": moment for key, moment in moments.items()}
        write_tensors(path, tensors, {"step": self.step, "log": self.log, "identity": identity})

    def load(self, path: Path, identity: dict) -> None:
        """Continue from a checkpoint; one of another run (`identity`) is refused."""
        tensors, facts = read_tensors(path)
        if facts["identity"] != identity:
            other = ", ".join(name for name in identity if facts["identity"].get(name) != identity[name])
            raise StaleError(f"{path} belongs to a run with other {other}; use another --out, or --force to start anew")
        self.model.load_state_dict({name: tensors[f"model.{name}"] for name in self.model.state_dict()})
        for name, parameter in self.model.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in tensors]
            self.optimiser.state[parameter] = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in keys}
        self.step, self.log = facts["step"], facts["log"]


def train(
    state: TrainingState,
    batch: Callable[[int], Tokens],
    settings: PairTrainingSettings,
    *,
    pad_id: int,
    stop: int,
    steps: int,
    world: World,
    checkpoint: Path,
    identity: dict,
    held_out: Sequence[Tokens] = (),
    on_step: Progress = silent,
) -> None:
    """Train `state` in place up to step `stop` of a schedule of `steps`."""
    total, since = 0.0, 0
    while state.step < stop:
        for group in state.optimiser.param_groups:
            group["lr"] = settings.lr * schedule(state.step / steps, settings.warmup)
        loss = _train_step(state, batch(state.step).to(world.device), pad_id, world)
        state.step += 1
        total, since = total + loss, since + 1
        if state.step % settings.checkpoint_every == 0 or state.step == stop:
            _check_finite(state, total, since, settings)
            entry = {"step": state.step, "loss": total / since}
            if held_out:
                entry["held_out_loss"] = held_out_loss(state.model, held_out, pad_id, world)
            state.log.append(entry)
            state.save(checkpoint, identity)
            total, since = 0.0, 0
        on_step(state.step, stop, f"loss {loss:.3f}")


def schedule(progress: float, warmup: float) -> float:
    """The learning rate as a share of its peak, `progress` from 0 to 1 through the run."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.55 + 0.45 * math.cos(math.pi * (progress - warmup) / (1 - warmup))


@torch.no_grad()
def held_out_loss(model: Decoder, batches: Sequence[Tokens], pad_id: int, world: World) -> float:
    """Mean cross-entropy, nats a token."""
    total = count = 0.0
    for tokens in batches:
        loss, n = _loss(model, tokens.to(world.device), pad_id, world)
        total, count = total + float(loss) * float(n), count + float(n)
    return total / count


def _check_finite(state: TrainingState, total: float, since: int, settings: PairTrainingSettings) -> None:
    """Before a checkpoint: neither its losses nor the weights their last step left may be out of range."""
    if math.isfinite(total) and all(bool(parameter.isfinite().all()) for parameter in state.model.parameters()):
        return
    raise NotFiniteError(
        f"training went to infinity between steps {state.step - since} and {state.step}; "
        f"start anew with --force and a lower --lr (it was {settings.lr:g})"
    )


def _optimiser(model: Decoder, settings: PairTrainingSettings) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)


def _train_step(state: TrainingState, tokens: Tokens, pad_id: int, world: World) -> float:
    loss, _ = _loss(state.model, tokens, pad_id, world)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimiser.step()
    state.optimiser.zero_grad()
    return float(loss.detach())


def _loss(model: Decoder, tokens: Tokens, pad_id: int, world: World) -> tuple[Tensor, Tensor]:
    targets = tokens[:, 1:].masked_fill(tokens[:, 1:] == pad_id, IGNORE)
    with world.compute():
        logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    return loss, (targets != IGNORE).sum()
