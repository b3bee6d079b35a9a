"""Single-site edits a second: suffix replay against TransformerLens, on the same prompts, onsets and directions.

    python experiments/benchmarks/replay_speed.py  # about a minute on 2 cores; writes replay_speed.json

The 23M shape with random weights, float32; an edit adds a direction to the stream after block 2 at one onset and
is read as the log-odds of a set of tokens there. All three must agree to 1e-4 log-odds. TransformerLens runs
(a) as its users write it, `run_with_hooks` on whole prompts, one edit of every prompt a call or one prompt a
call, whichever is faster; (b) done well, `start_at_layer` on rows batched over directions, each cut off at
its onset, unembedded only there. The clean pass that replay and (b) start from is inside the timing.
"""

import time
from collections.abc import Callable

import torch
from isa import as_asked, machine, record_path
from torch import Tensor

from sae_steer.model.decoder import Decoder, init_decoder
from sae_steer.model.lens import to_hooked_transformer
from sae_steer.model.replay import CleanPass
from sae_steer.randomness import generator
from sae_steer.records import write_json
from sae_steer.settings import PRESETS

PROMPTS, LENGTH, ONSETS, DIRECTIONS, LAYER, REPEATS = 8, 128, 4, 256, 2, 1
DONE_WELL, WITH_HOOKS = 32, 1
"""Directions that TransformerLens is timed on, the first of all."""
WELL_PROMPTS = 4
"""Prompts that it is timed on when done well."""
SITE = f"blocks.{LAYER}.hook_resid_post"
IDS = list(range(40, 60))


def log_odds(logits: Tensor) -> Tensor:
    """Of the tokens `IDS` against all others."""
    rest = logits.clone()
    rest[..., IDS] = float("-inf")
    return logits[..., IDS].logsumexp(-1) - rest.logsumexp(-1)


def lively_decoder() -> Decoder:
    """Random weights, large enough that every block matters."""
    model = init_decoder(PRESETS["interpgpt-23m"], generator(1)).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(2.0)
    return model


@torch.no_grad()
def replay(model: Decoder, tokens: Tensor, onsets: Tensor, directions: Tensor) -> Tensor:
    """Log-odds [prompt, onset, direction] by suffix replay."""
    clean = CleanPass.of(model, tokens, LAYER)
    found = [
        clean.read_many(row, at, clean.resid[row, at] + directions, log_odds)
        for row, places in enumerate(onsets.tolist())
        for at in places
    ]
    return torch.stack(found).view(*onsets.shape, -1)


@torch.no_grad()
def with_hooks(hooked, tokens: Tensor, onsets: Tensor, directions: Tensor, *, together: int) -> Tensor:
    """The same by `run_with_hooks`, `together` prompts a call."""
    found = torch.empty(*onsets.shape, len(directions))
    for start in range(0, len(tokens), together):
        part = slice(start, start + together)
        rows = torch.arange(len(tokens[part]))
        for slot in range(onsets.shape[1]):
            places = onsets[part, slot]
            for column, direction in enumerate(directions):

                def add(resid, hook, places=places, direction=direction, rows=rows):
                    resid[rows, places] += direction
                    return resid

                logits = hooked.run_with_hooks(tokens[part], fwd_hooks=[(SITE, add)])
                found[part, slot, column] = log_odds(logits[rows, places])
    return found


@torch.no_grad()
def done_well(hooked, tokens: Tensor, onsets: Tensor, directions: Tensor) -> Tensor:
    """The same by `start_at_layer`, rows batched over directions."""
    _, cache = hooked.run_with_cache(tokens, names_filter=SITE, stop_at_layer=LAYER + 1)
    found, last = torch.empty(*onsets.shape, len(directions)), hooked.cfg.n_layers
    for row, places in enumerate(onsets.tolist()):
        for slot, at in enumerate(places):
            for start in range(0, len(directions), 32):
                part = directions[start : start + 32]
                rows = cache[SITE][row, : at + 1].repeat(len(part), 1, 1)
                rows[:, at] += part
                carried = hooked(rows, start_at_layer=LAYER + 1, stop_at_layer=last)[:, -1:]
                logits = hooked(carried, start_at_layer=last)[:, 0]
                found[row, slot, start : start + 32] = log_odds(logits)
    return found


def rate(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Edits a second, the best of some runs after a first one; and what was read."""
    found, best = run(), float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return found.numel() / best, found


def measure() -> dict:
    """All rates, their ratios, and how far the readings differ."""
    model = lively_decoder()
    hooked = to_hooked_transformer(model)
    random = generator(2)
    tokens = torch.randint(0, model.shape.d_vocab, (PROMPTS, LENGTH), generator=random)
    onsets = torch.stack([torch.randperm(LENGTH - 16, generator=random)[:ONSETS] + 16 for _ in range(PROMPTS)])
    directions = torch.randn(DIRECTIONS, model.shape.d_model, generator=random) * 0.05
    ours, found = rate(lambda: replay(model, tokens, onsets, directions))
    well, theirs = rate(lambda: done_well(hooked, tokens[:WELL_PROMPTS], onsets[:WELL_PROMPTS], directions[:DONE_WELL]))
    few = directions[:WITH_HOOKS]
    by_call = {
        str(together): rate(lambda together=together: with_hooks(hooked, tokens, onsets, few, together=together))
        for together in (1, PROMPTS)
    }
    hooks = max(speed for speed, _ in by_call.values())
    differences = [
        (found[:WELL_PROMPTS, :, :DONE_WELL] - theirs).abs().max(),
        *((found[..., :WITH_HOOKS] - other).abs().max() for _, other in by_call.values()),
    ]
    return {
        "shape": "interpgpt-23m",
        "prompts": PROMPTS,
        "tokens_per_prompt": LENGTH,
        "onsets_per_prompt": ONSETS,
        "directions": {"replay": DIRECTIONS, "done_well": DONE_WELL, "run_with_hooks": WITH_HOOKS},
        "machine": machine(),
        "edits_per_second": {
            "replay": ours,
            "transformer_lens_done_well": well,
            **{f"run_with_hooks_{together}_prompts_a_call": speed for together, (speed, _) in by_call.items()},
        },
        "largest_log_odds_difference": float(max(differences)),
        "ratio_to_transformer_lens_run_with_hooks": ours / hooks,
        "ratio_to_transformer_lens_done_well": ours / well,
    }


if __name__ == "__main__":
    as_asked()
    record = measure()
    assert record["largest_log_odds_difference"] < 1e-4, record
    print(write_json(record_path(__file__), record))
