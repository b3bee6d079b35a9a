"""Texts as both models read them: token ids with a label for every position, from the grammar or a file."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from sae_steer.arguments import Checked, checked
from sae_steer.corpus import VARIANTS, UserText, label_positions, read_texts, write_plans
from sae_steer.errors import InputError
from sae_steer.files import sha256
from sae_steer.pair.model_pair import ModelPair
from sae_steer.settings import SPLITS, CorpusSettings, SplitShares

UNNAMED = "text"
"""The one rendering of a file that names none."""


@dataclass(frozen=True)
class Text:
    """One text: ids and labels, one a position. `prompt` is shared by the renderings of one plan."""

    prompt: int
    task: int
    rendering: int
    """Index into the source's `variants`."""
    split: str
    token: np.ndarray
    is_onset: np.ndarray
    step: np.ndarray
    """The step a delimiter opens; -1 elsewhere."""
    next_is_target: np.ndarray
    true_p: np.ndarray
    """The grammar's probability that the step a delimiter opens is a target step; NaN where none is known."""
    cut: int = 0
    """Tokens left out at its end because the pair reads no more."""

    def __len__(self) -> int:
        return len(self.token)


@dataclass(frozen=True)
class SplitCounts:
    """What a split's texts hold."""

    split: str
    texts: int
    tasks: int
    onsets: int
    targets: int
    """Onsets of steps that are a target phrase."""
    cut: int
    """Texts longer than the pair reads."""


@runtime_checkable
class TextSource(Protocol):
    """Where a cache's texts come from."""

    variants: tuple[str, ...]

    def identity(self) -> dict:
        """What fixes the texts, for the manifest."""

    def texts(self, pair: ModelPair, split: str) -> Iterator[Text]:
        """The texts of a split, always in the same order."""


@dataclass(frozen=True)
class GeneratedTexts(Checked):
    """Plans of the grammar, each in both renderings, on the tasks of each split."""

    settings: CorpusSettings = field(default_factory=CorpusSettings)
    variants: tuple[str, ...] = VARIANTS

    @property
    def count(self) -> int:
        """Texts in all."""
        return len(self.variants) * sum(getattr(self.settings, f"{split}_plans") for split in SPLITS)

    def identity(self) -> dict:
        """The corpus settings and the renderings."""
        return {"corpus": asdict(self.settings), "variants": self.variants}

    def texts(self, pair: ModelPair, split: str) -> Iterator[Text]:
        """Plan after plan, each rendering in turn."""
        count = getattr(self.settings, f"{split}_plans")
        first = sum(getattr(self.settings, f"{name}_plans") for name in SPLITS[: SPLITS.index(split)])
        both = [write_plans(split, variant, count=count, seed=self.settings.seed) for variant in self.variants]
        for plan in chain.from_iterable(zip(*both, strict=True)):
            yield _label(
                pair,
                plan.text,
                where=f"plan {plan.prompt} of '{split}' ({plan.variant})",
                prompt=first + plan.prompt,
                task=plan.task.index,
                rendering=self.variants.index(plan.variant),
                split=split,
                true_p=[step.true_p for step in plan.steps],
            )


@dataclass(frozen=True)
class TextFile:
    """The texts of a `.txt` or `.jsonl` file; tasks are dealt to the splits by a hash of their name."""

    path: Path
    variants: tuple[str, ...]
    lines: tuple[UserText, ...]
    tasks: tuple[str, ...]
    content: str
    """The hash of the bytes that were read."""
    shares: SplitShares = field(default_factory=SplitShares)

    @classmethod
    @checked
    def read(cls, path: Path, shares: SplitShares | None = None) -> "TextFile":
        """Read the file whole; what cannot be used is an `InputError` naming the line."""
        content = _content(Path(path))
        lines = tuple(read_texts(Path(path)))
        if content is not None and _content(Path(path)) != content:
            raise InputError(f"{path} was changed while it was read; wait until it is written, and repeat")
        variants = tuple(sorted({line.rendering or UNNAMED for line in lines}))
        return cls(
            Path(path),
            variants,
            lines,
            tuple(sorted({line.task for line in lines})),
            content or "",
            shares or SplitShares(),
        )

    def identity(self) -> dict:
        """The hash of the file's content, and how it is read."""
        shares = {} if self.shares == SplitShares() else {"shares": astuple(self.shares)}
        return {"texts": self.content, "kind": self.path.suffix, **shares}

    def texts(self, pair: ModelPair, split: str) -> Iterator[Text]:
        """The lines whose task was dealt to `split`, in the file's order."""
        self._check_renderings(pair)
        numbers = {task: i for i, task in enumerate(self.tasks)}
        for prompt, line in enumerate(self.lines):
            if self.shares.split_at(_point(line.task)) != split:
                continue
            yield _label(
                pair,
                line.text,
                where=f"{self.path}, line {line.line},",
                prompt=prompt,
                task=numbers[line.task],
                rendering=self.variants.index(line.rendering or UNNAMED),
                split=split,
                may_cut=True,
            )

    def check_targets(self, pair: ModelPair, texts: Iterable[Text]) -> None:
        """Raise `InputError` unless some step is a target phrase, with the step that comes nearest to one."""
        if any(text.next_is_target.any() for text in texts):
            return
        read = (pair.tokenizer.tokenized(line.text) for line in self.lines)
        steps = Counter(step for text in read for _, step in pair.onsets.steps(text, pair.tokenizer))
        near = [close for phrase in pair.phrases for close in get_close_matches(phrase, steps, 1)]
        example = f"nearest to one is {near[0]!r}" if near else f"the most frequent is {steps.most_common(1)[0][0]!r}"
        raise InputError(
            f"none of the {steps.total()} steps in {self.path} is a target phrase; {example}. Correct target.phrases: "
            "'Sip*' is how a step begins, '/sip|drink/' a regular expression for its beginning"
        )

    def _check_renderings(self, pair: ModelPair) -> None:
        """Texts that name no model of the pair, or only partly say whose they are, would count as the target's."""
        if self.variants == (UNNAMED,):
            return
        names = [model.name for model in pair.models]
        for line in self.lines:
            if line.rendering not in names:
                told = (
                    f'"rendering" is {line.rendering!r}' if line.rendering else 'no "rendering", where others have one'
                )
                raise InputError(
                    f"{self.path}, line {line.line}: {told}; name the model whose kind of text it is, "
                    f"{' or '.join(map(repr, names))}"
                )


def count_texts(pair: ModelPair, source: TextSource) -> tuple[SplitCounts, ...]:
    """What a cache of `source` would hold, split by split; nothing is computed by a model."""
    counts = []
    for split in SPLITS:
        texts = list(source.texts(pair, split))
        counts.append(
            SplitCounts(
                split,
                texts=len(texts),
                tasks=len({text.task for text in texts}),
                onsets=sum(int(text.is_onset.sum()) for text in texts),
                targets=sum(int(text.next_is_target.sum()) for text in texts),
                cut=sum(text.cut > 0 for text in texts),
            )
        )
    return tuple(counts)


def _label(
    pair: ModelPair,
    text: str,
    *,
    where: str,
    prompt: int,
    task: int,
    rendering: int,
    split: str,
    true_p: list[float] | None = None,
    may_cut: bool = False,
) -> Text:
    """The text as both models read it; of one too long for them what comes first, with the labels it had, if it may."""
    read = pair.read(text, where)
    if len(read.ids) > pair.context and not may_cut:
        raise InputError(
            f"{where} has {len(read.ids)} tokens, and pair '{pair.name}' reads {pair.context}; give shorter texts"
        )
    labels = label_positions(read, tokenizer=pair.tokenizer, rule=pair.onsets, phrases=pair.phrases)
    ids = read.ids[: pair.context]
    if cut := len(read.ids) - len(ids):
        labels = labels.before(len(ids))
    unknown = np.full(len(ids), np.nan)
    return Text(
        prompt=prompt,
        task=task,
        rendering=rendering,
        split=split,
        token=np.asarray(ids, dtype=np.int32),
        is_onset=labels.is_onset,
        step=labels.step,
        next_is_target=labels.next_is_target,
        true_p=(unknown if true_p is None else labels.spread(true_p)).astype(np.float32),
        cut=cut,
    )


def _content(path: Path) -> str | None:
    """The hash of a file; None where there is none to be read, which its reader tells."""
    try:
        return sha256(path)
    except OSError:
        return None


def _point(task: str) -> float:
    """A point of [0, 1) from the hash of a task's name: what adding tasks later does not move."""
    return int(sha256(task.encode())[:13], 16) / 16**13
