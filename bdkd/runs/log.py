"""The log of a run: ``metrics.jsonl``, the console, TensorBoard and wandb."""

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from bdkd.config import Recipe, to_toml
from bdkd.data import Split
from bdkd.engine.state import EMA_SUFFIX, TrainingState
from bdkd.errors import RunError
from bdkd.runs.checkpoint import check_folder, explain_oserror
from bdkd.runs.console import Console, wrap
from bdkd.runs.folder import RunFolder
from bdkd.runs.progress_table import percent, shorten
from bdkd.runs.remaining_time import Phase, RemainingTime


class MetricsLogger(contextlib.AbstractContextManager):
    """Write the metrics of a run, and measure the time of its log intervals.

    All ranks create a logger, but only rank 0 writes and prints. Intervals do not include the time
    of evaluations and checkpoints (:meth:`paused`).

    Args:
        state: the state after resuming. Metrics of later steps are removed from the folder.
        last_step: the last step of the run.
        progress_bar: show a progress bar if standard error is a terminal.
    """

    def __init__(
        self, state: TrainingState, folder: RunFolder, last_step: int, progress_bar: bool
    ) -> None:
        self.state, self.folder, self.last_step = state, folder, last_step
        self.is_rank0 = state.context.is_rank0
        self.sinks: list[Sink] = []
        step = state.progress.step
        if self.is_rank0:
            folder.write_config(state.recipe)  # after resuming, which may fail
            folder.drop_after(step)
            self.sinks = open_sinks(state.recipe, folder.path, folder.events, step)
        self.console = Console(last_step, step, progress_bar and self.is_rank0)
        self.line = self.console.line
        self.remaining = RemainingTime()
        self.start_interval()
        self._counted = time.monotonic()  # progress.seconds includes the time before this moment

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bar and the sinks."""
        self.console.close()
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def start_interval(self) -> None:
        """Start a new log interval."""
        self._clock, self._images, self._first = time.monotonic(), 0, self.state.progress.step

    def step(self, images: int) -> None:
        """Count a step of ``images`` images."""
        self.console.step()
        self._images += images

    def interval(self) -> tuple[int, float]:
        """Return the number of images and the seconds of the current interval."""
        return self._images, time.monotonic() - self._clock

    @contextlib.contextmanager
    def paused(self, phase: Phase) -> Iterator[None]:
        """Stop the clock of the interval during an evaluation or a checkpoint."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._clock += seconds
        self.remaining.add_phase(phase, seconds)

    def count_time(self) -> None:
        """Add the time since the last call to ``progress.seconds``, which checkpoints save."""
        now = time.monotonic()
        self.state.progress.seconds += now - self._counted
        self._counted = now

    def training(self, values: Mapping[str, Any]) -> None:
        """Log the means of an interval, and start the next interval."""
        state, progress = self.state, self.state.progress
        _, seconds = self.interval()
        self.remaining.add_interval(progress.step - self._first, seconds)
        evaluations = progress.remaining_evaluations(state.recipe, state.train_images)
        evaluations += progress.validation_due  # the evaluation after this step
        left = self.remaining.seconds(self.last_step - progress.step, evaluations)
        line = self._write("train", values)
        self.console.metrics(self._students_first(line), state.recipe.train.epochs, left)
        self.start_interval()

    def evaluation(self, split: Split, networks: Mapping[str, Mapping[str, float]]) -> None:
        """Log the metrics of an evaluation by network."""
        self._write(split, networks)
        networks = self._students_first(networks)
        width, epochs = self.console.width, self.state.recipe.train.epochs
        names = shorten(list(networks), max(8, width - len("     top-1 10.0% ECE 10.0%")))
        shown = [
            f"{name} top-1 {percent(metrics['top1'])} ECE {percent(metrics['ece'])}"
            for name, metrics in zip(names, networks.values(), strict=True)
        ]
        epoch = f"epoch {self.state.progress.current_epoch}/{epochs}"
        title = {"val": "val", "test": "test (not used for selection)"}[split]
        self.line(wrap([epoch, title, *shown], width))

    def _students_first(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values with the students and their averages first."""
        recipe = self.state.recipe.networks
        students = {name for name, network in recipe.items() if network.role == "student"}
        names = sorted(values, key=lambda name: name.removesuffix(EMA_SUFFIX) not in students)
        return {name: values[name] for name in names}

    def _write(self, split: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write one line of metrics of the current step, and return it.

        If a sink fails, remove it with a warning. No metrics are lost, because ``metrics.jsonl``
        contains all of them.

        Raises:
            FolderGoneError: the folder was deleted or moved.
        """
        self.count_time()
        progress = self.state.progress
        line = {
            "step": progress.step, "epoch": progress.current_epoch, "split": split,
            "seconds": progress.seconds, **values,
        }  # fmt: skip
        if not self.is_rank0:
            return line
        if warning := self.folder.append_metrics(line):
            check_folder(self.folder.path)
            self.line(f"warning: {warning}")
        for sink in list(self.sinks):
            try:
                sink.scalars(progress.step, flat_scalars(line))
            except RunError as error:
                self.line(f"warning: training continues without this log: {error}")
                self.sinks.remove(sink)
        return line

    def flush(self) -> None:
        """Write the lines that could not be written before. Raise ``RunError`` if this fails."""
        if self.is_rank0:
            self.folder.flush_metrics()


class Sink(Protocol):
    """A destination of metrics in addition to ``metrics.jsonl``."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Write TensorBoard event files to the run's folder."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        threading.excepthook = partial(_without_tensorboard, threading.excepthook)
        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        failed = f"cannot write TensorBoard events in {self.folder}"
        remedy = "fix the cause and continue with --resume, or pass --log without a value"
        with explain_oserror(failed, remedy):  # also raises earlier errors of the writer's thread
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # scalars() has already reported the error
            self.writer.close()


def _without_tensorboard(
    otherwise: Callable[[threading.ExceptHookArgs], object], failure: threading.ExceptHookArgs
) -> None:
    """Handle exceptions of threads, except for errors of TensorBoard's writer, which ``scalars``
    reports."""
    thread = type(failure.thread).__module__.partition(".")[0]
    if thread != "tensorboard" or not isinstance(failure.exc_value, OSError):
        otherwise(failure)


class WandbSink:
    """Log to Weights & Biases. With WANDB_MODE=offline, the data stay in the run's folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        # The identifier depends on the folder, so a resumed run has the same identifier.
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project="bdkd", name=folder.name, dir=str(folder), id=identity, resume="allow",
            config={"recipe": to_toml(recipe)},
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def check_sinks(recipe: Recipe) -> None:
    """Raise ``RunError`` if the package of a sink is missing, before anything is written."""
    needs = {"tensorboard": ("tensorboard", "'bdkd[train]'"), "wandb": ("wandb", "wandb")}
    for sink in recipe.log:
        module, package = needs[sink]
        try:
            import_module(module)
        except ImportError as error:
            remedy = f"pip install {package} (or pass --log without a value)"
            raise RunError(f"--log {sink} needs {module}: {remedy}") from error


def open_sinks(recipe: Recipe, folder: Path, events: Path, start_step: int) -> list[Sink]:
    """Open the sinks that the recipe names."""
    sinks: list[Sink] = []
    if "tensorboard" in recipe.log:
        sinks.append(TensorBoardSink(events, start_step))
    if "wandb" in recipe.log:
        sinks.append(WandbSink(recipe, folder))
    return sinks


def flat_scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """Return a line of metrics as ``{"train/student/loss": ...}``, without values that are None."""
    split = values["split"]
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            named = {f"{split}/{key}/{name}": number for name, number in value.items()}
            flat |= {name: number for name, number in named.items() if number is not None}
        elif key not in ("step", "split") and value is not None:
            flat[f"{split}/{key}"] = value
    return flat
