"""How a measure's numbers are written: a probability in points, any other in its own unit; and what caps its bound."""

from dataclasses import dataclass
from typing import Literal

from sae_steer.model.readout import Measure, TargetMass
from sae_steer.settings import InterveneSettings

UNCAPPED = 1e6
"""The cap of the bound for a measure that is no probability: far beyond any number a model gives."""


UnitName = Literal["points", "in the measure's own unit"]


@dataclass(frozen=True)
class Unit:
    """What one unit of a measure is called, and how many of them a difference of one is."""

    name: UnitName
    short: str
    """For the head of a column."""
    factor: float
    form: str

    def signed(self, value: float) -> str:
        """A difference, without the unit's name."""
        return f"{self.factor * value:+{self.form}}"

    def plain(self, value: float) -> str:
        """A value, without the unit's name."""
        return f"{self.factor * value:{self.form}}"


POINTS = Unit("points", "points", 100.0, ".2f")
"""Of probability."""
OWN = Unit("in the measure's own unit", "own unit", 1.0, ".3g")


UNITS = {unit.name: unit for unit in (POINTS, OWN)}


def is_probability(measure: Measure) -> bool:
    """Whether the measure is known to be one."""
    return isinstance(measure, TargetMass)


def unit_of(measure: Measure) -> Unit:
    """Points for a probability."""
    return POINTS if is_probability(measure) else OWN


def cap_of(measure: Measure, settings: InterveneSettings) -> float:
    """The largest bound. The default is meant for probabilities, so that other measures have one only if it is set."""
    meant = is_probability(measure) or settings.bound_cap != InterveneSettings.bound_cap
    return settings.bound_cap if meant else UNCAPPED
