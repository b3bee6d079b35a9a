"""Learning any SAELens architecture (`saelens:gated`) with SAELens's own trainer, fed with our rows.

1. SAELens's training dictionary and SAETrainer, with its own losses, coefficients and schedules; its rows are our
   batches, each a pure function of the step.
2. Rows are scaled as SAELens advises (`expected_average_only_in`: mean norm sqrt(d_in), which here leaves rows far
   longer than the others aside) and the scale is folded into the weights; b_dec starts at the rows' mean.
3. A checkpoint is one safetensors file of everything a step reads; the same run goes on from it bit for bit.
4. What comes back is the inference dictionary SAELens would save (`batchtopk` becomes `jumprelu`).
"""

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_steer.errors import InputError, NotFiniteError, StaleError
from sae_steer.files import read_tensors, write_tensors
from sae_steer.sae.checkpoint import interrupts_held, last_good
from sae_steer.sae.log import Log, Quiet, StepFacts
from sae_steer.sae.saelens.adapter import SAELensDictionary, sae_lens
from sae_steer.sae.saelens.reading import for_inference
from sae_steer.sae.training import RowSource, shorten_, typical_moments, typical_rows
from sae_steer.settings import SAESettings
from sae_steer.world import World

PREFIX = "saelens:"
LOG_EVERY = 10
"""Steps between two looks at the loss: each look waits for the device."""
SCALE_BATCHES = 10
"""First batches, from which SAELens estimates the scale of the rows."""

_COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
_TALLIES = ("act_freq_scores", "n_forward_passes_since_fired")


def saelens_architectures() -> tuple[str, ...]:
    """The names SAELens trains."""
    sae_lens()
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    return tuple(sorted(SAE_TRAINING_CLASS_REGISTRY))


def parse_architecture(asked: str) -> tuple[str, dict[str, Any]]:
    """`saelens:gated,l1_coefficient=2` -> ("gated", {"l1_coefficient": 2}): a name and its options as JSON values."""
    name, *options = asked.removeprefix(PREFIX).split(",")
    found: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        try:
            found[key.strip()] = json.loads(value)
        except ValueError as error:
            raise InputError(
                f"{asked!r} has an option {option!r}; write NAME=NUMBER, as in {PREFIX}gated,l1_coefficient=2"
            ) from error
    return name, found


def train_saelens(
    rows: RowSource,
    settings: SAESettings,
    architecture: str,
    *,
    options: Mapping[str, Any] | None = None,
    world: World,
    log: Log | None = None,
    checkpoint: Path | None = None,
) -> SAELensDictionary:
    """The dictionary of SAELens's `architecture` for `rows`; goes on from `checkpoint` if that file exists.

    Args:
        options: fields of the architecture's own training config, such as `l1_coefficient`.
    """
    log, options = log or Quiet(), dict(options or {})
    trainer = _trainer(rows, settings, architecture, options, world)
    identity = {
        "settings": dataclasses.asdict(settings),
        "architecture": architecture,
        "options": options,
        "rows": rows.fingerprint,
        "precision": str(world.autocast),
    }
    identity = json.loads(json.dumps(identity))  # as it comes back from a checkpoint
    if checkpoint is not None and checkpoint.exists():
        _load(trainer, checkpoint, identity)
    steps = settings.rows // settings.batch_size
    with interrupts_held() as interrupted:
        while trainer.n_training_steps < steps:
            step = trainer.n_training_steps
            trainer.maybe_reset_sparsity()
            lr = trainer.optimizer.param_groups[0]["lr"]
            batch = rows.batch(step, settings.batch_size, settings.seed).to(world.device)
            output = trainer.step(shorten_(batch, usual=rows.d_in**0.5 / trainer.activation_scaler.scaling_factor))
            trainer.n_training_steps = step = step + 1
            if step % LOG_EVERY == 0 or step == steps:
                log.step(_facts(trainer, output, rows, steps, lr, checkpoint))
            due = step % settings.checkpoint_every == 0 or step == steps or interrupted()
            if due and checkpoint is not None:
                _save(trainer, checkpoint, identity)
                log.checkpoint(step, checkpoint)
            if interrupted():
                raise KeyboardInterrupt
    log.done(steps)
    return _inference(trainer, architecture)


def _trainer(rows: RowSource, settings: SAESettings, architecture: str, options: dict, world: World):
    """SAELens's trainer at step 0, fixed by the settings' seed and the rows."""
    if settings.rows < settings.batch_size:
        raise InputError(f"{settings.rows} rows do not fill a batch of {settings.batch_size}; raise --rows")
    config = _config(rows.d_in, settings, architecture, options, world)
    from sae_lens import LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    steps = settings.rows // settings.batch_size
    gpus = [] if world.device.type == "cpu" else [world.device]
    with torch.random.fork_rng(devices=gpus):  # sae_lens draws its first weights from torch's global generators
        torch.manual_seed(settings.seed)
        sae = get_sae_training_class(architecture)[0](config)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=settings.rows, train_batch_size_samples=settings.batch_size,
            lr=settings.peak_lr, lr_end=settings.peak_lr / 10,
            lr_warm_up_steps=round(steps * settings.warmup), lr_decay_steps=round(steps * settings.decay),
            device=str(world.device), autocast=world.autocast is not None,
            dead_feature_window=max(1, settings.dead_after_rows // settings.batch_size),
            logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=SCALE_BATCHES,
        ),
        sae=sae.to(world.device),
        data_provider=iter(()),
    )  # fmt: skip
    first = (typical_rows(rows.batch(step, settings.batch_size, settings.seed)) for step in range(SCALE_BATCHES))
    trainer.activation_scaler.estimate_scaling_factor(
        d_in=rows.d_in, data_provider=first, n_batches_for_norm_estimate=SCALE_BATCHES
    )
    # sae_lens starts b_dec at zero, and rows far off centre then cost thousands of steps to find their mean
    mean, _ = typical_moments(rows, rows.batch(0, settings.batch_size, settings.seed))
    sae.b_dec.data.copy_(mean * trainer.activation_scaler.scaling_factor)
    return trainer


def _config(d_in: int, settings: SAESettings, architecture: str, options: dict, world: World):
    """SAELens's training config of the architecture."""
    known = saelens_architectures()
    if architecture not in known:
        raise InputError(f"SAELens trains no architecture {architecture!r}; it trains {', '.join(known)}")
    from sae_lens.registry import get_sae_training_class

    kind = get_sae_training_class(architecture)[1]
    fields = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(options) - fields):
        raise InputError(f"SAELens's {architecture} has no option {unknown[0]!r}; it has {', '.join(sorted(fields))}")
    own = {"d_in": d_in, "d_sae": settings.d_sae, "device": str(world.device)}
    own |= {"normalize_activations": "expected_average_only_in"} | ({"k": settings.k} if "k" in fields else {})
    if "matryoshka_widths" in fields:  # sae_lens has none of its own
        own["matryoshka_widths"] = [settings.d_sae // 4, settings.d_sae // 2, settings.d_sae]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it sets for itself and says so
            return kind(**own | options)
    except (TypeError, ValueError) as error:
        raise InputError(f"SAELens's {architecture} refuses its options {options}: {error}") from error


def _facts(trainer, output, rows: RowSource, steps: int, lr: float, checkpoint: Path | None) -> StepFacts:
    loss, step = float(output.loss.detach()), trainer.n_training_steps
    if not math.isfinite(loss):
        raise NotFiniteError(f"the loss is {loss} at step {step}; {last_good(checkpoint)}")
    scaled_square = rows.mean_square * trainer.activation_scaler.scaling_factor**2
    error = float((output.sae_in - output.sae_out).detach().float().square().sum(1).mean())
    can_be_dead = step > trainer.cfg.dead_feature_window
    return StepFacts(
        step=step, steps=steps, loss=loss, fve=1 - error / scaled_square,
        dead=float(trainer.dead_neurons.double().mean()) if can_be_dead else None, lr=lr,
    )  # fmt: skip


def _save(trainer, path: Path, identity: dict) -> None:
    """Write everything the next step reads; weights that are not finite are refused and the last good one stays."""
    weights = trainer.sae.state_dict()
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        raise NotFiniteError(f"the weights are not finite at step {trainer.n_training_steps}; {last_good(path)}")
    tensors = {f"weight.{name}": weight.clone() for name, weight in weights.items()}
    tensors |= {f"tally.{name}": getattr(trainer, name) for name in _TALLIES}
    for number, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": moment for name, moment in moments.items()}
    facts = {
        "step": trainer.n_training_steps,
        "identity": identity,
        "counters": {name: getattr(trainer, name) for name in _COUNTERS},
        "scale": trainer.activation_scaler.scaling_factor,
        "lr": trainer.lr_scheduler.state_dict(),
        "coefficients": {name: one.state_dict() for name, one in trainer.coefficient_schedulers.items()},
    }
    write_tensors(path, tensors, facts)


def _load(trainer, path: Path, identity: dict) -> None:
    """Continue from a checkpoint of the same run; one of another run is refused."""
    tensors, facts = read_tensors(path)
    if facts.get("identity") != identity:
        raise StaleError(f"{path} is of a run with other settings or rows; delete it or name another output")
    trainer.sae.load_state_dict(_part(tensors, "weight."))
    for name, tally in _part(tensors, "tally.").items():
        setattr(trainer, name, tally.to(trainer.cfg.device))
    state = trainer.optimizer.state_dict()
    for key, moment in _part(tensors, "adam.").items():
        number, name = key.split(".")
        state["state"].setdefault(int(number), {})[name] = moment
    trainer.optimizer.load_state_dict(state)
    for name, count in facts["counters"].items():
        setattr(trainer, name, count)
    trainer.activation_scaler.scaling_factor = facts["scale"]
    trainer.lr_scheduler.load_state_dict(facts["lr"])
    for group, lr in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = lr
    for name, one in trainer.coefficient_schedulers.items():
        one.load_state_dict(facts["coefficients"][name])


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _inference(trainer, architecture: str) -> SAELensDictionary:
    """The finished dictionary as SAELens would save it for inference, on raw rows."""
    sae = trainer.sae
    sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.set_final_sae_metadata()
    return SAELensDictionary(for_inference(sae).to("cpu"), f"{PREFIX}{architecture}")
