"""Edits of the residual stream: by hook while a model runs, and by replaying only what an edit can change.

An edit after block L at position t leaves every layer up to L and every position before t as they were. So

1. the clean pass runs once and keeps the stream after L and the keys and values of the blocks above;
2. an edit of one position costs one token through the blocks above, which reads the stored keys and
   values of earlier positions and its own new ones: few edits at every position of a batch of texts
   (`read_single`), or hundreds at one position, on exactly the keys it reads (`read_many`);
3. edits of many positions together cost the blocks above alone, the last of them only where it is read (`read_joint`).

`whole_pass` is what replay must equal: the full model with the edit in it, by hook.

The only module that edits activations.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_steer.errors import InputError, NotDeliveredError
from sae_steer.model.language_model import LanguageModel, Suffix
from sae_steer.model.suffix import gather

Edit = Callable[[Tensor], Tensor]
"""Residual rows [*rows, d_model] -> the rows that replace them."""
Readout = Callable[[Tensor], Tensor]
"""Next-token logits [row, vocab] -> what is kept of them [row, *read]."""
ROWS = 512
"""Copies of one token carried at once: fewer lose time to calls, many more leave the processor's cache."""


def as_they_are(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
    """The logits themselves."""
    return logits


@contextmanager
def edited(
    model: LanguageModel,
    site: str,
    edit: Edit,
    *,
    after: tuple[int, ...] | None = None,
    at: Bool[Tensor, "batch pos"] | None = None,
) -> Iterator[LanguageModel]:
    """While it lasts, `edit` is applied at `site` (`blocks.2.hook_resid_post`), at the positions of the
    tokens `after`, at those marked in `at`, or at all; gone afterwards, exception or not. An edit that met no
    position is an error.
    """
    layer = _layer_of(site, model)
    wanted = None if after is None else torch.tensor(after, device=model.device)
    seen = threading.local()  # threads may run the model side by side
    met = 0

    def remember(module, inputs):
        seen.tokens = inputs[0]

    def apply(module, inputs, resid):
        nonlocal met
        if wanted is None and at is None:
            met += resid.shape[0] * resid.shape[1]
            return edit(resid)
        assert seen.tokens.shape == resid.shape[:2], "run the model from its tokens: the edit follows some of them"
        here = torch.isin(seen.tokens, wanted) if at is None else at
        met += int(here.sum())
        changed = resid.clone()
        changed[here] = edit(resid[here])
        return changed

    hooks = [
        model.embed_tokens.register_forward_pre_hook(remember),
        model.resid_post(layer).register_forward_hook(apply),
    ]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
    if not met:
        raise NotDeliveredError(
            f"the edit at {site} met no position; run the model inside the `with`, on texts with onsets"
        )


@torch.no_grad()
def whole_pass(
    model: LanguageModel, tokens: Int[Tensor, "batch pos"], layer: int, edit: Edit, at: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_model"], Float[Tensor, "batch pos vocab"]]:
    """The stream that the part above block `layer` receives, and the logits, of a full pass with `edit` at `at`."""
    received: list[Tensor] = []
    hook = model.resid_pre(layer + 1).register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    try:
        with edited(model, f"blocks.{layer}.hook_resid_post", edit, at=at):
            logits = model(tokens)
    finally:
        hook.remove()
    return received[0], logits


@dataclass(frozen=True)
class CleanPass:
    """What one batch of texts leaves behind unedited: all that replay after block `layer` reads."""

    model: LanguageModel
    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    """The stream after block `layer`."""
    above: Suffix

    @classmethod
    @torch.no_grad()
    def of(cls, model: LanguageModel, tokens: Int[Tensor, "batch pos"], layer: int) -> "CleanPass":
        """Run `tokens` (right-padded) once."""
        resid = model.resid_posts(tokens, (layer,))[layer]
        return cls(model, layer, resid, model.suffix(resid, layer + 1))

    def at(self, positions: Int[Tensor, "batch edit"]) -> Float[Tensor, "batch edit d_model"]:
        """The clean stream at the positions."""
        return gather(self.resid, positions)

    @torch.no_grad()
    def read_single(
        self, positions: Int[Tensor, "batch edit"], resid: Float[Tensor, "copy batch edit d_model"]
    ) -> Float[Tensor, "copy batch edit vocab"]:
        """Next-token logits at each position, had the stream there alone been `resid`.

        `copy` runs over edits of the same positions (doses, directions).
        """
        return self.model.unembed(self.above.single(positions, resid))

    @torch.no_grad()
    def read_many(
        self, row: int, position: int, resid: Float[Tensor, " copy d_model"], readout: Readout = as_they_are
    ) -> Float[Tensor, " copy *read"]:
        """What `readout` makes of the next-token logits at one position of one text, had the stream there alone
        been each of `resid`.
        """
        parts = resid.tensor_split(-(-len(resid) // ROWS))
        return torch.cat([readout(self.model.unembed(self.above.many(row, position, part))) for part in parts])

    @torch.no_grad()
    def read_joint(
        self,
        at: Bool[Tensor, "batch pos"],
        resid: Float[Tensor, "copy place d_model"],
        positions: Int[Tensor, "batch edit"],
    ) -> Float[Tensor, "copy batch edit vocab"]:
        """Next-token logits at `positions`, had the stream at all places marked in `at` been `resid` together.

        `copy` runs over edits of the same texts (doses, directions); places are those of `at` in row order.
        """
        copies = resid.shape[0]
        whole = self.resid.repeat(copies, 1, 1, 1)
        whole[:, at] = resid
        picked = self.above.joint(rearrange(whole, "copy batch ... -> (copy batch) ..."), positions.repeat(copies, 1))
        return rearrange(self.model.unembed(picked), "(copy batch) ... -> copy batch ...", copy=copies)

    def gradient(self, positions: Int[Tensor, "batch edit"], readout: Readout) -> Float[Tensor, "batch edit d_model"]:
        """What `readout`, one number a row, changes by as the stream at each position alone begins to move.

        The derivative of what `read_single` reads there: other positions stay as they are, so one backward pass
        gives it for all of them.
        """
        with torch.enable_grad():
            here = self.at(positions).detach().requires_grad_()
            read = readout(self.model.unembed(self.above.single(positions, here[None]))[0])
            return torch.autograd.grad(read.sum(), here)[0]


def _layer_of(site: str, model: LanguageModel) -> int:
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", site)
    if not found:
        raise InputError(f"cannot edit at {site!r}; sites are 'blocks.N.hook_resid_post'")
    model.check_layer(int(found[1]))
    return int(found[1])
