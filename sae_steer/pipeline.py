"""The whole study on one pair, stage by stage: each reads what the one before wrote, and is made only once.

    cache -> dictionary -> scan -> interventions -> report
      `-> layers, heads --------------------------^

A finished stage is found again by its settings and the hashes of its inputs; one made with others is refused.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sae_steer.atlas.atlas import FILES as ATLAS_FILES
from sae_steer.atlas.atlas import RECORD_FILE as ATLAS_RECORD
from sae_steer.atlas.atlas import Atlas, atlas_provenance, load_atlas, make_atlas
from sae_steer.cache import ActivationCache, cache_activations
from sae_steer.capability import capability
from sae_steer.dictionary import Dictionary, check_fits, default_folder, train_sae
from sae_steer.effects.splicing import find_or_splice
from sae_steer.errors import SteerError
from sae_steer.files import TIMING_FILE, timed
from sae_steer.findings import heads
from sae_steer.findings import layer_probability as layers
from sae_steer.findings.layer_patching import Depth
from sae_steer.model.heads import has_heads
from sae_steer.outputs import tidy, writing
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.progress import Progress, silent
from sae_steer.records import already_done, read_json, write_json
from sae_steer.sae.log import Log
from sae_steer.scan import RECORD_FILE as SCAN_RECORD
from sae_steer.scan import FeatureScan, load_scan, save_scan, scan_features, scan_provenance, tells_stability
from sae_steer.scan.record import FILES as SCAN_FILES
from sae_steer.settings import (
    DEFAULT_LAYER,
    AtlasSettings,
    CacheSettings,
    CorpusSettings,
    HeadsSettings,
    InterveneSettings,
    LayersSettings,
    SAESettings,
    ScanSettings,
)
from sae_steer.study.files import FILES as STUDY_FILES
from sae_steer.study.files import RECORD_FILE as STUDY_RECORD
from sae_steer.study.files import load_study
from sae_steer.study.of_pair import Source, intervene, plan_study, study_provenance
from sae_steer.study.plan import check_unedited
from sae_steer.study.record import Study
from sae_steer.world import World


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The settings of every stage of `run_study`."""

    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)
    sae: SAESettings = field(default_factory=SAESettings)
    scan: ScanSettings = field(default_factory=ScanSettings)
    intervene: InterveneSettings = field(default_factory=InterveneSettings)
    layers: LayersSettings = field(default_factory=LayersSettings)
    heads: HeadsSettings | None = None
    """None leaves the heads out, as does a model whose heads cannot be read."""


@dataclass(frozen=True)
class Places:
    """Where the files of a pair's study lie; by default below the current folder."""

    cache: Path
    run: Path

    @classmethod
    def of(cls, pair: str) -> "Places":
        """The usual places."""
        return cls(Path("activations", pair), Path("runs", pair))

    @property
    def scan(self) -> Path:
        """The scan's folder."""
        return self.run / "scan"

    @property
    def layers(self) -> Path:
        """The layer curves' folder."""
        return self.run / "layers"

    @property
    def heads(self) -> Path:
        """The folder of the heads' study."""
        return self.run / "heads"

    def dictionary(self, model: str, layer: int, settings: SAESettings | None = None) -> Path:
        """A dictionary's folder."""
        return self.run / "saes" / default_folder(model, layer, settings or SAESettings())

    @property
    def atlas(self) -> Path:
        """The folder of the atlas."""
        return self.run / "intervene" / "atlas"

    def intervene(self, source: Source) -> Path:
        """The folder of the interventions with a feature's index or another direction."""
        name = f"feature-{source}" if isinstance(source, int) else f"direction-{Path(str(source)).stem}"
        return self.run / "intervene" / name


def find_or_scan(
    cache: ActivationCache,
    dictionary: Dictionary,
    out: Path,
    *,
    settings: ScanSettings | None = None,
    force: bool = False,
    on_rows: Progress = silent,
) -> FeatureScan:
    """The scan in `out`, made now unless it is there, with the stability of seeds learned since."""
    settings = settings or ScanSettings()
    origin = scan_provenance(cache, dictionary, settings)
    if not _is_done(out, SCAN_RECORD, SCAN_FILES, origin, force):
        with _into(out, SCAN_FILES, force):
            save_scan(scan_features(cache, dictionary, settings=settings, on_rows=on_rows), out, origin)
    found = load_scan(out, dictionary)
    if not tells_stability(out, found):
        save_scan(found, out, origin)
    return found


def find_or_intervene(
    pair: ModelPair,
    cache: ActivationCache,
    dictionary: Dictionary,
    source: Source,
    out: Path,
    *,
    settings: InterveneSettings | None = None,
    leave_out: Collection[int] | None = None,
    force: bool = False,
    on_step: Progress = silent,
) -> Study:
    """The study of a feature's index or another direction in `out`, made now unless it is there; its plan first."""
    settings = settings or InterveneSettings()
    origin = study_provenance(pair, cache, dictionary, source, settings, leave_out)
    if not _is_done(out, STUDY_RECORD, STUDY_FILES, origin, force):
        check_fits(dictionary, cache)  # a study that cannot be made leaves no plan behind
        with _into(out, STUDY_FILES, force):
            plan = plan_study(pair, cache, origin, out, force=force)
            named = {"feature": source} if isinstance(source, int) else {"direction": source}
            intervene(
                pair, dictionary, **named, cache=cache, settings=settings, leave_out=leave_out, plan=plan,
                on_step=on_step,
            ).save(out)  # fmt: skip
    study = load_study(out)
    check_unedited(out, study.plan and study.plan.hash)
    return study


def find_or_make_atlas(
    pair: ModelPair,
    cache: ActivationCache,
    dictionary: Dictionary,
    scan: FeatureScan,
    out: Path,
    *,
    features: Sequence[int] | None = None,
    settings: AtlasSettings | None = None,
    force: bool = False,
    on_step: Progress = silent,
) -> Atlas:
    """The atlas of `features` (default: those specific by the scan) in `out`, made now unless it is there."""
    settings, features = settings or AtlasSettings(), scan.specific_features if features is None else features
    known = {"features": features, "alive": np.flatnonzero(scan.alive), "log_odds": scan.log_odds.log_odds}
    origin = atlas_provenance(pair, cache, dictionary, **known, settings=settings)
    if not _is_done(out, ATLAS_RECORD, ATLAS_FILES, origin, force):
        check_fits(dictionary, cache)
        with _into(out, ATLAS_FILES, force):
            make_atlas(pair, dictionary, **known, cache=cache, settings=settings, on_step=on_step).save(out)
    return load_atlas(out)


def find_or_read_layers(
    pair: ModelPair,
    cache: ActivationCache,
    out: Path,
    *,
    settings: LayersSettings | None = None,
    force: bool = False,
    on_step: Progress = silent,
) -> Path:
    """The path of the layer curves in `out`, made now unless they are there."""
    settings, path = settings or LayersSettings(), out / layers.RECORD_FILE
    if not already_done(path, layers.layers_provenance(pair, cache, settings), force=force):
        with _into(out, [layers.RECORD_FILE], force):
            write_json(path, layers.layer_probability(pair, cache, settings=settings, on_step=on_step))
    return path


def where_it_moves(layers_record: Path, studied: int | None = DEFAULT_LAYER) -> str | None:
    """At which layers the behaviour can be moved, with a warning if the studied one is not among them."""
    patching = read_json(layers_record)["patching"]
    return None if patching is None else Depth.of_record(patching).sentence(studied)


def find_or_study_heads(
    pair: ModelPair,
    cache: ActivationCache,
    out: Path,
    *,
    settings: HeadsSettings | None = None,
    force: bool = False,
    on_step: Progress = silent,
) -> Path:
    """The path of the heads' record in `out`, made now unless it is there."""
    settings, path = settings or HeadsSettings(), out / heads.RECORD_FILE
    if not already_done(path, heads.heads_provenance(pair, cache, settings), force=force):
        with _into(out, heads.FILES, force):
            heads.study_heads(pair, cache, settings=settings, on_step=on_step).save(out)
    return path


def run_study(
    pair: ModelPair,
    places: Places,
    *,
    feature: str = "top",
    settings: StudySettings | None = None,
    keep: bool = False,
    force: bool = False,
    progress: Callable[[str], Progress] = lambda stage: silent,
    log: Log | None = None,
) -> Path:
    """Every stage on the default layer, `feature` as the one intervened on; returns the report's path.

    Args:
        keep: count the rows of special tokens and long rows too, which are left out otherwise.
    """
    from sae_steer.report.page import write_report  # matplotlib takes a second that no other stage needs

    settings, target = settings or StudySettings(), pair.target.name
    check_writable(places.run)
    cache = cache_activations(
        pair,
        out=places.cache,
        settings=settings.cache,
        source=GeneratedTexts(settings.corpus),
        force=force,
        on_rows=progress("cache"),
    )
    cache = replace(cache, keep_special_tokens=keep)
    where = places.dictionary(target, DEFAULT_LAYER, settings.sae)
    dictionary = train_sae(
        cache, model=target, layer=DEFAULT_LAYER, out=where, settings=settings.sae, force=force, log=log
    )
    find_or_splice(pair, cache, dictionary, where, force=force)
    scan = find_or_scan(cache, dictionary, places.scan, settings=settings.scan, force=force, on_rows=progress("scan"))
    chosen = scan.resolve(feature)
    find_or_intervene(
        pair, cache, dictionary, chosen, places.intervene(chosen), settings=settings.intervene,
        leave_out=scan.specific_features, force=force, on_step=progress("intervene"),
    )  # fmt: skip
    find_or_read_layers(pair, cache, places.layers, settings=settings.layers, force=force, on_step=progress("layers"))
    if settings.heads and all(has_heads(model.model) for model in pair.models):
        find_or_study_heads(pair, cache, places.heads, settings=settings.heads, force=force, on_step=progress("heads"))
    return write_report(places.run, on_step=progress("report"))


def check_writable(folder: Path) -> None:
    """Make `folder`, or raise the `SteerError` that writing there would end in, before hours are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SteerError(f"cannot write {folder}: {error.strerror}; name a writable folder with --out") from error
    if not os.access(folder, os.W_OK):
        raise SteerError(f"cannot write {folder}: permission denied; name a writable folder with --out")


def _is_done(folder: Path, record: str, files: Collection[str], origin: Mapping, force: bool) -> bool:
    """Whether the finished output is there; what a kill after its record left is swept."""
    done = already_done(folder / record, dict(origin), force=force)
    if done:
        tidy(folder, [*files, TIMING_FILE])
    return done


@contextmanager
def _into(folder: Path, files: Collection[str], force: bool) -> Iterator[None]:
    """A stage that writes `files` into `folder`, held by it alone, with the time it took beside its result."""
    machine = capability().facts("float32", World.local().device.type)
    with writing(folder, [*files, TIMING_FILE], force=force), timed(folder, **machine):
        yield
