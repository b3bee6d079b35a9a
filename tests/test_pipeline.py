"""The whole study on the toy pair: every record is there, made once, and the same however it came about."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import STUDY, write_toy_pair

from sae_steer.errors import InputError, StaleError, SteerError
from sae_steer.pair.model_pair import load_pair
from sae_steer.pipeline import Places, StudySettings, find_or_intervene, find_or_scan, run_study
from sae_steer.settings import InterveneSettings, ScanSettings
from sae_steer.study.files import load_study

UNEQUAL = ("timing.json", "log.jsonl", ".sae_steer")
"""What holds wall times, or nothing."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return load_pair(write_toy_pair(tmp_path_factory.mktemp("toy") / "toy"))


def places(folder: Path) -> Places:
    return Places(folder / "activations", folder / "run")


@pytest.fixture(scope="module")
def finished(pair, tmp_path_factory):
    """A folder in which the study has run, and the progress it told."""
    folder, told = tmp_path_factory.mktemp("finished"), {}

    def progress(stage):
        return lambda done, total, note="": told.setdefault(stage, []).append(done / total)

    assert run_study(pair, places(folder), settings=STUDY, progress=progress) == folder / "run" / "report.html"
    return folder, told


def records(folder: Path) -> dict[str, bytes]:
    """Every file but those that hold wall times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in UNEQUAL
    }


def studied(folder: Path) -> Path:
    (found,) = (folder / "run" / "intervene").glob("feature-*")
    return found


def test_every_stage_leaves_its_record(finished):
    folder, told = finished
    names = set(records(folder))
    feature = studied(folder).name
    assert {
        "activations/manifest.json",
        "run/saes/adhd_L2_hook_resid_post_k6_d48/cfg.json",
        "run/saes/adhd_L2_hook_resid_post_k6_d48/training.json",
        "run/saes/adhd_L2_hook_resid_post_k6_d48/ce_recovered.json",
        "run/scan/feature_diff.json",
        "run/scan/features.parquet",
        f"run/intervene/{feature}/results.json",
        f"run/intervene/{feature}/trials.parquet",
        "run/layers/layers.json",
        "run/report.html",
    } <= names
    assert {"run/scan/timing.json", "run/layers/timing.json"} <= {
        str(path.relative_to(folder)) for path in folder.rglob("timing.json")
    }
    assert not [name for name in names if name.endswith(".tmp")]
    for stage in ("cache", "scan", "intervene", "layers"):
        assert told[stage] == sorted(told[stage]), stage
        assert told[stage][-1] == 1, stage


def test_each_record_names_what_made_it(finished):
    folder, _ = finished
    for path in (folder / "run").rglob("*.json"):
        if path.name in ("feature_diff.json", "results.json", "layers.json", "training.json"):
            origin = json.loads(path.read_text())["provenance"]
            assert set(origin) == {"sae_steer", "commit", "settings", "inputs"}
            assert origin["inputs"]


def test_the_feature_studied_is_the_first_of_the_scan(finished):
    folder, _ = finished
    scanned = json.loads((folder / "run" / "scan" / "feature_diff.json").read_text())
    study = load_study(studied(folder))
    assert study.tested
    assert study.feature == scanned["top"][0]["feature"]


def test_a_second_run_makes_nothing_again(finished, pair):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    run_study(pair, places(folder), settings=STUDY)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    again = {path.name for path, time in after.items() if before[path] != time and "figures" not in path.parts}
    assert again <= {"report.html"}, "the page alone is drawn again, from the same records"


def test_the_same_seed_gives_the_same_bytes_in_another_folder(finished, pair, tmp_path):
    run_study(pair, places(tmp_path), settings=STUDY)
    first, second = records(finished[0]), records(tmp_path)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


KILLED = """
import os, signal, sys
import torch
from toy import STUDY
from sae_steer.pair.model_pair import load_pair
from sae_steer.pipeline import Places, run_study
from pathlib import Path

pair_folder, folder = map(Path, sys.argv[1:3])
pair = load_pair(pair_folder)
places = Places(folder / "activations", folder / "run")


class Stop:
    def step(self, facts):
        if facts.step > 20:
            os.kill(os.getpid(), signal.SIGKILL)
    def checkpoint(self, step, path): ...
    def done(self, step): ...


def stopping(at):
    def progress(stage):
        def told(done, total, note=""):
            if stage == at and 0.3 < done / total < 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return told
    return progress


for stage in ("cache", "train-sae", "intervene"):
    child = os.fork()  # before any of torch's threads exist
    if child == 0:
        torch.set_num_threads(int(sys.argv[3]))
        run_study(pair, places, settings=STUDY, progress=stopping(stage), log=Stop() if stage == "train-sae" else None)
        os._exit(0)
    print(stage, os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_every_stage_and_repeated_it_ends_in_the_same_records(finished, pair, tmp_path):
    pair_folder = write_toy_pair(tmp_path / "toy")
    folder = tmp_path / "work"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(pair_folder), str(folder), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=True,
    )
    assert killed.stdout.split("\n")[:3] == [f"{s} {int(signal.SIGKILL)}" for s in ("cache", "train-sae", "intervene")]
    assert (folder / "run" / "scan" / "feature_diff.json").is_file()
    assert not list((folder / "run" / "intervene").rglob("results.json"))
    run_study(pair, places(folder), settings=STUDY)
    first, second = records(finished[0]), records(folder)
    assert first.keys() == second.keys()
    different = [name for name in first if first[name] != second[name]]
    assert different == []


def test_outputs_made_with_other_settings_are_refused_and_stay(finished, pair):
    folder, _ = finished
    before = records(folder)
    for changed in (
        {"corpus": dataclasses.replace(STUDY.corpus, scan_plans=31)},
        {"scan": ScanSettings(min_rate=0.2)},
        {"intervene": dataclasses.replace(STUDY.intervene, controls=21)},
        {"layers": dataclasses.replace(STUDY.layers, prompts=7)},
    ):
        with pytest.raises(StaleError, match="made with other") as caught:
            run_study(pair, places(folder), settings=dataclasses.replace(STUDY, **changed))
        assert "\n" not in str(caught.value)
    after = records(folder)
    assert [name for name in before if before[name] != after[name]] == []


def test_force_replaces_what_was_made_otherwise(finished, pair, tmp_path):
    folder, _ = finished
    from sae_steer.cache import ActivationCache
    from sae_steer.dictionary import load_dictionary

    cache = ActivationCache.open(folder / "activations")
    dictionary = load_dictionary(folder / "run" / "saes" / "adhd_L2_hook_resid_post_k6_d48")
    first = find_or_scan(cache, dictionary, tmp_path)
    with pytest.raises(StaleError):
        find_or_scan(cache, dictionary, tmp_path, settings=ScanSettings(min_rate=0.9))
    second = find_or_scan(cache, dictionary, tmp_path, settings=ScanSettings(min_rate=0.9), force=True)
    assert second.specific.sum() < first.specific.sum()
    with pytest.raises(InputError, match="not in this dictionary"):
        find_or_intervene(pair, cache, dictionary, 48, tmp_path / "out", settings=STUDY.intervene)


def test_an_unwritable_run_folder_is_told_before_any_work(pair, tmp_path):
    (tmp_path / "file").write_text("")
    there = Places(tmp_path / "activations", tmp_path / "file" / "run")
    with pytest.raises(SteerError, match=r"cannot write .*name a writable folder with --out"):
        run_study(pair, there, settings=STUDY)
    assert not (tmp_path / "activations").exists()


def test_without_settings_every_stage_has_its_own_defaults():
    assert StudySettings().intervene == InterveneSettings()
    assert StudySettings().scan == ScanSettings()
