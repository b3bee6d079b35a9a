"""From tests to a verdict: pure rules over numbers, the first that holds.

INVALID       a gate fails
NULL          the 90 % interval lies inside the bound, for the single and the joint edit, and something of this
              size is known to move this model by twice the bound
CAUSAL        beyond the bound with the predicted sign (single or joint), and further than control directions go
OPPOSITE      the same with the other sign
NON-SPECIFIC  beyond the bound, but control directions go as far
INCONCLUSIVE  none of these: the interval straddles the bound, or lies inside it on too few tasks, or too few control
              directions were read to rank the effect, or nothing of this size moves this model

The minimum-effect p of a study's variants and modes are Holm-corrected together, so that one CAUSAL among them
is wrong in 5 % of studies; a null needs no correction, because all four must hold (intersection-union).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sae_steer.effects.estimates import FEWEST_RANKED
from sae_steer.settings import LEVEL
from sae_steer.stats import MIN_CLUSTERS_FOR_NULL
from sae_steer.study.gates import Gate

VerdictName = Literal["INVALID", "NULL", "CAUSAL", "OPPOSITE", "NON-SPECIFIC", "INCONCLUSIVE"]
VERDICTS: tuple[VerdictName, ...] = get_args(VerdictName)
INVALID, NULL, CAUSAL, OPPOSITE, NON_SPECIFIC, INCONCLUSIVE = VERDICTS


@dataclass(frozen=True)
class ModeTests:
    """What one mode of a variant, single or joint, says."""

    p_above: float
    """Minimum-effect p that the effect is beyond the bound upwards, Holm-corrected."""
    p_below: float
    inside: bool
    """Whether the 90 % interval lies inside the bound, on tasks enough for a null."""
    specific_p: float | None
    """The largest rank p among the control families; None where none has members enough to be ranked against."""
    inside_but_few: bool = False
    """Whether the interval lies inside the bound, on too few tasks for a null."""

    def beyond(self, sign: int) -> bool:
        """Whether the effect lies beyond the bound on the side of `sign`."""
        return (self.p_above if sign > 0 else self.p_below) <= LEVEL

    @property
    def specific(self) -> bool:
        """Whether it goes further than the controls of every family."""
        return self.specific_p is not None and self.specific_p <= LEVEL


@dataclass(frozen=True)
class Verdict:
    """A verdict's name and why it holds, in one sentence."""

    name: VerdictName
    why: str


def judge(predicted_sign: int, modes: Mapping[str, ModeTests], gates: Sequence[Gate], *, needs: str) -> Verdict:
    """One variant's verdict.

    Args:
        gates: of the variant and of the study. Those that do not invalidate are read by number: "6b" and "7".
        needs: how many onsets it would take to decide, as a sentence.
    """
    failed = [gate for gate in gates if gate.invalidates and not gate.passed]
    if failed:
        return Verdict(INVALID, "; ".join(f"gate {gate.number} ({gate.name}): {gate.detail}" for gate in failed))
    movable, calibrated = (all(g.passed for g in gates if g.number == number) for number in ("6b", "7"))
    if movable and all(tests.inside for tests in modes.values()):
        return Verdict(NULL, "the 90 % interval lies inside the bound, single and joint")
    for sign, name in ((predicted_sign, CAUSAL), (-predicted_sign, OPPOSITE)):
        special = [mode for mode, tests in modes.items() if tests.beyond(sign) and tests.specific]
        if special and calibrated:
            side = "in the predicted direction" if name == CAUSAL else "against the prediction"
            return Verdict(name, f"beyond the bound {side} and further than control directions go ({_and(special)})")
    beyond = [mode for mode, tests in modes.items() if tests.beyond(+1) or tests.beyond(-1)]
    if beyond and all(modes[mode].specific_p is None for mode in beyond):
        return Verdict(
            INCONCLUSIVE,
            f"beyond the bound ({_and(beyond)}), but too few control directions were read to tell whether any of this "
            f"size goes as far; a family ranks an effect from {FEWEST_RANKED} on: set controls to so many or more",
        )
    if beyond:
        why = "but control directions of the same size go as far"
        if not calibrated:
            why = "but so are too many control directions treated as if they were the one studied (gate 7)"
        return Verdict(NON_SPECIFIC, f"beyond the bound ({_and(beyond)}), {why}")
    if not movable:
        return Verdict(
            INCONCLUSIVE,
            "nothing of this size moves this model: no positive control of the delivered length exceeds twice the "
            "bound, so that an effect inside it says nothing",
        )
    if all(tests.inside or tests.inside_but_few for tests in modes.values()):
        few = f"fewer than the {MIN_CLUSTERS_FOR_NULL} tasks that a null needs"
        return Verdict(INCONCLUSIVE, f"the interval lies inside the bound, but on {few}")
    return Verdict(INCONCLUSIVE, f"the interval straddles the bound; {needs}")


def judge_study(verdicts: Mapping[str, Verdict]) -> VerdictName:
    """The study's verdict from those of its variants, the first that holds.

    INVALID       every variant is
    NULL          every variant is
    CAUSAL        any variant is
    OPPOSITE      any variant is, and none is CAUSAL
    NON-SPECIFIC  any variant is, and none is either
    INCONCLUSIVE  otherwise: no effect was found, and not every variant is a null
    """
    names = {verdict.name for verdict in verdicts.values()}
    for name in (INVALID, NULL):
        if names == {name}:
            return name
    for name in (CAUSAL, OPPOSITE, NON_SPECIFIC):
        if name in names:
            return name
    return INCONCLUSIVE


def listed(verdicts: Mapping[str, Verdict]) -> str:
    """The variants under each verdict, in the verdicts' order."""
    parts = []
    for name in VERDICTS:
        under = [variant for variant, verdict in verdicts.items() if verdict.name == name]
        if under:
            parts.append(f"{name}: {', '.join(under)}")
    return "; ".join(parts)


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
