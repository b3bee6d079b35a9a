"""A dictionary is learned once, found again, and refused where it does not belong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_pair import SHAPE, lively, write_pair

from sae_steer.cache import ActivationCache, cache_activations
from sae_steer.capability import Capability, assumed
from sae_steer.dictionary import (
    Wanted,
    adopt_dictionary,
    check_fits,
    default_folder,
    kept_precision,
    load_dictionary,
    train_sae,
    train_saes,
)
from sae_steer.edits.edit import ZeroAblate
from sae_steer.errors import InputError, StaleError
from sae_steer.info import describe
from sae_steer.model.decoder import Decoder
from sae_steer.pair.model_pair import NamedModel, load_pair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.randomness import generator
from sae_steer.records import read_json, read_table
from sae_steer.sae.evaluation import evaluate
from sae_steer.sae.log import Quiet, StepFacts
from sae_steer.sae.saelens.adapter import sae_lens
from sae_steer.sae.saelens.reading import saelens_in_memory
from sae_steer.sae.stability import RECORD_FILE as STABILITY_FILE
from sae_steer.sae.stability import seed_stability
from sae_steer.scan import scan_features
from sae_steer.settings import CacheSettings, CorpusSettings, SAESettings
from sae_steer.world import World

SETTINGS = SAESettings(d_sae=64, k=4, rows=60 * 64, batch_size=64, dead_after_rows=500, aux_k=8, checkpoint_every=10)
FEW = CorpusSettings(train_plans=20, scan_plans=8, tune_plans=2, confirm_plans=2)
FILES = ("cfg.json", "sae_weights.safetensors", "training.json")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_pair(write_pair(tmp_path_factory.mktemp("pairs") / "tiny"))


def cached(pair, out: Path, texts: CorpusSettings = FEW, layers: tuple[int, ...] = (0, 2)) -> ActivationCache:
    settings = CacheSettings(rows_per_shard=1_500)
    return cache_activations(pair, out=out, layers=layers, settings=settings, source=GeneratedTexts(texts))


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> ActivationCache:
    return cached(tiny, tmp_path_factory.mktemp("caches") / "small")


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run; not to be spoilt."""
    folder = tmp_path_factory.mktemp("saes") / "whole"
    train_sae(small, model="adhd", layer=2, out=folder, settings=SETTINGS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


class StopAt(Quiet):
    """A Ctrl-C, as it were, after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, facts: StepFacts) -> None:
        if facts.step >= self.at:
            raise KeyboardInterrupt


def test_a_dictionary_says_what_it_is_of(whole):
    found = load_dictionary(whole)
    assert (found.model, found.layer, found.name) == ("adhd", 2, "adhd_L2_hook_resid_post")
    assert (found.sae.config.d_in, found.sae.config.d_sae, found.sae.config.k) == (32, 64, 4)
    record = found.record
    stored = json.loads((whole / "training.json").read_text())
    assert {**record, "seal": stored["seal"], "files": stored["files"]} == {**stored, "settings": record["settings"]}
    assert record["hook"] == "blocks.2.hook_resid_post"
    assert 0 < record["final_fve"] < 1
    assert record["final_l0"] == pytest.approx(4, abs=0.1)
    assert record["heldout_rows"] > 500
    assert not any(parameter.requires_grad for parameter in found.sae.parameters())


@pytest.mark.parametrize("at", [10, 30, 60])
def test_stopped_and_repeated_equals_uninterrupted(small, whole, tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS, log=StopAt(at))
    assert not (tmp_path / "training.json").exists()
    train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS)
    assert contents(tmp_path) == contents(whole)
    assert not (tmp_path / "training" / "state.safetensors").exists()


def test_auto_is_decided_once_and_finished_at_that_wherever_it_is_resumed(small, tmp_path):
    amx, haswell = (Capability(frozenset(names)) for names in ({"avx2", "avx512", "amx_bf16"}, {"avx2"}))
    with assumed(amx):
        whole = train_sae(small, model="adhd", layer=2, out=tmp_path / "whole", settings=SETTINGS)
    with assumed(amx), pytest.raises(KeyboardInterrupt):
        train_sae(small, model="adhd", layer=2, out=tmp_path / "mine", settings=SETTINGS, log=StopAt(50))
    assert kept_precision(tmp_path / "mine") == kept_precision(tmp_path / "whole") == "bfloat16"
    with assumed(haswell):
        with pytest.raises(StaleError, match="was begun at bfloat16, and --precision float32 was asked"):
            train_sae(
                small, model="adhd", layer=2, out=tmp_path / "mine", settings=replace(SETTINGS, precision="float32")
            )
        resumed = train_sae(small, model="adhd", layer=2, out=tmp_path / "mine", settings=SETTINGS)
        found = train_sae(small, model="adhd", layer=2, out=tmp_path / "whole", settings=SETTINGS)
        own = train_sae(small, model="adhd", layer=2, out=tmp_path / "own", settings=SETTINGS)
    assert resumed.sha256 == found.sha256 == whole.sha256
    assert resumed.record["computed"]["precision"] == "bfloat16"
    assert own.record["provenance"]["settings"]["precision"] == "float32"


def test_a_finished_dictionary_is_reused(small, whole):
    before = contents(whole)
    again = train_sae(small, model="adhd", layer=2, out=whole, settings=SETTINGS, log=StopAt(0))
    assert again.sha256 == load_dictionary(whole).sha256
    assert contents(whole) == before


@pytest.mark.parametrize("change", [{"settings": replace(SETTINGS, seed=1)}, {"model": "standard"}, {"layer": 0}])
def test_one_made_otherwise_is_refused_and_kept(small, whole, change):
    before = contents(whole)
    with pytest.raises(StaleError, match="--force to replace it"):
        train_sae(small, **{"model": "adhd", "layer": 2, "settings": SETTINGS, **change}, out=whole)
    assert contents(whole) == before


def test_one_measured_on_other_held_out_rows_is_refused(tiny, whole, tmp_path):
    other = cached(tiny, tmp_path / "cache", replace(FEW, scan_plans=6))
    with pytest.raises(StaleError, match="held_out: "):
        train_sae(other, model="adhd", layer=2, out=whole, settings=SETTINGS)


def test_force_trains_anew_even_over_a_run_begun_otherwise(small, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_sae(small, model="adhd", layer=2, out=tmp_path, settings=replace(SETTINGS, seed=1), log=StopAt(20))
    with pytest.raises(StaleError, match="other settings"):
        train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS)
    train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS, force=True)
    assert contents(tmp_path) == contents(whole)


def test_a_cache_without_held_out_rows_is_refused_before_training(tiny, tmp_path):
    bare = cached(tiny, tmp_path / "cache", replace(FEW, scan_plans=0))
    with pytest.raises(InputError, match="no 'scan' rows"):
        train_sae(bare, model="adhd", layer=2, out=tmp_path / "sae", settings=SETTINGS, log=StopAt(0))


def test_a_dictionary_fits_the_cache_it_came_from(small, whole):
    check_fits(load_dictionary(whole), small)


def of_another(dictionary, tiny, tmp_path, **models) -> tuple:
    return dictionary, cached(replace(tiny, **models), tmp_path / "cache")


def test_a_dictionary_of_another_model_is_refused(tiny, whole, tmp_path):
    found = load_dictionary(whole)
    with pytest.raises(InputError, match="is of model 'adhd', and this cache holds standard and tuned"):
        check_fits(*of_another(found, tiny, tmp_path / "a", target=NamedModel("tuned", tiny.target.model)))
    with pytest.raises(InputError, match="trained on another model called 'adhd'"):
        check_fits(*of_another(found, tiny, tmp_path / "b", target=NamedModel("adhd", lively(SHAPE, 9))))


def test_a_dictionary_of_another_width_is_refused(tiny, whole, tmp_path):
    narrow: Decoder = lively(replace(SHAPE, d_model=16), 9)
    with pytest.raises(InputError, match="reads 32 dimensions and model 'adhd' has 16"):
        check_fits(*of_another(load_dictionary(whole), tiny, tmp_path, target=NamedModel("adhd", narrow)))


def test_a_dictionary_of_a_layer_that_is_not_cached_is_refused(tiny, whole, tmp_path):
    with pytest.raises(InputError, match="is of layer 2, and this cache holds layers 0, 1"):
        check_fits(load_dictionary(whole), cached(tiny, tmp_path / "cache", layers=(0, 1)))


def test_a_folder_without_a_dictionary_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no dictionary in .*nowhere; run `sae-steer train-sae`"):
        load_dictionary(tmp_path / "nowhere")


@pytest.mark.parametrize("metadata", [{}, {"sae_steer": {}}, {"sae_steer": {"settings": {}, "steps": 3}}])
def test_a_dictionary_that_does_not_say_what_it_was_trained_on_is_refused(whole, tmp_path, metadata):
    folder = Path(shutil.copytree(whole, tmp_path / "mine"))
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "metadata": metadata}))
    with pytest.raises(InputError, match="does not say which model and layer"):
        load_dictionary(folder)


def test_firings_on_both_splits_stand_beside_the_dictionary(small, whole):
    found, table = load_dictionary(whole), read_table(whole / "firings.parquet")
    exact = World.local(precision="float32")
    for column, split in (("train", "train"), ("heldout", "scan")):
        firings = evaluate(found.sae, small.rows("adhd", 2, split).that_count(), exact).firings
        assert np.array_equal(table[column], firings)
    assert found.record["dead_pct_heldout"] == pytest.approx(100 * (table["heldout"] == 0).mean())
    density = found.record["density_heldout"]
    assert density["dead"] == (table["heldout"] == 0).sum()
    assert sum(density["counts"]) == (table["heldout"] > 0).sum()


def wanted(folder: Path, seeds: tuple[int, ...], **changes) -> list[Wanted]:
    return [Wanted("adhd", replace(SETTINGS, seed=seed, **changes), folder / f"s{seed}") for seed in seeds]


@pytest.fixture(scope="module")
def seeds(small, tmp_path_factory) -> Path:
    """The folder of three seeds of one dictionary, and of one of another width; not to be spoilt."""
    folder = tmp_path_factory.mktemp("seeds")
    train_saes(small, [*wanted(folder, (0, 1, 2)), *wanted(folder, (3,), d_sae=48)], layer=2)
    return folder


def test_seeds_learned_together_are_compared_and_the_record_says_how(seeds):
    learned = [load_dictionary(seeds / f"s{seed}") for seed in range(3)]
    for seed, (own, stability) in enumerate(zip(learned, seed_stability([one.sae for one in learned]), strict=True)):
        assert np.array_equal(own.stability.cosines, stability.cosines)
        record = read_json(seeds / f"s{seed}" / STABILITY_FILE)
        others = {f"seed {other}": learned[other].sha256 for other in range(3) if other != seed}
        assert record["provenance"]["inputs"] == {"dictionary": own.sha256} | others
        alive = read_table(seeds / f"s{seed}" / "firings.parquet")["heldout"] > 0
        assert record["alive"] == stability.summary(alive)
        told, whole = describe(seeds / f"s{seed}")
        assert whole
        assert f"{alive.sum()} alive features over 3 seeds: mean cosine with their matches" in told
    assert load_dictionary(seeds / "s3").stability is None
    assert "seeds" not in describe(seeds / "s3")[0]


def test_a_seed_learned_later_is_compared_with_those_that_are_there(small, seeds, tmp_path):
    train_saes(small, wanted(tmp_path, (0, 1)), layer=2)
    before = load_dictionary(tmp_path / "s0")
    assert before.stability.cosines.shape == (1, 64)
    train_saes(small, wanted(tmp_path, (0, 1, 2)), layer=2)
    for seed in range(3):
        name = f"s{seed}/{STABILITY_FILE}"
        assert (tmp_path / name).read_bytes() == (seeds / name).read_bytes()
    train_saes(small, wanted(tmp_path, (0,)), layer=2)
    assert load_dictionary(tmp_path / "s0").stability.cosines.shape == (2, 64), "found again, with what is known of it"
    train_sae(small, model="adhd", layer=2, out=tmp_path / "s0", settings=replace(SETTINGS, lr=0.002), force=True)
    assert load_dictionary(tmp_path / "s0").stability is None, "other weights have not been compared"


def test_the_default_folder_names_what_differs_from_the_default_settings():
    assert default_folder("adhd", 2, SAESettings()) == "adhd_L2_hook_resid_post"
    assert default_folder("standard", 0, SAESettings(k=20, d_sae=8192, seed=1)) == (
        "standard_L0_hook_resid_post_k20_d8192_s1"
    )


def test_a_saelens_dictionary_made_elsewhere_is_scanned_and_edits_as_ours_do(small, tiny, tmp_path):
    folder = gated(SHAPE.d_model, tmp_path / "gated")
    dictionary = load_dictionary(folder, model=tiny.target, layer=2)
    check_fits(dictionary, small)
    inner, rows = dictionary.sae.inner, small.rows("adhd", 2, "scan")
    codes = torch.cat([inner.encode(batch) for batch in rows.in_order()])
    onset, text = (small.labels("scan")[name] for name in ("is_onset", "text_variant"))
    here = (onset == 1) & (text == small.variants.index("adhd"))
    rate = (codes[torch.from_numpy(here)] > 0).double().mean(0)
    assert rate.max() > 0.1
    assert np.allclose(scan_features(small, dictionary).target_rate, rate.numpy())
    x, feature = next(iter(rows.in_order())), int(rate.argmax())
    silent = inner.encode(x)
    silent[:, feature] = 0
    expected = x - (inner(x) - inner.decode(silent))
    torch.testing.assert_close(ZeroAblate(dictionary.sae, feature)(x), expected, rtol=1e-4, atol=1e-4)


def test_a_saelens_architecture_is_learned_from_the_cache_and_found_again(small, tmp_path):
    settings = replace(SETTINGS, architecture="saelens:gated,l1_coefficient=0.5")
    made = train_sae(small, model="adhd", layer=2, out=tmp_path, settings=settings)
    assert made.sae.config.architecture == "saelens:gated"
    assert (made.model, made.layer) == ("adhd", 2)
    assert made.record["settings"]["architecture"] == settings.architecture
    before = contents(tmp_path)
    train_sae(small, model="adhd", layer=2, out=tmp_path, settings=settings)
    assert contents(tmp_path) == before
    assert sae_lens().SAE.load_from_disk(tmp_path).cfg.metadata.sae_steer["model"] == "adhd"
    assert default_folder("adhd", 2, settings).startswith("adhd_L2_hook_resid_post_saelens-gated")


def test_a_dictionary_made_elsewhere_is_refused_at_a_layer_it_does_not_read(tiny, tmp_path):
    folder = gated(SHAPE.d_model, tmp_path / "gated")
    with pytest.raises(InputError, match="does not say which model and layer"):
        load_dictionary(folder)
    with pytest.raises(InputError, match=r"reads blocks\.2\.hook_resid_post, and blocks\.1\.hook_resid_post was asked"):
        load_dictionary(folder, model=tiny.target, layer=1)


def gated(d_in: int, folder: Path) -> Path:
    """A SAELens folder of random weights that names the site it reads."""
    sae_lens()
    from sae_lens import GatedSAE, GatedSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    config = GatedSAEConfig(d_in=d_in, d_sae=40, metadata=SAEMetadata(hook_name="blocks.2.hook_resid_post"))
    made = GatedSAE(config)
    for number, weight in enumerate(made.parameters()):
        weight.data.normal_(generator=generator(6, number)).mul_(0.3)
    made.save_model(folder)
    return folder


def test_trackers_are_told_in_the_first_ones_folder_and_change_no_byte(small, whole, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_sae(small, model="adhd", layer=2, out=tmp_path, settings=SETTINGS, trackers=("tensorboard",))
    assert contents(tmp_path) == contents(whole)
    found = events.EventAccumulator(str(tmp_path / "training" / "tensorboard"))
    found.Reload()
    lines = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]
    assert [told.step for told in found.Scalars("loss")] == [step for step, _ in steps]
    assert [told.value for told in found.Scalars("loss")] == pytest.approx([loss for _, loss in steps])
    with pytest.raises(InputError, match="no log 'mlflow'"):
        train_sae(small, model="adhd", layer=2, out=tmp_path / "b", settings=SETTINGS, trackers=("mlflow",))


@pytest.mark.parametrize("kind", ["TopKSAE", "JumpReLUSAE", "StandardSAE"])
def test_the_case_of_a_foreign_site_is_refused_for_every_architecture_and_in_memory(tiny, tmp_path, kind):
    inner = untrained(kind, hook_name="blocks.5.hook_mlp_out")
    inner.save_model(tmp_path)
    refused = r"it reads blocks\.5\.hook_mlp_out, and blocks\.2\.hook_resid_post was asked for"
    with pytest.raises(InputError, match=refused):
        load_dictionary(tmp_path, model=tiny.target, layer=2)
    with pytest.raises(InputError, match=refused):
        adopt_dictionary(saelens_in_memory(inner, "the SAE in memory"), model=tiny.target, layer=2)


def test_one_of_ours_whose_config_names_another_site_is_refused(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "mine"))
    config = json.loads((folder / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.2.hook_resid_post", "SAELens's users read it there"
    config["metadata"]["hook_name"] = "blocks.1.hook_resid_post"
    del config["metadata"]["sae_steer"]["seal"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"it reads blocks\.1\.hook_resid_post"):
        load_dictionary(folder)


@pytest.mark.parametrize(
    ("stated", "came_from", "fits"),
    [
        ("gpt2-small", "tl:gpt2", True),
        ("gpt2", "hub:openai-community/gpt2", True),
        ("custom", "hub:openai-community/gpt2", True),
        ("my-run-3", "tl:gpt2", True),
        ("gpt2-medium", "standard", True),
        ("gpt2-medium", "tl:gpt2", False),
        ("EleutherAI/pythia-70m-deduped", "hub:EleutherAI/pythia-70m", False),
        ("someone/standard-23M", "hub:someone/adhd-23M@main", False),
    ],
)
def test_a_dictionary_of_another_public_model_is_refused(tiny, stated, came_from, fits):
    model = replace(tiny.target, source={"from": came_from})
    sae = saelens_in_memory(untrained("TopKSAE", model_name=stated), "the SAE in memory")
    if fits:
        assert adopt_dictionary(sae, model=model, layer=2).model == "adhd"
        return
    with pytest.raises(InputError, match=f"it was trained on {stated}, and model 'adhd' is"):
        adopt_dictionary(sae, model=model, layer=2)


def untrained(kind: str, **metadata: str):
    """A SAELens dictionary of the tiny models' width that says where it reads."""
    package = sae_lens()
    options = {"k": 8} if kind == "TopKSAE" else {}
    inner = getattr(package, kind)(getattr(package, f"{kind}Config")(d_in=SHAPE.d_model, d_sae=40, **options))
    for name, value in metadata.items():
        inner.cfg.metadata[name] = value
    return inner


def test_a_dictionary_of_what_enters_a_block_is_one_of_the_layer_below(tiny, tmp_path):
    inner = sae_lens().StandardSAE(sae_lens().StandardSAEConfig(d_in=SHAPE.d_model, d_sae=24))
    inner.cfg.metadata.hook_name = "blocks.2.hook_resid_pre"
    inner.save_model(tmp_path)
    adopted = load_dictionary(tmp_path, model=tiny.target, layer=1)
    assert (adopted.layer, adopted.record["hook"]) == (1, "blocks.1.hook_resid_post")
    for layer in (0, 2, 3):
        with pytest.raises(InputError, match=r"reads blocks\.2\.hook_resid_pre.*what enters block N is layer N - 1"):
            load_dictionary(tmp_path, model=tiny.target, layer=layer)
