"""Onsets, the positions where a model chooses the next step, and the tokens regulation steps begin with.

1. An onset is a delimiter followed by a step: `<|steps|>` or `<|sep|>`, but not the `<|sep|>` before
   `<|end|>`, nor one at the very end. Other domains name their delimiters by a regular expression over the text;
   which token a delimiter ends with, the tokenizer's own character offsets say.
2. A step is what stands between its onset and the next delimiter or special token.
3. The target tokens are the first tokens of regulation steps that (almost) only begin regulation steps.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int32

from sae_steer.arguments import Checked
from sae_steer.corpus.plans import SEP, STEPS
from sae_steer.corpus.regulation import REGULATION_PHRASES, is_pattern, is_target
from sae_steer.corpus.spans import TokenizedText
from sae_steer.corpus.tokenizer import PlanTokenizer
from sae_steer.errors import InputError

MIN_PURITY = 0.9


@dataclass(frozen=True)
class OnsetRule(Checked):
    """Where steps begin: after any of `tokens`, or, if given, where a match of `regex` in the text ends."""

    tokens: tuple[str, ...] = (STEPS, SEP)
    regex: str | None = None

    def steps(self, text: TokenizedText | Sequence[int], tokenizer: PlanTokenizer) -> list[tuple[int, str]]:
        """Every onset, a delimiter's last token, with the text of the step it opens, up to the next delimiter or
        special token. A delimiter that ends inside a token, but for white space, has no onset.
        """
        text = _read(text, tokenizer)
        controls = [at for at, token in enumerate(text.ids) if token in tokenizer.control_ids]
        if self.regex is not None:
            steps = self._steps_by_regex(text, controls)
        else:
            delimiters = {tokenizer.token_id(token) for token in self.tokens}
            places = {at for at, token in enumerate(text.ids) if token in delimiters}
            steps = _steps_between(text, places, controls)
        return [(at, step) for at, step in steps if step]

    def delimiters(self, tokenizer: PlanTokenizer) -> frozenset[int]:
        """Ids of the special tokens that are a delimiter by themselves."""
        if self.regex is None:
            return frozenset(tokenizer.token_id(token) for token in self.tokens)
        return frozenset(row for row in tokenizer.control_ids if self._matches(tokenizer.decode([row])))

    def _steps_by_regex(self, text: TokenizedText, controls: list[int]) -> Iterator[tuple[int, str]]:
        """Steps cut from the text: a delimiter may be several tokens, and begin inside one of the step before it."""
        matches, ends = self._matches(text.text), _Ends.of(text)
        starts = (text.spans[at][0] for at in controls)
        stops = sorted({*(match.start() for match in matches), *starts, len(text.text)})
        for match in matches:
            position = ends.last_token_of(match.end())
            if position is not None:
                yield position, text.text[match.end() : stops[bisect_left(stops, match.end())]].strip()

    def _matches(self, text: str) -> list[re.Match[str]]:
        return [match for match in self.check_regex().finditer(text) if match.group()]

    def check_regex(self) -> re.Pattern[str]:
        """The compiled `regex`, or an `InputError`."""
        try:
            return re.compile(self.regex or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"onset regex {self.regex!r} does not compile ({error}); correct it") from error


def _steps_between(text: TokenizedText, places: set[int], controls: list[int]) -> Iterator[tuple[int, str]]:
    """Steps from each delimiter, one token, to the next or to a special token."""
    starts = [*(start for start, _ in text.spans), len(text.text)]
    for at, following in pairwise(sorted({*places, *controls, len(text.ids)})):
        if at in places:
            yield at, text.text[text.spans[at][1] : starts[following]].strip()


@dataclass(frozen=True)
class _Ends:
    """Where the tokens of a text end, those that stand for no character left out."""

    text: str
    tokens: list[int]
    ends: list[int]
    """Never falling."""

    @classmethod
    def of(cls, text: TokenizedText) -> "_Ends":
        tokens = [at for at, (start, end) in enumerate(text.spans) if start < end]
        return cls(text.text, tokens, list(accumulate((text.spans[at][1] for at in tokens), max)))

    def last_token_of(self, end: int) -> int | None:
        """The last token of a delimiter that ends before character `end`: what predicts the step's first token.

        White space at the delimiter's end may have gone to the step's first token or nowhere, and white space after
        it may have come along.
        """
        before = bisect_right(self.ends, end) - 1
        after = before + 1
        if before >= 0 and self.ends[before] == end:
            at = before
        elif after < len(self.ends) and not self.text[end : self.ends[after]].strip():
            at = after
        elif before >= 0 and not self.text[self.ends[before] : end].strip():
            at = before
        else:
            return None
        return self.tokens[at] if at + 1 < len(self.tokens) else None


@dataclass(frozen=True)
class Onsets:
    """What each position of one text is."""

    is_onset: Bool[np.ndarray, " pos"]
    """A delimiter that is followed by a step."""
    step: Int32[np.ndarray, " pos"]
    """The number of the step that this onset opens; -1 where none opens."""
    next_is_target: Bool[np.ndarray, " pos"]
    """The step that this onset opens is a regulation step."""

    def before(self, end: int) -> "Onsets":
        """The labels of the first `end` positions; the last of them opens no step any more."""
        inside = np.arange(end) < end - 1
        return Onsets(
            self.is_onset[:end] & inside, np.where(inside, self.step[:end], -1), self.next_is_target[:end] & inside
        )

    def spread(self, values: Sequence[float]) -> Float[np.ndarray, " pos"]:
        """One value a step, such as `true_p`, written at the onset that opens it; NaN elsewhere."""
        spread = np.full(len(self.step), np.nan)
        spread[self.is_onset] = np.asarray(values, dtype=np.float64)[self.step[self.is_onset]]
        return spread


INTERPGPT = OnsetRule()


def label_positions(
    text: TokenizedText | Sequence[int],
    *,
    tokenizer: PlanTokenizer,
    rule: OnsetRule = INTERPGPT,
    phrases: Iterable[str] = REGULATION_PHRASES,
) -> Onsets:
    """The onsets of one tokenised text, or of ids alone, and which of them open a step that is a target phrase."""
    phrases, read = tuple(phrases), _read(text, tokenizer)
    labels = Onsets(
        np.zeros(len(read.ids), dtype=bool),
        np.full(len(read.ids), -1, dtype=np.int32),
        np.zeros(len(read.ids), dtype=bool),
    )
    for number, (position, step) in enumerate(rule.steps(read, tokenizer)):
        labels.is_onset[position] = True
        labels.step[position] = number
        labels.next_is_target[position] = is_target(step, phrases)
    return labels


def _read(text: TokenizedText | Sequence[int], tokenizer: PlanTokenizer) -> TokenizedText:
    return text if isinstance(text, TokenizedText) else tokenizer.detokenized(text)


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


class Labelled(Protocol):
    """A text's ids, and which of them are onsets and open a target phrase."""

    token: Sequence[int] | np.ndarray
    is_onset: Bool[np.ndarray, " pos"]
    next_is_target: Bool[np.ndarray, " pos"]


def first_token_purity(
    texts_ids: Iterable[Sequence[int]],
    *,
    tokenizer: PlanTokenizer,
    rule: OnsetRule = INTERPGPT,
    phrases: Iterable[str] = REGULATION_PHRASES,
    min_purity: float = MIN_PURITY,
) -> TargetTokens:
    """The target token set, counted over training text of the target variant, of which there are ids alone."""
    phrases = tuple(phrases)
    labelled = ((ids, label_positions(ids, tokenizer=tokenizer, rule=rule, phrases=phrases)) for ids in texts_ids)
    return count_first_tokens(labelled, tokenizer=tokenizer, phrases=phrases, min_purity=min_purity)


@runtime_checkable
class Labels(Protocol):
    """Which tokens of a text are onsets, and which of those open a target phrase."""

    is_onset: Bool[np.ndarray, " pos"]
    next_is_target: Bool[np.ndarray, " pos"]


def count_first_tokens(
    labelled: Iterable[tuple[Sequence[int] | np.ndarray, Labels]],
    *,
    tokenizer: PlanTokenizer,
    phrases: tuple[str, ...],
    min_purity: float = MIN_PURITY,
) -> TargetTokens:
    """The target token set of texts whose labels stand beside their ids."""
    spelled = [phrase.removesuffix("*") for phrase in phrases if not is_pattern(phrase)]
    unmade = [phrase for phrase in spelled if not tokenizer.can_make(phrase)]
    if unmade:
        raise InputError(
            f"the tokenizer cannot make {len(unmade)} of the {len(phrases)} target phrases, the first {unmade[0]!r}; "
            "take it out of target.phrases, or spell it with what the tokenizer knows"
        )
    target, every = Counter(), Counter()
    for ids, labels in labelled:
        onsets = np.flatnonzero(labels.is_onset)
        first = np.asarray(ids)[onsets + 1]
        every.update(first.tolist())
        target.update(first[labels.next_is_target[onsets]].tolist())
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
