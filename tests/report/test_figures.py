import numpy as np
import pytest
from report_records import atlas, feature_table, layers, scan, study, training

from sae_steer.report import effect_figures, figures, trace_figure
from sae_steer.report.atlas_figure import LOOKS, atlas_figure
from sae_steer.report.drawing import png_and_svg, spread
from sae_steer.study.record import Study
from sae_steer.typed_json import of_json


def texts(figure) -> str:
    """All text of a figure."""
    artists = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return "\n".join(artist.get_text() for artist in artists)


def test_every_labelled_feature_stands_where_the_table_has_it():
    table = feature_table()
    axes = figures.firing_scatter(scan(table), table, {7: "intervened on"}).axes[0]
    for feature, x in ((7, None), (25, table["reference_rate"][25])):
        drawn = [line.get_xydata()[0] for line in axes.lines if len(line.get_xdata()) == 1]
        near = [place for place in drawn if np.isclose(place[1], table["target_rate"][feature])]
        assert near
        assert x is None or any(np.isclose(place[0], x) for place in near)


def test_a_rate_of_zero_is_drawn_at_the_axis():
    table = feature_table()
    axes = figures.firing_scatter(scan(table), table, {}).axes[0]
    assert table["reference_rate"][7] == 0
    assert axes.get_xticklabels()[0].get_text() == "0"
    assert axes.get_xlim()[0] < axes.get_xticks()[0] < 1 / 8770


def test_a_scan_without_specific_features_is_drawn():
    table = feature_table() | {"specific": np.zeros(400, dtype=bool)}
    record = scan(table) | {"top": [], "like_2504": None}
    assert "specific to adhd (0)" in texts(figures.firing_scatter(record, table, {}))


@pytest.mark.parametrize("sampled", [True, False])
def test_the_forest_says_its_sizes_and_both_modes(sampled):
    record = of_json(Study, study(7, sampled=sampled))
    figure = effect_figures.effect_forest(record)
    assert len(figure.axes) == 1 + sampled
    for words in ("1,187 onsets of 143 tasks", "4,291 of 143", "+24.3 [+22.6, +26.0]", "one onset at a time"):
        assert words in texts(figure)


def test_the_dose_curves_go_through_the_record():
    record = study(7)
    axes = effect_figures.dose_curves(of_json(Study, record)).axes
    for panel, variant in zip(axes, record["variants"], strict=True):
        expected = [100 * row["mean"] for row in variant["joint_doses"]["doses"]]
        assert any(len(line.get_ydata()) == 6 and np.allclose(line.get_ydata(), expected) for line in panel.lines)


def test_the_trace_goes_through_the_record_and_leaves_out_edits_that_moved_nothing():
    record = study(7)
    record["variants"][2]["trace"]["blocks"][0]["n"] = 0
    shown = of_json(Study, record)
    figure = trace_figure.trace_by_block(shown)
    assert len(figure.axes) == 6
    for what, panels in (("norm", figure.axes[::2]), ("projection", figure.axes[1::2])):
        for panel, (variant, _) in zip(panels, trace_figure.traced(shown), strict=True):
            carried, attention, _ = panel.lines[:3]
            blocks = next(v for v in record["variants"] if v["variant"] == variant.name)["trace"]["blocks"]
            assert carried.get_xydata().tolist() == [[row["block"], row[f"resid_{what}"]] for row in blocks]
            assert attention.get_ydata().tolist() == [row[f"attention_{what}"] for row in blocks[1:]]
    assert "direct +0.0427 [+0.0127, +0.0727]" in texts(figure)
    assert "inject changes the stream by a length of 1.37 after block 2, 0.66 after 5" in trace_figure.describe_trace(
        shown
    )


def test_controls_that_all_do_nothing_are_drawn():
    record = study(7)
    for variant in record["variants"]:
        for family in variant["controls"]:
            family |= {"means": [0.0] * 99, "low": 0.0, "high": 0.0}
    png, _ = png_and_svg(effect_figures.control_histograms(of_json(Study, record)))
    assert png.startswith(b"\x89PNG")


def test_a_fourth_control_family_has_a_colour_of_its_own_and_is_drawn():
    record = study(7)
    for variant in record["variants"]:
        variant["controls"].append(variant["controls"][0] | {"family": "a fourth"})
    figure = effect_figures.control_histograms(of_json(Study, record))
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["isotropic (99)", "covariance (99)", "matched features (99)", "a fourth (99)"]
    bars = {patch.get_facecolor() for patch in figure.axes[0].patches}
    assert len(bars) == 4


def test_the_density_is_drawn_bin_by_bin_for_every_dictionary_and_says_how_many_are_dead():
    other = training() | {"heldout_rows": 99, "density_heldout": {"log10_edges": [-2, 0], "counts": [7], "dead": 3}}
    figure = figures.firing_density([("one", training()), ("two", other)])
    for axes, record in zip(figure.axes, (training(), other), strict=True):
        (stairs,) = axes.patches
        assert stairs.get_data().values.tolist() == record["density_heldout"]["counts"]
        assert stairs.get_data().edges.tolist() == record["density_heldout"]["log10_edges"]
    for words in ("one: n = 123,457 rows, 4,036 features fire, 60 never", "two: n = 99 rows, 7 features fire, 3 never"):
        assert words in texts(figure)
    png_and_svg(figure)
    assert "0.1 %" in texts(figure)


def test_a_probability_of_zero_does_not_break_the_layer_curves():
    record = layers()
    record["curves"][0]["layers"][0] |= {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert "n = 4,017 onsets, 149 tasks" in texts(figures.layer_curves(record))


def test_names_are_text_and_no_formula():
    record = layers()
    record["curves"][0]["model"] = "$\\frac{a$_b"
    png, _ = png_and_svg(figures.layer_curves(record))
    assert png.startswith(b"\x89PNG")


def test_neighbours_end_up_apart_and_in_order():
    assert spread([1.0, 0.0, 1.05], 0.2) == pytest.approx([1.0, 0.0, 1.2])


def test_the_forest_shades_the_bound_and_shows_the_positive_controls_and_verdicts():
    record = study(7)
    record["variants"][1]["verdict"] = "INCONCLUSIVE"
    figure = effect_figures.effect_forest(of_json(Study, record))
    for words in ("bound of 1.19 points", "unembedding (positive control)", "INCONCLUSIVE", "NULL"):
        assert words in texts(figure)
    means = [100 * variant["single"]["beside"]["unembedding"]["mean"] for variant in record["variants"]]
    drawn = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert np.allclose(drawn, means)


def test_whatever_should_move_the_measure_is_in_the_forest_and_no_other_flavour_of_the_edit():
    record = study(7)
    for variant in record["variants"]:
        beside = variant["single"]["beside"]
        beside |= {"something new": beside["unembedding"], "raw": beside["unembedding"]}
    said = texts(effect_figures.effect_forest(of_json(Study, record)))
    for name in ("unembedding", "full patch, raw", "full patch, rotated", "something new"):
        assert f"{name} (positive control)" in said
    assert "\nraw (positive control)" not in said


def test_every_task_is_a_point():
    record = study(7)
    axes = effect_figures.task_effects(of_json(Study, record)).axes
    for panel, variant in zip(axes, record["variants"], strict=True):
        expected = [100 * row["mean"] for row in variant["by_task"]]
        assert any(np.allclose(line.get_ydata(), expected) for line in panel.lines if len(line.get_ydata()) == 143)


def test_the_atlas_draws_every_feature_where_the_table_has_it():
    record, table = atlas()
    figure = atlas_figure(record, table)
    for axes, variant in zip(figure.axes, record["variants"], strict=True):
        mine = table["variant"] == variant["variant"]
        drawn = np.concatenate([line.get_xydata() for line in axes.lines if line.get_marker() != "None"])
        tested = mine & (table["tag"] != "")
        wanted = np.stack([table["log_odds"][tested], 100 * table["mean"][tested]], axis=1)
        assert sorted(map(tuple, drawn.tolist())) == sorted(map(tuple, wanted.tolist()))
        (dots,) = [found for found in axes.collections if len(found.get_offsets()) == mine.sum()]
        assert np.allclose(dots.get_offsets()[:, 1], 100 * table["estimate"][mine])
        assert axes.get_ylim()[1] > 100 * np.abs(table["mean"][tested]).max()
    said = texts(figure)
    assert "n = 1,187 onsets of 143 tasks" in said
    labels = [text.get_text() for axes in figure.axes[:2] for text in axes.get_legend().get_texts()]
    assert {label for label, *_ in LOOKS.values()} < set(labels)
    assert "inside the bound of 1.19 points" in labels


def test_an_atlas_in_which_nothing_moves_is_drawn():
    record, table = atlas()
    still = {key: np.zeros_like(table[key]) for key in ("estimate", "mean", "low", "high")}
    png, svg = png_and_svg(atlas_figure(record, table | still))
    assert png_and_svg(atlas_figure(record, table | still)) == (png, svg)
