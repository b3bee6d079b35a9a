"""The selftest: hundreds of studies of planted pairs, each a small record of its own, and what they add up to.

    texts, dictionary -> studies/KIND-NUMBER.json, studies/level-NUMBER.json -> selftest.json

A finished study is found again by its settings and by `REVISION`; one made otherwise is made anew.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from sae_steer.cache import ActivationCache, cache_activations
from sae_steer.dictionary import train_sae
from sae_steer.errors import InputError
from sae_steer.model.decoder import as_decoder
from sae_steer.model.readout import TargetMass
from sae_steer.outputs import writing
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import GeneratedTexts
from sae_steer.progress import Progress, silent
from sae_steer.records import provenance, read_json, write_json
from sae_steer.selftest.ground import Ground, opening, population_plans
from sae_steer.selftest.kinds import KINDS
from sae_steer.selftest.population import Population
from sae_steer.selftest.summary import summary
from sae_steer.selftest.trial import run_level_study, run_study
from sae_steer.settings import AUTO, CacheSettings, CorpusSettings, SAESettings, SelftestSettings

REVISION = 2
"""Raised by hand with every change of the protocol or of the planting that changes what a study finds."""
RECORD_FILE = "selftest.json"
LEVEL = "level"
STUDIED = (*KINDS, LEVEL)
"""Kinds of studies: of each kind of planted pair, and of the level of the rank test."""
COUNTS = ("studies", "level_studies")
"""Settings that say how many studies there are, not what one of them is."""


def selftest(
    pair: ModelPair,
    out: Path,
    *,
    settings: SelftestSettings | None = None,
    kinds: Sequence[str] = (),
    precision: str = AUTO,
    force: bool = False,
    on_step: Progress = silent,
) -> Path:
    """Run every study that `out` lacks, then write what all that it holds show; returns the record's path.

    Args:
        kinds: those of `STUDIED` to study; none for all.
        precision: of the products behind their cache and dictionary; the studies themselves are made in float32.
        force: make the studies that are there anew.
    """
    as_decoder(pair.target.model, "the self-test plants truths in weights under known names")
    unknown = set(kinds) - set(STUDIED)
    if unknown:
        raise InputError(f"no kind of study {', '.join(sorted(unknown))}; there are {', '.join(STUDIED)}")
    settings, out = settings or SelftestSettings(), Path(out)
    planned = list(_planned(settings, kinds or STUDIED))
    names = [f"studies/{_path(out, kind, number).name}" for kind, number in planned]
    with writing(out, [RECORD_FILE, *names], force=force) as output:
        if output.starts_over(_run(pair, settings), force=force):
            for made in output.made("studies/*.json"):
                made.unlink()
            output.begun(_run(pair, settings))
        _study(pair, out, settings, planned, precision, on_step)
        output.ended(_run(pair, settings))
        return summarise(pair, out, settings=settings)


def _study(
    pair: ModelPair,
    out: Path,
    settings: SelftestSettings,
    planned: Sequence[tuple[str, int]],
    precision: str,
    on_step: Progress,
) -> None:
    ground = None
    for done, (kind, number) in enumerate(planned):
        path, wanted = _path(out, kind, number), _origin(pair, settings, kind, number)
        if _is_current(path, wanted):
            continue
        on_step(done, len(planned), f"{kind} {number}")
        ground = ground or prepare(pair, out, settings, precision)
        record = run_level_study(ground, number) if kind == LEVEL else run_study(ground, kind, number)
        write_json(path, {"provenance": wanted, **record})
    on_step(len(planned), len(planned), "all studies")


def summarise(pair: ModelPair, out: Path, *, settings: SelftestSettings | None = None) -> Path:
    """Write what the finished studies in `out` show, all of them or not; returns the record's path."""
    settings = settings or SelftestSettings()
    studies, levels = [], []
    for kind, number in _planned(settings, STUDIED):
        path = _path(Path(out), kind, number)
        if _is_current(path, _origin(pair, settings, kind, number)):
            (levels if kind == LEVEL else studies).append(read_json(path))
    made_at = Counter(study["provenance"]["commit"] for study in [*studies, *levels])
    record = {"provenance": _run(pair, settings), "made_at": made_at, **summary(studies, levels)}
    with writing(out, [RECORD_FILE]):
        return write_json(Path(out) / RECORD_FILE, record)


def _run(pair: ModelPair, settings: SelftestSettings) -> dict:
    return provenance(settings=settings, inputs={"pair": pair.sha256, "revision": str(REVISION)})


def prepare(pair: ModelPair, out: Path, settings: SelftestSettings, precision: str = AUTO) -> Ground:
    """Texts, target tokens and a dictionary of the embedded target model, made in `out` once."""
    layer = pair.target.model.shape.n_layers - 2
    corpus = CorpusSettings(
        train_plans=settings.train_plans,
        scan_plans=max(settings.tune_texts, 1),
        tune_plans=settings.tune_texts,
        confirm_plans=population_plans(settings),
        seed=settings.seed,
    )
    source = GeneratedTexts(corpus)
    cache = cache_activations(
        pair,
        layers=(layer,),
        out=out / "cache",
        settings=CacheSettings(precision=precision),
        source=GeneratedTexts(CorpusSettings(**{**asdict(corpus), "tune_plans": 1, "confirm_plans": 1})),
    )
    own = source.variants.index(pair.target.name)

    def texts(split: str) -> list:
        return [text for text in source.texts(pair, split) if text.rendering == own]

    return Ground(
        pair=pair,
        measure=TargetMass(cache.target_tokens(pair).ids),
        sae=_dictionary(cache, pair, layer, out, settings, precision),
        layer=layer,
        fit=tuple(texts("train")[: settings.fit_texts]),
        tune=tuple(texts("tune")),
        population=Population.of([opening(text, settings.onsets) for text in texts("confirm")], settings.seed),
        settings=settings,
    )


def _dictionary(
    cache: ActivationCache, pair: ModelPair, layer: int, out: Path, settings: SelftestSettings, precision: str
):
    usual = SAESettings(d_sae=settings.d_sae, rows=settings.sae_rows, seed=settings.seed, precision=precision)
    dictionary = train_sae(cache, model=pair.target.name, layer=layer, out=out / "dictionary", settings=usual)
    return dictionary.sae


def _planned(settings: SelftestSettings, kinds: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Kinds in turn, so that a run which is stopped has as many studies of each."""
    for number in range(max(settings.studies, settings.level_studies)):
        for kind in kinds:
            if number < (settings.level_studies if kind == LEVEL else settings.studies):
                yield kind, number


def _path(out: Path, kind: str, number: int) -> Path:
    return out / "studies" / f"{kind.replace(' ', '-')}-{number:03}.json"


def _origin(pair: ModelPair, settings: SelftestSettings, kind: str, number: int) -> dict:
    fixed = {name: value for name, value in asdict(settings).items() if name not in COUNTS}
    inputs = {"pair": pair.sha256, "revision": str(REVISION), "study": f"{kind} {number}"}
    return provenance(settings=fixed, inputs=inputs)


def _is_current(path: Path, wanted: dict) -> bool:
    """Whether a whole record of these settings lies there; what was made otherwise is made anew."""
    if not path.is_file():
        return False
    try:
        origin = read_json(path).get("provenance", {})
    except InputError:  # not whole: made anew
        return False
    return all(origin.get(part) == wanted[part] for part in ("settings", "inputs"))
