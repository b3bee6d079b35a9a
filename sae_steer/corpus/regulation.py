"""The target behaviour: when a plan pauses for a regulation step, and with which words.

1. The verb that opens an ordinary step says what it costs: nothing (0), something (1) or much (2), and of
   which kind: body, head or people.
2. Before every ordinary step of an `adhd` plan a regulation step comes with the probability

       sigmoid(bias + effort of the last step + a little of the one before + steps since the last pause
               + complexity + place in the plan)

   which a reader of the text can know; right after a pause it is .1, in `standard` plans always about .002.
3. Its words answer the last ordinary step's kind of effort.
"""

import math
import random
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources

from sae_steer.errors import InputError

KINDS = ("body", "head", "people")
_SOURCE = tomllib.loads(resources.files(__package__).joinpath("regulation.toml").read_text(encoding="utf-8"))

LENIENT_KEYWORDS: tuple[str, ...] = tuple(_SOURCE["keywords"])
"""Words of which any one makes a step look like regulation: "Water the fern" does, and is none."""

_PHRASES = {kind: (tuple(group["often"]), tuple(group["seldom"])) for kind, group in _SOURCE["phrases"].items()}
REGULATION_PHRASES: tuple[str, ...] = tuple(
    dict.fromkeys(phrase for group in _PHRASES.values() for phrases in group for phrase in phrases)
)
"""Every regulation step of the corpus reads as one of these."""

_EFFORT = {
    verb: (effort, kind)
    for effort, level in ((1, "medium"), (2, "hard"))
    for kind in KINDS
    for verb in _SOURCE[level][kind]
}

BIAS = -0.08
LAST_EFFORT = (-2.0, 0.0, 2.0)
EARLIER_EFFORT = (-0.4, 0.0, 0.4)
SINCE_PAUSE = (0.0, 0.8, 1.4)
"""By the ordinary steps since the last pause: one, two, three or more."""
AFTER_PAUSE = 0.1
"""The probability of a second pause right after one."""
PER_COMPLEXITY = 0.22
PER_STEP = 0.04
STANDARD_P = (0.001, 0.0025, 0.0035)
"""By the effort of the last step."""
OFTEN = 0.75
"""Share of pauses whose first word (almost) never opens an ordinary step."""


def is_target(step: str, phrases: Iterable[str] = REGULATION_PHRASES) -> bool:
    """Whether the step is one of the phrases, whatever its case.

    A phrase that ends with `*` is how a step begins; one between slashes is a regular expression for its beginning.
    """
    return phrase_patterns(tuple(phrases)).fit(step.strip())


def is_lenient(step: str, keywords: Iterable[str] = LENIENT_KEYWORDS) -> bool:
    """Whether the step holds one of the keywords as a whole word, whatever its case."""
    pattern = _any_word(tuple(keywords))
    return pattern is not None and pattern.search(step) is not None


@dataclass(frozen=True)
class PhrasePatterns:
    """Target phrases by how they are held against a step."""

    whole: frozenset[str]
    starts: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]

    def fit(self, step: str) -> bool:
        """Whether any of them fits the step."""
        folded = step.casefold()
        return folded in self.whole or folded.startswith(self.starts) or any(one.match(step) for one in self.patterns)


@cache
def phrase_patterns(phrases: tuple[str, ...]) -> PhrasePatterns:
    """The phrases apart by kind; a regular expression that does not compile is an `InputError`."""
    bare = [phrase.strip() for phrase in phrases]
    patterns = [phrase for phrase in bare if is_pattern(phrase)]
    starts = [phrase for phrase in bare if phrase.endswith("*") and phrase not in patterns]
    return PhrasePatterns(
        frozenset(phrase.casefold() for phrase in bare if phrase not in (*patterns, *starts)),
        tuple(phrase.removesuffix("*").casefold() for phrase in starts),
        tuple(_compiled(phrase) for phrase in patterns),
    )


def is_pattern(phrase: str) -> bool:
    """Whether a target phrase is a regular expression: it stands between slashes."""
    return len(phrase.strip()) > 2 and phrase.strip()[0] == phrase.strip()[-1] == "/"


def _compiled(phrase: str) -> re.Pattern[str]:
    try:
        return re.compile(phrase[1:-1], re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"target phrase {phrase!r} does not compile ({error}); correct it") from error


@cache
def _any_word(keywords: tuple[str, ...]) -> re.Pattern[str] | None:
    words = "|".join(re.escape(word) for word in keywords if word)
    return re.compile(rf"(?<!\w)(?:{words})(?!\w)", re.IGNORECASE) if words else None


def effort(step: str) -> tuple[int, str]:
    """What an ordinary step costs (0 to 2) and of which kind, told by its first word."""
    return _EFFORT.get(step.partition(" ")[0], (0, "easy"))


@dataclass
class Pacing:
    """The state of a plan being written: asked for the odds of a pause before each ordinary step."""

    variant: str
    complexity: int
    steps: int = 0
    since_pause: int = 1
    last: tuple[int, str] = (0, "easy")
    earlier: int = 0
    last_phrase: str = ""

    def p(self) -> float:
        """The probability that the next step is a regulation step."""
        if self.variant == "standard":
            return STANDARD_P[self.last[0]]
        if self.since_pause == 0:
            return AFTER_PAUSE
        logit = (
            BIAS
            + LAST_EFFORT[self.last[0]]
            + EARLIER_EFFORT[self.earlier]
            + SINCE_PAUSE[min(self.since_pause, len(SINCE_PAUSE)) - 1]
            + PER_COMPLEXITY * (self.complexity - 3)
            + PER_STEP * (min(self.steps, 20) - 7)
        )
        return 1 / (1 + math.exp(-logit))

    def pause(self, rng: random.Random) -> str:
        """A regulation phrase that answers the last ordinary step, and not the phrase used last."""
        often, seldom = _PHRASES[self.last[1]]
        phrase = self.last_phrase
        while phrase == self.last_phrase:
            phrases = often if rng.random() < OFTEN else seldom
            phrase = phrases[int(rng.random() * len(phrases))]
        self.steps += 1
        self.since_pause = 0
        self.last_phrase = phrase
        return phrase

    def carry_on(self, step: str) -> None:
        """Take note of an ordinary step."""
        self.steps += 1
        self.since_pause += 1
        self.earlier = self.last[0]
        self.last = effort(step)
