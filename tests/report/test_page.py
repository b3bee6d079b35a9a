import json
import re
import shutil
from base64 import b64decode
from html import unescape

import pytest
from report_records import feature_table, layers, scan, study, untested

from sae_steer.errors import InputError, SteerError
from sae_steer.records import write_json
from sae_steer.report import numbers
from sae_steer.report import page as report_page
from sae_steer.report.page import page, write_report
from sae_steer.report.run import RunRecords

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[−+-]\d+)?")
OURS = {"95", "2504", "0", "1e-300"}
"""Numbers of the page's own words: intervals of 95 %, feature 2504 of the release."""


def shown(html: str) -> str:
    """What a reader sees of the page."""
    return unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(style|title)>.*?</\1>", " ", html, flags=re.DOTALL)))


def forms(value) -> list[str]:
    """Every way the report may write what a record holds."""
    if isinstance(value, list):
        return [form for part in value for form in forms(part)]
    if isinstance(value, str) or value is None:
        return [str(value)]
    if not isinstance(value, dict):
        plain = [numbers.count, numbers.number, numbers.percent, numbers.points, numbers.p_value, numbers.setting]
        return [str(value), f"{value:g}", *(write(value) for write in plain)]
    found = [form for part in value.values() for form in forms(part)]
    if {"mean", "low", "high"} <= value.keys():
        found += [numbers.points_interval(value), numbers.percent_interval(value)]
    if "share_low" in value:
        found.append(numbers.share_interval(value))
    if "log_odds_low" in value:
        rates = [[f"{model}_rate{end}" for end in ("", "_low", "_high")] for model in ("target", "reference")]
        found += [numbers.log_odds_interval(value), *(numbers.percent_interval(value, *keys) for keys in rates)]
    return found


def test_every_number_shown_comes_from_a_record(run):
    records = RunRecords.read(run)
    known = {number for _, record in records.named for form in forms(record) for number in NUMBER.findall(form)}
    known |= {number for path, _ in records.named for number in NUMBER.findall(path)} | OURS
    known |= {number[:12] for number in known}
    found = NUMBER.findall(shown(page(records, {})))
    assert len(found) > 500
    assert [number for number in found if number not in known] == []


@pytest.mark.parametrize(
    ("keys", "value", "written"),
    [
        (("firings", "onsets"), 3_901, "3,901 of"),
        (("firings", "s"), 7.654, "7.65,"),
        (("gap", "single", "mean"), 0.2317, "+23.2 ["),
        (("variants", 1, "single", "doses", 3, "mean"), -0.01717, "−1.72 ["),
        (("variants", 2, "joint", "doses", 3, "share"), 0.00747, "+0.747 % ["),
        (("variants", 0, "controls", 1, "rank_p"), 0.613, "rank p 0.613"),
        (("variants", 0, "joint_controls", "families", 0, "rank_p"), 0.427, "rank p 0.427"),
        (("variants", 0, "joint_controls", "families", 0, "count"), 75, "of 75, where reading the other 124 could"),
        (("variants", 1, "why"), "the interval straddles the bound", "the interval straddles the bound"),
        (("variants", 1, "gates", 0, "detail"), "equal bits", "equal bits"),
        (("plan", "changes"), [{"key": "settings.doses", "was": "1", "now": "2"}], "from 1 to 2"),
        (("variants", 2, "sampled", "strict", "paired", "p"), 0.811, "p 0.811"),
        (("variants", 3, "sampled", "lenient", "delta"), 0.0271, "+2.71"),
        (("variants", 3, "sampled", "strict", "p"), 0.729, "0.729"),
        (("verdict",), "OPPOSITE", "OPPOSITE"),
        (("note",), "an index is an index", "an index is an index"),
    ],
)
def test_what_a_record_says_is_on_the_page(run, keys, value, written):
    record = study(7)
    part = record
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    write_json(run / "intervene" / "feature-7" / "results.json", record)
    assert written in shown(page(RunRecords.read(run), {}))


def test_the_same_records_give_the_same_bytes_and_progress_ends_with_the_whole(reported, run):
    told = []
    write_report(run, on_step=lambda done, total, note="": told.append((done, total)))
    assert told[-1] == (11, 11)
    for path in sorted((reported / "figures").iterdir()):
        assert (run / "figures" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (run / "report.html").read_bytes() == (reported / "report.html").read_bytes()


def test_the_page_stands_alone(reported):
    html = (reported / "report.html").read_text()
    sources = re.findall(r"""(?:src|href|action|data|poster)\s*=\s*["']?([^"'\s>]*)""", html)
    assert sources
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in sources)
    assert "<script" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert all(f'id="{place}"' in html for place in re.findall(r'href="#([^"]*)"', html))
    for image in re.findall(r'src="data:image/svg\+xml;base64,([^"]*)"', html):
        assert not re.search(rb"href=\"(?!#|data:)", b64decode(image))


def test_every_chart_is_a_png_and_an_svg_of_the_page(reported):
    from PIL import Image

    html = (reported / "report.html").read_text()
    names = {path.stem for path in (reported / "figures").iterdir()}
    assert names == {
        "atlas",
        "density",
        "firing",
        "layers",
        "depth",
        "heads",
        "feature-7-effects",
        "feature-7-doses",
        "feature-7-controls",
        "feature-7-tasks",
        "feature-7-trace",
    }
    for name in names:
        with Image.open(reported / "figures" / f"{name}.png") as image:
            image.load()
            assert image.width >= 1_200
            assert not image.info.keys() & {"Software", "date"}
        assert b"<dc:date>" not in (reported / "figures" / f"{name}.svg").read_bytes()
        assert f"figures/{name}.png" in html
    assert not list(reported.rglob("*.tmp"))


def test_text_from_data_is_escaped(run):
    evil = "<script>alert('x')</script>&\""
    write_json(
        run / "intervene" / "feature-7" / "results.json", study(7, pair=evil) | {"note": evil, "dictionary": evil}
    )
    write_json(run / "scan" / "feature_diff.json", scan(feature_table(), target=evil))
    record = layers(pair=evil)
    record["target_tokens"]["tokens"][0] = record["curves"][0]["model"] = evil
    write_json(run / "layers" / "layers.json", record)
    html = page(RunRecords.read(run), {"firing": {"source": "data:,", "alt": evil}})
    assert "<script" not in html
    assert "alert('x')" not in html
    assert shown(html).count(evil) > 5


@pytest.mark.parametrize(
    ("part", "command"),
    [
        ("saes", "sae-steer train-sae"),
        ("scan", "sae-steer scan"),
        ("scan/features.parquet", "sae-steer scan --force"),
        ("intervene", "sae-steer intervene --feature top"),
        ("layers", "sae-steer layers"),
    ],
)
def test_a_missing_part_is_named_with_its_command(run, part, command):
    assert "Not here yet" not in page(RunRecords.read(run), {})
    (run / part).unlink() if (run / part).is_file() else shutil.rmtree(run / part)
    html = page(RunRecords.read(run), {})
    assert "Not here yet" in html
    assert f"<code>{command}</code>" in html


@pytest.mark.parametrize(("only", "missing"), [("saes", 3), ("scan", 3), ("intervene", 3), ("layers", 3), ("heads", 4)])
def test_one_part_alone_is_a_page(run, only, missing):
    for part in {"saes", "scan", "intervene", "layers", "heads"} - {only}:
        shutil.rmtree(run / part)
    assert page(RunRecords.read(run), {}).count("Not here yet") == missing


def test_no_record_at_all_is_an_error_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^no record in .*run `sae-steer") as raised:
        write_report(tmp_path / "nowhere")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("content", [{"primary_count": 312}, [], {"provenance": {}}])
def test_a_record_of_another_make_is_an_error_that_names_it(run, content):
    write_json(run / "scan" / "feature_diff.json", content)
    with pytest.raises(InputError, match=r"feature_diff\.json lacks .*sae-steer scan --force"):
        RunRecords.read(run)


def test_a_feature_that_was_not_tested_says_why(run):
    shutil.rmtree(run / "intervene" / "feature-7")
    html = shown(page(RunRecords.read(run), {}))
    assert html.count(untested(25)["reason"]) == 2
    assert "Not tested:" in html
    assert "Verdict: INVALID" in html


def test_a_study_asked_for_without_plans_says_so(run):
    record = study(7, sampled=False)
    record["provenance"]["settings"]["generations"] = 0
    write_json(run / "intervene" / "feature-7" / "results.json", record)
    html = page(RunRecords.read(run), {})
    assert "this study was asked for without them" in html
    assert "the texts of this pair are no plans" not in html


def test_a_pair_without_plans_has_no_sampled_part(run):
    write_json(run / "intervene" / "feature-7" / "results.json", study(7, sampled=False))
    assert "the texts of this pair are no plans" in page(RunRecords.read(run), {})


def test_a_feature_of_another_dictionary_is_not_labelled_in_this_scan(run):
    write_json(run / "intervene" / "feature-7" / "results.json", study(7, dictionary="9" * 64))
    records = RunRecords.read(run)
    assert records.studied_here == {25: "not tested"}
    assert "not made from the same dictionary" in page(records, {})


def test_the_atlas_tables_what_stands_out_most_and_is_left_out_without_a_record(run):
    records = RunRecords.read(run)
    qs = [row["q"] for row in records.furthest]
    assert qs == sorted(row["q"] for row in records.atlas["features"] if row["q"] is not None)[: len(qs)]
    html = shown(page(records, {}))
    assert "Atlas: every specific feature" in html
    assert "Silent in the tune texts, so without a size: 211" in html
    shutil.rmtree(run / "intervene" / "atlas")
    assert "Atlas" not in page(RunRecords.read(run), {})


@pytest.mark.parametrize(("key", "value"), [("top", "text"), ("top", [3]), ("criteria", []), ("provenance", 3)])
def test_a_record_of_another_shape_is_one_line(run, key, value, monkeypatch):
    monkeypatch.setattr(report_page, "charts", lambda records: [])
    path = run / "scan" / "feature_diff.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**{name: part for name, part in record.items() if name != "seal"}, key: value}))
    with pytest.raises(SteerError) as told:
        write_report(run)
    assert "\n" not in str(told.value)
    assert "--force" in str(told.value)
