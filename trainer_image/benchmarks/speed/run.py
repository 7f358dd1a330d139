"""The benchmark, on a machine with a GPU: `python -m speed.run`; `--rows` and `--systems` choose, `--help` says more.

Models are prepared once, every measurement runs in a process of its own, and systems take turns. A measurement that
fails is reported and left out. Each result is appended to results.csv at once; all results of one call share a run
number.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from benchmarks.provenance import current_commit, installed_versions
from finetune_api.gpus import GPU_ALLOCATOR
from speed.children import Child, MeasurementError
from speed.report import progress_line, show
from speed.results import COLUMNS, RESULTS, Result, append, next_run, read
from speed.rows import ON_ONE_GPU, ROWS, STEPS, SYSTEMS, working_folder
from speed.schedule import Entry, expected_seconds, order

Start = Callable[[str, Sequence[str], str], Child]
"""(module of this package, its arguments, name of the log) -> process."""


@dataclass
class Campaign:
    """One call of the benchmark."""

    results: Path
    copy: Path | None
    steps: int
    commit: str
    versions: str
    deadline: float
    """Value of time.monotonic() at which the last measurement has to be over."""
    most: float
    """Seconds that one measurement may take."""
    start: Start
    console: Console

    def __post_init__(self) -> None:
        self.known = read(self.results)
        self.run = next_run(self.known)
        self.made: list[Result] = []
        self.prepared: set[str] = set()
        self.failed: list[str] = []
        self.left_out: list[str] = []

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def conduct(self, entries: Sequence[Entry]) -> None:
        """Measures one entry after the other; meanwhile the next one's process imports its libraries."""
        waiting = self._begin(entries[0]) if entries else None
        for index, entry in enumerate(entries):
            expected = expected_seconds(entry, [*self.known, *self.made], self.steps, imported=index > 0)
            child, waiting = waiting or self._begin(entry), None

            if expected > self.left():
                self.left_out += [str(late) for late in entries[index:]]
                child.kill()
                return

            self.console.print(f"{index + 1}/{len(entries)} {entry}: about {expected:.0f} s", highlight=False)
            if not self._is_prepared(entry):
                child.kill()
                continue

            child.go()
            if index + 1 < len(entries):
                waiting = self._begin(entries[index + 1])
            self._finish(entry, child, waiting)

    def _begin(self, entry: Entry) -> Child:
        seconds = max(60, int(self.left()) - 30)
        arguments = (entry.system, entry.row, "--wait", f"--steps={self.steps}", f"--seconds={seconds}")
        return self.start("measure", arguments, f"{entry.row}-{entry.system}")

    def _finish(self, entry: Entry, child: Child, waiting: Child | None) -> None:
        began = time.monotonic()

        def on_line(line: str) -> None:
            if line == "TRAINING" and waiting is not None:
                waiting.pause()
            if line.startswith("PROGRESS "):
                self.console.print("    " + line.removeprefix("PROGRESS "), highlight=False)

        try:
            found = child.result(min(self.left(), self.most), on_line)
        except MeasurementError as error:
            self.failed.append(str(entry))
            self.console.print(f"    failed: {error}", style="red", markup=False, highlight=False)
            return
        finally:
            if waiting is not None:
                waiting.resume()

        known = {column: found.get(column) for column in COLUMNS}
        known |= {"run": self.run, "versions": self.versions, "commit": self.commit}
        result = Result(**{**known, "spread": found.get("spread", 0.0)})

        self.made.append(result)
        append(self.results, result)
        if self.copy is not None:
            shutil.copy(self.results, self.copy)
        self.console.print(progress_line(result, time.monotonic() - began), highlight=False)

    def _is_prepared(self, entry: Entry) -> bool:
        """Makes the entry's model if it does not exist; returns False if that fails."""
        model = ROWS[entry.row].model
        if model in self.prepared:
            return True

        began = time.monotonic()
        try:
            self.start("models.checkpoint", (model,), f"prepare-{model}").end(self.left())
        except MeasurementError as error:
            self.failed.append(str(entry))
            self.console.print(f"    the model could not be made: {error}", style="red", markup=False, highlight=False)
            return False

        self.prepared.add(model)
        self.console.print(f"    {model} is ready: {time.monotonic() - began:.0f} s", highlight=False)
        return True


def start_process(module: str, arguments: Sequence[str], log: str) -> Child:
    """Starts a module of this package as a process, without the current folder on its path."""
    logs = working_folder() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    speed, kernels = Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[3] / "kernels"
    places = [str(speed), str(kernels), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | GPU_ALLOCATOR | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = (sys.executable, "-P", "-m", f"speed.{module}", *arguments)
    return Child(command, logs / f"{time.strftime('%H%M%S')}-{log}.log", environment)


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Returns the parsed command line. Ends the program for an unknown row or system."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default=",".join(ON_ONE_GPU), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeats", type=int, default=1, help="rounds through the systems of each row")
    parser.add_argument("--again", default="ours", help="systems measured once more at the end of a single round")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of each measurement")
    parser.add_argument(
        "--seconds", type=float, default=24 * 3600.0, help="time limit: no measurement starts that would end later"
    )
    parser.add_argument(
        "--row-seconds", type=float, default=3600.0, help="time limit of one measurement, which fails when it is over"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to append to")
    parser.add_argument("--copy", type=Path, help="folder or file that gets a copy after each result")
    parser.add_argument("--commit", default=None, help="commit that is measured (default: git's)")
    arguments = parser.parse_args(words)

    for name, known in (("rows", ROWS), ("systems", SYSTEMS), ("again", SYSTEMS)):
        chosen = [word for word in getattr(arguments, name).split(",") if word]
        unknown = [word for word in chosen if word not in known]
        if unknown:
            parser.error(f"--{name}: unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        setattr(arguments, name, chosen)

    return arguments


def main(words: Sequence[str] | None = None, start: Start = start_process) -> int:
    """Runs the benchmark; returns 0 if at least one measurement was made and none failed."""
    began = time.monotonic()
    arguments, console = parse_arguments(words), Console(width=150)

    entries = order(arguments.rows, arguments.systems, arguments.repeats, arguments.again)
    campaign = Campaign(
        results=arguments.results, copy=arguments.copy, steps=arguments.steps,
        commit=arguments.commit or current_commit(), versions=installed_versions(),
        deadline=began + arguments.seconds, most=arguments.row_seconds, start=start, console=console,
    )  # fmt: skip
    campaign.conduct(entries)
    show(console, campaign.made, campaign.failed, campaign.left_out, time.monotonic() - began)
    return 0 if campaign.made and not campaign.failed else 1


if __name__ == "__main__":
    sys.exit(main())
