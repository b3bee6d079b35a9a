"""The figures of heads and of depth draw what their records hold."""

import re

from report_records import heads, layers

from sae_steer.report.depth_figure import CUT, depth_figure, describe_depth
from sae_steer.report.drawing import png_and_svg
from sae_steer.report.heads_figure import describe_heads, heads_figure
from sae_steer.report.page import page
from sae_steer.report.run import RunRecords


def test_the_heads_figure_shows_every_cosine_pair_and_ablation() -> None:
    record = heads()
    figure = heads_figure(record)
    cosines, ablations, _ = figure.axes
    assert cosines.images[0].get_array().tolist() == record["centred"]
    circles = {tuple(line.get_xydata()[0].astype(int)) for line in cosines.lines if line.get_marker() == "o"}
    assert circles == {(0, 0), (1, 1), (2, 2), (5, 3), (4, 4), (3, 5)}
    stars = [tuple(line.get_xydata()[0].astype(int)) for line in cosines.lines if line.get_marker() == "*"]
    assert stars == [(5, 3)], "L1H0 of the reference, L1H2 of the target"
    dots = [list(line.get_ydata()) for line in ablations.lines if line.get_marker() == "."]
    for way, drawn in zip(("zero", "mean"), dots, strict=True):
        effects = [effect for effect in record["ablations"]["effects"] if effect["way"] == way]
        assert drawn == sorted(effect["change"]["value"] for effect in effects)
    assert record["summary"] in describe_heads(record)
    png_and_svg(figure)


def test_heads_without_ablations_are_one_panel() -> None:
    assert len(heads_figure(heads() | {"ablations": None}).axes) == 2, "the matrix and its scale"


def test_the_depth_figure_shows_every_share_and_cuts_the_wild_ones() -> None:
    record = layers()
    record["patching"]["patched"][0]["share"] = 40.0
    figure = depth_figure(record)
    left, right = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    rows = [row for row in record["patching"]["patched"] if (row["receiver"], row["flavour"]) == ("standard", "affine")]
    assert lines["into standard, affine"] == [row["share"] for row in rows]
    assert lines["into standard, raw"][0] == CUT[1]
    heights = [bar.get_height() for bar in right.patches]
    curve = record["curves"][-1]["layers"]
    assert heights == [row[part]["mean"] for part in ("attention", "mlp") for row in curve]
    assert record["patching"]["summary"] in describe_depth(record)
    png_and_svg(figure)


def test_the_page_has_both_sections(run) -> None:
    html = re.sub(r"<[^>]*>", " ", page(RunRecords.read(run), {"heads": {"source": "data:,", "alt": "a"}}))
    assert "mean profile cosine of 0.952" in html
    assert "One model\u2019s stream" in html or "One model's stream put into the other" in html
    assert "the grammar itself" in html
