"""Onsets, the positions where a model chooses the next step, and the tokens regulation steps begin with.

1. An onset is a delimiter followed by a step: `<|steps|>` or `<|sep|>`, but not the `<|sep|>` before
   `<|end|>`, nor one at the very end. Other domains name their delimiters by a regular expression.
2. A step is what stands between its onset and the next delimiter or special token.
3. The target tokens are the first tokens of regulation steps that (almost) only begin regulation steps.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Int32

from sae_steer.corpus.plans import SEP, STEPS
from sae_steer.corpus.regulation import REGULATION_PHRASES, is_target
from sae_steer.corpus.tokenizer import PlanTokenizer
from sae_steer.errors import InputError

MIN_PURITY = 0.9


@dataclass(frozen=True)
class OnsetRule:
    """Where steps begin: after any of `tokens`, or, if given, where a match of `regex` in the text ends."""

    tokens: tuple[str, ...] = (STEPS, SEP)
    regex: str | None = None

    def steps(self, ids: Sequence[int], tokenizer: PlanTokenizer) -> list[tuple[int, str]]:
        """Every onset, a delimiter's last token, with the text of the step it opens, up to the next delimiter or
        special token. A regex match that ends inside a token has no onset.
        """
        controls = [position for position, token in enumerate(ids) if token in tokenizer.control_ids]
        if self.regex is not None:
            found = self._steps_by_regex(ids, tokenizer, controls)
        else:
            known = {tokenizer.token_id(token) for token in self.tokens}
            delimiters = [position for position, token in enumerate(ids) if token in known]
            following = dict(pairwise(sorted({*delimiters, *controls, len(ids)})))
            found = ((at, tokenizer.decode(ids[at + 1 : following[at]]).strip()) for at in delimiters)
        return [(at, text) for at, text in found if text]

    def _steps_by_regex(
        self, ids: Sequence[int], tokenizer: PlanTokenizer, controls: list[int]
    ) -> Iterator[tuple[int, str]]:
        """Steps cut from the text: a delimiter may be several tokens, and begin inside one of the step before it."""
        text, ends = tokenizer.decode(ids), tokenizer.ends(ids)
        matches, places = self._matches(text), _first_to_reach(ends)
        stops = sorted({*(match.start() for match in matches), *([0, *ends][at] for at in controls), len(text)})
        for match in matches:
            if match.end() in places:
                yield places[match.end()], text[match.end() : stops[bisect_left(stops, match.end())]].strip()

    def _matches(self, text: str) -> list[re.Match[str]]:
        try:
            return [match for match in re.finditer(self.regex, text) if match.group()]
        except re.error as error:
            raise InputError(f"onset regex {self.regex!r} does not compile ({error}); correct it") from error


def _first_to_reach(ends: list[int]) -> dict[int, int]:
    """{characters finished: the first token that finishes them}; tokens that finish none share an end."""
    return {end: at for at, end in reversed(list(enumerate(ends)))}


@dataclass(frozen=True)
class Onsets:
    """What each position of one text is."""

    is_onset: Bool[np.ndarray, " pos"]
    """A delimiter that is followed by a step."""
    step: Int32[np.ndarray, " pos"]
    """The number of the step that this onset opens; -1 where none opens."""
    next_is_target: Bool[np.ndarray, " pos"]
    """The step that this onset opens is a regulation step."""

    def spread(self, values: Sequence[float]) -> Float[np.ndarray, " pos"]:
        """One value a step, such as `true_p`, written at the onset that opens it; NaN elsewhere."""
        spread = np.full(len(self.step), np.nan)
        spread[self.is_onset] = np.asarray(values, dtype=np.float64)[self.step[self.is_onset]]
        return spread


INTERPGPT = OnsetRule()


def label_positions(
    ids: Sequence[int],
    *,
    tokenizer: PlanTokenizer,
    rule: OnsetRule = INTERPGPT,
    phrases: Iterable[str] = REGULATION_PHRASES,
) -> Onsets:
    """The onsets of one tokenised text, and which of them open a step that is one of the target phrases."""
    phrases = tuple(phrases)
    labels = Onsets(
        np.zeros(len(ids), dtype=bool),
        np.full(len(ids), -1, dtype=np.int32),
        np.zeros(len(ids), dtype=bool),
    )
    for number, (position, text) in enumerate(rule.steps(ids, tokenizer)):
        labels.is_onset[position] = True
        labels.step[position] = number
        labels.next_is_target[position] = is_target(text, phrases)
    return labels


@dataclass(frozen=True)
class TargetTokens:
    """The tokens whose probability at an onset is the probability of a regulation step."""

    ids: tuple[int, ...]
    purity: dict[int, float]
    """Of each first token of a regulation step: the share of its occurrences at onsets that begin one."""
    coverage: float
    """The share of regulation steps that begin with one of `ids`."""

    def described(self, tokenizer: PlanTokenizer) -> dict:
        """What a record says of the set: ids, their text, and the coverage."""
        texts = [tokenizer.decode([token]) for token in self.ids]
        return {"ids": list(self.ids), "tokens": texts, "coverage": self.coverage}


def first_token_purity(
    texts_ids: Iterable[Sequence[int]],
    *,
    tokenizer: PlanTokenizer,
    rule: OnsetRule = INTERPGPT,
    phrases: Iterable[str] = REGULATION_PHRASES,
    min_purity: float = MIN_PURITY,
) -> TargetTokens:
    """The target token set, counted over training text of the target variant."""
    phrases = tuple(phrases)
    unmade = [phrase for phrase in phrases if not is_target(tokenizer.decode(tokenizer.encode_text(phrase)), (phrase,))]
    if unmade:
        raise InputError(
            f"the tokenizer cannot make {len(unmade)} of the {len(phrases)} target phrases, the first {unmade[0]!r}; "
            "take it out of target.phrases, or spell it with what the tokenizer knows"
        )
    target, every = Counter(), Counter()
    for ids in texts_ids:
        for position, text in rule.steps(ids, tokenizer):
            first = int(ids[position + 1])
            every[first] += 1
            target[first] += is_target(text, phrases)
    purity = {first: target[first] / every[first] for first in sorted(every) if target[first]}
    if not purity:
        raise InputError("no step of these texts is a target phrase; check target.phrases and the onset rule")
    pure = tuple(first for first, share in purity.items() if share >= min_purity)
    if not pure:
        raise InputError(
            f"no first token of a target phrase begins one at {min_purity:.0%} of its onsets; name phrases that begin "
            "with words other steps do not begin with"
        )
    return TargetTokens(pure, purity, sum(target[first] for first in pure) / target.total())
