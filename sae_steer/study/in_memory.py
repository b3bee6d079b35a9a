"""The verdict on objects in memory: the user's models, direction or dictionary, token tensors, positions and measure.

No pair folder, no cache. The texts are divided by cluster and seed: maps are fitted on some, sizes read on
others, and the rest is what the verdict rests on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sae_steer.dictionary import adopt_dictionary
from sae_steer.edits.arms import Bench
from sae_steer.edits.directions import feature_direction, of_vector
from sae_steer.errors import InputError
from sae_steer.model.hub import HUB
from sae_steer.model.readout import Measure, TargetMass
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.texts import Text
from sae_steer.progress import Progress, silent
from sae_steer.row_filter import RowFilter
from sae_steer.sae.architectures import SparseDictionary, on_device
from sae_steer.settings import InterveneSettings
from sae_steer.study import of_pair as study
from sae_steer.study.of_pair import Study, dictionary_gate
from sae_steer.study.protocol import Evidence, weigh
from sae_steer.study.verdict import INVALID

SHARES = {"fit": 0.25, "tune": 0.25}
"""Of the clusters; the others confirm."""


def intervene(models: Any, subject: Any, *, tokens: Tensor | None = None, **options: Any) -> "Study | MemoryStudy":
    """What a feature or direction does, with a verdict.

    `intervene(pair, dictionary, feature=, cache=)` reads a pair and its cache (`study.intervene`);
    `intervene((reference, target), direction_or_sae, tokens=, positions=, measure=, layer=)` takes what is in
    memory (`intervene_in_memory`).
    """
    if tokens is not None:
        return intervene_in_memory(models, subject, tokens=tokens, **options)
    if not isinstance(models, ModelPair) or "cache" not in options:
        raise InputError(
            "interventions need texts: give tokens= and positions= with models in memory, or cache= with a pair"
        )
    return study.intervene(models, subject, **options)


@dataclass(frozen=True)
class MemoryStudy:
    """A verdict on objects in memory, and the evidence for it."""

    evidence: Evidence | None
    """None where the feature fires too seldom to be tested."""
    reason: str | None
    """Why it could not be tested."""

    @property
    def verdict(self) -> str:
        """NULL, CAUSAL, OPPOSITE, NON-SPECIFIC, INCONCLUSIVE or INVALID."""
        return self.evidence.verdict if self.evidence else INVALID

    @property
    def record(self) -> dict:
        """Effects, tests, gates and verdicts by variant, as in a study's results.json."""
        return self.evidence.record if self.evidence else {"verdict": INVALID, "reason": self.reason}

    def table(self) -> str:
        """The verdict, then every variant's effect, interval, verdict and reason."""
        if self.evidence is None:
            return f"verdict: {INVALID}: {self.reason}"
        dose = self.record["primary_dose"]
        lines = [f"verdict: {self.verdict}; {self.record['verdicts']}"]
        for variant in self.record["variants"]:
            row = next(row for row in variant["single"]["doses"] if row["dose"] == dose)
            lines.append(
                f"{variant['variant']:<12} {row['mean']:+.5f} [{row['low']:+.5f}, {row['high']:+.5f}] "
                f"{variant['verdict']}: {variant['why']}"
            )
        return "\n".join(lines)


def intervene_in_memory(
    models: ModelPair | Sequence[Any],
    subject: Any,
    *,
    layer: int,
    tokens: Int[Tensor, "text pos"],
    positions: Bool[Tensor, "text pos"],
    measure: Measure | Sequence[int],
    feature: int | None = None,
    lengths: Int[Tensor, " text"] | None = None,
    clusters: Int[Tensor, " text"] | None = None,
    settings: InterveneSettings | None = None,
    on_step: Progress = silent,
) -> MemoryStudy:
    """The whole protocol on models, texts and a measure in memory.

    Args:
        models: reference and target, each a `Decoder`, a Hugging Face `LlamaForCausalLM` or a `HookedTransformer`.
        subject: a vector of the target's stream after block `layer`, or a dictionary of it (ours, a SAELens
            object, or a SAELens (release, sae_id)) of which `feature` is tested.
        tokens: right-padded.
        positions: where to edit and read.
        measure: next-token logits [row, vocab] -> a number a row, or token ids whose total probability is meant.
        lengths: tokens of each text that are no padding; by default all.
        clusters: which texts belong together, the unit of every interval; by default each text alone.

    Raises:
        InputError: too few clusters, a direction or dictionary of another width, no position marked.
    """
    reference, target = (_named(name, m) for name, m in zip(("reference", "target"), _two(models), strict=True))
    target.model.check_layer(layer, "the target model")
    found = measure if callable(measure) else TargetMass(tuple(int(token) for token in measure))
    probability = isinstance(found, TargetMass)
    settings = settings or InterveneSettings()
    texts = _texts(tokens, positions, lengths, clusters, found.ids if probability else (), settings.seed)
    sae = None if isinstance(subject, Tensor) else on_device(_dictionary(subject), target.model.device)
    bench = Bench(
        reference=reference,
        target=target,
        layer=layer,
        measure=found,
        settings=settings,
        fit=[text for text in texts if text.split == "fit"],
        tune=[text for text in texts if text.split == "tune"],
        dictionary=sae,
        row_filter=RowFilter(frozenset(models.special_tokens if isinstance(models, ModelPair) else ())),
    )
    confirm = [text for text in texts if text.split == "confirm"][: settings.prompts]
    direction, known, reason = _direction(bench, subject, sae, feature, confirm)
    if reason is not None:
        return MemoryStudy(None, reason)
    arms = bench.arms(direction)
    return MemoryStudy(weigh(arms, confirm, found, settings, known_gates=known, on_step=on_step), None)


def _two(models: ModelPair | Sequence[Any]) -> Sequence[Any]:
    if isinstance(models, ModelPair):
        return models.reference.model, models.target.model
    if len(models) != 2:
        raise InputError(f"{len(models)} models were given; name two, the reference and the target")
    return models


def _named(name: str, model: Any) -> NamedModel:
    """The model under its name in the study, and the name transformers loaded it by, if it is no folder's."""
    named = NamedModel.of(name, model)
    loaded_as = getattr(getattr(model, "config", None), "name_or_path", None) or ""
    return replace(named, source={"from": HUB + loaded_as}) if loaded_as and not Path(loaded_as).exists() else named


def _dictionary(subject: Any) -> SparseDictionary:
    if isinstance(subject, SparseDictionary):
        return subject
    from sae_steer.sae.saelens.reading import pretrained_saelens, saelens_in_memory

    if isinstance(subject, tuple):
        return pretrained_saelens(*subject)
    if not (isinstance(subject, nn.Module) and hasattr(subject, "cfg")):
        raise InputError(
            f"a {type(subject).__name__} is neither a vector nor a dictionary; give a tensor, a dictionary, a SAELens "
            "object, or the (release, sae_id) of one"
        )
    return saelens_in_memory(subject, "the SAE in memory")


def _direction(bench: Bench, subject: Any, sae: SparseDictionary | None, feature: int | None, confirm: Sequence[Text]):
    """The direction, the gates known beforehand, and why it cannot be tested, if so."""
    d_model = bench.target.model.shape.d_model
    if sae is None:
        if subject.numel() != d_model:
            raise InputError(f"the direction has {subject.numel()} numbers and the stream {d_model} dimensions")
        return of_vector("a vector", subject.reshape(d_model), None), [], None
    if feature is None:
        raise InputError("a dictionary has many directions; name one with feature=")
    adopted = adopt_dictionary(sae, model=bench.target, layer=bench.layer)
    direction = feature_direction(sae, feature, *bench.sizing_rows)
    known, _, reason = dictionary_gate(bench, adopted, direction, confirm, feature)
    return direction, known, reason


def _texts(
    tokens: Tensor, positions: Tensor, lengths: Tensor | None, clusters: Tensor | None, ids: Sequence[int], seed: int
) -> list[Text]:
    """The texts with their marked positions, divided by cluster."""
    tokens, positions = tokens.cpu(), positions.cpu()
    if tokens.shape != positions.shape:
        raise InputError(f"tokens are {tuple(tokens.shape)} and positions {tuple(positions.shape)}; mark every token")
    count = len(tokens)
    ends = torch.full((count,), tokens.shape[1]) if lengths is None else lengths.cpu()
    task = np.arange(count) if clusters is None else clusters.cpu().numpy()
    splits = _splits(task, seed)
    texts = []
    for number, end in enumerate(ends.tolist()):
        token, marked = tokens[number, :end].numpy(), positions[number, :end].numpy().astype(bool)
        follows = np.append(np.isin(token[1:], list(ids)), False)
        texts.append(
            Text(
                prompt=number,
                task=int(task[number]),
                variant=0,
                split=splits[int(task[number])],
                token=token,
                is_onset=marked,
                step=np.where(marked, 0, -1),
                next_is_target=marked & follows,
                true_p=np.full(end, np.nan),
            )
        )
    if not any(text.is_onset.any() for text in texts):
        raise InputError("positions marks no token; mark those to edit and read")
    return texts


def _splits(task: np.ndarray, seed: int) -> dict[int, str]:
    """{cluster: its split}."""
    found = np.random.default_rng([seed, 61]).permutation(np.unique(task)).tolist()
    fit, tune = (round(share * len(found)) for share in SHARES.values())
    return {name: "fit" if i < fit else "tune" if i < fit + tune else "confirm" for i, name in enumerate(found)}
