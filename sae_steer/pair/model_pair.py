"""A pair: a reference model, a target model, the tokenizer both read, and what the study is about.

`pair.toml` in a pair folder names them:

    tokenizer = "tokenizer.json"                        # default: the one the reference model came with
    context = 512                                       # tokens a text may have
    special_tokens = false                              # whether texts get the tokenizer's own, such as <s> before
    [reference]
    name = "standard"
    model = "standard"                                  # a folder or .pt file, hub:ORG/NAME, hf:NAME, or tl:NAME
    [target]
    name = "adhd"
    model = "adhd"
    phrases = ["Sip water", ...]                        # steps that count as the target behaviour; "Sip*" is how one
                                                        # begins, "/sip|drink/" a regular expression for its beginning
    lenient = ["water", ...]                            # keywords of the lenient matcher
    [onset]
    tokens = ["<|steps|>", "<|sep|>"]                   # a step begins after these; or: regex = "..."
    [twin]                                              # if there is one: the target trained anew on the same text
    name = "adhd-twin"
    model = "adhd-twin"
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from itertools import zip_longest
from pathlib import Path

import torch

from sae_steer.arguments import Checked
from sae_steer.corpus import OnsetRule, PlanTokenizer, TokenizedText, phrase_patterns
from sae_steer.errors import InputError, visible
from sae_steer.files import sha256
from sae_steer.model.adapting import adapt
from sae_steer.model.hub import HUB
from sae_steer.model.language_model import LanguageModel, fingerprint
from sae_steer.model.sources import LENS, load_model
from sae_steer.pair.pair_file import FILE, PairFile, write_pair_toml
from sae_steer.records import check_files

TRAINING_FILE = "training.json"
"""The record of a pair's training, where this package trained it."""
__all__ = ["ModelPair", "NamedModel", "load_pair", "write_pair_toml"]


TWIN = "twin"
ROLES = ("reference", "target", TWIN)


def to_stderr(line: str) -> None:
    """What people should see, where a caller does not say otherwise."""
    print(visible(line), file=sys.stderr)


@dataclass(frozen=True)
class NamedModel(Checked):
    """A model and what the pair calls it."""

    name: str
    model: LanguageModel
    """A `Decoder`, or what `transformers` or TransformerLens runs, behind the same interface."""
    tokenizer: PlanTokenizer | None = None
    """The tokenizer the model came with, if it came with one."""
    source: dict = field(default_factory=dict)
    """Where it was read from, and how the names there were matched."""

    @classmethod
    def of(cls, name: str, model: object, tokenizer: PlanTokenizer | None = None) -> "NamedModel":
        """A model in memory: a `Decoder`, or what `transformers` or TransformerLens runs, taken as it is."""
        return cls(name, adapt(model), tokenizer)

    @property
    def published_as(self) -> str | None:
        """What the public calls it, ORG/NAME or TransformerLens's name, where it came by such a name."""
        came_from = self.source.get("from", "")
        for prefix in (HUB, LENS):
            if came_from.startswith(prefix):
                return came_from.removeprefix(prefix).partition("@")[0]
        return getattr(self.model.shape, "model_name", None)

    @property
    def names_read(self) -> dict:
        """How the names in its file were matched, for a record; nothing where they were known."""
        return {"key_map": self.source["key_map"]} if "key_map" in self.source else {}

    @cached_property
    def sha256(self) -> str:
        """The hash of what it computes: shape and weights."""
        return fingerprint(self.model)


@dataclass(frozen=True)
class UnreadModel:
    """A model that is read when it is first asked for, and what the pair calls it."""

    name: str
    read: Callable[[], NamedModel]


@dataclass(frozen=True)
class ModelPair(Checked):
    """Two models that read the same token ids, and the behaviour in which they differ.

    A pair that is not consistent in itself is an `InputError`.
    """

    name: str
    reference: NamedModel
    target: NamedModel
    tokenizer: PlanTokenizer
    onsets: OnsetRule
    phrases: tuple[str, ...]
    context: int
    lenient: tuple[str, ...] = ()
    provenance: dict = field(default_factory=dict)
    third: NamedModel | UnreadModel | None = field(default=None, repr=False)
    """What `twin` is, or is read from."""

    def __post_init__(self) -> None:
        _check_names(self)
        _check_phrases(self)
        _check_onsets(self)
        for model in self.models:
            _check_tokenizer(self, model)

    @property
    def models(self) -> tuple[NamedModel, NamedModel]:
        """Reference, then target."""
        return self.reference, self.target

    @cached_property
    def twin(self) -> NamedModel | None:
        """The target trained anew on the same text, which differs from it by chance alone; read when first asked for.

        No result of reference and target depends on it, nor does the pair's hash.
        """
        twin = self.third.read() if isinstance(self.third, UnreadModel) else self.third
        if twin is not None:
            _check_context(self, twin)
            _check_tokenizer(self, twin)
            twin.model.to(self.target.model.device)
        return twin

    def to(self, device: torch.device | str) -> "ModelPair":
        """Itself, both models moved to `device`."""
        for model in (*self.models, self.__dict__.get("twin")):
            if model is not None:
                model.model.to(device)
        return self

    @cached_property
    def sha256(self) -> str:
        """The hash of everything a result can depend on."""
        study = repr((self.onsets, self.phrases, self.lenient, self.context))
        parts = (self.reference.name, self.reference.sha256, self.target.name, self.target.sha256)
        return sha256(*(part.encode() for part in (*parts, self.tokenizer.sha256, study)))

    @cached_property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids of the special tokens that are no onset delimiter: rows of theirs are left out of statistics."""
        return tuple(sorted(self.tokenizer.control_ids - self.onsets.delimiters(self.tokenizer)))

    def model(self, name: str) -> NamedModel:
        """The model of that name; `reference`, `target` and `twin` are names too."""
        for role, model in (("reference", self.reference), ("target", self.target)):
            if name in (model.name, role):
                return model
        if self.third is not None and name in (self.third.name, TWIN):
            assert self.twin is not None
            return self.twin
        names = [model.name for model in (*self.models, self.third) if model is not None]
        raise InputError(
            f"pair '{self.name}' has no model {name!r}; it has {', '.join(map(repr, names[:-1]))} and {names[-1]!r}"
        )

    def encode(self, text: str, where: str) -> list[int]:
        """The ids both models read; a text that their tokenizers read as different ids is an `InputError`."""
        return list(self.read(text, where).ids)

    def read(self, text: str, where: str) -> TokenizedText:
        """`encode`, with the characters each token covers."""
        read = self.tokenizer.tokenized(text)
        ids = list(read.ids)
        for model in self._tokenized_apart:
            theirs = model.tokenizer.encode(text)
            if theirs != ids:
                at = next(i for i, (a, b) in enumerate(zip_longest(ids, theirs)) if a != b)
                raise InputError(
                    f"{where} is read as ids {ids[at : at + 4]} from position {at} by the tokenizer of pair "
                    f"'{self.name}', and as {theirs[at : at + 4]} by that of model '{model.name}'; both models must "
                    "read the same ids"
                )
        return read

    @cached_property
    def _tokenized_apart(self) -> tuple[NamedModel, ...]:
        """Models that came with another tokenizer than the pair's, if only by rows it does not have."""
        return tuple(m for m in self.models if m.tokenizer and m.tokenizer.sha256 != self.tokenizer.sha256)

    def check_layer(self, layer: int) -> None:
        """Raise `InputError` unless both models have a block `layer`."""
        for model in self.models:
            model.model.check_layer(layer, f"model '{model.name}'")


def load_pair(pair: str | Path, *, tell: Callable[[str], None] = to_stderr) -> ModelPair:
    """The packaged pair of that name, or the pair of a folder with a `pair.toml`.

    Args:
        tell: takes the map of a model's tensor names, line by line, where the names had to be matched.
    """
    facts = PairFile.read(_find(pair) / FILE)
    check_files(facts.folder / TRAINING_FILE)
    if facts.strings("onset.tokens", ()) and facts.value("onset.regex", str, ""):
        raise InputError(f"{facts.path} has onset.tokens and onset.regex; say where steps begin by one of them")
    reference, target = (_read_model(facts, side, tell) for side in ("reference", "target"))
    return ModelPair(
        name=facts.folder.name,
        reference=reference,
        target=target,
        tokenizer=_read_tokenizer(facts, reference),
        onsets=OnsetRule(tokens=facts.strings("onset.tokens", ()), regex=facts.value("onset.regex", str, "") or None),
        phrases=facts.strings("target.phrases"),
        lenient=facts.strings("target.lenient", ()),
        context=facts.value("context", int),
        provenance=facts.value("provenance", dict, {}),
        third=_twin(facts, tell) if facts.has(TWIN) else None,
    )


def _twin(facts: PairFile, tell: Callable[[str], None]) -> UnreadModel:
    facts.value(f"{TWIN}.model", str)
    return UnreadModel(facts.value(f"{TWIN}.name", str), lambda: _read_model(facts, TWIN, tell))


def _read_model(facts: PairFile, side: str, tell: Callable[[str], None]) -> NamedModel:
    name, named = facts.value(f"{side}.name", str), facts.value(f"{side}.model", str)
    orders = {key: facts.value(f"{side}.fused_{key}", str, "") or None for key in ("qkv", "gate_up")}
    loaded = load_model(named, beside=facts.folder, **orders)
    for line in loaded.notes:
        tell(line)
    template = facts.value("special_tokens", bool, False)
    tokenizer = None if loaded.tokenizer is None else PlanTokenizer.read(*loaded.tokenizer, template=template)
    return NamedModel(name, loaded.model, tokenizer, loaded.source)


def _read_tokenizer(facts: PairFile, reference: NamedModel) -> PlanTokenizer:
    named = facts.value("tokenizer", str, "")
    if named:
        return PlanTokenizer.load(facts.folder / named, template=facts.value("special_tokens", bool, False))
    if reference.tokenizer is None:
        raise InputError(f"{facts.path} has no tokenizer, and model '{reference.name}' came without one; name one")
    return reference.tokenizer


def _find(pair: str | Path) -> Path:
    packaged = Path(str(files("sae_steer") / "assets"))
    for folder in (Path(pair), packaged / str(pair)):
        if (folder / FILE).is_file():
            return folder.resolve()
    names = sorted(found.parent.name for found in packaged.glob(f"*/{FILE}"))
    raise InputError(f"no pair '{pair}': give a folder with a {FILE}, or a packaged pair ({', '.join(names)})")


def _check_names(pair: ModelPair) -> None:
    names = [model.name for model in (*pair.models, pair.third) if model is not None]
    plain = all(re.fullmatch(r"[\w.-]+", name) and name.strip(".") for name in names)
    if len(set(names)) < len(names) or not plain:
        raise InputError(
            f"pair '{pair.name}' calls its models {' and '.join(map(repr, names))}; "
            "give two different names of letters, digits, '.', '_' and '-': they become folders and data sets"
        )
    roles = ROLES[: len(names)]
    for role, name in zip(roles, names, strict=True):
        if name in roles and name != role:
            raise InputError(
                f"the {role} model of pair '{pair.name}' is called {name!r}, which means the {name} model; "
                "give it another name"
            )


def _check_phrases(pair: ModelPair) -> None:
    if not pair.phrases or not all(phrase.strip() for phrase in pair.phrases):
        what = "an empty one among its target phrases" if pair.phrases else "no target phrases"
        raise InputError(f"pair '{pair.name}' has {what}; list in target.phrases the steps that are the behaviour")
    phrase_patterns(pair.phrases)


def _check_onsets(pair: ModelPair) -> None:
    if not pair.onsets.tokens and not pair.onsets.regex:
        raise InputError(f"pair '{pair.name}' has neither onset.tokens nor onset.regex; say where steps begin")
    pair.onsets.check_regex()
    for token in pair.onsets.tokens:
        pair.tokenizer.token_id(token)
    for model in pair.models:
        _check_context(pair, model)


def _check_context(pair: ModelPair, model: NamedModel) -> None:
    if not 0 < pair.context <= model.model.shape.n_ctx:
        raise InputError(
            f"pair '{pair.name}' has context {pair.context}, and model '{model.name}' reads 1 to "
            f"{model.model.shape.n_ctx}"
        )


def _check_tokenizer(pair: ModelPair, model: NamedModel) -> None:
    rows = model.model.shape.d_vocab
    if pair.tokenizer.n_vocab > rows:
        raise InputError(
            f"the tokenizer of pair '{pair.name}' makes ids up to {pair.tokenizer.n_vocab - 1}, but model "
            f"'{model.name}' has {rows} embedding rows; give the tokenizer both models were trained with"
        )
    if model.tokenizer is None:
        return
    if clash := pair.tokenizer.disagreements(model.tokenizer):
        raise InputError(
            f"the tokenizer of model '{model.name}' disagrees with the pair's on ids {', '.join(map(str, clash[:5]))}"
            f"{' and more' if len(clash) > 5 else ''}; both models must read the same ids"
        )
    for token in pair.onsets.tokens:
        ours, theirs = pair.tokenizer.token_id(token), model.tokenizer.token_id(token)
        if ours != theirs:
            raise InputError(
                f"{token!r} is id {ours} in the tokenizer of pair '{pair.name}' and id {theirs} in that of model "
                f"'{model.name}'; both models must read the same ids"
            )
