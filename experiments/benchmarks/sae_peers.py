"""The trainers that are compared, each as a function of one batch, set up by its own library as its authors do.

SAELens: TopKTrainingSAE in its SAETrainer. dictionary_learning: TopKTrainer. eai-sparsify: SparseCoder with the
body of its Trainer's loop (the Trainer itself drives a language model). The last two pin
versions of their own, so they live in a second environment that borrows the first one's packages:

    python3 -m venv /tmp/venv-peers
    echo "$(python -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parents[1])')" \
        > /tmp/venv-peers/lib/python3.11/site-packages/shared.pth
    /tmp/venv-peers/bin/pip install --no-deps dictionary-learning eai-sparsify schedulefree natsort nnsight greenlet
"""

import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_steer.sae.training import Job, RowSource, Training
from sae_steer.settings import SAESettings
from sae_steer.world import World

Rows = Iterable[Float[Tensor, "row d_in"]]
Item = TypeVar("Item")
DEAD_ROWS = 200_000
"""Rows after which a silent feature counts as dead, in every trainer that lets one say."""
NORM_BATCHES = 10
"""Batches from which SAELens estimates its scaling of the rows."""


@dataclass(frozen=True)
class Trainer:
    """A dictionary in training: `step` changes it by one batch; `finish` gives its encode to dense codes, its decode,
    and a function of its directions [d_sae, d_in]."""

    step: Callable[[Tensor], None]
    finish: Callable[[], tuple[Callable, Callable, Callable]]


def saelens(
    *, d_in: int, d_sae: int, k: int, rows: int, batch_size: int, autocast: bool, first: Rows,
    lr: float = 1e-3, dead_rows: int = DEAD_ROWS, device: str = "cpu",
):  # fmt: skip
    """SAELens's TopK with its auxiliary loss; rows scaled as its guide advises, from the batches `first`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    steps = rows // batch_size
    config = TopKTrainingSAEConfig(
        d_in=d_in, d_sae=d_sae, k=k, normalize_activations="expected_average_only_in", device=device
    )
    settings = SAETrainerConfig(
        total_training_samples=rows, train_batch_size_samples=batch_size, lr=lr, lr_end=lr / 10, autocast=autocast,
        lr_warm_up_steps=steps // 20, lr_decay_steps=steps // 5, device=device,
        dead_feature_window=dead_rows // batch_size,
        logger=LoggingConfig(log_to_wandb=False), n_batches_for_norm_estimate=NORM_BATCHES,
    )  # fmt: skip
    trainer = SAETrainer(cfg=settings, sae=TopKTrainingSAE(config).to(device), data_provider=iter(()))
    trainer.activation_scaler.estimate_scaling_factor(
        d_in=d_in, data_provider=iter(list(islice(first, NORM_BATCHES))), n_batches_for_norm_estimate=NORM_BATCHES
    )

    def step(batch: Tensor) -> None:
        trainer.step(batch)
        trainer.n_training_steps += 1

    def finish():
        trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
        return trainer.sae.encode, trainer.sae.decode, lambda: trainer.sae.W_dec.detach()

    return Trainer(step, finish)


def dictionary_learning(*, d_in: int, d_sae: int, k: int, rows: int, batch_size: int, lr: float | None = None):
    """dictionary_learning's TopK; its learning rate unless told."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    steps = rows // batch_size
    trainer = TopKTrainer(
        steps=steps, activation_dim=d_in, dict_size=d_sae, k=k, layer=2, lm_name="", lr=lr, device="cpu", seed=0,
        warmup_steps=steps // 20, decay_start=steps - steps // 5,
    )  # fmt: skip
    trainer.dead_feature_threshold = DEAD_ROWS
    count = iter(range(10**9))
    return Trainer(
        lambda batch: trainer.update(next(count), batch),
        lambda: (trainer.ae.encode, trainer.ae.decode, lambda: trainer.ae.decoder.weight.detach().T),
    )


def sparsify(*, d_in: int, d_sae: int, k: int, batch_size: int, lr: float | None = None):
    """eai-sparsify's sparse coder, stepped as in its Trainer.fit with Adam."""
    from sparsify import SparseCoder, SparseCoderConfig

    torch.manual_seed(0)
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k))
    optimiser = torch.optim.Adam(coder.parameters(), lr=lr or 2e-4 / (d_sae / 2**14) ** 0.5)
    silent = torch.zeros(d_sae, dtype=torch.long)

    def step(batch: Tensor) -> None:
        if not coder.b_dec.any():
            coder.b_dec.data = batch.mean(0)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(batch, dead_mask=silent > DEAD_ROWS)
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        fired = torch.zeros(d_sae, dtype=torch.bool)
        fired[out.latent_indices.flatten()] = True
        silent.add_(batch_size).masked_fill_(fired, 0)

    def encode(x: Tensor) -> Tensor:
        acts, indices, pre = coder.encode(x)
        return torch.zeros_like(pre).scatter(1, indices, acts)

    return Trainer(
        step, lambda: (encode, lambda codes: codes @ coder.W_dec + coder.b_dec, lambda: coder.W_dec.detach())
    )


def ours(source: RowSource, *settings: SAESettings, device: str | None = None) -> Trainer:
    """sae_steer's own trainer; several settings are learned together, and the first is the one that is returned."""
    world = World.local(precision=settings[0].precision, device=device)
    training = Training([Job(source, one) for one in settings], world)

    def step(batch: Tensor) -> None:
        training.step([batch])

    def finish():
        sae = training.finished()[0].sae
        return (
            lambda x: sae.encode(x).dense(),
            lambda codes: codes @ sae.W_dec + sae.b_dec,
            lambda: sae.W_dec.detach(),
        )

    return Trainer(step, finish)


@dataclass(frozen=True)
class Spent:
    """Seconds a step: by the clock, and of all processors together, which other work on the machine hardly changes."""

    seconds: float
    processor_seconds: float

    @classmethod
    def by(cls, work: Callable[[Item], object], items: Iterable[Item]) -> "Spent":
        """The medians of work(item) over the items."""
        clock, processor = [], []
        for item in items:
            start, processor_start = time.perf_counter(), time.process_time()
            work(item)
            _wait()
            clock.append(time.perf_counter() - start)
            processor.append(time.process_time() - processor_start)
        return cls(statistics.median(clock), statistics.median(processor))


def spent_a_step(trainer: Trainer, batches: Sequence[Tensor], *, warm: int = 2, rounds: int = 1) -> Spent:
    """A step over the batches, after `warm` untimed ones."""
    for number in range(warm):
        trainer.step(batches[number % len(batches)])
    return Spent.by(trainer.step, [*batches] * rounds)


def seconds_a_step(trainer: Trainer, batches: Sequence[Tensor], *, warm: int = 2, rounds: int = 1) -> float:
    """The same by the clock."""
    return spent_a_step(trainer, batches, warm=warm, rounds=rounds).seconds


def in_own_process(script: str, *arguments: object) -> dict:
    """What `script` prints last, as JSON, with these arguments: no library finds what another did to the process.

    OpenMP's threads wait as `sae-steer` has them wait; SAELens is as fast either way.
    """
    asked, quiet = [sys.executable, script, *map(str, arguments)], {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(asked, env=quiet, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def encoder_spent(
    rows: int, d_in: int, d_sae: int, *, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, repeats: int = 20
) -> Spent:
    """The encoder's product alone: no TopK step that makes it at this precision can be faster."""
    x = torch.randn(rows, d_in, device=device, dtype=dtype)
    W_enc = torch.randn(d_in, d_sae, device=device, dtype=dtype)
    for _ in range(2):
        x @ W_enc
    return Spent.by(lambda _: x @ W_enc, range(repeats))


def encoder_seconds(rows: int, d_in: int, d_sae: int, *, device: str = "cpu", repeats: int = 20) -> float:
    """The same in bfloat16, by the clock."""
    return encoder_spent(rows, d_in, d_sae, device=device, repeats=repeats).seconds


@torch.no_grad()
def figures(encode: Callable, decode: Callable, rows: Rows, d_sae: int) -> dict:
    """Held-out FVE (1 - squared error / squared deviation from the rows' mean, float64), L0, share of dead features."""
    error = square = count = 0.0
    total, fired = 0.0, torch.zeros(d_sae, dtype=torch.long)
    for batch in rows:
        codes = encode(batch)
        exact = batch.double()
        error += float((exact - decode(codes)).square().sum())
        square, total, count = square + float(exact.square().sum()), total + exact.sum(0), count + len(batch)
        fired += (codes > 0).sum(0)
    deviation = square - float((total / count).square().sum()) * count
    return {
        "fve": 1 - error / deviation, "l0": int(fired.sum()) / count, "dead": float((fired == 0).double().mean()),
        "rows": int(count),
    }  # fmt: skip


def versions() -> dict:
    """The packages compared."""
    found = {}
    for name in ("torch", "sae-lens", "dictionary-learning", "eai-sparsify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
