"""A run from its first step to its last, and on to its summary."""

import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from bdkd.data import Batch
from bdkd.errors import Interrupted, RunError
from bdkd.training import overlap
from bdkd.training.captured import CapturedStep
from bdkd.training.checkpoint import BackgroundWriter, load_checkpoint, snapshot
from bdkd.training.compiled import announced, compiled, count_shapes
from bdkd.training.evaluate import evaluate
from bdkd.training.log import Console, Sink, check_sinks, flat_scalars, open_sinks
from bdkd.training.profile import StepProfiler, in_range
from bdkd.training.resume import print_changes, progress, restore
from bdkd.training.run_folder import RunFolder
from bdkd.training.setup import Setup, check_step
from bdkd.training.signals import StopRequest
from bdkd.training.state import Best, TrainingState
from bdkd.training.step import Passes, forward_and_backward, train_step, warm_up
from bdkd.training.summary import summarise
from bdkd.training.usage import Usage

VALIDATION_METRICS = ("top1", "top5", "nll", "ece", "mce", "brier", "entropy")


def train(
    setup: Setup,
    folder: RunFolder,
    resume: str,
    bar: bool = True,
    launch: str | None = None,
    profiled_steps: int = 0,
) -> dict[str, Any]:
    """Train, evaluate, summarise. Returns what went into ``summary.json``, on the first rank.

    The first rank alone reads and writes the folder.

    Args:
        resume: ``never``, ``auto`` or ``require``, as :meth:`RunFolder.open_for_training` has it.
        bar: draw progress where standard error is a terminal.
        launch: identity of the ``torchrun`` that started this, whose restarts continue the run.
        profiled_steps: how many to record in ``profile/`` and ``profile.json``.

    Raises:
        RunError: one line on what is missing, in the way or broke.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 came; the checkpoint is written.
    """
    recipe, ranks = setup.recipe, setup.ranks
    state = TrainingState(
        recipe, setup.networks, setup.source.info.counts["train"], setup.device,
        ranks=ranks, sharded=setup.sharded, controls=setup.objective.controls,
        data=setup.source.info.identity(),
    )  # fmt: skip
    check_sinks(recipe)
    check_step(setup)
    writer = BackgroundWriter()

    def open_folder() -> tuple[bool, tuple[Path, dict[str, Any]] | None]:
        continues = folder.open_for_training(resume, launch)
        return continues, folder.newest_state(warn=print) if continues else None

    try:
        continues, found = ranks.from_first(open_folder)
        passes: Passes = forward_and_backward
        if recipe.train.compile:
            passes = announced(compiled(state.networks, ranks.alone, count_shapes(recipe)))
        if recipe.train.overlap:
            passes = overlap.overlapped(setup)
        settle(setup, state, passes)
        if found is not None:
            restore(state, *found)
            state.end_short_epoch()
            print_changes(state, found[1])
        if continues:
            where = found[0] if found else "the beginning: no checkpoint was written"
            print(
                f"continuing at step {state.position.step}, from {where} ({progress(state)})",
                flush=True,
            )
            if not state.remaining_steps():
                print(
                    f"nothing is left to train: train.epochs is {recipe.train.epochs} and "
                    f"max_steps {recipe.max_steps}", flush=True,
                )  # fmt: skip
        sinks = []
        if ranks.first:
            folder.write_config(recipe)  # a refused resume has changed nothing
            folder.drop_after(state.position.step)
            sinks = open_sinks(recipe, folder.path, folder.events, state.position.step)
        remaining = state.remaining_steps()
        console = Console(state.position.step + remaining, state.position.step, bar and ranks.first)
        try:
            # Alone, nobody can keep a step from ending.
            with (
                StopRequest(None if ranks.alone else recipe.distributed.grace) as stop,
                StepProfiler(profiled_steps, remaining, folder.path, setup.device, console.line,
                             ranks.rank) as profiler,
            ):  # fmt: skip
                Run(setup, state, folder, sinks, console, stop, writer, passes, profiler).run()
        finally:
            console.close()
            for sink in sinks:
                sink.close()
        return summarise(setup, whole(setup, state, folder), folder) if ranks.first else {}
    finally:
        writer.wait()
        folder.close()


def settle(setup: Setup, state: TrainingState, passes: Passes) -> None:
    """Let several ranks agree on the order in which gradients are added up, which DDP finds in its
    first steps: a resumed run then adds them as the run that was never stopped does."""
    if state.ranks.alone:
        return
    info, size = setup.source.info, setup.recipe.train.batch_size
    mine = state.ranks.shard.of_batch(size)
    count = mine.stop - mine.start
    images = torch.zeros(count, info.channels, *info.image_size, device=state.device)
    target = torch.zeros(count, dtype=torch.int64, device=state.device)
    batch = Batch((images,) * setup.objective.views, target)
    warm_up(state, setup.objective, batch, setup.recipe.train, passes)


def whole(setup: Setup, state: TrainingState, folder: RunFolder) -> TrainingState:
    """The state on the first rank alone, to look at when the training is over."""
    if not setup.sharded:
        return state
    images, device = setup.source.info.counts["train"], setup.device
    data = setup.source.info.identity()
    alone = TrainingState(setup.recipe, setup.fresh_networks(), images, device, data=data)
    alone.load_state_dict(load_checkpoint(folder.step_path(state.position.step))[1])
    return alone


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
        writer: BackgroundWriter,
        passes: Passes,
        profiler: StepProfiler,
    ) -> None:
        self.setup, self.state, self.folder = setup, state, folder
        self.profiler, self.usage = profiler, Usage(setup)
        self.sinks, self.console, self.stop, self.writer = sinks, console, stop, writer
        self.recipe, self.ranks, self.passes = setup.recipe, setup.ranks, passes
        self.step: Callable[[Batch], None] = (
            CapturedStep(setup, state, passes) if self.recipe.train.cuda_graph else self.one_step
        )
        self.end = state.position.step + state.remaining_steps()
        self.saved = time.monotonic()  # when the last checkpoint was
        self.since = time.monotonic()  # what position.seconds does not count yet
        self.clock = time.monotonic()  # of the log interval; stands still while evaluating, saving
        self.images = 0

    def run(self) -> None:
        """Every step that remains."""
        recipe, position = self.recipe, self.state.position
        self.setup.networks.train()
        finished = position.step >= self.end
        best = False
        if evaluates := position.validation_due:  # the run was stopped before it came to it
            best = self.validate()
        unsaved = finished and (evaluates or self.ranks.from_first(self.last_step_is_unsaved))
        if unsaved or best:
            self.save(newest=unsaved, best=best)
        while position.step < self.end:
            epoch = position.epoch
            batches = self.setup.source.train_batches(
                epoch, position.seen, recipe.train.batch_size, self.setup.objective.views,
                self.ranks.shard,
            )  # fmt: skip
            for batch in self.usage.watch(batches):
                self.ranks.place = f"step {position.step + 1}"
                self.step(batch)
                self.console.step()
                self.images += recipe.train.batch_size
                last = position.step == self.end
                if position.step % recipe.log_every == 0 or last:
                    self.log_interval(epoch)
                epoch_ended = position.epoch > epoch
                evaluated = epoch_ended and position.epoch % recipe.evaluate_every == 0
                position.validation_due = evaluated or last
                signal, overdue = self.ranks.agree(self.stop.signal or 0, int(self.overdue()))
                if signal and not last:
                    self.save_and_stop(signal)
                # Evaluated before it is saved: a checkpoint knows the result of its own step.
                best = position.validation_due and self.validate()
                due = overdue or position.step % recipe.checkpoint.every_steps == 0
                newest = last or (bool(due) and not self.state.in_a_skipped_row())
                if newest or best:
                    self.save(newest, best)
                self.profiler.step()
                if last:
                    break
        self.finish_files()

    def last_step_is_unsaved(self) -> bool:
        """Whether the run was killed between its last evaluation and its last checkpoint: it was
        then resumed from the best student's file."""
        return not self.folder.step_path(self.state.position.step).exists()

    def one_step(self, batch: Batch) -> None:
        train_step(self.state, self.setup.objective, batch, self.recipe.train, self.passes)

    def overdue(self) -> bool:
        """Whether the first rank's clock asks for a checkpoint; clocks may differ."""
        minutes = self.recipe.checkpoint.every_minutes
        late = minutes is not None and time.monotonic() - self.saved >= 60 * minutes
        return late and self.ranks.first

    @in_range("log")
    def log_interval(self, epoch: int) -> None:
        """Read the device: the means since the last time, and whether steps were skipped."""
        position = self.state.position
        # waits for the device, so that the clock is right
        values = self.state.meter.read(self.ranks)
        seconds = time.monotonic() - self.clock
        line = {
            "step": position.step,
            "epoch": epoch,
            "split": "train",
            **values,
            "images_per_second": self.images / seconds,
            **self.usage.read(self.images, seconds),
            "learning_rate": float(self.state.optimizer.param_groups[0]["lr"]),
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
            saved = self.folder.resumable_paths()
            good = f"the last good checkpoint is {saved[0]}" if saved else "none is saved yet"
            raise RunError(
                f"losses or gradients were not finite for {longest} steps in a row: {good}; "
                "lower optimizer.learning_rate, or use another train.precision"
            )
        return total

    @in_range("evaluation")
    def validate(self) -> bool:
        """Evaluate on the validation part, where there is one; whether the student is the best."""
        began = time.monotonic()
        state, recipe = self.state, self.recipe
        state.position.validation_due = False
        if not self.setup.source.info.counts["val"]:
            return False
        self.ranks.place = f"the evaluation after step {state.position.step}"
        results = evaluate(
            state.evaluated_networks(), self.setup.source, "val", recipe.train.batch_size,
            recipe.train.precision, self.ranks,
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
        self.clock += time.monotonic() - began
        # Of equals the later one: its learning rate had come further down.
        if state.best is not None and top1 < state.best.top1:
            return False
        state.best = Best(state.position.step, top1)
        return True

    @in_range("checkpoint")
    def save(self, newest: bool, best: bool) -> None:
        """Take a snapshot of this step and let it be written, as the newest checkpoint, the best
        student, or both."""
        began = time.monotonic()
        self.count_time()
        recipe, step, folder = self.recipe, self.state.position.step, self.folder
        self.ranks.place = f"the checkpoint of step {step}"
        state = self.state.state_dict()
        if state is not None:
            self.warn_of_lost_checkpoint()
            state = snapshot(state)
            self.writer.submit(
                partial(folder.save, step, recipe, state, recipe.checkpoint.keep)
                if newest else None,
                partial(folder.save_best, step, recipe, state) if best else None,
            )  # fmt: skip
        self.saved = time.monotonic()
        self.clock += self.saved - began

    def warn_of_lost_checkpoint(self) -> None:
        """A checkpoint that could not be written does not end a run: the next one tries again."""
        self.writer.wait()
        if error := self.writer.take_failure():
            self.console.line(f"warning: training goes on without this checkpoint: {error}")

    def save_and_stop(self, signal_number: int) -> NoReturn:
        """Answer a signal."""
        self.save(newest=True, best=False)
        self.finish_files()
        step = self.state.position.step
        raise Interrupted(
            signal_number,
            f"stopped at step {step}, saved in {self.folder.step_path(step)}; continue with: "
            f"bdkd train --resume --run-dir {shlex.quote(str(self.folder.path))}",
        )

    def finish_files(self) -> None:
        """What the run leaves must be written now."""
        if self.ranks.first:
            self.writer.finish()
            self.folder.flush_metrics()

    def log(self, values: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        if warning := self.folder.append_metrics(values):
            self.console.line(f"warning: {warning}")
        for sink in list(self.sinks):
            try:
                sink.scalars(values["step"], flat_scalars(values))
            except RunError as error:  # metrics.jsonl has it all
                self.console.line(f"warning: training goes on without this log: {error}")
                self.sinks.remove(sink)
