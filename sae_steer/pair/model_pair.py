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

import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path

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
    facts = _read_toml(folder / "pair.toml")
    try:
        sides = [facts[side] for side in ("reference", "target")]
        tokenizer = PlanTokenizer.load(folder / facts["tokenizer"])
        loaded = ModelPair(
            name=folder.name,
            reference=_load_side(folder, sides[0]),
            target=_load_side(folder, sides[1]),
            tokenizer=tokenizer,
            onsets=OnsetRule(tokens=tuple(facts["onset"].get("tokens", ())), regex=facts["onset"].get("regex")),
            phrases=tuple(sides[1]["phrases"]),
            lenient=tuple(sides[1].get("lenient", ())),
            context=facts["context"],
            provenance=facts.get("provenance", {}),
        )
    except KeyError as error:
        raise InputError(f"{folder / 'pair.toml'} has no {error}; see the pair files in the README") from error
    _check_tokenizers(folder, loaded, [side["model"] for side in sides])
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


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a TOML file ({error}); see the pair files in the README") from error


def _load_side(folder: Path, side: dict) -> NamedModel:
    return NamedModel(side["name"], load_decoder(folder / side["model"]))


def _check_tokenizers(folder: Path, pair: ModelPair, models: list[str]) -> None:
    for named, model in zip(pair.models, models, strict=True):
        rows = named.decoder.shape.d_vocab
        if pair.tokenizer.n_vocab > rows:
            raise InputError(
                f"the tokenizer of pair '{pair.name}' makes ids up to {pair.tokenizer.n_vocab - 1}, but model "
                f"'{named.name}' has {rows} embedding rows; give the tokenizer both models were trained with"
            )
        own = folder / model / "tokenizer.json"
        if own.is_file() and (clash := pair.tokenizer.disagreements(PlanTokenizer.load(own))):
            raise InputError(
                f"the tokenizer in {own.parent} disagrees with the pair's on ids {', '.join(map(str, clash[:5]))}"
                f"{' and more' if len(clash) > 5 else ''}; both models must read the same ids"
            )
