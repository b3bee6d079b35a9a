"""Which rows of a residual stream count: not those of special tokens, and not those far longer than the others.

A trained model parks attention on its first token, and on some delimiters, in rows up to hundreds of times as long as
the others (massive activations; Sun et al. 2024, 2402.17762). One of them in forty makes 98 % of the variance: it then
decides the scale of training rows, the variance explained and every map between two streams, and says nothing of the
rows a study is about.

1. A row of a special token is left out, unless it is an onset or its token one of the pair's onset delimiters.
2. A row longer than `LONG` medians of the rows that 1 leaves is left out, unless it is an onset.
3. An onset is never left out, because the study is about it; long ones are counted and told.

What is left out here is left out of figures and of what is fitted, and can still be read and edited.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

LONG = 10.0
"""Medians of the rows' norm beyond which a row is long: ordinary rows of one stream differ by a factor of two or three,
massive ones lie from fifty on."""
_CHUNK = 1_024


@dataclass(frozen=True)
class LeftOut:
    """How many rows were left out, by reason, for a record."""

    rows: int
    """In all."""
    special_tokens: int
    long: int
    """Left out for their length alone, or long and kept with the special tokens."""
    long_onsets: int
    """Onsets as long, which are never left out."""
    median_norm: float | None
    """Of the rows that are of no special token; None where two streams are read together."""
    kept: bool = False
    """Whether they were kept all the same (`--keep-special-tokens`)."""
    beyond: float = LONG
    """Medians from which a row is long."""

    def record(self) -> dict:
        """The figures for a JSON record."""
        return asdict(self)

    def sentence(self, where: str) -> str | None:
        """What a person should see, in a line; None where nothing was left out."""
        verb = "kept" if self.kept else "left out"
        parts = [
            f"{count:,} of {self.rows:,} rows {verb}: {reason}"
            for count, reason in (
                (self.special_tokens, "special tokens"),
                (self.long, f"longer than {self.beyond:g} medians"),
            )
            if count
        ]
        if self.long_onsets:
            parts.append(f"CAREFUL: {self.long_onsets:,} onsets are as long, and stay")
        return f"{where}: {'; '.join(parts)}" if parts else None


@dataclass(frozen=True)
class RowsThatCount:
    """Which rows of a stream count, and which are long."""

    counts: Bool[np.ndarray, " row"]
    long: Bool[np.ndarray, " row"]
    """Long rows, whether they count or not."""
    left_out: LeftOut

    @property
    def typical(self) -> Bool[np.ndarray, " row"]:
        """Those that count and are not long: what scales and means are taken from."""
        return self.counts & ~self.long

    def __and__(self, other: "RowsThatCount") -> "RowsThatCount":
        """The rows that count in two streams read at the same positions; long is what is long in either."""
        counts, long = self.counts & other.counts, self.long | other.long
        gone = self.left_out.rows - int(counts.sum())
        kept = self.left_out.kept or other.left_out.kept
        summary = replace(
            self.left_out,
            long=max(self.left_out.long, other.left_out.long) if kept else gone - self.left_out.special_tokens,
            long_onsets=max(self.left_out.long_onsets, other.left_out.long_onsets),
            median_norm=None,
        )
        return RowsThatCount(counts, long, summary)


def every_row(rows: int) -> RowsThatCount:
    """All of them, none long: where nothing is left out."""
    nothing = LeftOut(rows=rows, special_tokens=0, long=0, long_onsets=0, median_norm=None)
    return RowsThatCount(np.ones(rows, bool), np.zeros(rows, bool), nothing)


@dataclass(frozen=True)
class RowFilter:
    """Rows that count, by the ids of a tokenizer's special tokens and by length alone without them."""

    special: frozenset[int] = frozenset()
    """Special tokens that are no onset delimiter."""
    keep: bool = False
    """Whether all rows count all the same."""

    @property
    def identity(self) -> str:
        """What fixes the choice, for a record's inputs."""
        if self.keep:
            return "all rows"
        ids = ", ".join(map(str, sorted(self.special)))
        return f"without special tokens ({ids or 'none'}) and rows beyond {LONG:g} medians"

    def __call__(
        self,
        token: Int[np.ndarray, " row"] | None,
        is_onset: Bool[np.ndarray, " row"],
        norms: Float[np.ndarray, " row"],
    ) -> RowsThatCount:
        """The rows that count.

        Args:
            token: may be None where no token is special.
            norms: the rows' lengths.
        """
        assert token is not None or not self.special, "special tokens are known by their ids: give the tokens"
        special = np.zeros(len(norms), bool) if token is None else np.isin(token, sorted(self.special)) & ~is_onset
        ordinary = norms[~special]
        median = float(np.median(ordinary)) if len(ordinary) else 0.0
        long = norms > LONG * median if median > 0 else np.zeros(len(norms), bool)
        counts = np.ones(len(norms), bool) if self.keep else ~special & (~long | is_onset)
        summary = LeftOut(
            rows=len(norms),
            special_tokens=int(special.sum()),
            long=int((long & ~special & ~is_onset).sum()),
            long_onsets=int((long & is_onset).sum()),
            median_norm=median,
            kept=self.keep,
        )
        return RowsThatCount(counts, long, summary)

    def of_streams(
        self,
        token: Int[np.ndarray, " row"] | None,
        is_onset: Bool[np.ndarray, " row"],
        streams: Sequence[Float[np.ndarray, "row _d_model"]],
    ) -> RowsThatCount:
        """The rows that count in every one of some streams, read at the same positions."""
        parts = [self(token, is_onset, lengths(rows)) for rows in streams]
        joint = parts[0]
        for part in parts[1:]:
            joint = joint & part
        return joint


def lengths(rows: Float[np.ndarray, "row d_model"]) -> Float[np.ndarray, " row"]:
    """The norm of each row, summed in float64, a few rows at a time."""
    norms = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _CHUNK):
        exact = rows[start : start + _CHUNK].astype(np.float64)
        norms[start : start + _CHUNK] = np.sqrt(np.einsum("ij,ij->i", exact, exact))
    return norms
