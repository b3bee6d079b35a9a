"""Text written with and without an edit, with the same noise, and what the edit costs.

Both texts draw each token by inverse transform from the same uniform number (common random numbers), so that they part
only where the edit moves the distribution. The cost is read on the *unedited* text: the mean KL divergence of the
edited prediction from the unedited one, and the loss each pays on it, in nats a token.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_steer.cache import site
from sae_steer.corpus import is_target, parse_plan
from sae_steer.corpus.plans import END, STEPS
from sae_steer.edits.arms import Arm
from sae_steer.errors import InputError
from sae_steer.model.readout import divergence, nats
from sae_steer.model.replay import edited
from sae_steer.model.sampling import sample
from sae_steer.pair.model_pair import ModelPair
from sae_steer.randomness import generator
from sae_steer.settings import SteerSettings


@dataclass(frozen=True)
class Written:
    """A prompt continued, and the steps it was continued by, where the text is a plan."""

    text: str
    """The continuation alone."""
    steps: tuple[str, ...]
    is_target: tuple[bool, ...]
    """Which of the steps are target phrases."""
    well_formed: bool | None
    """None where texts of this pair have no form to keep."""


@dataclass(frozen=True)
class Steered:
    """One prompt, continued by the unedited model and by the edited one, with the same noise."""

    prompt: str
    model: str
    edit: str
    dose: float
    plain: Written
    steered: Written
    kl: float
    """Of the edited prediction from the unedited one along the unedited text, nats a token."""
    plain_loss: float
    """Of the unedited text, nats a token."""
    steered_loss: float
    """The same text under the edit."""


def steer(
    pair: ModelPair, arm: Arm, prompts: Sequence[str], *, dose: float, settings: SteerSettings | None = None
) -> list[Steered]:
    """Each prompt continued by the arm's model, unedited and edited at every delimiter (or everywhere) at `dose`.

    Args:
        arm: an intervention made ready (`Bench.arms`), which names the model, the block and the direction.
        prompts: task titles where the pair's onsets are `<|steps|>` and `<|sep|>`, else texts to continue.

    Raises:
        InputError: a prompt without tokens, or one as long as the context.
    """
    settings = settings or SteerSettings()
    has_plans = STEPS in pair.onsets.tokens
    ids = [_prompt_ids(pair, prompt, has_plans) for prompt in prompts]
    delimiters = tuple(pair.tokenizer.token_id(token) for token in pair.onsets.tokens) or None
    model, place, edit = arm.model.model, site(arm.layer), arm.edit(dose)

    def changed():
        return edited(model, place, edit, after=delimiters)

    texts = []
    for context in (nullcontext(), changed()):
        with context:
            texts.append(
                sample(
                    model, ids, end_id=pair.tokenizer.token_id(END) if has_plans else -1,
                    max_tokens=min(pair.context, max(map(len, ids)) + settings.max_tokens),
                    temperature=settings.temperature, generator=generator(settings.seed, 67),
                )
            )  # fmt: skip
    rows = []
    for prompt, begun, plain, steered in zip(prompts, ids, *texts, strict=True):
        whole = torch.tensor([begun + plain], device=model.device)
        before = _nats(model, whole, len(begun))
        with changed():
            after = _nats(model, whole, len(begun))
        following = whole[0, len(begun) :, None]
        losses = [float(-told.gather(1, following).mean()) if len(following) else 0.0 for told in (before, after)]
        rows.append(
            Steered(
                prompt=prompt,
                model=arm.model.name,
                edit=arm.variant.name,
                dose=dose,
                plain=_written(pair, begun, plain, has_plans),
                steered=_written(pair, begun, steered, has_plans),
                kl=float(divergence(before, after).mean()) if len(following) else 0.0,
                plain_loss=losses[0],
                steered_loss=losses[1],
            )
        )
    return rows


def _prompt_ids(pair: ModelPair, prompt: str, has_plans: bool) -> list[int]:
    ids = pair.tokenizer.encode_prompt(prompt) if has_plans else pair.tokenizer.encode(prompt)
    if not ids or not prompt.strip():
        raise InputError("the prompt is empty; give a text to continue")
    if len(ids) >= pair.context:
        raise InputError(f"the prompt has {len(ids)} tokens, and the pair's context is {pair.context}; shorten it")
    return ids


@torch.no_grad()
def _nats(model, tokens: Tensor, begun: int) -> Tensor:
    """Log-probabilities of what follows each token from the prompt's last on."""
    return nats(model(tokens)[0, begun - 1 : -1])


def _written(pair: ModelPair, begun: Sequence[int], more: Sequence[int], has_plans: bool) -> Written:
    text = pair.tokenizer.decode(list(more))
    if not has_plans:
        return Written(text, (), (), None)
    plan = parse_plan(pair.tokenizer.decode([*begun, *more]))
    return Written(text, plan.steps, tuple(is_target(step, pair.phrases) for step in plan.steps), plan.well_formed)
