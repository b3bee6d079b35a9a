"""What a path holds, in a few lines, and whether it is whole."""

import json
from pathlib import Path
from typing import NotRequired, TypedDict

from sae_steer.cache import ActivationCache
from sae_steer.errors import InputError
from sae_steer.model.language_model import fingerprint
from sae_steer.model.sources import load_model
from sae_steer.pair.model_pair import NamedModel, load_pair
from sae_steer.pair.texts import TextFile, count_texts
from sae_steer.records import read_json
from sae_steer.row_filter import LeftOut
from sae_steer.sae.saelens.files import CONFIG_FILE, identity, load_sae, read_metadata
from sae_steer.sae.stability import RECORD_FILE as STABILITY_FILE
from sae_steer.sae.stability import load_stability
from sae_steer.settings import SplitShares
from sae_steer.shapes import Count, Name, Provenance, conform


def describe(path: Path) -> tuple[str, bool]:
    """A description of the pair, model, cache, dictionary, run folder or record at `path`, and whether it is whole."""
    if path.is_file():
        return _record(path), True
    for name, tell in (
        ("pair.toml", _pair),
        ("manifest.json", _cache),
        ("cfg.json", _dictionary),
        ("config.json", _model),
    ):
        if (path / name).is_file():
            return tell(path)
    records = sorted(path.glob("**/*.json"))
    if not records:
        raise InputError(f"{path} holds no pair, model, cache, dictionary or record")
    names = [f"  {record.relative_to(path)}" for record in records]
    return "\n".join([f"folder with {len(names)} records", *names]), True


def _pair(path: Path) -> tuple[str, bool]:
    """Models, tokenizer, onsets and phrases; what keeps the pair from being loaded, where it is not whole."""
    notes: list[str] = []
    try:
        pair = load_pair(path, tell=notes.append)
        lines = [line for role, model in zip(("reference", "target"), pair.models, strict=True)
                 for line in _model_of_pair(role, model)]  # fmt: skip
    except InputError as error:
        return "\n".join([f"pair folder {path}: not whole", f"  {error}"]), False
    rule = f"what matches {pair.onsets.regex}" if pair.onsets.regex else " or ".join(pair.onsets.tokens)
    return "\n".join(
        [
            f"pair '{pair.name}', {pair.tokenizer.n_vocab} tokens, context {pair.context}, sha256 {pair.sha256[:12]}",
            *lines,
            f"  a step begins after {rule}",
            f"  {len(pair.phrases)} target phrases: {', '.join(pair.phrases[:3])}"
            + (", ..." if len(pair.phrases) > 3 else ""),
            *notes,
        ]
    ), True


def describe_texts(pair: Path, texts: Path, shares: SplitShares | None = None) -> str:
    """What a pair finds in a file of texts, split by split, and what that allows."""
    loaded, source = load_pair(pair), TextFile.read(texts, shares)
    counts = count_texts(loaded, source)
    lines = [f"{texts} as pair '{loaded.name}' reads it, renderings {', '.join(source.variants)}"]
    for one in counts:
        cut = f", {one.cut:,} texts cut at {loaded.context} tokens" if one.cut else ""
        lines.append(
            f"  {one.split:<8} {one.texts:>7,} texts of {one.tasks:>5,} tasks, {one.onsets:>8,} onsets, "
            f"{one.targets:>7,} of target steps{cut}"
        )
    lines.append(
        f"  {counts[-1].tasks} tasks confirm: an interval needs 30, a null about 100; --split-shares deals others"
    )
    return "\n".join(lines)


def _model_of_pair(role: str, model: NamedModel) -> list[str]:
    shape, own = model.model.shape, model.tokenizer
    return [
        f"  {role} {model.name}: {model.source.get('from', 'in memory')}, {shape.n_layers} layers of width "
        f"{shape.d_model}, {shape.d_vocab} rows, context {shape.n_ctx}",
        f"    {model.model.n_parameters:,} parameters, sha256 {model.sha256[:12]}"
        + (f", its own tokenizer of {own.n_vocab} tokens" if own else ""),
        *_compared(model.source),
    ]


def _model(path: Path) -> tuple[str, bool]:
    found = load_model(path.name, beside=path.resolve().parent)
    shape, facts = found.model.shape, f"{found.model.n_parameters:,} parameters, sha256 {fingerprint(found.model)[:12]}"
    head = f"model: {shape.n_layers} layers of width {shape.d_model}, {shape.d_vocab} rows, context {shape.n_ctx}"
    return "\n".join([f"{head}; {facts}", *_compared(found.source), *found.notes]), True


def _compared(source: dict) -> list[str]:
    """How far a Llama's logits are from those of `transformers`, where the two were compared."""
    if "compared" not in source:
        return []
    result = source["compared"]
    return [
        f"    logits of {result['tokens']} tokens as transformers {result['transformers']} has them, to "
        f"{result['largest_difference']:.1g} of {result['largest_logit']:.3g}"
    ]


def _cache(path: Path) -> tuple[str, bool]:
    cache = ActivationCache.open(path)
    rows = sum(shard["rows"] for shard in cache.manifest["shards"])
    wrong = cache.verify()
    head = (
        f"activation cache of pair '{cache.manifest['pair']}': {rows:,} rows in {len(cache.manifest['shards'])} "
        f"shards, layers {list(cache.layers)}, {cache.manifest['dtype']}, texts {', '.join(cache.variants)}"
    )
    cut = cache.manifest.get("texts_cut")
    told = [f"  {cut} texts were longer than the pair reads; their ends are left out"] if cut else []
    return "\n".join([head, *told, *(wrong or ["  every checksum is right"])]), not wrong


class Shown(TypedDict):
    """What is said of a dictionary of ours."""

    model: Name
    layer: Count
    final_fve: float
    final_l0: float
    dead_pct_heldout: float
    rows_left_out: NotRequired["BySplit"]
    fve_onsets: NotRequired[float | None]
    fve_all_rows: NotRequired[float]
    onset_rows: NotRequired[Count]


class BySplit(TypedDict):
    """Rows left out of a dictionary's figures."""

    train: LeftOut
    heldout: LeftOut


def _dictionary(path: Path) -> tuple[str, bool]:
    config, record = load_sae(path).config, read_metadata(path)
    k = f", k {config.k}" if hasattr(config, "k") else ""
    shape = f"{config.d_in} -> {config.d_sae}{k}"
    if "final_fve" not in record:
        return f"{config.architecture} dictionary made elsewhere: {shape}", True
    conform(record, Shown, f"metadata.sae_steer in {path / CONFIG_FILE}")
    told = (
        f"{config.architecture} dictionary {record['model']}_L{record['layer']}_hook_resid_post: {shape}, "
        f"held-out FVE {record['final_fve']:.4f}, L0 {record['final_l0']:.1f}, "
        f"dead {record['dead_pct_heldout']:.2f} %"
    )
    return "\n".join([told, *_left_out(record), *_seeds(path)]), True


def _left_out(record: dict) -> list[str]:
    """How far the figures are those of some rows only; nothing in records from before rows were left out."""
    if "rows_left_out" not in record:
        return []
    told = LeftOut(**record["rows_left_out"]["heldout"]).sentence("  held out")
    at_onsets = (
        "" if record["fve_onsets"] is None else f", at {record['onset_rows']:,} onsets {record['fve_onsets']:.4f}"
    )
    return [f"  FVE of all rows {record['fve_all_rows']:.4f}{at_onsets}", *([told] if told else [])]


def _seeds(path: Path) -> list[str]:
    """How stable the dictionary's features are over seeds, if that was measured for these weights."""
    if load_stability(path, identity(path)) is None:
        return []
    record = read_json(path / STABILITY_FILE)
    which = "all" if record["alive"] is None else "alive"
    found = record[which]
    if not found["features"]:
        return [f"  {record['seeds']} seeds compared; no feature is alive"]
    shares = [f"{share:.1%} above {level}" for level, share in found["found_in_every_seed"].items()]
    return [
        f"  {found['features']} {'' if which == 'all' else 'alive '}features over {record['seeds']} seeds: mean cosine "
        f"with their matches {found['mean']:.2f}; in every other seed {', '.join(shares)}"
    ]


def _record(path: Path) -> str:
    record = read_json(path)
    origin = record.get("provenance") if isinstance(record, dict) else None
    if not origin:
        raise InputError(f"{path} is JSON without a provenance: no record of this package")
    conform(origin, Provenance, f"the provenance in {path}")
    return "\n".join(
        [
            f"record made by sae-steer {origin['sae_steer']} at commit {origin.get('commit') or 'unknown'}",
            f"  settings {json.dumps(origin['settings'])}",
            f"  inputs {json.dumps(origin['inputs'])}",
        ]
    )
