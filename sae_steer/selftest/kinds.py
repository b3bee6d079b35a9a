"""The kinds of planted pairs, and which verdict is right on each.

              inject    subtract  zero-ablate  upstream   what is planted
causal        CAUSAL    CAUSAL    CAUSAL       CAUSAL     a neuron reads the feature and writes the target tokens
rotated       CAUSAL    CAUSAL    CAUSAL       CAUSAL     the same, the reference in another basis
broadcast     CAUSAL    CAUSAL    CAUSAL       CAUSAL     a head reads it at later onsets only: no single effect
redundant     CAUSAL    NULL      NULL         CAUSAL     a twin feature carries the same in the target
inert         NULL      NULL      NULL         NULL       written at onsets, read by nothing
low mass      NULL      NULL      NULL         NULL       read, but the target mass is tiny: large in log-odds alone
boundary      neither   neither   -            -          the effect equals the bound: neither CAUSAL nor NULL
graded        -         -         -            -          effects of 1 to 8 bounds, for the power curve

The truth is the effect measured on the whole population, not the construction. A verdict counts only where the
truth is what the kind promises: CAUSAL where one mode's effect is twice the bound or more, NULL where both
modes' are under seven tenths of it, neither where the larger of the two is within a twentieth of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sae_steer.edits.variants import VARIANTS as REGISTERED
from sae_steer.settings import MODES
from sae_steer.study.verdict import CAUSAL, NULL

NEITHER = "neither"
VARIANTS = {kind.name: "target" if kind.edits_target else "reference" for kind in REGISTERED}
"""Which model each edits."""
SIGNS = {kind.name: kind.predicted_sign for kind in REGISTERED}
SIGN = {"reference": 1, "target": -1}
"""Of the variant by which a model's reader is tuned."""
TUNED = {"reference": "inject", "target": "subtract"}
"""The variant whose effect a reader's strength is chosen by."""
LARGE, SMALL, NEAR = 2.0, 0.7, 0.05
"""In bounds: the least effect that must be found, the largest that is none, and how far from the bound is at it."""


@dataclass(frozen=True)
class Kind:
    """One kind of planted pair."""

    reader: str
    """As `plants.planted` calls it."""
    bodies: tuple[str, ...]
    """Taken in turn."""
    goals: Mapping[str, tuple[float, float]]
    """{model: range of the effect its reader is given, in bounds}; a model without one has no reader."""
    mode: str = "single"
    """In which the goal is met; `larger` for whichever effect is."""


RIGHT = {
    "inject": {
        "causal": CAUSAL, "rotated": CAUSAL, "broadcast": CAUSAL, "redundant": CAUSAL,
        "inert": NULL, "low mass": NULL, "boundary": NEITHER,
    },
    "subtract": {
        "causal": CAUSAL, "rotated": CAUSAL, "broadcast": CAUSAL, "redundant": NULL,
        "inert": NULL, "low mass": NULL, "boundary": NEITHER,
    },
    "zero_ablate": {
        "causal": CAUSAL, "rotated": CAUSAL, "broadcast": CAUSAL, "redundant": NULL, "inert": NULL, "low mass": NULL,
    },
    "upstream": {
        "causal": CAUSAL, "rotated": CAUSAL, "broadcast": CAUSAL, "redundant": CAUSAL, "inert": NULL, "low mass": NULL,
    },
}  # fmt: skip
"""{variant: {kind: the right verdict}}: a variant's truth is one row; without one its verdicts are only counted."""


def right_of(kind: str) -> dict[str, str]:
    """{variant: the right verdict} on pairs of a kind."""
    return {variant: RIGHT[variant][kind] for variant in VARIANTS if kind in RIGHT.get(variant, {})}


BOTH = ("whole", "partial")
KINDS = {
    "causal": Kind("causal", BOTH, {"reference": (6.0, 14.0), "target": (9.0, 15.0)}),
    "rotated": Kind("causal", ("rotated",), {"reference": (5.0, 12.0), "target": (9.0, 15.0)}),
    "broadcast": Kind("broadcast", ("whole",), {"reference": (4.0, 6.0), "target": (8.0, 12.0)}, "joint"),
    "redundant": Kind("redundant", ("whole",), {"reference": (6.0, 14.0)}),
    "inert": Kind("inert", BOTH, {}),
    "low mass": Kind("causal", ("tiny",), {"reference": (0.25, 0.5)}),
    "boundary": Kind("causal", BOTH, {"reference": (1.0, 1.0), "target": (1.0, 1.0)}, "larger"),
    "graded": Kind("causal", BOTH, {"reference": (1.0, 8.0), "target": (1.0, 12.0)}),
}
REDUNDANT_TARGET = (0.08, 0.16)
"""Strengths of redundant pairs' readers in the target, where no goal can set them: ablating one does nothing."""


def promised(kind: str, variant: str, truth: Mapping[str, float], bound: float) -> bool:
    """Whether the measured truth is what the kind promises of the variant."""
    right, sign = right_of(kind).get(variant), SIGNS[variant]
    sizes = [sign * truth[mode] / bound for mode in MODES]
    if right == CAUSAL:
        return max(sizes) >= LARGE
    if right == NULL:
        return max(map(abs, sizes)) <= SMALL
    return right == NEITHER and abs(max(sizes) - 1) <= NEAR


def is_right(kind: str, variant: str, verdict: str) -> bool:
    """Whether a verdict is the right one."""
    right = right_of(kind)[variant]
    return verdict not in (CAUSAL, NULL) if right == NEITHER else verdict == right
