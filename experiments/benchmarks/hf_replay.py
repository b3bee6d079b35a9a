"""Single-site edits a CPU second on a model that `transformers` runs: replay against its full passes with a hook.

    python experiments/benchmarks/hf_replay.py  # about two minutes on one core; writes hf_replay.json

A Qwen2 of SmolLM2-135M's shape with random weights, float32, on the CPU; an edit adds a direction to the stream after
the middle block at one position and is read as the log-odds of a set of tokens there. `transformers` runs it with a
forward hook on that block (a) on the whole text, one edit a call or eight in a batch, whichever is faster; (b) done
well: eight in a batch, each text cut off at its position and unembedded only there. All must agree to 1e-4 log-odds.
The clean pass that replay starts from is inside the timing. Seconds are the process's own, of one thread, so that what
else the machine does tells little.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from isa import as_asked, machine, record_path
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from sae_steer.model.hf.loading import adapt_hf
from sae_steer.model.hf.model import HFModel
from sae_steer.model.replay import CleanPass
from sae_steer.randomness import generator
from sae_steer.records import write_json

SHAPE = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2_048, "tie_word_embeddings": True,
}  # fmt: skip
LENGTH, POSITIONS, DIRECTIONS, LAYER = 128, (70, 120), 256, 14
WITH_HOOKS, TOGETHER = 8, 8
"""Directions that full passes are timed on, the first of all; and how many they take in a batch."""
IDS = list(range(40, 60))


def log_odds(logits: Tensor) -> Tensor:
    """Of the tokens `IDS` against all others."""
    rest = logits.clone()
    rest[..., IDS] = float("-inf")
    return logits[..., IDS].logsumexp(-1) - rest.logsumexp(-1)


def lively_model() -> Qwen2ForCausalLM:
    """Random weights, large enough that every block matters."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval().requires_grad_(False)
    for parameter in model.model.layers.parameters():
        if parameter.ndim == 2:
            parameter.mul_(2.0)
    return model


@torch.no_grad()
def replay(model: HFModel, tokens: Tensor, directions: Tensor) -> Tensor:
    """Log-odds [position, direction] by replay."""
    clean = CleanPass.of(model, tokens, LAYER)
    return torch.stack([clean.read_many(0, at, clean.resid[0, at] + directions, log_odds) for at in POSITIONS])


@contextmanager
def hooked(block: nn.Module, at: int, directions: Tensor) -> Iterator[None]:
    """While it lasts, row i of a batch gets direction i at position `at`."""

    def add(module, inputs, output):
        stream = (output[0] if isinstance(output, tuple) else output).clone()
        stream[:, at] += directions
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hook = block.register_forward_hook(add)
    yield
    hook.remove()


@torch.no_grad()
def with_hooks(model: Qwen2ForCausalLM, tokens: Tensor, directions: Tensor, *, together: int, cut: bool) -> Tensor:
    """The same by full passes, `together` directions a call; with `cut`, of texts that end at the position."""
    found = torch.empty(len(POSITIONS), len(directions))
    for row, at in enumerate(POSITIONS):
        text = tokens[:, : at + 1] if cut else tokens
        for start in range(0, len(directions), together):
            part = directions[start : start + together]
            with hooked(model.model.layers[LAYER], at, part):
                output = model(text.expand(len(part), -1), use_cache=False, logits_to_keep=1 if cut else 0)
            found[row, start : start + together] = log_odds(output.logits[:, -1 if cut else at])
    return found


def rate(run: Callable[[], Tensor], *, warm: bool) -> tuple[float, Tensor]:
    """Edits a CPU second, after a first run if `warm`; and what was read."""
    if warm:
        run()
    start = time.process_time()
    found = run()
    return found.numel() / (time.process_time() - start), found


def measure() -> dict:
    """All rates, their ratios, and how far the readings differ."""
    torch.set_num_threads(1)
    theirs, random = lively_model(), generator(2)
    ours = adapt_hf(theirs)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, LENGTH), generator=random)
    directions = torch.randn(DIRECTIONS, SHAPE["hidden_size"], generator=random) * 0.5
    few = directions[:WITH_HOOKS]
    replayed, found = rate(lambda: replay(ours, tokens, directions), warm=True)
    passes = {
        "one_a_call": rate(lambda: with_hooks(theirs, tokens, few, together=1, cut=False), warm=False),
        "batched": rate(lambda: with_hooks(theirs, tokens, few, together=TOGETHER, cut=False), warm=False),
        "cut_and_batched": rate(lambda: with_hooks(theirs, tokens, few, together=TOGETHER, cut=True), warm=True),
    }
    plain = log_odds(theirs(tokens).logits[0, list(POSITIONS)].detach())
    return {
        "shape": SHAPE,
        "machine": machine(),
        "tokens": LENGTH,
        "positions": POSITIONS,
        "layer": LAYER,
        "directions": {"replay": DIRECTIONS, "full_passes": WITH_HOOKS},
        "replayed": "masked" if ours.replays_masked else "by prefix",
        "edits_per_cpu_second": {"replay": replayed, **{f"hooks_{name}": speed for name, (speed, _) in passes.items()}},
        "largest_log_odds_difference": float(
            max((found[:, :WITH_HOOKS] - other).abs().max() for _, other in passes.values())
        ),
        "mean_effect_log_odds": float((found - plain[:, None]).abs().mean()),
        "ratio_to_transformers_with_hooks": replayed / max(passes["one_a_call"][0], passes["batched"][0]),
        "ratio_to_transformers_with_hooks_done_well": replayed / passes["cut_and_batched"][0],
    }


if __name__ == "__main__":
    as_asked()
    record = measure()
    assert record["largest_log_odds_difference"] < 1e-4, record
    print(write_json(record_path(__file__), record))
