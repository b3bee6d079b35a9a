"""Plans for some 2,500 everyday tasks, written by a seeded grammar in two renderings.

1. A task is an activity, a thing and a context ("Clean the oven" + "before guests arrive"); the files under
   `vocabulary/` hold them by domain, with the stages of each activity.
2. A plan draws how many stages it has (more for complex tasks), which, the wording of each, and which of
   them an `adhd` plan breaks into smaller steps.
3. `standard` writes the stages whole; `adhd` writes the smaller steps, with pauses (`regulation.py`).

A vocabulary line reads `? Whole step > small step > small step | another wording > small step > small step`;
`?` marks what a plan leaves out first. A thing is `name | part | shift of complexity`, a context is
`words | shift of complexity | step it asks for`.
"""

import hashlib
import random
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources

from sae_steer.corpus.plans import VARIANTS, Plan, Step, Task
from sae_steer.corpus.regulation import Pacing
from sae_steer.errors import InputError
from sae_steer.settings import SPLITS

STAGES_AT_ZERO, STAGES_PER_COMPLEXITY, STAGES_SPREAD = 5.1, 0.57, 1.15
FEWEST_STAGES = 3
BREAK_DOWN = (0.0, 0.02, 0.18, 0.46, 0.72, 0.96)
"""Probability, by complexity, that an `adhd` plan breaks a stage into smaller steps."""
SPLIT_SHARES = ((30, "train"), (39, "scan"), (42, "tune"), (50, "confirm"))
"""Upper ends, in fiftieths of the hash range: 60 % train; of the rest 45 % scan, 15 % tune, 40 % confirm."""


@dataclass(frozen=True)
class Wording:
    """One way to say a stage: whole, and in smaller steps (the whole again where there are none)."""

    whole: str
    small: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """A part of a procedure: its wordings, and how readily a plan keeps it (higher goes first)."""

    wordings: tuple[Wording, ...]
    weight: float


ALWAYS, CORE, OPTIONAL, AROUND = 9.0, 1.0, 0.5, 0.25


@cache
def _tasks_and_stages() -> tuple[tuple[Task, ...], tuple[tuple[Stage, ...], ...]]:
    tasks, procedures = [], []
    folder = resources.files(__package__).joinpath("vocabulary")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        domain = tomllib.loads(file.read_text(encoding="utf-8"))
        for title, complexity, stages in _expand(domain):
            tasks.append(Task(len(tasks), title, domain["domain"], complexity, _split_of(title)))
            procedures.append(stages)
    return tuple(tasks), tuple(procedures)


def _expand(domain: dict) -> Iterator[tuple[str, int, tuple[Stage, ...]]]:
    before = tuple(_stage(line, AROUND) for line in domain["open"])
    after = tuple(_stage(line, AROUND) for line in domain["close"])
    for activity in domain["activity"]:
        for thing in activity["things"]:
            name, part, shift = _columns(thing, 3)
            own = tuple(_stage(line.format(thing=_bare(name), part=part)) for line in activity["steps"])
            for context in ["", *domain["contexts"]]:
                words, further_shift, asked = _columns(context, 3)
                title = f"{activity['title'].format(thing=name)} {words}".strip()
                complexity = activity["level"] + int(shift or 0) + int(further_shift or 0)
                first = (_stage(asked, ALWAYS),) if asked else ()
                yield title, min(5, max(1, complexity)), first + before + own + after


def _columns(line: str, count: int) -> list[str]:
    columns = [column.strip() for column in line.split("|")]
    return columns + [""] * (count - len(columns))


def _bare(name: str) -> str:
    for article in ("a ", "an ", "the "):
        name = name.removeprefix(article)
    return name


def _stage(line: str, weight: float = CORE) -> Stage:
    wordings = []
    for wording in line.split("|"):
        if wording.strip().startswith("?"):
            weight = min(weight, OPTIONAL)
        whole, *small = (text.strip(" ?") for text in wording.split(">"))
        wordings.append(Wording(whole, tuple(small) or (whole,)))
    return Stage(tuple(wordings), weight)


def _split_of(title: str) -> str:
    """The split of a task depends on its title alone, so tasks added later move no other."""
    bucket = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8]) % SPLIT_SHARES[-1][0]
    return next(split for end, split in SPLIT_SHARES if bucket < end)


@cache
def tasks(split: str | None = None) -> tuple[Task, ...]:
    """All distinct tasks, or those of one split, in a fixed order."""
    if split is not None and split not in SPLITS:
        raise InputError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    return tuple(task for task in _tasks_and_stages()[0] if split in (None, task.split))


def draft(task: Task, rng: random.Random) -> list[tuple[Wording, bool]]:
    """The plan under both renderings: wordings in order, each with whether `adhd` breaks it down."""
    stages = _tasks_and_stages()[1][task.index]
    wanted = rng.gauss(STAGES_AT_ZERO + STAGES_PER_COMPLEXITY * task.complexity, STAGES_SPREAD)
    count = min(len(stages), max(FEWEST_STAGES, round(wanted)))
    ranked = sorted(range(len(stages)), key=[-stage.weight - rng.random() for stage in stages].__getitem__)
    chance = BREAK_DOWN[task.complexity]
    plan = []
    for index in sorted(ranked[:count]):
        wordings = stages[index].wordings
        plan.append((wordings[int(rng.random() * len(wordings))], rng.random() < chance))
    return plan


def write_plans(split: str, variant: str, *, count: int, seed: int) -> Iterator[Plan]:
    """Plans 0 to `count` - 1 of a split; plan i is the same in both variants, whatever the count.

    The split's tasks come in a seeded order, over and over, so that all are used alike.
    """
    if variant not in VARIANTS:
        raise InputError(f"no variant {variant!r}; choose one of {', '.join(VARIANTS)}")
    order = list(tasks(split))
    random.Random(f"{seed}/{split}/order").shuffle(order)
    for prompt in range(count):
        task = order[prompt % len(order)]
        plan = draft(task, random.Random(f"{seed}/{split}/{prompt}"))
        rng = random.Random(f"{seed}/{split}/{prompt}/{variant}")
        yield Plan(prompt, task, variant, tuple(_render(plan, Pacing(variant, task.complexity), rng)))


def _render(plan: list[tuple[Wording, bool]], pacing: Pacing, rng: random.Random) -> Iterator[Step]:
    for wording, broken_down in plan:
        for text in wording.small if broken_down and pacing.variant == "adhd" else (wording.whole,):
            while rng.random() < (p := pacing.p()):
                yield Step(pacing.pause(rng), True, p)
            yield Step(text, False, p)
            pacing.carry_on(text)
