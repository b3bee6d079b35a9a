"""What a text of the corpus is: a task, the steps of a plan for it, and the written form of both.

    <|task|>Clean the kitchen<|steps|>Clear the counter<|sep|>Sip water<|sep|>Wipe the counter<|sep|><|end|>

Every finished step, the last one too, is closed by `<|sep|>`; `<|end|>` closes the plan.
"""

import re
from dataclasses import dataclass

SPECIALS = ("<|task|>", "<|steps|>", "<|sep|>", "<|end|>", "<|pad|>")
TASK, STEPS, SEP, END, PAD = SPECIALS
VARIANTS = ("standard", "adhd")
SPECIAL_PATTERN = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")


@dataclass(frozen=True)
class Task:
    """Something to do; the unit that is split between training and testing, and that statistics cluster on."""

    index: int
    title: str
    domain: str
    complexity: int
    """1 (a few minutes) to 5 (a project)."""
    split: str


@dataclass(frozen=True)
class Step:
    """One step of a plan, and the grammar's probability that it would be a regulation step."""

    text: str
    is_target: bool
    true_p: float
    """P(this step is a regulation step | what came before it, and that a step comes)."""


@dataclass(frozen=True)
class Plan:
    """One rendering of one plan; `prompt` is shared by the renderings of the same plan."""

    prompt: int
    task: Task
    variant: str
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """The plan as models read it."""
        return written(self.task.title, tuple(step.text for step in self.steps))


@dataclass(frozen=True)
class ParsedPlan:
    """What can be read back from a text, finished and formed well or not."""

    title: str
    steps: tuple[str, ...]
    well_formed: bool


def written(title: str, steps: tuple[str, ...]) -> str:
    """Title and steps between their delimiters."""
    return f"{TASK}{title}{STEPS}" + "".join(f"{step}{SEP}" for step in steps) + END


def parse_plan(text: str) -> ParsedPlan:
    """Title and steps of `text`; well formed if these, written again, give `text`.

    A model's text may stop early, repeat delimiters or lack them: then whatever stands between the first
    `<|steps|>` and the first `<|end|>` is cut at `<|sep|>`, and empty pieces are dropped. Padding is ignored.
    """
    text = text.replace(PAD, "")
    head, _, body = text.partition(STEPS)
    title = SPECIAL_PATTERN.sub("", head.rpartition(TASK)[2])
    pieces = (SPECIAL_PATTERN.sub("", piece).strip() for piece in body.partition(END)[0].split(SEP))
    steps = tuple(piece for piece in pieces if piece)
    well_formed = bool(title.strip()) and bool(steps) and text == written(title, steps)
    return ParsedPlan(title, steps, well_formed)
