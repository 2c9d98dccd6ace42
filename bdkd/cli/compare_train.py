"""Train the runs of ``bdkd compare`` that are not finished."""

import dataclasses
import fcntl
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from bdkd.cli.compare_plan import TEACHERS, PlannedRun, read_summary, run_name
from bdkd.cli.processes import Job, Outcome, run_jobs
from bdkd.errors import Interrupted, RunError, UsageError
from bdkd.identity import refuse_other_data
from bdkd.plugins import plugin_arguments
from bdkd.runs.checkpoint import explain_oserror
from bdkd.runs.console import Console
from bdkd.runs.folder import RunFolder, selected_checkpoint
from bdkd.runs.signals import StopRequest
from bdkd.text import without_waiting


def locked(folder: Path) -> IO[str]:
    """Create and lock a folder. Close the returned file to unlock it."""
    with explain_oserror(f"cannot write the folder {folder}", "choose another --folder"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w", opener=without_waiting)  # noqa: SIM115 - closed by the caller
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        remedy = "wait until it ends or choose another --folder"
        raise RunError(f"another bdkd compare or tune works in {folder}: {remedy}") from error
    return lock


def train_all(
    runs: Sequence[PlannedRun], at_once: int, folder: Path, command: str, stream: IO[str] | None,
    describe: Callable[[PlannedRun], str] | None = None,
) -> dict[str, Outcome]:  # fmt: skip
    """Train the runs that are not finished, ``at_once`` of them concurrently. Return the outcome of
    each run by name.

    Args:
        command: the command line, printed if a signal stops the comparison.
        stream: where to print. Default: standard output.
        describe: returns the results of a finished run in one line. Default: the results on the
            test images.

    Raises:
        Interrupted: a signal was received. Every run is saved.
        UsageError: the recipe is invalid, so no run can succeed.
        RunError: the runs were trained on different data sets.
    """
    session = _Session(runs, stream, describe or (lambda run: headline(read_summary(run))))
    try:
        with StopRequest() as stop:
            before = f"{len(session.outcomes)} of them already finished"
            session.console.line(f"{len(runs)} runs in {folder}, {before}, {at_once} at a time")
            session.stop = stop
            run_jobs(session.jobs(folder), at_once, session.done, session.must_stop)
    finally:
        session.console.close()
    if stop.signal is not None:
        finished = sum(RunFolder(run.path).summary.exists() for run in runs)
        state = f"{finished} of {len(runs)} runs are finished, the others are saved"
        remedy = f"continue with the same command: {command}"
        raise Interrupted(stop.signal, f"stopped; {state}; {remedy}")
    if session.error is not None:
        raise session.error
    return session.outcomes


class _Session:
    """Collect the outcomes of the runs, and show the progress."""

    stop: StopRequest

    def __init__(
        self, runs: Sequence[PlannedRun], stream: IO[str] | None,
        describe: Callable[[PlannedRun], str],
    ) -> None:  # fmt: skip
        self.describe = describe
        self.runs = {run.name: run for run in runs}
        finished = [run.name for run in runs if RunFolder(run.path).summary.exists()]
        self.outcomes = dict.fromkeys(finished, Outcome(0))
        self.error: UsageError | RunError | None = None
        self.console = Console(len(runs), len(self.outcomes), unit="run", stream=stream)

    def jobs(self, folder: Path) -> list[Job]:
        """Return a job for each run that is not finished. It waits for the run that trains its
        teachers."""
        jobs = []
        for run in self.runs.values():
            if run.name not in self.outcomes:
                teacher = run_name(TEACHERS, run.seed)
                needs = (teacher,) if run.teachers and teacher not in self.outcomes else ()
                arguments = partial(prepare, run, folder)
                jobs.append(Job(run.name, arguments, run.path / "output.log", needs))
        return jobs

    def must_stop(self) -> bool:
        return self.stop.signal is not None or self.error is not None

    def done(self, job: Job, outcome: Outcome) -> None:
        self.outcomes[job.name] = outcome
        self.console.step()
        count = f"[{len(self.outcomes)}/{len(self.runs)}] {job.name}"
        if outcome.code == 2:
            self.error = self.error or UsageError(f"{job.name}: {outcome.message}")
        elif outcome.code and self.stop.signal is None:
            self.console.line(f"{count}  failed: {outcome.message}")
        elif not outcome.code:
            self.console.line(f"{count}  {self.describe(self.runs[job.name])}")
            finished = [self.runs[n] for n, done in self.outcomes.items() if not done.code]
            try:
                refuse_other_data([(str(r.path), read_summary(r).get("data")) for r in finished])
            except RunError as error:
                self.error = self.error or error


def prepare(run: PlannedRun, folder: Path) -> list[str]:
    """Write the run's ``config.toml`` unless it has begun. Return the command that trains it."""
    stored = RunFolder(run.path)
    if not stored.config.exists() or not stored.has_begun():
        teachers = folder / run_name(TEACHERS, run.seed)
        networks = dict(run.recipe.networks)
        for name in run.teachers:
            weights = str(selected_checkpoint(teachers))
            networks[name] = dataclasses.replace(networks[name], weights=weights)
        stored.path.mkdir(parents=True, exist_ok=True)
        stored.write_config(dataclasses.replace(run.recipe, networks=networks))
    return ["train", *plugin_arguments(), "--resume", "require", "--run-dir", str(run.path)]


_HEADLINE = (("top1", "top-1"), ("ece", "ECE"))


def _percent(label: str, value: float | None) -> str:
    return f"{label} –" if value is None else f"{label} {100 * value:.2f}%"


def headline(summary: Mapping[str, Any]) -> str:
    """Return the results of a run in one line. A value that is not finite is a dash."""
    shown = [
        f"{name} " + " ".join(_percent(label, network[key]) for key, label in _HEADLINE)
        for name, network in summary["networks"].items()
    ]
    return "  ".join([*shown, f"{summary['wall_seconds']:.0f} s"])
