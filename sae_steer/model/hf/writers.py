"""What attention and MLP of a block add to the stream: two modules whose outputs sum, scaled, to what it adds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sae_steer.errors import InputError

if TYPE_CHECKING:
    from sae_steer.model.hf.model import HFModel

CLOSE = 1e-4


@dataclass(frozen=True)
class Term:
    """One of the two: `tap` is called with it, for the tap's hooks, whenever the block runs."""

    module: nn.Module
    scale: float
    """What the block multiplies the module's output by."""
    tap: nn.Module = field(default_factory=nn.Identity)


@contextmanager
def heard(terms: tuple[Term, ...]) -> Iterator[None]:
    """Taps with hooks get what their modules put out while it lasts."""

    def pass_on(term: Term):
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            term.tap(term.scale * rows_of(output))

        return term.module.register_forward_hook(hook)

    hooks = [pass_on(term) for term in terms if term.tap._forward_hooks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(output: Any) -> Any:
    """What a module puts out, or the first of it."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def find_terms(model: "HFModel", tokens: Int[Tensor, "batch pos"]) -> list[tuple[Term, Term]]:
    """The two terms of every block; a block whose terms no two modules put out is an `InputError`."""
    found = []
    for layer, block in enumerate(model.layers):
        outputs, before, after = _outputs(model, layer, block, tokens)
        found.append(_pair(outputs, after - before, layer))
    return found


def _outputs(
    model: "HFModel", layer: int, block: nn.Module, tokens: Tensor
) -> tuple[dict[nn.Module, Tensor], Tensor, Tensor]:
    """What every module inside the block puts out, if it has the stream's shape, and the stream around the block."""
    outputs: dict[nn.Module, Tensor] = {}
    around: list[Tensor] = []
    size = tokens.numel() * model.width

    def note(module: nn.Module, inputs: tuple, output: Any) -> None:
        rows = rows_of(output)
        if isinstance(rows, Tensor) and rows.numel() == size and rows.shape[-1] == model.width:
            outputs[module] = rows.clone().view(*tokens.shape, -1)  # some blocks add to it in place

    hooks = [module.register_forward_hook(note) for module in block.modules() if module is not block]
    for tap in (model.resid_pre(layer), model.resid_post(layer)):
        hooks.append(tap.register_forward_hook(lambda module, inputs, output: around.append(inputs[0].clone())))
    try:
        model.resid_posts(tokens, (layer,))
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, *around


def _pair(outputs: dict[nn.Module, Tensor], added: Tensor, layer: int) -> tuple[Term, Term]:
    """The first two modules, in the order they end, whose sum is what the block adds; else whose scaled sum is."""
    for first, second in combinations(outputs, 2):
        if (outputs[first] + outputs[second] - added).norm() <= CLOSE * added.norm():
            return Term(first, 1.0), Term(second, 1.0)
    for first, second in combinations(outputs, 2):
        columns = torch.stack([outputs[first].flatten(), outputs[second].flatten()], dim=1).float()
        scales = torch.linalg.lstsq(columns, added.flatten()[:, None].float()).solution[:, 0]
        if (columns @ scales - added.flatten()).norm() <= CLOSE * added.norm():
            return Term(first, float(scales[0])), Term(second, float(scales[1]))
    raise InputError(
        f"no two modules of block {layer} put out what it adds to the stream: what attention and MLP write there "
        "cannot be told apart"
    )
