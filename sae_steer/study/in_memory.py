"""The verdict on objects in memory: the user's models, direction or dictionary, token tensors, positions and measure.

No pair folder, no cache. The texts are divided by cluster and seed: maps are fitted on some, sizes read on
others, and the rest is what the verdict rests on.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sae_steer.arguments import check, shown
from sae_steer.cache import ActivationCache
from sae_steer.dictionary import Dictionary, adopt_dictionary
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
from sae_steer.study.of_pair import dictionary_gate
from sae_steer.study.plan import Plan
from sae_steer.study.protocol import check_settings, weigh
from sae_steer.study.record import Study
from sae_steer.study.token_texts import Numbers, token_texts
from sae_steer.study.verdict import INVALID

ALL_BUT_NOTHING = "the total probability of all tokens is 1 whatever a model does; name those of the behaviour"


Models = ModelPair | Sequence[object]
"""A pair, or the reference and the target: each a `Decoder`, a model of transformers or a `HookedTransformer`."""
Subject = Dictionary | SparseDictionary | nn.Module | Tensor | tuple[str, str]
"""A dictionary (ours, a SAELens object, or the (release, sae_id) of one), or a vector of the stream."""
Ids = Sequence[int] | Tensor | np.ndarray
"""Token ids, or a mask of the vocabulary."""


def intervene(
    models: Models,
    subject: Subject,
    texts: ActivationCache | Numbers | None = None,
    *,
    cache: ActivationCache | None = None,
    tokens: Numbers | None = None,
    feature: int | None = None,
    direction: str | Path | Tensor | None = None,
    layer: int | None = None,
    positions: Numbers | int | None = None,
    measure: Measure | Ids | None = None,
    lengths: Numbers | None = None,
    attention_mask: Numbers | None = None,
    clusters: Numbers | None = None,
    settings: InterveneSettings | None = None,
    leave_out: Collection[int] | None = None,
    plan: Plan | None = None,
    on_step: Progress = silent,
) -> Study:
    """What a feature or direction does to the behaviour, with a verdict; nothing is written.

    `intervene(pair, dictionary, cache, feature=)` reads the texts of a cache, and what the pair calls its behaviour
    (`of_pair.intervene`, which says what `direction`, `leave_out` and `plan` are);
    `intervene((reference, target), subject, tokens, positions=, measure=, layer=)` takes what is in memory
    (`intervene_in_memory`, which says what may stand there).

    Args:
        texts: a cache, or token ids; `cache=` and `tokens=` name the one and the other.
    """
    cache = texts if isinstance(texts, ActivationCache) else cache
    tokens = tokens if texts is None or isinstance(texts, ActivationCache) else texts
    of_cache = {"direction": direction, "leave_out": leave_out, "plan": plan}
    of_memory = {
        "layer": layer, "positions": positions, "measure": measure, "lengths": lengths,
        "attention_mask": attention_mask, "clusters": clusters,
    }  # fmt: skip
    if (cache is None) == (tokens is None):
        raise InputError(
            "interventions need texts: give tokens= and positions= with models in memory, or cache= with a pair"
        )
    if tokens is not None:
        _refuse(of_cache, "texts in memory", of_memory)
        for name in ("layer", "positions", "measure"):
            if of_memory[name] is None:
                raise InputError(f"texts in memory need {name}=; give layer=, positions= and measure=")
        return intervene_in_memory(
            models, subject, tokens=tokens, **of_memory, feature=feature, settings=settings, on_step=on_step
        )
    _refuse(of_memory, "a cache", of_cache)
    if not isinstance(models, ModelPair) or not isinstance(subject, Dictionary):
        raise InputError(
            "a cache is read with its pair and a dictionary of it, as load_pair and load_dictionary give them; give "
            "tokens= for other models"
        )
    return study.intervene(
        models, subject, feature=feature, cache=cache, settings=settings, on_step=on_step, **of_cache
    )


def _refuse(strange: Mapping[str, object], texts: str, own: Mapping[str, object]) -> None:
    """Arguments that mean nothing for this kind of texts."""
    for name, value in strange.items():
        if value is not None:
            raise InputError(f"{name}= means nothing with {texts}, which takes {', '.join(f'{key}=' for key in own)}")


def intervene_in_memory(
    models: Models,
    subject: Subject,
    *,
    layer: int,
    tokens: Numbers,
    positions: Numbers | int,
    measure: Measure | Ids,
    feature: int | None = None,
    lengths: Numbers | None = None,
    attention_mask: Numbers | None = None,
    clusters: Numbers | None = None,
    settings: InterveneSettings | None = None,
    on_step: Progress = silent,
) -> Study:
    """The whole protocol on models, texts and a measure in memory.

    Args:
        models: reference and target, each a `Decoder`, a Hugging Face `LlamaForCausalLM` or a `HookedTransformer`.
        subject: a vector of the target's stream after block `layer`, or a dictionary of it (ours, a SAELens
            object, or a SAELens (release, sae_id)) of which `feature` is tested.
        tokens: ids [text, pos], a tensor, an array or lists; padded on either side where `attention_mask` says so.
        positions: where to edit and read: a mask of the tokens' shape, or token indices, one or several a text, -1 for
            a text's last.
        measure: next-token logits [row, vocab] -> a number a row, or token ids whose total probability is meant.
        lengths: tokens of each right-padded text that are no padding; by default all.
        attention_mask: 1 where a token is no padding, instead of `lengths`.
        clusters: which texts belong together, the unit of every interval; by default each text alone.

    Raises:
        InputError: too few clusters, a direction or dictionary of another width, no position marked, ids that the
            models do not have, padding nobody told of.
    """
    reference, target = (_named(name, m) for name, m in zip(("reference", "target"), _two(models), strict=True))
    target.model.check_layer(layer, "the target model")
    settings = settings or InterveneSettings()
    if not 0 < settings.upstream <= layer:
        raise InputError(
            f"cannot inject {settings.upstream} layers upstream of layer {layer}; set upstream to 1 or more, and take "
            "a layer that has as many below it"
        )
    check_settings(settings)
    d_vocab = min(model.model.shape.d_vocab for model in (reference, target))
    read_out = measure_of(measure, target.model.shape.d_vocab, d_vocab)
    texts = token_texts(
        tokens, positions, d_vocab=d_vocab, lengths=lengths, attention_mask=attention_mask, clusters=clusters,
        target=read_out.ids if isinstance(read_out, TargetMass) else (), seed=settings.seed,
    )  # fmt: skip
    sae = None if isinstance(subject, Tensor) else on_device(_dictionary(subject), target.model.device)
    bench = Bench(
        reference=reference,
        target=target,
        layer=layer,
        measure=read_out,
        settings=settings,
        fit=[text for text in texts if text.split == "fit"],
        tune=[text for text in texts if text.split == "tune"],
        dictionary=sae,
        row_filter=RowFilter(frozenset(models.special_tokens if isinstance(models, ModelPair) else ())),
    )
    confirm = [text for text in texts if text.split == "confirm"][: settings.prompts]
    direction, known_gates, firings, reason = _direction(bench, subject, sae, feature, confirm)
    facts = {"feature": feature, "firings": firings, "quick": settings.quick}
    facts["direction"] = "a vector" if feature is None else f"feature {feature}"
    if reason is not None:
        return Study(**facts, verdict=INVALID, reason=reason)
    weighed = weigh(bench.arms(direction), confirm, read_out, settings, known_gates=known_gates, on_step=on_step)
    return Study(**facts, **vars(weighed))


def measure_of(measure: Measure | Ids, width: int, d_vocab: int) -> Measure:
    """A function of logits that gives one finite number a row, or the probability of ids, each counted once."""
    if callable(measure) and not isinstance(measure, TargetMass):
        values = measure(torch.zeros(2, width))
        if not isinstance(values, Tensor) or values.shape != (2,) or not values.isfinite().all():
            raise InputError(
                f"the measure makes {shown(values)} of logits [2, {width}]; it must make one finite number a row, [2]"
            )
        return measure
    named = measure.ids if isinstance(measure, TargetMass) else measure
    if isinstance(named, Tensor | np.ndarray):
        named = torch.as_tensor(named)
        mask = named.dtype == torch.bool and tuple(named.shape) == (width,)
        named = (named.nonzero()[:, 0] if mask else named).flatten().tolist()
    ids = tuple(dict.fromkeys(check("measure", named, tuple[int, ...])))
    if not ids:
        raise InputError("the measure names no token; give ids of the behaviour's first tokens")
    if outside := [token for token in ids if not 0 <= token < d_vocab]:
        raise InputError(f"the measure names token {outside[0]}, and both models have ids 0 to {d_vocab - 1}")
    if len(ids) == width:
        raise InputError(ALL_BUT_NOTHING)
    return TargetMass(ids)


def _two(models: Models) -> Sequence[object]:
    if isinstance(models, ModelPair):
        return models.reference.model, models.target.model
    if len(models) != 2:
        raise InputError(f"{len(models)} models were given; name two, the reference and the target")
    return models


def _named(name: str, model: object) -> NamedModel:
    """The model under its name in the study, and the name transformers loaded it by, if it is no folder's."""
    named = NamedModel.of(name, model)
    loaded_as = getattr(getattr(model, "config", None), "name_or_path", None) or ""
    return replace(named, source={"from": HUB + loaded_as}) if loaded_as and not Path(loaded_as).exists() else named


def _dictionary(subject: Subject) -> SparseDictionary:
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


def _direction(
    bench: Bench, subject: Subject, sae: SparseDictionary | None, feature: int | None, confirm: Sequence[Text]
):
    """The direction, the gates known beforehand, how often it fires, and why it cannot be tested, if so."""
    d_model = bench.target.model.shape.d_model
    if sae is None:
        if subject.numel() != d_model:
            raise InputError(f"the direction has {subject.numel()} numbers and the stream {d_model} dimensions")
        if not subject.isfinite().all() or not subject.any():
            raise InputError("the direction is zero or not finite; give a vector that points somewhere")
        return of_vector("a vector", subject.reshape(d_model), None), [], None, None
    if feature is None:
        raise InputError("a dictionary has many directions; name one with feature=")
    adopted = adopt_dictionary(sae, model=bench.target, layer=bench.layer)
    direction = feature_direction(sae, feature, *bench.sizing_rows)
    return direction, *dictionary_gate(bench, adopted, direction, confirm, feature)
