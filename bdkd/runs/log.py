"""The log of a run: ``metrics.jsonl``, a progress bar or plain lines, TensorBoard and wandb."""

import contextlib
import hashlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from bdkd.config import Recipe, to_toml
from bdkd.data import Split
from bdkd.engine.state import TrainingState
from bdkd.errors import RunError
from bdkd.runs.checkpoint import check_folder, explain_oserror
from bdkd.runs.folder import RunFolder


class MetricsLogger(contextlib.AbstractContextManager):
    """Write the metrics of a run, and measure the time of its log intervals.

    All ranks create a logger, but only rank 0 writes and prints. The time of evaluations and
    checkpoints does not count (:meth:`paused`).

    Args:
        state: the state after resuming. Metrics of later steps are removed from the folder.
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
            folder.write_config(state.recipe)  # not earlier, because resuming may fail
            folder.drop_after(step)
            self.sinks = open_sinks(state.recipe, folder.path, folder.events, step)
        self.console = Console(last_step, step, progress_bar and self.is_rank0)
        self.line = self.console.line
        self.start_interval()
        self._counted = time.monotonic()  # progress.seconds includes the time until here

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the progress bar and the sinks."""
        self.console.close()
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def start_interval(self) -> None:
        """Start a log interval."""
        self._clock, self._images = time.monotonic(), 0

    def step(self, images: int) -> None:
        """Count a step and its images."""
        self.console.step()
        self._images += images

    def interval(self) -> tuple[int, float]:
        """Return the images and the seconds of the current interval."""
        return self._images, time.monotonic() - self._clock

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock of the interval."""
        began = time.monotonic()
        yield
        self._clock += time.monotonic() - began

    def count_time(self) -> None:
        """Add the time since the last call to ``progress.seconds``, which checkpoints save."""
        now = time.monotonic()
        self.state.progress.seconds += now - self._counted
        self._counted = now

    def training(self, values: dict[str, Any]) -> None:
        """Log the means of an interval, and start the next interval."""
        self.write(values)
        self.count_time()
        progress = self.state.progress
        left = progress.seconds / progress.step * (self.last_step - progress.step)
        self.console.metrics(values, left)
        self.start_interval()

    def evaluation(self, split: Split, networks: Mapping[str, Mapping[str, float]]) -> None:
        """Log the metrics of an evaluation by network."""
        progress = self.state.progress
        self.write({"step": progress.step, "epoch": progress.epoch, "split": split, **networks})
        shown = "  ".join(
            f"{name} top-1 {100 * metrics['top1']:.1f}% ECE {100 * metrics['ece']:.1f}%"
            for name, metrics in networks.items()
        )
        title = {"val": "validation", "test": "test images (not used for selection)"}[split]
        self.line(f"epoch {progress.epoch}  {title}  {shown}")

    def write(self, values: dict[str, Any]) -> None:
        """Write one line of metrics. A sink that fails is removed with a warning, because
        ``metrics.jsonl`` contains all metrics. Raise ``FolderGoneError`` if the folder was deleted
        or moved."""
        if not self.is_rank0:
            return
        if warning := self.folder.append_metrics(values):
            check_folder(self.folder.path)
            self.line(f"warning: {warning}")
        for sink in list(self.sinks):
            try:
                sink.scalars(values["step"], flat_scalars(values))
            except RunError as error:
                self.line(f"warning: training continues without this log: {error}")
                self.sinks.remove(sink)

    def flush(self) -> None:
        """Write the lines that could not be written yet. Raise ``RunError`` if that fails again."""
        if self.is_rank0:
            self.folder.flush_metrics()


class Console:
    """Show the progress: a progress bar on a terminal, else one line for each log interval."""

    def __init__(
        self, total: int, done: int, bar: bool = True, unit: str = "step",
        stream: IO[str] | None = None,
    ) -> None:  # fmt: skip
        self.total, self.stream = total, stream
        self.bar = tqdm(
            total=total, initial=done, unit=unit, dynamic_ncols=True,
            disable=not (bar and sys.stderr.isatty()),
        )  # fmt: skip

    def step(self) -> None:
        self.bar.update(1)

    def metrics(self, values: Mapping[str, Any], seconds_left: float) -> None:
        """Show the means of a log interval."""
        shown = []
        for name, v in values.items():
            if isinstance(v, dict):  # networks that did not train have a loss of NaN
                loss = "" if math.isnan(v["loss"]) else f"loss {v['loss']:.3f} "
                shown.append(f"{name} {loss}top-1 {100 * v['top1']:.1f}%")
        text = "  ".join([*shown, f"{values['images_per_second']:.0f} images/s"])
        if self.bar.disable:
            minutes, seconds = divmod(round(seconds_left), 60)
            step = f"step {values['step']}/{self.total}  epoch {values['epoch']}"
            print(f"{step}  {text}  {minutes}:{seconds:02d} left", flush=True)
        else:
            self.bar.set_postfix_str(text)

    def line(self, text: str) -> None:
        """Print a line."""
        if self.bar.disable:
            print(text, file=self.stream, flush=True)
        else:
            self.bar.write(text, file=self.stream)

    def close(self) -> None:
        self.bar.close()


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
        with explain_oserror(failed, remedy):  # the writer's thread may have failed earlier
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # scalars() has reported it
            self.writer.close()


def _without_tensorboard(
    otherwise: Callable[[threading.ExceptHookArgs], object], failure: threading.ExceptHookArgs
) -> None:
    """Print no traceback of TensorBoard's writing thread, whose error ``scalars`` reports."""
    thread = type(failure.thread).__module__.partition(".")[0]
    if thread != "tensorboard" or not isinstance(failure.exc_value, OSError):
        otherwise(failure)


class WandbSink:
    """Log to Weights & Biases. WANDB_MODE=offline keeps the data in the run's folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        # A resumed run has the same folder, so it gets the same identifier.
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
    """Return a line of metrics as ``{"train/student/loss": ...}``."""
    split = values["split"]
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{split}/{key}/{name}": number for name, number in value.items()}
        elif key not in ("step", "split") and value is not None:
            flat[f"{split}/{key}"] = value
    return flat
