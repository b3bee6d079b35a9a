"""The rows all trainer benchmarks read: real ones of the 23M shape, and synthetic ones whose features are known.

    python experiments/benchmarks/sae_rows.py      # about 40 minutes on 2 cores; resumes after a kill
    python experiments/benchmarks/sae_rows.py --tokens 120000 --rows 65536    # five minutes: enough for a speed

1. One model of the `interpgpt-23m` shape reads 1.2 million tokens of generated plans.
2. Its stream after block 2 is stored over other plans: 1,015,808 rows of training tasks, 61,440 of held-out ones.
3. Synthetic rows are sums of known directions: as many, drawn from a seed when they are read.

Rows are shuffled once and stored in that order, so that every trainer that reads them reads the same batches.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from isa import as_asked
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from sae_steer.corpus import SPECIALS, VARIANTS, PlanTokenizer, write_plans
from sae_steer.files import replacing, sha256
from sae_steer.model.batching import bucket, pad
from sae_steer.model.decoder import Decoder
from sae_steer.model.loading import load_decoder, save_decoder
from sae_steer.model.training import TrainingState, train
from sae_steer.randomness import generator
from sae_steer.settings import PRESETS, PairTrainingSettings
from sae_steer.world import World

FOLDER = Path("/tmp/sae_steer_benchmarks")
SETTINGS = PairTrainingSettings(preset="interpgpt-23m", init="separate", tokens=1_200_000, lr=1e-3, checkpoint_every=40)
LAYER, TRAIN_ROWS, HELD_OUT_ROWS = 2, 1_015_808, 61_440
TOKENIZER_SEED, MODEL_SEED, ROWS_SEED = 11, 13, 21
D_IN, D_TRUE, ACTIVE = 512, 4096, 32


@dataclass(frozen=True)
class StoredRows:
    """Shuffled rows of a file, cut into batches in their order: a `RowSource` of sae_steer and a stream for others."""

    rows: np.ndarray
    fingerprint: str

    @classmethod
    def open(cls, name: str) -> "StoredRows":
        """`real-train`, `real-held-out`, `synthetic-train` or `synthetic-held-out`."""
        path = FOLDER / f"{name}.npy"
        if not path.is_file():
            sys.exit(f"{path} is not there; run experiments/benchmarks/sae_rows.py first")
        return cls(np.load(path, mmap_mode="r"), sha256(str((name, path.stat().st_size)).encode()))

    @property
    def d_in(self) -> int:
        """Width of a row."""
        return self.rows.shape[1]

    @property
    def n_rows(self) -> int:
        """Rows in all."""
        return len(self.rows)

    @cached_property
    def _moments(self) -> tuple[np.ndarray, float]:
        total, square = np.zeros(self.d_in), 0.0
        for start in range(0, self.n_rows, 65_536):
            part = self.rows[start : start + 65_536].astype(np.float64)
            total, square = total + part.sum(0), square + float((part**2).sum())
        mean = total / self.n_rows
        return mean, square / self.n_rows - float((mean**2).sum())

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """The mean row."""
        return torch.from_numpy(self._moments[0]).float()

    @property
    def mean_square(self) -> float:
        """Mean squared distance of a row from the mean row."""
        return self._moments[1]

    def batch(self, step: int, batch_size: int, seed: int) -> Float[Tensor, "batch d_in"]:
        """The rows of a step; the order is that of the file whatever the seed, and starts over at its end."""
        start = step % (self.n_rows // batch_size) * batch_size
        return torch.from_numpy(self.rows[start : start + batch_size].astype(np.float32))

    def batches(self, batch_size: int = 4096):
        """All rows in order."""
        return (self.batch(step, batch_size, 0) for step in range(self.n_rows // batch_size))


def known_features() -> Float[Tensor, "feature d_in"]:
    """The unit directions synthetic rows are sums of: random, eight times as many as dimensions."""
    return normalize(torch.randn(D_TRUE, D_IN, generator=generator(31)), dim=1)


def synthetic(count: int, stream: int) -> Float[np.ndarray, "row d_in"]:
    """Rows x = sum of a_i d_i + noise: ACTIVE features a row, frequent ones more often (rates ~ rank^-0.7),
    a_i = |N(0, 1)| + 0.5."""
    directions, rng = known_features(), generator(32, stream)
    rates = torch.arange(1, D_TRUE + 1).double() ** -0.7
    rates = (ACTIVE * rates / rates.sum()).clamp(max=0.5)
    parts = []
    for start in range(0, count, 8_192):
        n = min(8_192, count - start)
        active = torch.rand(n, D_TRUE, generator=rng) < rates.float()
        sizes = torch.randn(n, D_TRUE, generator=rng).abs() + 0.5
        rows = (active * sizes) @ directions + 0.05 * torch.randn(n, D_IN, generator=rng)
        parts.append(rows.half().numpy())
    return np.concatenate(parts)


def tokenizer() -> PlanTokenizer:
    """The 23M shape's tokenizer, learned once."""
    path = FOLDER / "tokenizer.json"
    if not path.is_file():
        texts = (
            plan.text
            for variant in VARIANTS
            for plan in write_plans("train", variant, count=4_000, seed=TOKENIZER_SEED)
        )
        size = PRESETS[SETTINGS.preset].d_vocab - len(SPECIALS)
        PlanTokenizer.train(texts, merges_vocab=size).save(path)
    return PlanTokenizer.load(path)


def trained_model(words: PlanTokenizer, tokens: int) -> Decoder:
    """The model, trained on `tokens` tokens of adhd plans, or as far as it is still to be."""
    folder = FOLDER / "model"
    if (folder / "config.json").is_file():
        return load_decoder(folder)
    texts, held = [], 0
    for plan in write_plans("train", "adhd", count=10**9, seed=MODEL_SEED):
        texts.append(words.encode(plan.text))
        if (held := held + len(texts[-1])) >= tokens:
            break
    batches = bucket(texts, tokens_per_batch=SETTINGS.tokens_per_batch, pad_id=words.pad_id, seed=0)
    world = World.local(precision="bfloat16")
    state = TrainingState.fresh(PRESETS[SETTINGS.preset], SETTINGS, stream=1, world=world)
    checkpoint, identity = FOLDER / "training.safetensors", {**asdict(SETTINGS), "tokens": tokens}
    if checkpoint.is_file():
        state.load(checkpoint, identity)
    train(
        state, batches.__getitem__, SETTINGS, pad_id=words.pad_id, stop=len(batches), steps=len(batches), world=world,
        checkpoint=checkpoint, identity=identity,
        on_step=lambda done, total, note: print(done, total, note, flush=True),
    )  # fmt: skip
    save_decoder(state.model, folder, dtype=torch.float32, pad_token_id=words.pad_id)
    return state.model


@torch.no_grad()
def real(model: Decoder, words: PlanTokenizer, split: str, count: int) -> Float[np.ndarray, "row d_in"]:
    """`count` rows of the stream after block LAYER, over plans of both renderings, shuffled."""
    plans = [write_plans(split, variant, count=10**9, seed=ROWS_SEED) for variant in VARIANTS]
    texts = (words.encode(plan.text) for both in zip(*plans, strict=True) for plan in both)
    rows, filled, world = np.empty((count, D_IN), np.float16), 0, World.local(precision="bfloat16")
    while filled < count:
        chunk = sorted(islice(texts, 64), key=len)
        for start in range(0, len(chunk), 16):
            tokens = pad(chunk[start : start + 16], words.pad_id)
            with world.compute():
                resid = model.resid_posts(tokens, (LAYER,))[LAYER]
            found = resid[tokens != words.pad_id].float().half().numpy()[: count - filled]
            rows[filled : filled + len(found)] = found
            filled += len(found)
        print(split, filled, "of", count, flush=True)
    order = torch.randperm(count, generator=generator(ROWS_SEED, 2)).numpy()
    return rows[order]


def _store(name: str, rows: np.ndarray) -> None:
    with replacing(FOLDER / f"{name}.npy") as scratch, open(scratch, "wb") as file:
        np.save(file, rows)


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=SETTINGS.tokens)
    parser.add_argument("--rows", type=int, default=TRAIN_ROWS, help="training rows, and at most as many held out")
    arguments = parser.parse_args()
    counts = (("train", arguments.rows), ("held-out", min(arguments.rows, HELD_OUT_ROWS)))
    FOLDER.mkdir(parents=True, exist_ok=True)
    words = tokenizer()
    model = trained_model(words, arguments.tokens).eval()
    for (name, count), split in zip(counts, ("train", "scan"), strict=True):
        if not (FOLDER / f"real-{name}.npy").is_file():
            _store(f"real-{name}", real(model, words, split, count))
    for stream, (name, count) in enumerate(counts):
        if not (FOLDER / f"synthetic-{name}.npy").is_file():
            _store(f"synthetic-{name}", synthetic(count, stream))


if __name__ == "__main__":
    as_asked()
    main()
