"""How the loops of `choosing` and `loops` are compiled.

What loops share is inlined: a library of its own is optimised otherwise when numba reads it from its cache than when
it has just compiled it, and a first run would then end in other bytes than a second.
"""

from inspect import unwrap

from numba import njit

REORDERED = {"reassoc", "contract", "nsz", "arcp"}
"""For `fastmath`: sums may be cut into lanes; NaN and infinity keep their meaning."""


def loop(**options):
    """`njit` of the function as written, without the shape checks that tests wrap around every function."""
    return lambda function: njit(nogil=True, cache=True, error_model="numpy", **options)(unwrap(function))


def shared(**options):
    """The same for what is inlined into loops."""
    return loop(inline="always", **options)
