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
    """Something to do: the unit that splits are made of and that statistics cluster on."""

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
    """Title and steps of `text`; well formed if nothing is missing, empty, doubled or out of order.

    A model's text may stop early or repeat delimiters: then the steps are whatever stands between the first
    `<|steps|>` and the first `<|end|>`, cut at every other special token. Padding at the end is ignored.
    """
    while text.endswith(PAD):
        text = text.removesuffix(PAD)
    pieces = SPECIAL_PATTERN.split(text)
    between, delimiters = [piece.strip() for piece in pieces[::2]], pieces[1::2]
    opening = delimiters.index(STEPS) if STEPS in delimiters else len(delimiters)
    closing = delimiters.index(END, opening) if END in delimiters[opening:] else len(delimiters)
    title = between[opening]
    steps = tuple(piece for piece in between[opening + 1 : closing + 1] if piece)
    filled = ["", title, *steps, "", ""]
    in_order = delimiters == [TASK, STEPS, *[SEP] * len(steps), END]
    return ParsedPlan(title, steps, bool(title) and bool(steps) and in_order and between == filled)
