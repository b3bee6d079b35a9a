"""What the cache benchmarks share: models of any shape with random weights, and ready texts of the corpus's lengths."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from sae_steer import load_pair
from sae_steer.model.decoder import init_decoder
from sae_steer.pair.model_pair import ModelPair, NamedModel
from sae_steer.pair.texts import GeneratedTexts, Text
from sae_steer.randomness import generator
from sae_steer.settings import CorpusSettings, DecoderSettings

SOME = CorpusSettings(train_plans=300, scan_plans=0, tune_plans=0, confirm_plans=0)


def random_pair(shape: DecoderSettings) -> ModelPair:
    """Two models with random weights on the packaged tokenizer."""
    small = load_pair("small")
    reference, target = (
        NamedModel(model.name, init_decoder(shape, generator(seed)).eval().requires_grad_(False))
        for seed, model in enumerate(small.models)
    )
    return replace(small, name="random", reference=reference, target=target)


@dataclass(frozen=True)
class RepeatedTexts:
    """Generated plans over and over until there are `rows` token positions, all to train on."""

    rows: int
    variants: tuple[str, ...] = GeneratedTexts.variants

    def identity(self) -> dict:
        """How many rows."""
        return {"benchmark": "repeated plans", "rows": self.rows}

    def texts(self, pair: ModelPair, split: str) -> Iterator[Text]:
        """The same few hundred plans in turn: labelled once, because here the caching is measured."""
        if split != "train":
            return
        some, left, number = list(GeneratedTexts(SOME).texts(pair, "train")), self.rows, 0
        while left > 0:
            text = some[number % len(some)]
            yield replace(text, prompt=number)
            left, number = left - len(text), number + 1


def anonymous_megabytes() -> float:
    """RssAnon of this process: mapped pages of the page cache, which the system takes back at will, do not count."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
