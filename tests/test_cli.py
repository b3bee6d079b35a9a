"""The command line: help, defaults, what goes to stdout, and bad input told in one line."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from toy import write_toy_pair

import sae_steer
from sae_steer.cli import main
from sae_steer.records import write_json
from sae_steer.sae.architectures import TopKConfig, TopKSAE
from sae_steer.sae.saelens.files import load_sae, read_metadata, save_sae
from sae_steer.settings import (
    AtlasSettings,
    CacheSettings,
    CorpusSettings,
    HeadsSettings,
    InterveneSettings,
    LayersSettings,
    PairTrainingSettings,
    SAESettings,
    ScanSettings,
    SelftestSettings,
)
from sae_steer.terminal import Bar

SETTINGS = {
    "train-pair": (PairTrainingSettings,),
    "cache": (CorpusSettings, CacheSettings),
    "train-sae": (SAESettings,),
    "scan": (ScanSettings,),
    "intervene": (InterveneSettings,),
    "layers": (LayersSettings,),
    "heads": (HeadsSettings,),
    "selftest": (SelftestSettings,),
}
CACHE = ("cache", "--train-plans", "60", "--scan-plans", "40", "--tune-plans", "30", "--confirm-plans", "40")
DICTIONARY = ("train-sae", "--k", "6", "--d-sae", "48", "--rows", "6400", "--batch-size", "256")
SAE = ("--sae", "runs/toy/saes/adhd_L2_hook_resid_post_k6_d48")


def steer(*arguments) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The current folder: a toy pair, and what each command in turn has made of it and said."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("workplace")
        patch.chdir(folder)
        write_toy_pair(folder / "toy")
        said = {
            command[0]: steer(*command, *("--pair", "toy"))
            for command in (
                CACHE,
                DICTIONARY,
                ("scan", *SAE),
                ("intervene", *SAE, "--quick", "--generations", "4", "--prompts", "30"),
                ("layers", "--prompts", "10"),
                ("heads", "--prompts", "10", "--ablation-prompts", "0"),
                ("report",),
            )
        }
        yield said


@pytest.fixture
def here(workplace, tmp_path, monkeypatch):
    """An empty folder to be in, with the toy pair in reach; `made` is where its finished outputs lie."""
    made = Path.cwd()
    monkeypatch.chdir(tmp_path)
    return made


def refused(result: Result, *parts: str) -> None:
    """Exit code 1, and one line on stderr that names `parts`, whether the precision was decided before or not."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("precision ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    for part in parts:
        assert part in lines[0]


# Help


def test_every_command_has_help_with_an_example_and_every_option_a_help_text():
    for name, command in main.commands.items():
        told = steer(name, "-h")
        assert told.exit_code == 0
        assert f"sae-steer {name}" in told.stdout.split("Example", 1)[1], name
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, f"{name} {option.name}"


def test_defaults_are_those_of_the_settings_and_are_shown():
    for name, kinds in SETTINGS.items():
        known = {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}
        shared = [option for option in main.commands[name].params if option.name in known]
        assert shared, name
        told = " ".join(steer(name, "--help").stdout.split())
        for option in shared:
            if known[option.name] is None:  # what follows from other things is said in words
                assert option.required is False, f"{name} {option.name}"
                assert "[default: " in option.help, f"{name} {option.name}"
                continue
            assert option.default == known[option.name], f"{name} {option.name}"
            shown = f"({option.show_default})" if isinstance(option.show_default, str) else option.default
            assert f"[default: {shown}" in told, f"{name} {option.name}"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom sae_steer.cli import main\n"
        "for arguments in (['--help'], ['run', '-h'], ['intervene', '-h'], ['--version']):\n"
        "    main(arguments, standalone_mode=False)\n"
        "print([n for n in ('torch', 'transformer_lens', 'sae_lens', 'numpy', 'h5py') if n in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "[]"


def test_wrong_usage_exits_with_2():
    for arguments in (
        ["fly"],
        ["scan", "--colour", "red"],
        ["train-sae", "--k", "many"],
        ["train-sae", "--k", "0"],
        ["intervene", "--prompts", "-5"],
        ["intervene", "--all-specific", "--feature", "3"],
        ["intervene", "--all-specific", "--direction", "random"],
        ["intervene", "--all-specific", "--quick"],
        ["intervene", "--all-specific", "--generations", "4"],
        ["train-pair", "--preset", "huge"],
        ["info", "/nowhere/at/all"],
    ):
        assert steer(*arguments).exit_code == 2, arguments


# What is written where


def test_each_command_picks_up_what_the_one_before_wrote_and_says_where_its_own_lies(workplace):
    wanted = {
        "cache": "activations/toy",
        "train-sae": "runs/toy/saes/adhd_L2_hook_resid_post_k6_d48",
        "scan": "runs/toy/scan",
        "layers": "runs/toy/layers",
        "heads": "runs/toy/heads",
        "report": "runs/toy/report.html",
    }
    for name, path in wanted.items():
        assert workplace[name].exit_code == 0, workplace[name].output
        assert workplace[name].stdout == f"{path}\n"
        assert Path(path).exists()


def test_results_for_people_go_to_stderr_and_the_path_alone_to_stdout(workplace):
    top = json.loads(Path("runs/toy/scan/feature_diff.json").read_text())["top"][0]["feature"]
    said = workplace["intervene"]
    assert said.exit_code == 0, said.output
    assert said.stdout == f"runs/toy/intervene/feature-{top}\n"
    assert f"feature {top} of this one is not feature {top} of any other" in said.stderr
    for variant in ("inject", "subtract", "zero_ablate", "upstream"):
        assert f"\n{variant} " in said.stderr
    assert "features are specific" in workplace["scan"].stderr
    assert "of the gap" in workplace["layers"].stderr
    assert "the step-layout-broadcast head is L" in workplace["heads"].stderr


def test_features_are_named_by_number_top_or_likeness(workplace, tmp_path):
    record = json.loads(Path("runs/toy/scan/feature_diff.json").read_text())
    wanted = {"top": record["top"][0]["feature"], "like-2504": record["like_2504"]["feature"], "3": 3}
    for name, feature in wanted.items():
        out = tmp_path / name
        said = steer("intervene", "--pair", "toy", *SAE, "--feature", name, "--prompts", "1", "--out", out)
        assert said.stdout == f"{out}\n"
        assert json.loads((out / "results.json").read_text())["feature"] == feature


def test_a_feature_with_too_few_firings_is_told_with_its_count_and_exit_0(workplace, tmp_path):
    said = steer("intervene", "--pair", "toy", *SAE, "--feature", "0", "--prompts", "1", "--out", tmp_path)
    assert said.exit_code == 0
    assert "a test needs 50 onsets of 30 tasks" in said.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["tested"] is False
    assert record["firings"]["tasks"] <= 1


def test_all_specific_features_at_once_and_again_from_what_was_made(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_steer.cli.intervene.AtlasSettings", partial(AtlasSettings, null_draws=300))
    named = ("intervene", "--pair", "toy", *SAE, "--all-specific", "--prompts", "36", "--out", tmp_path)
    said = steer(*named)
    assert said.exit_code == 0, said.output
    assert said.stdout == f"{tmp_path}\n"
    record = json.loads((tmp_path / "atlas.json").read_text())
    scanned = json.loads(Path("runs/toy/scan/feature_diff.json").read_text())
    assert record["tested"] + len(record["silent"]) == scanned["primary_count"]
    assert f"{record['tested']} features at {record['n']} onsets" in said.stderr
    before = (tmp_path / "atlas.json").stat().st_mtime_ns
    assert steer(*named).exit_code == 0
    assert (tmp_path / "atlas.json").stat().st_mtime_ns == before
    refused(steer(*named, "--bound", "0.1"), "bound_share: 0.05, now 0.1", "--force")


def test_a_scan_without_a_specific_feature_has_no_atlas(workplace, tmp_path):
    steer("scan", "--pair", "toy", *SAE, "--max-q", "0", "--out", tmp_path / "scan")
    named = ("intervene", "--pair", "toy", *SAE, "--all-specific", "--scan", tmp_path / "scan", "--out", tmp_path / "a")
    refused(steer(*named), "no feature of adhd_L2_hook_resid_post is specific to 'adhd'", "--min-ratio")
    assert not (tmp_path / "a" / "atlas.json").exists()


def test_info_says_what_a_path_is(workplace):
    for path, said in (
        ("toy", "pair 'toy', 1029 tokens, context 512"),
        ("activations/toy", "every checksum is right"),
        (SAE[1], "topk dictionary adhd_L2_hook_resid_post: 16 -> 48, k 6"),
        ("runs/toy/scan/feature_diff.json", "record made by sae-steer"),
        ("runs/toy", "scan/feature_diff.json"),
    ):
        found = steer("info", path)
        assert found.exit_code == 0, found.output
        assert said in found.stdout


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_one_line_redrawn_on_a_terminal_and_silent_until_the_end_elsewhere(monkeypatch):
    for screen, wanted in ((Terminal(), "\r\x1b[2Ktrain:  50%, 0 s left  half"), (io.StringIO(), "")):
        monkeypatch.setattr(sys, "stderr", screen)
        bar = Bar("train", _said=-1e9 if screen.isatty() else time.monotonic())
        bar(0, 4)
        bar._said = -1e9 if screen.isatty() else bar._said
        bar(2, 4, "half")
        assert screen.getvalue().endswith(wanted)
        assert "\n" not in screen.getvalue()
        bar(4, 4, "all")
        assert screen.getvalue().endswith("train: 100%  all\n")


def test_the_time_left_is_that_of_this_process(monkeypatch):
    screen, now = Terminal(), [100.0]
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar = Bar("resumed", _said=0.0)
    bar(500, 1000)  # found finished by the process before
    now[0] += 10
    bar(600, 1000)
    assert screen.getvalue().endswith("resumed:  60%, 40 s left  ")
    now[0] += 200
    bar(700, 1000)
    assert screen.getvalue().endswith("resumed:  70%, 5 min 15 s left  ")


# Bad input


def test_a_kind_of_study_that_there_is_none_of(here):
    done = steer("selftest", "--kind", "casual")
    assert done.exit_code == 1
    assert "no kind of study casual; there are causal, rotated" in done.stderr
    assert not Path("runs/small/selftest").exists()


def test_a_missing_cache(here):
    for command in ("train-sae", "scan", "intervene", "layers"):
        refused(steer(command, "--pair", here / "toy"), "no activation cache in activations/toy", "sae-steer cache")


def test_a_half_written_cache(here):
    shutil.copytree(here / "activations" / "toy", "half")
    manifest = json.loads(Path("half/manifest.json").read_text())
    write_json(Path("half/manifest.json"), {**manifest, "complete": False})
    refused(steer("train-sae", "--pair", here / "toy", "--cache", "half"), "half", "repeat `sae-steer cache`")
    refused(steer("info", "half"), "only half written")
    write_json(Path("half/manifest.json"), manifest)
    cut = Path("half") / manifest["shards"][1]["file"]
    cut.write_bytes(cut.read_bytes()[:-1])
    refused(steer("layers", "--pair", here / "toy", "--cache", "half"), cut.name, "missing or cut short")


def test_a_damaged_cache_is_found_by_its_checksums(here):
    shutil.copytree(here / "activations" / "toy", "damaged")
    shard = next(Path("damaged").glob("*.h5"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    said = steer("info", "damaged")
    assert said.exit_code == 1
    assert f"{shard} is damaged: it does not have the checksum" in said.stdout


def test_a_missing_dictionary_and_a_missing_scan(here):
    known = ("--pair", here / "toy", "--cache", here / "activations" / "toy")
    refused(steer("scan", *known), "no dictionary in runs/toy/saes/adhd_L2_hook_resid_post", "sae-steer train-sae")
    refused(steer("intervene", *known, "--sae", here / SAE[1]), "no scan in runs/toy/scan", "sae-steer scan")


def test_a_dictionary_of_another_width_or_model(here):
    known = ("--pair", here / "toy", "--cache", here / "activations" / "toy")
    facts = read_metadata(here / SAE[1])
    save_sae(TopKSAE(TopKConfig(d_in=20, d_sae=48, k=6)), Path("wide"), metadata=facts)
    save_sae(load_sae(here / SAE[1]), Path("other"), metadata={**facts, "model_sha256": "0" * 64})
    for command in (("scan",), ("intervene", "--feature", "1")):
        refused(steer(*command, *known, "--sae", "wide"), "reads 20 dimensions and model 'adhd' has 16")
        refused(steer(*command, *known, "--sae", "other"), "another model called 'adhd'")


def test_a_feature_outside_the_dictionary_and_one_that_is_none(here):
    known = ("--pair", here / "toy", "--cache", here / "activations" / "toy", "--sae", here / SAE[1])
    refused(steer("intervene", *known, "--feature", "2504"), "feature 2504", "it has features 0 to 47")
    refused(steer("intervene", *known, "--feature", "-1"), "feature -1")
    refused(steer("intervene", *known, "--feature", "best"), "takes an index, top or like-2504, not 'best'")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [("", "is empty"), ("  \n \n", "is empty"), ("<|sep|><|end|>\n", "line 1"), ("ok\n<|pad|>\n", "line 2")],
)
def test_a_prompt_file_that_is_empty_or_holds_special_tokens_alone(here, content, told):
    Path("texts.txt").write_text(content)
    refused(steer("cache", "--pair", here / "toy", "--texts", "texts.txt"), "texts.txt", told)
    assert not Path("activations").exists()


def test_a_prompt_file_that_cannot_be_read(here):
    refused(steer("cache", "--pair", here / "toy", "--texts", "none.txt"), "cannot read none.txt")
    refused(steer("cache", "--pair", here / "toy", "--texts", "none.csv"), "give a .txt or .jsonl file")


def test_an_output_folder_that_cannot_be_written(here):
    Path("file").write_text("mine")
    known = ("--pair", here / "toy")
    cache = ("--cache", here / "activations" / "toy")
    for command in (
        (*CACHE, *known),
        (*DICTIONARY, *known, *cache),
        ("scan", *known, *cache, "--sae", here / SAE[1]),
        ("intervene", *known, *cache, "--sae", here / SAE[1], "--feature", "3"),
        ("layers", *known, *cache),
        ("heads", *known, *cache),
        ("run", *known),
    ):
        refused(steer(*command, "--out", "file/folder"), "file", "folder")
    assert Path("file").read_text() == "mine"


def test_a_pair_that_is_not_there(here):
    refused(steer("cache", "--pair", "nobody"), "no pair 'nobody'", "small")
    refused(steer("run", "--pair", "nobody"), "no pair 'nobody'")


def test_a_layer_or_model_the_pair_does_not_have(here):
    refused(steer("cache", "--pair", here / "toy", "--layer", "9"), "has no layer 9; it has layers 0 to 3")
    known = ("--pair", here / "toy", "--cache", here / "activations" / "toy")
    refused(steer("train-sae", *known, "--layer", "1"), "holds layers 2, not 1")
    refused(steer("train-sae", *known, "--model", "gpt"), "has no model 'gpt'; it has 'standard' and 'adhd'")


def test_an_activation_that_is_not_finite(here):
    shutil.copytree(here / "toy", "broken")
    weights = load_file("broken/adhd/model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, "broken/adhd/model.safetensors", {"format": "pt"})
    refused(steer(*CACHE, "--pair", "broken"), "model 'adhd'", "after block 2", "position 0")
    refused(steer("train-sae", "--pair", "broken"), "cache")


def test_tokenizers_that_disagree(here):
    shutil.copytree(here / "toy", "clash")
    facts = json.loads(Path("clash/tokenizer.json").read_text())
    vocabulary = facts["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    Path("clash/adhd/tokenizer.json").write_text(json.dumps(facts))
    refused(steer("cache", "--pair", "clash"), "disagrees with the pair's on ids", "both models must read the same ids")


def test_outputs_of_other_settings_are_refused_and_left_alone(workplace):
    known = ("--pair", "toy")
    cases = {
        "activations/toy/manifest.json": ("cache", *known, "--train-plans", "61"),
        f"{SAE[1]}/training.json": (*DICTIONARY, *known, "--lr", "0.1"),
        "runs/toy/scan/feature_diff.json": ("scan", *known, *SAE, "--min-rate", "0.3"),
        "runs/toy/layers/layers.json": ("layers", *known, "--prompts", "9"),
        "runs/toy/heads/heads.json": ("heads", *known, "--prompts", "9"),
    }
    for path, command in cases.items():
        before = Path(path).read_bytes()
        refused(steer(*command), "made with other", "--force")
        assert Path(path).read_bytes() == before


def test_a_report_of_nothing(here):
    refused(steer("report", "--run", "."), "no record in")
    Path("plain.json").write_text("{}")
    refused(steer("info", "plain.json"), "no record of this package")
    Path("empty").mkdir()
    refused(steer("info", "empty"), "holds no pair, model, cache, dictionary or record")


def test_a_message_of_several_lines_is_told_in_one(monkeypatch):
    from sae_steer.errors import InputError

    @click.command()
    def fail():
        raise InputError("first\nsecond")

    monkeypatch.setitem(main.commands, "fail", fail)
    refused(steer("fail"), "Error: first second")


def test_torchrun_is_refused_where_one_process_is_meant(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(steer("report"), "WORLD_SIZE is 2 and RANK is not set; start the processes with torchrun")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    refused(steer("report"), "report runs in one process; start it without torchrun")
    monkeypatch.setenv("WORLD_SIZE", "two")
    refused(steer("cache"), "WORLD_SIZE is 'two'")


def test_two_processes_of_torchrun_learn_the_dictionary_of_one(here):
    environment = {**os.environ, "PYTHONPATH": str(Path(sae_steer.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # two processes take two GPUs
    known = ("--pair", here / "toy", "--cache", here / "activations/toy", "--precision", "float32")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sae_steer")
    command = [str(part) for part in (*launch, *DICTIONARY, *known, "--out", "two")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "two\n"
    assert steer(*DICTIONARY, *known, "--out", "one").exit_code == 0
    two, one = (load_file(f"{folder}/sae_weights.safetensors") for folder in ("two", "one"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5)


INTERRUPTED = """
import os, signal
from sae_steer import terminal

class Bar(terminal.Bar):
    def __call__(self, done, total, note=""):
        super().__call__(done, total, note)
        if 0 < done < total:
            os.kill(os.getpid(), signal.SIGINT)

terminal.Bar = Bar
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from sae_steer.cli import main
main()
"""


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path):
    write_toy_pair(tmp_path / "pair")
    arguments = [*CACHE, "--pair", "pair", "--out", "cached"]
    environment = {**os.environ, "PYTHONPATH": str(Path(sae_steer.__file__).parents[1])}
    run = partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    told = run([sys.executable, "-c", INTERRUPTED, *arguments])
    assert told.returncode == 1
    assert told.stderr.splitlines()[-1] == (
        "Error: interrupted; what is finished is kept, and the same command goes on from there"
    )
    assert "Traceback" not in told.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cached").glob("shard-*.h5")}
    assert kept
    assert run([sys.executable, "-m", "sae_steer", *arguments]).returncode == 0
    assert len(list((tmp_path / "cached").glob("shard-*.h5"))) > len(kept)
    assert all((tmp_path / "cached" / name).stat().st_mtime_ns == moment for name, moment in kept.items())


def test_an_empty_path_is_none(here):
    for option in ("--out", "--cache"):
        ran = steer("layers", "--pair", here / "toy", option, "")
        assert ran.exit_code == 2
        assert "the path is empty; name one, or . for the current folder" in ran.stderr


def test_a_layer_that_is_not_the_dictionarys_is_refused(here):
    known = ("--pair", here / "toy", "--cache", here / "activations/toy", "--sae", here / SAE[1])
    refused(steer("scan", *known, "--layer", "1", "--out", "other"), "is of layer 2, not 1; leave --layer out")
