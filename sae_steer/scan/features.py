"""What the counts of a scan say of each feature: rates, intervals, and which features are specific to the target."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array

from sae_steer import stats
from sae_steer.errors import InputError
from sae_steer.row_filter import LeftOut
from sae_steer.sae.stability import SeedStability
from sae_steer.scan.pairing import PairedFirings, paired_firings
from sae_steer.settings import ScanSettings


@dataclass(frozen=True)
class FeatureScan:
    """Counts of a scan, and everything that follows from them."""

    dictionary: str
    target: str
    reference: str
    cells: dict[str, int]
    """Rows read in each cell, `model/rendering/onset` or `model/rendering/elsewhere`."""
    hits: dict[str, Int[np.ndarray, " d_sae"]]
    """Firings of every feature in each cell."""
    target_hits: csc_array
    """[cluster, d_sae] Firings at the onsets of target-rendered text, by task, in the target model."""
    reference_hits: csc_array
    """[cluster, d_sae] At the same onsets, read in the reference model."""
    trials: Int[np.ndarray, " cluster"]
    """Onsets of target-rendered text, by task."""
    settings: ScanSettings
    record: dict
    stability: SeedStability | None = None
    """The dictionary's features in those of other seeds, where they were compared."""
    left_out: LeftOut | None = None
    """The rows that were not counted; None where a scan was saved before rows were left out."""

    @property
    def d_sae(self) -> int:
        """Features."""
        return self.target_hits.shape[1]

    @cached_property
    def target_rate(self) -> Float[np.ndarray, " d_sae"]:
        """Share of the onsets of target-rendered text at which each feature fires in the target model."""
        return self.target_hits.sum(0) / self.trials.sum()

    @cached_property
    def reference_rate(self) -> Float[np.ndarray, " d_sae"]:
        """The same onsets, read in the reference model."""
        return self.reference_hits.sum(0) / self.trials.sum()

    @cached_property
    def paired(self) -> PairedFirings:
        """Target against reference, at the same onsets."""
        return paired_firings(self.target_hits, self.reference_hits, self.trials)

    @property
    def log_odds(self) -> stats.LogOdds:
        """Target against reference, paired at the onsets, clusters counted."""
        return self.paired.log_odds

    @property
    def p(self) -> Float[np.ndarray, " d_sae"]:
        """Of the paired difference in rates."""
        return self.paired.p

    @cached_property
    def q(self) -> Float[np.ndarray, " d_sae"]:
        """`p` corrected over all features."""
        return stats.benjamini_hochberg(self.p)

    @cached_property
    def alive(self) -> Bool[np.ndarray, " d_sae"]:
        """Features that fire anywhere in the scan."""
        return sum(self.hits.values()) > 0

    @cached_property
    def percentile(self) -> Float[np.ndarray, " d_sae"]:
        """Where the lower bound of the log-odds stands among the alive features, in percent."""
        return stats.percentile_among(self.log_odds.low, self.alive)

    @cached_property
    def task_share(self) -> Float[np.ndarray, " d_sae"]:
        """Share of the tasks at some onset of which each feature fires in the target model."""
        return np.diff(self.target_hits.indptr) / self.target_hits.shape[0]

    @cached_property
    def specific(self) -> Bool[np.ndarray, " d_sae"]:
        """Features specific to the target model, by the settings' three conditions."""
        return (
            (self.target_rate >= self.settings.min_rate)
            & (self.q < self.settings.max_q)
            & (self.target_rate >= self.settings.min_ratio * self.reference_rate)
        )

    @property
    def specific_features(self) -> list[int]:
        """The indices of the specific features."""
        return np.flatnonzero(self.specific).tolist()

    def top(self, count: int) -> list[int]:
        """The specific features that fire in enough tasks, the highest lower bound of the log-odds first."""
        order = np.argsort(-self.log_odds.low, kind="stable")
        wanted = self.specific & (self.task_share >= self.settings.min_task_share)
        return [int(feature) for feature in order if wanted[feature]][:count]

    def like_2504(self) -> int:
        """The feature nearest the released phenotype: fires at .59 of onsets, at no more than .005 in the reference."""
        candidates = self._like_2504
        if not len(candidates):
            raise InputError(
                f"every feature of '{self.target}' fires at more than {self.settings.like_max_reference} of the onsets "
                f"in '{self.reference}'; name one by its index"
            )
        return int(candidates[0])

    @cached_property
    def _like_2504(self) -> Int[np.ndarray, " candidate"]:
        """Features all but silent in the reference, nearest the released rate first."""
        limits = self.settings
        found = np.flatnonzero((self.target_rate > 0) & (self.reference_rate <= limits.like_max_reference))
        return found[np.argsort(np.abs(self.target_rate[found] - limits.like_rate), kind="stable")]

    def resolve(self, feature: str) -> int:
        """The index meant by `top`, `like-2504` or a number."""
        if feature == "top":
            found = self.top(1)
            if not found:
                raise InputError(
                    "no feature is specific to the target model and fires in "
                    f"{self.settings.min_task_share:.0%} of the tasks; name one by its index, or try like-2504"
                )
            return found[0]
        if feature == "like-2504":
            return self.like_2504()
        return resolve_index(feature, self.d_sae)

    def table(self, count: int) -> str:
        """The top features, counts beside the rates; their cosines with other seeds' matches, where there are some."""
        sides = f"{self.target + ' fires':>16} {self.reference + ' fires':>16}"
        seeds = "" if self.stability is None else f" {'in other seeds':>17}"
        lines = [f"{'feature':>8} {sides} {'log-odds':>22} {'q':>9}{seeds}"]
        for feature in self.top(count):
            row = self.row(feature)
            odds = f"{row['log_odds']:.2f} [{row['log_odds_low']:.2f}, {row['log_odds_high']:.2f}]"
            fires = [f"{row[f'{side}_hits']} ({row[f'{side}_rate']:.4f})" for side in ("target", "reference")]
            if seeds:
                seeds = f" {row['stability']:>6.2f} (min {row['stability_least']:.2f})"
            lines.append(f"{feature:>8} {fires[0]:>16} {fires[1]:>16} {odds:>22} {row['q']:>9.1e}{seeds}")
        lines.append(
            f"{self.specific.sum()} of {self.alive.sum()} alive features are specific; "
            f"counted at {self.trials.sum()} onsets of {len(self.trials)} tasks"
        )
        told = self.left_out and self.left_out.sentence("elsewhere")
        if told:
            lines.append(told)
        return "\n".join(lines)

    def row(self, feature: int) -> dict:
        """What the scan knows of one feature; its stability is None where the dictionary has no other seeds."""
        known = {name: column[feature].item() for name, column in self.columns.items()}
        return {"stability": None, "stability_least": None} | known

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """The table: one row a feature."""
        intervals = {}
        sides = (self.target_hits, self.reference_hits)
        for name, by_task, effect in zip(("target", "reference"), sides, self.paired.design_effects, strict=True):
            low, high = stats.wilson(by_task.sum(0), np.full(self.d_sae, self.trials.sum()), deff=effect)
            intervals |= {f"{name}_rate_low": low, f"{name}_rate_high": high}
        found = self.stability
        seeds = {} if found is None else {"stability": found.mean, "stability_least": found.least}
        return {
            "feature": np.arange(self.d_sae),
            "target_hits": self.target_hits.sum(0),
            "reference_hits": self.reference_hits.sum(0),
            "task_share": self.task_share,
            "onsets": np.full(self.d_sae, self.trials.sum()),
            "target_rate": self.target_rate,
            "reference_rate": self.reference_rate,
            **intervals,
            "log_odds": self.log_odds.log_odds,
            "log_odds_low": self.log_odds.low,
            "log_odds_high": self.log_odds.high,
            "p": self.p,
            "q": self.q,
            "percentile": self.percentile,
            "alive": self.alive,
            "specific": self.specific,
            **seeds,
            **{f"hits/{cell}": hits for cell, hits in self.hits.items()},
        }

    def onset_rate(self, model: str) -> Float[np.ndarray, " d_sae"]:
        """Share of all onsets, of both renderings, at which each feature fires in `model`."""
        cells = [cell for cell in self.cells if cell.startswith(f"{model}/") and cell.endswith("/onset")]
        return sum(self.hits[cell] for cell in cells) / sum(self.cells[cell] for cell in cells)


def resolve_index(feature: str, d_sae: int) -> int:
    """The index a user typed, if the dictionary has it."""
    try:
        index = int(feature)
    except ValueError as error:
        raise InputError(f"--feature takes an index, top or like-2504, not {feature!r}") from error
    if not 0 <= index < d_sae:
        raise InputError(f"feature {index} is not in this dictionary; it has features 0 to {d_sae - 1}")
    return index
