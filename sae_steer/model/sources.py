"""Where a model of a pair comes from: a folder or file beside the pair file, `hub:ORG/NAME`, `hf:` or `tl:`.

A folder that the native decoder reads is read by it, the fast path; of a folder it does not compute, and of `hf:FOLDER`
and `hf:ORG/NAME`, `transformers` runs the model itself.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from sae_steer.errors import InputError, NotNativeError
from sae_steer.model.comparing import compare
from sae_steer.model.hub import HUB, hub_folder
from sae_steer.model.language_model import LanguageModel
from sae_steer.model.lens import load_lens, tokenizer_json
from sae_steer.model.loading import DecoderFile, read_decoder

LENS, TRANSFORMERS = "tl:", "hf:"
NO_TOKENIZERS = ("tokenizer_config.json",)


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what came with it."""

    model: LanguageModel
    tokenizer: tuple[str, str] | None = None
    """The content of its tokenizer.json, and what to call it in an error."""
    source: dict = field(default_factory=dict)
    """What it was called, and how the names in its file were read."""
    notes: list[str] = field(default_factory=list)
    """The same, for people."""


def load_model(named: str, *, beside: Path, qkv: str | None = None, gate_up: str | None = None) -> LoadedModel:
    """The model that a pair file in the folder `beside` calls `named`.

    Args:
        qkv, gate_up: the orders of fused projections, for `read_decoder`.
    """
    if named.startswith(LENS):
        model = load_lens(named.removeprefix(LENS))
        content = tokenizer_json(model)
        return LoadedModel(model, content and (content, f"the tokenizer of {named}"), {"from": named})
    path, came_from = _folder(named, beside)
    if named.startswith(TRANSFORMERS):
        return _by_transformers(path, came_from)
    try:
        read = read_decoder(path, qkv=qkv, gate_up=gate_up)
    except NotNativeError as error:
        return _by_transformers(path, came_from, why=str(error))
    source = {"from": came_from, **read.record, **_compared(read, path)}
    return LoadedModel(read.model, _tokenizer(path), source, read.lines())


def _folder(named: str, beside: Path) -> tuple[Path, str]:
    """What `named` stands for on disk, a repository fetched, and where it came from: `hub:`, or as it was named."""
    for prefix in (HUB, TRANSFORMERS):
        name = named.removeprefix(prefix)
        if named.startswith(prefix) and (prefix == HUB or not (beside / name).exists()):
            return hub_folder(name), HUB + name
    return beside / named.removeprefix(TRANSFORMERS), named


def _by_transformers(path: Path, came_from: str, why: str = "") -> LoadedModel:
    """The model as `transformers` runs it.

    Args:
        why: what the native decoder has against it.
    """
    from sae_steer.model.hf.loading import load_hf

    try:
        read = load_hf(path)
    except InputError as error:
        raise InputError(f"{why}; and {error}" if why else str(error)) from error
    notes = [*([f"{why}: transformers runs it, more slowly"] if why else []), *read.lines()]
    return LoadedModel(read.model, _tokenizer(path), {"from": came_from, **read.record}, notes)


def _compared(read: DecoderFile, path: Path) -> dict:
    """What `transformers` made of the same folder, if it is one it can load; a difference is an error."""
    if read.key_map is not None or path.is_file():
        return {}
    result = compare(read.model, path)
    return {} if result is None else {"compared": asdict(result)}


def _tokenizer(path: Path) -> tuple[str, str] | None:
    """`tokenizer.json`, or the one other file that calls itself a tokenizer."""
    folder = path.parent if path.is_file() else path
    own = folder / "tokenizer.json"
    others = [found for found in sorted(folder.glob("*tokenizer*.json")) if found.name not in NO_TOKENIZERS]
    if not own.is_file():
        if len(others) != 1:
            return None
        own = others[0]
    try:
        return own.read_text(encoding="utf-8"), str(own)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the tokenizer {own} ({error}); copy it again") from error
