"""How good a pair is: sampled plans of both models, and the basis they share, layer by layer."""

from collections.abc import Sequence

import numpy as np
import torch

from sae_steer.align import basis_check
from sae_steer.corpus import is_lenient, is_target, parse_plan, write_plans
from sae_steer.model.rows import real_streams
from sae_steer.model.sampling import sample
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.progress import Progress, silent
from sae_steer.randomness import Stream, generator
from sae_steer.row_filter import RowFilter

GENERATIONS = 1_000
BASIS_PLANS = 200


def measure_pair(pair: ModelPair, *, seed: int = 0, on_step: Progress = silent) -> dict:
    """Generation statistics of each model beside its corpus's, and R2 between the models at every layer."""
    generated = {}
    for done, model in enumerate(pair.models):
        on_step(done, 3, f"sampling {GENERATIONS} plans of {model.name}")
        generated[model.name] = generation_statistics(pair, model, seed=seed)
    on_step(2, 3, "comparing the bases")
    return {"generations": generated, "basis": basis_by_layer(pair, seed=seed)}


def generation_statistics(pair: ModelPair, model: NamedModel, *, count: int = GENERATIONS, seed: int = 0) -> dict:
    """Shares of sampled plans on held-out tasks, beside those of the corpus's plans of the same tasks."""
    corpus = list(write_plans("confirm", model.name, count=count, seed=seed))
    texts = sample_plans(pair, model, [plan.task.title for plan in corpus], seeds=(seed,))
    return {
        "sampled": plan_statistics(texts, pair),
        "corpus": plan_statistics([plan.text for plan in corpus], pair),
    }


def sample_plans(
    pair: ModelPair,
    model: NamedModel,
    titles: list[str],
    *,
    temperature: float = 1.0,
    seeds: tuple[int, ...] = (0,),
    parts: Sequence[int] | None = None,
) -> list[str]:
    """One sampled plan a title, as text, its title included. Edits in force apply.

    Args:
        parts: numbers of the noise of as many equal parts of the titles; the same number is the same noise.
    """
    prompts = [pair.tokenizer.encode_prompt(title) for title in titles]
    continued = sample(
        model.model,
        prompts,
        end_id=pair.tokenizer.token_id("<|end|>"),
        max_tokens=pair.context,
        temperature=temperature,
        generator=generator(*seeds, Stream.SAMPLED_TOKENS)
        if parts is None
        else [generator(*seeds, part, Stream.SAMPLED_TOKENS) for part in parts],
    )
    return [pair.tokenizer.decode(prompt + more) for prompt, more in zip(prompts, continued, strict=True)]


def step_counts(texts: list[str], pair: ModelPair) -> np.ndarray:
    """[text, 3] steps, steps that are a target phrase, steps with a lenient keyword."""
    counts = []
    for text in texts:
        steps = parse_plan(text).steps
        strict = sum(is_target(step, pair.phrases) for step in steps)
        counts.append((len(steps), strict, sum(is_lenient(step, pair.lenient) for step in steps)))
    return np.array(counts, dtype=np.int64).reshape(-1, 3)


def plan_statistics(texts: list[str], pair: ModelPair) -> dict:
    """Well-formed share, mean steps, and the share of steps that are target steps, strict and lenient."""
    steps, strict, lenient = step_counts(texts, pair).sum(axis=0).tolist()
    return {
        "texts": len(texts),
        "steps": steps,
        "well_formed": sum(parse_plan(text).well_formed for text in texts) / len(texts),
        "mean_step_count": steps / len(texts),
        "regulation_rate": strict / max(steps, 1),
        "lenient_rate": lenient / max(steps, 1),
    }


@torch.no_grad()
def basis_by_layer(pair: ModelPair, *, plans: int = BASIS_PLANS, seed: int = 0) -> list[dict]:
    """Identity, rotation and affine R2 from the reference's stream to the target's, held out by task.

    The same positions of target-variant texts, read in both models; fitted on one half of the tasks. Rows of special
    tokens, and rows that are long in either model after any block, are left out.
    """
    texts = list(write_plans("scan", pair.target.name, count=plans, seed=seed))
    layers = tuple(range(min(model.model.shape.n_layers for model in pair.models)))
    halves = [
        [_stacked(pair, model, [plan.text for plan in texts[half::2]], layers) for model in pair.models]
        for half in (0, 1)
    ]
    (x_fit, y_fit), (x_test, y_test) = halves
    counts = [_that_count(pair, [plan.text for plan in texts[half::2]], streams) for half, streams in enumerate(halves)]
    found = [
        basis_check(
            x_fit[layer][counts[0]], y_fit[layer][counts[0]], x_test[layer][counts[1]], y_test[layer][counts[1]]
        )
        for layer in layers
    ]
    return [
        {
            "layer": layer,
            "identity_r2": check.identity_r2,
            "procrustes_r2": check.procrustes_r2,
            "affine_r2": check.affine_r2,
            "n_test": check.n_test,
        }
        for layer, check in zip(layers, found, strict=True)
    ]


def _that_count(pair: ModelPair, texts: list[str], streams: list[dict[int, np.ndarray]]) -> np.ndarray:
    token = np.concatenate([pair.tokenizer.encode(text) for text in texts])
    opens = np.isin(token, sorted(pair.onsets.delimiters(pair.tokenizer)))
    rows = [resid for stream in streams for resid in stream.values()]
    return RowFilter(frozenset(pair.special_tokens)).of_streams(token, opens, rows).typical


def _stacked(pair: ModelPair, model: NamedModel, texts: list[str], layers: tuple[int, ...]) -> dict[int, np.ndarray]:
    """{layer: [row, d_model]} over every position of the texts."""
    rows = real_streams(model.model, [pair.tokenizer.encode(text) for text in texts], layers)
    return {layer: resid.astype(np.float64) for layer, resid in rows.items()}
