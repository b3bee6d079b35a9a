"""Which texts fall to which shard: consecutive texts of one split, as many as fit."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from sae_steer.errors import InputError
from sae_steer.pair.model_pair import ModelPair
from sae_steer.pair.texts import Text, TextFile, TextSource
from sae_steer.settings import SPLITS

SHARD_BYTES = 2**28
"""Of a shard's streams in float32, all models and layers together."""
MOST_ROWS, LEAST_BITS = 65_536, 10
"""However narrow or wide they are, a shard holds 1,024 to 65,536 rows."""


@dataclass(frozen=True)
class ShardTexts:
    """The texts of one shard, all of one split."""

    number: int
    split: str
    texts: tuple[Text, ...]

    @property
    def file(self) -> str:
        """The shard's name."""
        return f"shard-{self.number:05d}.h5"

    @property
    def record(self) -> str:
        """The name of the file that says the shard is finished, while the manifest does not."""
        return f"shard-{self.number:05d}.json"

    @cached_property
    def rows(self) -> int:
        """Token positions in all."""
        return sum(map(len, self.texts))


def rows_that_fit(values_a_row: int) -> int:
    """Rows a shard holds where the settings do not say: a power of two, by the width of the streams alone.

    What memory is free plays no part, so that the same models and texts give the same shards everywhere.
    """
    fit = SHARD_BYTES // (4 * values_a_row)
    return min(MOST_ROWS, 2 ** max(fit.bit_length() - 1, LEAST_BITS))


def deal_texts(pair: ModelPair, source: TextSource, rows_per_shard: int) -> tuple[ShardTexts, ...]:
    """The shards of a cache of `source`; texts that make no cache are an `InputError`."""
    dealt = tuple(
        ShardTexts(number, split, texts) for number, (split, texts) in enumerate(_deal(pair, source, rows_per_shard))
    )
    if not dealt:
        raise InputError("there are no texts to cache; ask for plans, or give a file with texts")
    if not any(text.is_onset.any() for shard in dealt for text in shard.texts):
        raise InputError("no text has an onset; the pair's [onset] tokens or regex match nothing in these texts")
    if isinstance(source, TextFile):
        source.check_targets(pair, (text for shard in dealt for text in shard.texts))
    return dealt


def _deal(pair: ModelPair, source: TextSource, rows_per_shard: int) -> Iterator[tuple[str, tuple[Text, ...]]]:
    for split in SPLITS:
        texts: list[Text] = []
        rows = 0
        for text in source.texts(pair, split):
            if texts and rows + len(text) > rows_per_shard:
                yield split, tuple(texts)
                texts, rows = [], 0
            texts.append(text)
            rows += len(text)
        if texts:
            yield split, tuple(texts)
