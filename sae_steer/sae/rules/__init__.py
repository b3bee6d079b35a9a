"""How a dictionary's codes are chosen and kept: a rule a file. Another is its file and its line in `RULES`.

Nothing here loads torch: the command line names the rules.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sae_steer.errors import InputError

if TYPE_CHECKING:
    from sae_steer.sae.rules.rule import Rule

RULES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka": "Matryoshka",
    "jumprelu": "JumpReLU",
}
"""{what `--arch` calls it, as does its file: its class}"""


def rule_of(architecture: str) -> "Rule":
    """The rule of `topk` or `jumprelu,bandwidth=0.2`: a name and what is set of its knobs; a list as `0.25/0.5/1`."""
    name, *options = architecture.split(",")
    if name not in RULES:
        raise InputError(f"no architecture {name!r}; choose one of {', '.join(RULES)}")
    rule = getattr(import_module(f"{__name__}.{name}"), RULES[name])
    return rule(**dict(_knob(rule, name, option) for option in options))


def _knob(rule: type["Rule"], name: str, option: str) -> tuple[str, object]:
    knob, _, text = option.partition("=")
    usual = rule.knobs()
    if knob not in usual:
        choice = f"it has {', '.join(usual)}" if usual else "it has none"
        raise InputError(f"{name} has no knob {knob!r}; {choice}")
    try:
        numbers = tuple(float(part) for part in text.split("/"))
    except ValueError:
        numbers = ()
    if not numbers or (len(numbers) > 1 and not isinstance(usual[knob], tuple)):
        raise InputError(f"{name} cannot read {option!r}; write {knob}=NUMBER, or NUMBER/NUMBER/... for a list")
    return knob, numbers if isinstance(usual[knob], tuple) else numbers[0]
