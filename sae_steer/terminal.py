"""How long work looks on a terminal: one bar on stderr with the time left; a line now and then where there is none."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from sae_steer.errors import visible

QUIET_SECONDS = 15.0
"""Between two lines where stderr is no terminal."""


@dataclass
class Bar:
    """A `Progress` with a title, drawn on stderr."""

    title: str
    _started: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)
    _first: int | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Draw how far the work is and how long the rest will take."""
        now = time.monotonic()
        if self._first is None:  # a resumed run starts part-way: the rate is that of this process
            self._first, self._started = done, now
        live = sys.stderr.isatty()
        if done < total and now - self._said < (0.2 if live else QUIET_SECONDS):
            return
        self._said = now
        advanced = done - self._first
        left = (now - self._started) / advanced * (total - done) if advanced else None
        rest = "" if left is None or done >= total else f", {_spell(left)} left"
        line = f"{self.title}: {done / max(total, 1):4.0%}{rest}  {visible(note)}"
        end = "" if live and done < total else "\n"
        print(f"\r\x1b[2K{line}" if live else line, end=end, file=sys.stderr, flush=True)


@dataclass
class TrainingBar:
    """The `Log` of a dictionary's training, as a bar."""

    bar: Bar

    def step(self, facts) -> None:
        """Draw the step."""
        dead = "not known yet" if facts.dead is None else f"{facts.dead:.1%}"
        self.bar(facts.step, facts.steps, f"FVE {facts.fve:.3f}, dead {dead}")

    def checkpoint(self, step: int, path: Path) -> None:
        """Nothing to draw."""

    def done(self, step: int) -> None:
        """Nothing to draw."""


def _spell(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
