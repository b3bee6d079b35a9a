"""How long each stage of `sae-steer run` takes on the embedded pair, from the start of the process to the page.

    python experiments/benchmarks/run_stages.py             # this machine's own instruction set
    python experiments/benchmarks/run_stages.py --isa avx2  # as on a machine with AVX2 alone

Both write their part of run_stages.json. The settings are those of the command without flags; the steps within the
interventions stand beside their sum. `cpu_seconds` count all threads and hardly move with what else the machine does:
two quiet cores need at least half of them.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402

from isa import as_asked, machine  # noqa: E402

from sae_steer.records import commit, read_json, write_json  # noqa: E402

RECORD = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Moment:
    """The time on the wall, and what all threads of this process have computed."""

    name: str
    wall: float = field(default_factory=time.perf_counter)
    busy: float = field(default_factory=time.process_time)


@dataclass
class Clock:
    """The `progress` and the `log` of a study: notes when each stage began and each step was told."""

    stages: list[Moment] = field(default_factory=lambda: [Moment("imports", START, 0.0)])
    steps: list[Moment] = field(default_factory=list)

    def stage(self, name: str):
        """The `Progress` of a stage, which begins now."""
        self.stages.append(Moment(name))

        def told(done: int, total: int, note: str = "") -> None:
            if name == "cache" and done >= total:
                self.stages.append(Moment("train-sae"))
            if name == "intervene":
                self.steps.append(Moment(note))

        return told

    def step(self, facts) -> None:
        """A step of the dictionary."""

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint of it."""

    def done(self, step: int) -> None:
        """Its end: what follows measures it."""
        self.stages.append(Moment("measuring the dictionary"))

    def interventions(self) -> list[Moment]:
        """The steps within the interventions, from their beginning to their end."""
        at = next(i for i, moment in enumerate(self.stages) if moment.name == "intervene")
        first, after = self.stages[at], self.stages[at + 1]
        return [Moment("before the first arm", first.wall, first.busy), *self.steps, after]


def durations(moments: list[Moment]) -> dict[str, dict[str, float]]:
    """{name: seconds until the next moment, and seconds computed}; a name told twice is summed."""
    found: dict[str, dict[str, float]] = {}
    for now, then in pairwise(moments):
        spent = found.setdefault(now.name, {"seconds": 0.0, "cpu_seconds": 0.0})
        spent["seconds"] = round(spent["seconds"] + then.wall - now.wall, 1)
        spent["cpu_seconds"] = round(spent["cpu_seconds"] + then.busy - now.busy, 1)
    return found


def main() -> None:
    """Run the study in an empty folder and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="as `sae-steer run --full`")
    full = parser.parse_args().full
    from sae_steer.cli.run import study_settings
    from sae_steer.pair.model_pair import load_pair
    from sae_steer.pipeline import Places, run_study

    pair, clock, load = load_pair("small"), Clock(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        run_study(pair, Places.of(pair.name), settings=study_settings(full=full), progress=clock.stage, log=clock)
        clock.stages.append(Moment("end"))
        sae = read_json(Path("runs/small/saes/adhd_L2_hook_resid_post/training.json"))["computed"]
        os.chdir("/")
    here, end = machine(), clock.stages[-1]
    measured = {
        "commit": commit(),
        "machine": here,
        "load_before": load,
        "precision": sae["precision"],
        "seconds": round(end.wall - START, 1),
        "cpu_seconds": round(end.busy, 1),
        "stages": durations(clock.stages),
        "interventions": durations(clock.interventions()),
    }
    name = here["isa"] + (" --full" if full else "")
    known = read_json(RECORD) if RECORD.is_file() else {}
    print(write_json(RECORD, known | {name: measured}), measured)


if __name__ == "__main__":
    as_asked()
    main()
