"""How the report writes numbers: points of probability, shares, counts, p-values, intervals.

A probability of .0123 is 1.23 points. An interval and its estimate keep the same decimals, as many as show
three digits of the largest of the three.
"""

from collections.abc import Mapping
from decimal import Decimal
from math import floor, log10

from sae_steer.effects.estimates import Effect

Number = float | int
Estimate = Mapping | Effect
"""A row of a record, or an effect."""
MINUS = "\u2212"
NONE = "n/a"


def count(value: Number) -> str:
    """12,345."""
    return f"{value:,.0f}"


def number(value: Number | None) -> str:
    """Three significant digits."""
    if value is None:
        return NONE
    return _typeset(f"{value:.3g}")


def percent(value: Number | None) -> str:
    """A share of one, in percent."""
    return NONE if value is None else f"{_fixed(100 * value, 100 * value)} %"


def setting(value: Number) -> str:
    """A share of one that someone chose, in percent, without added digits."""
    return f"{Decimal(f'{100 * value:g}'):f} %"


def points(value: Number | None) -> str:
    """A signed difference of probabilities, in points."""
    return NONE if value is None else _fixed(100 * value, 100 * value, sign=True)


def p_value(value: Number) -> str:
    """A p or q."""
    if value == 0:
        return "< 1e-300"
    return _typeset(f"{value:.3f}" if value >= 0.001 else f"{value:.0e}")


def points_interval(estimate: Estimate, mean: str = "mean", low: str = "low", high: str = "high") -> str:
    """`+1.23 [+0.45, +2.01]`, in points."""
    return _interval(estimate, (mean, low, high), sign=True)


def percent_interval(estimate: Estimate, mean: str = "mean", low: str = "low", high: str = "high") -> str:
    """`12.3 % [10.4, 14.1]`, of a share of one."""
    return _interval(estimate, (mean, low, high), unit=" %")


def share_interval(estimate: Estimate) -> str:
    """An effect's share of the gap, signed, in percent; an end without bound is an infinity."""
    return _interval(estimate, ("share", "share_low", "share_high"), sign=True, unit=" %")


def log_odds_interval(row: Mapping) -> str:
    """A log-odds ratio and its interval, in nats."""
    return _interval(row, ("log_odds", "log_odds_low", "log_odds_high"), sign=True, scale=1)


def _interval(
    estimate: Estimate, keys: tuple[str, str, str], *, sign: bool = False, unit: str = "", scale: int = 100
) -> str:
    ends = [estimate[key] if isinstance(estimate, Mapping) else getattr(estimate, key) for key in keys]
    values = [None if end is None else scale * end for end in ends]
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if values[0] is None:
        return NONE
    low = f"{MINUS}\u221e" if values[1] is None else _fixed(values[1], largest, sign=sign)
    high = "\u221e" if values[2] is None else _fixed(values[2], largest, sign=sign)
    return f"{_fixed(values[0], largest, sign=sign)}{unit} [{low}, {high}]"


def _fixed(value: Number, largest: Number, *, sign: bool = False) -> str:
    """`value` with the decimals that show three digits of `largest`: one at least, six at most."""
    if largest == 0:
        return "0"
    decimals = min(max(2 - floor(log10(abs(largest))), 1), 6)
    return _typeset(f"{value:{'+' if sign else ''}.{decimals}f}")


def _typeset(written: str) -> str:
    return written.replace("-", MINUS)
