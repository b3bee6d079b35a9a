"""What changes from step to step: the learning rate, k, and where the run ends."""

from dataclasses import dataclass

from sae_steer.settings import SAESettings

BETTER = 1e-3
"""The gain in FVE that counts as one, for `patience`."""


def learning_rate(progress: float, settings: SAESettings) -> float:
    """The rate at `progress` from 0 to 1 through the run: up over `warmup`, down to zero over `decay`."""
    rise = (progress + 1e-3) / (settings.warmup + 1e-3)
    fall = (1 - progress) / settings.decay if settings.decay else 1.0
    return settings.peak_lr * min(1.0, rise, fall)


def codes_a_row(progress: float, settings: SAESettings) -> int:
    """k at `progress`: over `k_warmup` it falls linearly from four times its value, at most d_sae."""
    left = max(0.0, 1 - progress / settings.k_warmup) if settings.k_warmup else 0.0
    return min(settings.d_sae, round(settings.k * (1 + 3 * left)))


@dataclass
class Plateau:
    """Watches FVE, the mean of one look after another; on a plateau it brings the end, with its decay, nearer."""

    settings: SAESettings
    steps: int
    """Of the whole run, as planned."""
    best: float = -1e30
    best_step: int = 0
    average: float | None = None
    end: int | None = None
    """The step at which the run ends now, if a plateau was met."""

    @property
    def last(self) -> int:
        """The step at which the run ends."""
        return self.end or self.steps

    def progress(self, step: int) -> float:
        """How far the run is after `step` steps, the decay counted from where it begins."""
        if self.end is None:
            return step / self.steps
        return 1 - (self.end - step) / self.steps

    def look(self, step: int, fve: float) -> None:
        """Take note of a batch's FVE."""
        if self.settings.patience is None or self.end is not None:
            return
        self.average = fve if self.average is None else 0.7 * self.average + 0.3 * fve
        if self.average > self.best + BETTER:
            self.best, self.best_step = self.average, step
        waited = (step - self.best_step) * self.settings.batch_size
        decay = round(self.settings.decay * self.steps)
        if waited >= self.settings.patience and step + decay < self.steps:
            self.end = step + decay
