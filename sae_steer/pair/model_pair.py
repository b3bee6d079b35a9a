"""A pair: a reference model, a target model, the tokenizer both read, and what the study is about.

`pair.toml` in a pair folder names them:

    tokenizer = "tokenizer.json"
    context = 512                                       # tokens a text may have
    [reference]
    name = "standard"
    model = "standard"                                  # a Hugging Face Llama folder
    [target]
    name = "adhd"
    model = "adhd"
    phrases = ["Sip water", ...]                        # steps that count as the target behaviour
    lenient = ["water", ...]                            # keywords of the lenient matcher
    [onset]
    tokens = ["<|steps|>", "<|sep|>"]                   # a step begins after these; or: regex = "..."
"""

import re
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import tomli_w

from sae_steer.corpus import OnsetRule, PlanTokenizer
from sae_steer.errors import InputError
from sae_steer.model.decoder import Decoder
from sae_steer.model.loading import fingerprint, load_decoder
from sae_steer.runtime import sha256, write_text


@dataclass(frozen=True)
class NamedModel:
    """A model and what the pair calls it."""

    name: str
    decoder: Decoder

    @cached_property
    def sha256(self) -> str:
        """The hash of its shape and weights."""
        return fingerprint(self.decoder)


@dataclass(frozen=True)
class ModelPair:
    """Two models that read the same token ids, and the behaviour in which they differ."""

    name: str
    reference: NamedModel
    target: NamedModel
    tokenizer: PlanTokenizer
    onsets: OnsetRule
    phrases: tuple[str, ...]
    lenient: tuple[str, ...]
    context: int
    provenance: dict = field(default_factory=dict)

    @property
    def models(self) -> tuple[NamedModel, NamedModel]:
        """Reference, then target."""
        return self.reference, self.target

    @cached_property
    def sha256(self) -> str:
        """The hash of everything a result can depend on."""
        study = repr((self.onsets, self.phrases, self.lenient, self.context))
        parts = (self.reference.name, self.reference.sha256, self.target.name, self.target.sha256)
        return sha256(*(part.encode() for part in (*parts, self.tokenizer.sha256, study)))

    def model(self, name: str) -> NamedModel:
        """The model of that name; `reference` and `target` are names too."""
        for role, model in (("reference", self.reference), ("target", self.target)):
            if name in (model.name, role):
                return model
        raise InputError(
            f"pair '{self.name}' has no model {name!r}; it has {self.reference.name!r} and {self.target.name!r}"
        )

    def check_layer(self, layer: int) -> None:
        """Raise `InputError` unless both models have a block `layer`."""
        for model in self.models:
            model.decoder.check_layer(layer, f"model '{model.name}'")


def load_pair(pair: str | Path) -> ModelPair:
    """The packaged pair of that name, or the pair of a folder with a `pair.toml`."""
    folder = _find(pair)
    facts = _PairFile.read(folder / "pair.toml")
    reference, target = (
        NamedModel(facts.value(f"{side}.name", str), load_decoder(folder / facts.value(f"{side}.model", str)))
        for side in ("reference", "target")
    )
    loaded = ModelPair(
        name=folder.name,
        reference=reference,
        target=target,
        tokenizer=PlanTokenizer.load(folder / facts.value("tokenizer", str)),
        onsets=OnsetRule(tokens=facts.strings("onset.tokens", ()), regex=facts.value("onset.regex", str, "") or None),
        phrases=facts.strings("target.phrases"),
        lenient=facts.strings("target.lenient", ()),
        context=facts.value("context", int),
        provenance=facts.value("provenance", dict, {}),
    )
    _check_names(facts.path, loaded)
    _check_onsets(facts.path, loaded)
    for named, side in zip(loaded.models, ("reference", "target"), strict=True):
        _check_tokenizers(loaded, named, folder / facts.value(f"{side}.model", str))
    return loaded


def write_pair_toml(folder: Path, facts: dict) -> Path:
    """Write `facts` (the keys of the module's docstring) as the folder's `pair.toml`."""
    return write_text(Path(folder) / "pair.toml", tomli_w.dumps(facts))


def _find(pair: str | Path) -> Path:
    packaged = Path(str(files("sae_steer") / "assets"))
    for folder in (Path(pair), packaged / str(pair)):
        if (folder / "pair.toml").is_file():
            return folder.resolve()
    names = sorted(found.parent.name for found in packaged.glob("*/pair.toml"))
    raise InputError(f"no pair '{pair}': give a folder with a pair.toml, or a packaged pair ({', '.join(names)})")


@dataclass(frozen=True)
class _PairFile:
    """A `pair.toml` as read; a key that is missing, or holds another kind of value, is an `InputError` naming it."""

    path: Path
    facts: dict

    @classmethod
    def read(cls, path: Path) -> "_PairFile":
        try:
            return cls(path, tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a TOML file ({error}); see the pair files in the README") from error

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """The value at a dotted key; without a default the key must be there."""
        found: Any = self.facts
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None and default is None:
            raise InputError(f"{self.path} has no {key}; see the pair files in the README")
        if found is not None and not isinstance(found, kind):
            raise InputError(f"{self.path} has {key} = {found!r}, which is no {kind.__name__}; correct it")
        return default if found is None else found

    def strings(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of strings at a dotted key."""
        found = self.value(key, list, None if default is None else list(default))
        if not all(isinstance(item, str) for item in found):
            raise InputError(f"{self.path} has {key} = {found!r}, which is no list of strings; correct it")
        return tuple(found)


def _check_names(path: Path, pair: ModelPair) -> None:
    names = [model.name for model in pair.models]
    if names[0] == names[1] or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        raise InputError(
            f"{path} calls its models {names[0]!r} and {names[1]!r}; "
            "give two different names of letters, digits, '.', '_' and '-': they become folders and data sets"
        )


def _check_onsets(path: Path, pair: ModelPair) -> None:
    if not pair.onsets.tokens and not pair.onsets.regex:
        raise InputError(f"{path} has neither onset.tokens nor onset.regex; say where steps begin")
    for token in pair.onsets.tokens:
        pair.tokenizer.token_id(token)
    for model in pair.models:
        if not 0 < pair.context <= model.decoder.shape.n_ctx:
            raise InputError(
                f"{path} has context {pair.context}, and model '{model.name}' reads 1 to {model.decoder.shape.n_ctx}"
            )


def _check_tokenizers(pair: ModelPair, model: NamedModel, folder: Path) -> None:
    rows = model.decoder.shape.d_vocab
    if pair.tokenizer.n_vocab > rows:
        raise InputError(
            f"the tokenizer of pair '{pair.name}' makes ids up to {pair.tokenizer.n_vocab - 1}, but model "
            f"'{model.name}' has {rows} embedding rows; give the tokenizer both models were trained with"
        )
    own = folder / "tokenizer.json"
    if own.is_file() and (clash := pair.tokenizer.disagreements(PlanTokenizer.load(own))):
        raise InputError(
            f"the tokenizer in {folder} disagrees with the pair's on ids {', '.join(map(str, clash[:5]))}"
            f"{' and more' if len(clash) > 5 else ''}; both models must read the same ids"
        )
