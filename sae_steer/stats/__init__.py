"""Arrays in, numbers out: what may be claimed from rows that come in clusters.

Rows of one task are not independent, so the cluster is the task in every interval and test.

bootstrap  means and shares of clustered rows, with BCa intervals and one-sided p
bounds     an effect against a bound fixed beforehand: beyond it, or inside it (equivalence)
nulls      sign flips, control directions, sampled arms; Holm and Benjamini-Hochberg over many p
power      how large an effect would have been seen, and how many onsets it takes
rates      of clustered trials, and of two models read at the same onsets
ranks      where values stand among others
"""

from sae_steer.stats.bootstrap import (
    Estimate,
    cluster_bootstrap,
    cluster_bootstrap_ratio,
    cluster_sums,
    resampled_counts,
)
from sae_steer.stats.bounds import (
    BOUND_CAP,
    BOUND_SHARE,
    MIN_CLUSTERS,
    MIN_CLUSTERS_FOR_NULL,
    AgainstBound,
    against_bound,
    check_clusters,
)
from sae_steer.stats.nulls import aa_null, benjamini_hochberg, holm, rank_p, sign_flip_p
from sae_steer.stats.power import SampleSize, design_effect_of_mean, icc, minimum_detectable, sample_size
from sae_steer.stats.ranks import percentile_among, spearman
from sae_steer.stats.rates import LogOdds, design_effect, paired_log_odds, paired_rate_p, wilson

__all__ = [
    "BOUND_CAP",
    "BOUND_SHARE",
    "MIN_CLUSTERS",
    "MIN_CLUSTERS_FOR_NULL",
    "AgainstBound",
    "Estimate",
    "LogOdds",
    "SampleSize",
    "aa_null",
    "against_bound",
    "benjamini_hochberg",
    "check_clusters",
    "cluster_bootstrap",
    "cluster_bootstrap_ratio",
    "cluster_sums",
    "design_effect",
    "design_effect_of_mean",
    "holm",
    "icc",
    "minimum_detectable",
    "paired_log_odds",
    "paired_rate_p",
    "percentile_among",
    "rank_p",
    "resampled_counts",
    "sample_size",
    "sign_flip_p",
    "spearman",
    "wilson",
]
