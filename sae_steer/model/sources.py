"""Where a model of a pair comes from: a folder beside the pair file, `hub:ORG/NAME`, or `tl:NAME`."""

from dataclasses import dataclass, field
from pathlib import Path

from sae_steer.model.language_model import LanguageModel
from sae_steer.model.lens import load_lens, tokenizer_json
from sae_steer.model.loading import load_decoder

LENS = "tl:"


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what came with it."""

    model: LanguageModel
    tokenizer: tuple[str, str] | None = None
    """The content of its tokenizer.json, and what to call it in an error."""
    source: dict = field(default_factory=dict)


def load_model(named: str, *, beside: Path) -> LoadedModel:
    """The model that a pair file in `beside` calls `named`."""
    if named.startswith(LENS):
        model = load_lens(named.removeprefix(LENS))
        content = tokenizer_json(model)
        return LoadedModel(model, content and (content, f"the tokenizer of {named}"), {"from": named})
    folder = beside / named
    own = folder / "tokenizer.json"
    tokenizer = (own.read_text(encoding="utf-8"), str(own)) if own.is_file() else None
    return LoadedModel(load_decoder(folder), tokenizer, {"from": named})
