"""How long each stage of `sae-steer run` takes on the embedded pair, from the start of the process to the page.

    python experiments/benchmarks/run_stages.py             # this machine's own instruction set
    python experiments/benchmarks/run_stages.py --isa avx2  # as on a machine with AVX2 alone

Both write their part of run_stages.json. The settings are those of the command without flags; the steps within the
interventions stand beside their sum.
"""

import time

START = time.perf_counter()

import argparse  # noqa: E402
import os  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402

from isa import as_asked, machine  # noqa: E402

from sae_steer.records import commit, read_json, write_json  # noqa: E402

RECORD = Path(__file__).with_suffix(".json")


@dataclass
class Clock:
    """The `progress` and the `log` of a study: notes when each stage began and each step was told."""

    began: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[str, float]] = field(default_factory=list)

    def stage(self, name: str):
        """The `Progress` of a stage, which begins now."""
        self.began[name] = time.perf_counter()

        def told(done: int, total: int, note: str = "") -> None:
            now = time.perf_counter()
            if name == "cache" and done >= total:
                self.began["train-sae"] = now
            if name == "intervene":
                self.steps.append((note, now))

        return told

    def step(self, facts) -> None:
        """A step of the dictionary."""

    def checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint of it."""

    def done(self, step: int) -> None:
        """Its end: what follows measures it."""
        self.began["measuring the dictionary"] = time.perf_counter()

    def seconds(self, end: float) -> dict[str, float]:
        """{stage: how long it took}; the imports first."""
        marks = [("imports", START), *sorted(self.began.items(), key=lambda mark: mark[1]), ("", end)]
        return {name: round(marks[i + 1][1] - at, 1) for i, (name, at) in enumerate(marks[:-1])}

    def interventions(self) -> dict[str, float]:
        """{step of the interventions: how long it took}."""
        starts = [self.began["intervene"], *(at for _, at in self.steps)]
        names = ["before the first arm", *(note for note, _ in self.steps)]
        ends = [*starts[1:], self.began["layers"]]
        return {name: round(end - at, 1) for name, at, end in zip(names, starts, ends, strict=True)}


def main() -> None:
    """Run the study in an empty folder and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="as `sae-steer run --full`")
    full = parser.parse_args().full
    from sae_steer.cli.run import study_settings
    from sae_steer.pair.model_pair import load_pair
    from sae_steer.pipeline import Places, run_study

    pair, clock = load_pair("small"), Clock()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        run_study(pair, Places.of(pair.name), settings=study_settings(full=full), progress=clock.stage, log=clock)
        end = time.perf_counter()
        sae = read_json(Path("runs/small/saes/adhd_L2_hook_resid_post/training.json"))["computed"]
        os.chdir("/")
    here = machine()
    measured = {
        "commit": commit(),
        "machine": here,
        "precision": sae["precision"],
        "seconds": round(end - START, 1),
        "stages": clock.seconds(end),
        "interventions": clock.interventions(),
    }
    name = here["isa"] + (" --full" if full else "")
    known = read_json(RECORD) if RECORD.is_file() else {}
    print(write_json(RECORD, known | {name: measured}), measured)


if __name__ == "__main__":
    as_asked()
    main()
