"""A run from its first step to its last, and on to its summary."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from bdkd.errors import Interrupted, RunError
from bdkd.training.evaluate import evaluate
from bdkd.training.log import Console, Sink, check_sinks, flat_scalars, open_sinks
from bdkd.training.run_folder import RunFolder
from bdkd.training.setup import Setup
from bdkd.training.signals import StopRequest
from bdkd.training.state import Best, TrainingState
from bdkd.training.step import forward_and_loss, train_step
from bdkd.training.summary import summarise

VALIDATION_METRICS = ("top1", "top5", "nll", "ece", "mce", "brier", "entropy")


def train(setup: Setup, folder: RunFolder, resume: str, bar: bool = True) -> dict[str, Any]:
    """Train, evaluate, summarise. Returns what went into ``summary.json``.

    Args:
        resume: ``never``, ``auto`` or ``require``, as :meth:`RunFolder.open_for_training` has it.
        bar: draw progress where standard error is a terminal.

    Raises:
        RunError: one line on what is missing, in the way or broke.
        Interrupted: SIGINT or SIGTERM came; the checkpoint is written.
    """
    recipe = setup.recipe
    state = TrainingState(recipe, setup.networks, setup.source.info.counts["train"], setup.device)
    check_sinks(recipe)
    try:
        continues = folder.open_for_training(resume)
        found = folder.newest_state(warn=print) if continues else None
        if found is not None:
            restore(state, *found)
        if continues:
            where = found[0] if found else "the beginning: no checkpoint was written"
            print(f"continuing at step {state.position.step}, from {where}", flush=True)
        folder.write_config(recipe)  # a refused resume has changed nothing
        folder.drop_after(state.position.step)
        sinks = open_sinks(recipe, folder.path, folder.events, state.position.step)
        console = Console(last_step(state), state.position.step, bar)
        try:
            with StopRequest() as stop:
                Run(setup, state, folder, sinks, console, stop).run()
        finally:
            console.close()
            for sink in sinks:
                sink.close()
        return summarise(setup, state, folder)
    finally:
        folder.close()


def restore(state: TrainingState, path: Path, saved: Mapping[str, Any]) -> None:
    """Load a checkpoint's state; a checkpoint of other networks is refused in one line."""
    try:
        images = saved["train_images"]
        state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} holds other networks or another optimizer than the recipe: resume with the "
            f"recipe of that run ({path.parent.parent / 'config.toml'}), or choose another "
            "--run-dir"
        ) from error
    if images != state.train_images:
        raise RunError(
            f"{path} was trained on {images} images, the data now has {state.train_images}: "
            "restore the data set or data.validation, or choose another --run-dir"
        )


def last_step(state: TrainingState) -> int:
    limit = state.recipe.max_steps
    return state.total_steps if limit is None else min(limit, state.total_steps)


class Run:
    """The loop over steps, with its logging, evaluations and checkpoints."""

    def __init__(
        self,
        setup: Setup,
        state: TrainingState,
        folder: RunFolder,
        sinks: list[Sink],
        console: Console,
        stop: StopRequest,
    ) -> None:
        self.setup, self.state, self.folder = setup, state, folder
        self.sinks, self.console, self.stop = sinks, console, stop
        self.recipe = setup.recipe
        self.end = last_step(state)
        compiled = self.recipe.train.compile
        self.forward = torch.compile(forward_and_loss) if compiled else forward_and_loss
        self.since = time.monotonic()  # what position.seconds does not count yet
        self.clock = time.monotonic()  # of the log interval; stands still while evaluating, saving
        self.images = 0

    def run(self) -> None:
        """Every step that remains."""
        recipe, position = self.recipe, self.state.position
        self.setup.networks.train()
        if position.validation_due:  # the run was stopped before it came to that
            self.validate()
        while position.step < self.end:
            epoch = position.epoch
            batches = self.setup.source.train_batches(
                epoch, position.seen, recipe.train.batch_size, self.setup.objective.views
            )
            for batch in batches:
                train_step(self.state, self.setup.objective, batch, recipe.train, self.forward)
                self.console.step()
                self.images += len(batch.target)
                last = position.step == self.end
                if position.step % recipe.log_every == 0 or last:
                    self.log_interval(epoch)
                epoch_ended = position.epoch > epoch
                evaluated = epoch_ended and position.epoch % recipe.evaluate_every == 0
                position.validation_due = evaluated or last
                if self.stop.signal is not None and not last:
                    self.save_and_stop(self.stop.signal)
                # Evaluated before it is saved: a checkpoint knows the result of its own step.
                if position.validation_due:
                    self.validate()
                due = position.step % recipe.checkpoint.every_steps == 0
                if last or (due and not self.state.in_a_skipped_row()):
                    self.save()
                if last:
                    break
            if position.epoch == epoch and position.step < self.end:
                # resumed with larger batches or fewer images: no whole batch is left of the epoch
                position.epoch, position.seen = epoch + 1, 0

    def log_interval(self, epoch: int) -> None:
        """Read the device: the means since the last time, and whether steps were skipped."""
        position = self.state.position
        values = self.state.meter.read()  # waits for the device, so that the clock is right
        seconds = time.monotonic() - self.clock
        line = {
            "step": position.step,
            "epoch": epoch,
            "split": "train",
            **values,
            "images_per_second": self.images / seconds,
            "learning_rate": self.state.optimizer.param_groups[0]["lr"],
            "skipped_steps": self.check_skipped(),
        }
        self.log(line)
        self.count_time()
        left = position.seconds / position.step * (self.end - position.step)
        self.console.metrics(line, left)
        self.clock, self.images = time.monotonic(), 0

    def count_time(self) -> None:
        now = time.monotonic()
        self.state.position.seconds += now - self.since
        self.since = now

    def check_skipped(self) -> int:
        """Steps skipped so far; too long a row of them ends the run."""
        total, row, longest = self.state.skipped.tolist()
        self.state.skipped[2] = row
        if longest:
            self.console.line(
                f"skipped up to {longest} steps in a row: losses or gradients were not finite"
            )
        if longest >= self.recipe.train.max_skipped:
            saved = self.folder.checkpoint_paths()
            good = f"the last good checkpoint is {saved[0]}" if saved else "none is saved yet"
            raise RunError(
                f"losses or gradients were not finite for {longest} steps in a row: {good}; "
                "lower optimizer.learning_rate, or use another train.precision"
            )
        return total

    def validate(self) -> None:
        """Evaluate on the validation part, where there is one; keep the best student."""
        began = time.monotonic()
        state, recipe = self.state, self.recipe
        state.position.validation_due = False
        if not self.setup.source.info.counts["val"]:
            return
        results = evaluate(
            state.evaluated_networks(), self.setup.source, "val", recipe.train.batch_size,
            recipe.train.precision,
        )  # fmt: skip
        self.log(
            {
                "step": state.position.step,
                "epoch": state.position.epoch,
                "split": "val",
                **{
                    name: {metric: getattr(result, metric) for metric in VALIDATION_METRICS}
                    for name, result in results.items()
                },
            }
        )
        shown = "  ".join(
            f"{name} top-1 {100 * result.top1:.1f}% ECE {100 * result.ece:.1f}%"
            for name, result in results.items()
        )
        self.console.line(f"epoch {state.position.epoch}  validation  {shown}")
        judged = state.judged_networks()
        top1 = sum(results[name].top1 for name in judged) / len(judged)
        # Of equals the later one: its learning rate had come further down.
        if state.best is None or top1 >= state.best.top1:
            state.best = Best(state.position.step, top1)
            self.folder.save_best(state.position.step, recipe, state.state_dict())
        self.clock += time.monotonic() - began

    def save(self) -> Path:
        """Write a checkpoint."""
        began = time.monotonic()
        self.count_time()
        recipe, step = self.recipe, self.state.position.step
        path = self.folder.save(step, recipe, self.state.state_dict(), recipe.checkpoint.keep)
        self.clock += time.monotonic() - began
        return path

    def save_and_stop(self, signal_number: int) -> NoReturn:
        """Answer a signal."""
        path = self.save()
        raise Interrupted(
            signal_number,
            f"stopped at step {self.state.position.step}, saved in {path}; continue with: "
            f"bdkd train --resume --run-dir {shlex.quote(str(self.folder.path))}",
        )

    def log(self, values: dict[str, Any]) -> None:
        self.folder.append_metrics(values)
        for sink in self.sinks:
            sink.scalars(values["step"], flat_scalars(values))
