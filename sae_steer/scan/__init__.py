"""Which features of a dictionary are specific to one model: how often each fires at step onsets, in both.

1. The dictionary reads the scan split's streams of both models, the same positions in each (`reading`).
2. `FiringCounter` counts firings by cell: model x text rendering x onset or elsewhere; and at the onsets
   of target-rendered text also by task, the cluster of every interval and test (`counting`). Rows that do not count
   in either model (`row_filter`), none of them an onset, are in no cell.
3. `FeatureScan` answers: rates with Wilson intervals at the design effect of the tasks, log-odds ratios with
   intervals, p of the paired difference corrected over all features (Benjamini-Hochberg), and what is specific.
4. Where the dictionary was compared with those of other seeds, each feature's stability stands beside.
"""

from sae_steer.scan.counting import FiringCounter
from sae_steer.scan.features import FeatureScan, resolve_index
from sae_steer.scan.reading import scan_features
from sae_steer.scan.record import (
    BY_TASK_FILE,
    RECORD_FILE,
    TABLE_FILE,
    load_scan,
    save_scan,
    scan_provenance,
    tells_stability,
)

__all__ = [
    "BY_TASK_FILE",
    "RECORD_FILE",
    "TABLE_FILE",
    "FeatureScan",
    "FiringCounter",
    "load_scan",
    "resolve_index",
    "save_scan",
    "scan_features",
    "scan_provenance",
    "tells_stability",
]
