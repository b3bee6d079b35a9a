"""What is read from logits: the total next-token probability of a set of tokens."""

from jaxtyping import Float, Int
from torch import Tensor


def target_mass(logits: Float[Tensor, "*rows vocab"], target: Int[Tensor, " target"]) -> Float[Tensor, "*rows"]:
    """Total probability of the target tokens, float64."""
    return logits.double().softmax(-1)[..., target].sum(-1)
