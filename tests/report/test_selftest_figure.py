"""The selftest's chart draws what its record counts."""

from collections import Counter

from sae_steer.report.selftest_figure import SHOWN, selftest_figure


def interval(rate: float) -> dict:
    return {"rate": rate, "low": max(rate - 0.1, 0.0), "high": min(rate + 0.1, 1.0)}


RECORD = {
    "studies": {"causal": 3, "inert": 2, "graded": 1},
    "due": {"causal": {"inject": "CAUSAL"}, "inert": {"inject": "NULL"}, "graded": {}},
    "confusion": {
        "causal": {"inject": {"CAUSAL": 2, "INVALID": 1}},
        "inert": {"inject": {"NULL": 2}},
        "graded": {"inject": {"CAUSAL": 1}},
    },
    "level": {
        "isotropic": {**interval(0.05), "fresh": 200},
        "covariance": {"rate": 0.04, "low": None, "high": None, "fresh": 100},
    },
    "power": [
        {"mean": size, "causal": interval(share), "null": interval(1 - share)}
        for size, share in ((0.1, 0.0), (4.0, 1.0))
    ],
}


def test_every_tested_kind_has_a_row_of_counts_and_the_right_verdict_outlined():
    table, level, power = selftest_figure(RECORD).axes
    assert [label.get_text() for label in table.get_yticklabels()] == ["causal (CAUSAL)", "inert (NULL)"]
    assert Counter(text.get_text() for text in table.texts) == Counter({"2": 2, "1": 1, "0": 2 * len(SHOWN) - 3})
    assert len(table.patches) == 2
    assert [label.get_text().splitlines()[0] for label in level.get_yticklabels()] == ["isotropic", "covariance"]
    assert [container.get_label() for container in power.containers] == ["CAUSAL", "NULL"]
