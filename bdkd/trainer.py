"""The trainer: train a run from its first step, or from a checkpoint, and evaluate it."""

import contextlib
import shlex
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from bdkd.data import Batch, Split
from bdkd.engine import interruption
from bdkd.engine.compiled import choose_forward_backward
from bdkd.engine.components import Components
from bdkd.engine.cuda_graph import CapturedStep
from bdkd.engine.networks import SavedBuffers
from bdkd.engine.progress import Best
from bdkd.engine.ranges import in_range, named_range
from bdkd.engine.state import TrainingState
from bdkd.engine.step import warm_up
from bdkd.engine.throughput import ThroughputMeter
from bdkd.errors import Interrupted, RunError
from bdkd.evaluation.calibration import CalibrationResult
from bdkd.metrics import values_of
from bdkd.plugins import plugin_arguments
from bdkd.runs.checkpointer import Checkpointer
from bdkd.runs.folder import RunFolder
from bdkd.runs.log import MetricsLogger, check_sinks
from bdkd.runs.plan import banner
from bdkd.runs.profile import StepProfiler
from bdkd.runs.resume import resume as resume_run
from bdkd.runs.signals import StopRequest
from bdkd.runs.summary import evaluator_of, summarise


class Trainer:
    """Train the networks of a recipe together.

    Args:
        components: from :func:`bdkd.engine.components.build_components`. Load initial weights
            before, because this class wraps the networks in DDP or FSDP.
        state: the training state. Default: a new state at step 0.

    Attributes:
        state: everything that a checkpoint contains.
        forward_backward: computes the gradients of one micro-batch.
    """

    def __init__(self, components: Components, state: TrainingState | None = None) -> None:
        self.components = components
        self.recipe, self.context = components.recipe, components.context
        self.objective, self.source = components.objective, components.source
        self.state = TrainingState(components) if state is None else state
        self.meter = self.state.meter
        self.batch_size = self.recipe.train.batch_size
        self.accumulate = self.recipe.train.accumulate
        self.forward_backward = choose_forward_backward(self.state, self.objective)
        self.compute_step: Callable[[Batch], None] = self._compute_step
        if self.recipe.train.cuda_graph:
            self.compute_step = CapturedStep(
                self._compute_step, self.state.optimizer, components.device
            )

    # -- one step ----------------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> None:
        """Run one optimizer step of all networks, without synchronizing with the device.

        Args:
            batch: this rank's part of the batch.
        """
        self.state.set_learning_rate()
        self.objective.advance(self.state.epochs_done(), self.state.device)
        self.compute_step(batch)
        self.state.progress.advance(self.batch_size, self.state.train_images)

    def _compute_step(self, batch: Batch) -> None:
        """Run the part of a step that computes on the device.

        It runs the same operations in each step and changes tensors in place, so that a CUDA graph
        can replay it.
        """
        buffers = SavedBuffers(self.state.networks.buffers())
        try:
            self._add_gradients(batch)
        except interruption.CompilationInterrupted:
            # Undo what this step has already computed, for example other micro-batches.
            buffers.restore(where=torch.ones((), dtype=torch.bool, device=self.state.device))
            self.state.networks.zero_grad()
            raise
        with named_range("optimizer"):
            self.update_parameters(buffers)

    def _add_gradients(self, batch: Batch) -> None:
        """Add the gradients of a batch, one micro-batch at a time."""
        for micro_batch, last in batch.micro_batches(self.accumulate):
            with self.state.sync_gradients(enabled=last):
                output = self.forward_backward(micro_batch)
            with named_range("statistics"):
                self.meter.update(output, float(self.batch_size))

    def update_parameters(self, buffers: SavedBuffers) -> None:
        """Update the networks and averages, or skip the step if a loss or gradient is not finite.

        Args:
            buffers: buffers of the networks from before the step. A skipped step restores them,
                because a NaN changes the batch norm statistics.
        """
        state = self.state
        state.unscale_gradients()
        finite = state.check_and_clip(self.recipe.train.clip_norm)
        state.optimizer_step(finite)
        buffers.restore(where=~finite)
        state.update_ema(finite)
        state.networks.zero_grad()
        state.count_skipped(finite)

    def warm_up_ddp(self) -> None:
        """Run the passes in which DDP determines the order of its collectives.

        DDP does this in its first steps. After these passes, a resumed run adds gradients in the
        same order as an uninterrupted run.
        """
        if not self.context.is_distributed:
            return
        info = self.source.info
        part = self.context.shard.of_batch(self.batch_size)
        count, device = part.stop - part.start, self.state.device
        images = torch.zeros(count, info.channels, *info.image_size, device=device)
        target = torch.zeros(count, dtype=torch.int64, device=device)
        batch = Batch((images,) * self.objective.views, target)
        *_, (micro_batch, _) = batch.micro_batches(self.accumulate)
        self.objective.advance(self.state.epochs_done(), self.state.device)
        warm_up(self.state, self.forward_backward, micro_batch)

    # -- a run -------------------------------------------------------------------------------------

    def train(
        self,
        folder: RunFolder,
        *,
        resume: str = "never",
        launch: str | None = None,
        progress_bar: bool = True,
        profile_steps: int = 0,
    ) -> dict[str, Any]:
        """Train to the end of the recipe, then evaluate on the test images.

        All ranks must call this method. Only rank 0 reads and writes the folder.

        Args:
            folder: the folder of the run.
            resume: ``never``, ``auto`` or ``require``. See :meth:`RunFolder.open_for_training`.
            launch: identifier of the ``torchrun`` call. A restart by the same call continues the
                run.
            progress_bar: show a progress bar if standard error is a terminal.
            profile_steps: number of steps to record in ``profile/`` and ``profile.json``.

        Returns:
            The content of ``summary.json`` on rank 0, an empty dictionary on other ranks.

        Raises:
            RunError: a file or package is missing, a file cannot be read or written, the run
                diverged, or another process trains in the folder.
            Interrupted: a signal (SIGINT, SIGTERM or SIGUSR1) stopped the run. Its checkpoint is
                written.
        """
        check_sinks(self.recipe)
        with contextlib.ExitStack() as stack:
            stack.callback(folder.close)
            continues, found = self.context.broadcast_from_rank0(
                lambda: folder.open_run(resume, launch)
            )
            self.warm_up_ddp()
            if continues:
                resume_run(self.state, found)
            remaining = self.state.remaining_steps()
            self.last_step = self.state.progress.step + remaining
            if remaining and self.context.is_rank0:
                print(banner(self.components, folder.path, self.state.progress.step), flush=True)
            self.logger = stack.enter_context(
                MetricsLogger(self.state, folder, self.last_step, progress_bar)
            )
            self.checkpointer = Checkpointer(self.state, folder, warn=self.logger.line)
            stack.callback(self.checkpointer.close)
            with (
                self._stop_request() as stop,
                StepProfiler(
                    profile_steps, remaining, folder.path, self.state.device, self.logger.line,
                    self.context.rank,
                ) as profiler,
            ):  # fmt: skip
                self._train_loop(stop, profiler)
            self.logger.close()
            return summarise(self.components, self.state, folder)

    def _stop_request(self) -> StopRequest:
        if self.context.is_distributed:  # all ranks must stop after the same step; one may hang
            return StopRequest(self.recipe.distributed.grace)
        if self.recipe.train.cuda_graph:  # steps before a capture change the state: finish them
            return StopRequest()
        interruption.reset()
        return StopRequest(first=interruption.request)

    def _train_loop(self, stop: StopRequest, profiler: StepProfiler) -> None:
        """Run the remaining steps."""
        self.state.networks.train()
        self.throughput = ThroughputMeter(self.components)
        self.logger.start_interval()
        self._finish_interrupted_step()
        progress = self.state.progress
        while progress.step < self.last_step:
            batches = self.source.train_batches(
                progress.epoch, progress.seen, self.batch_size, self.objective.views,
                self.context.shard,
            )  # fmt: skip
            for batch in self.throughput.watch(batches):
                self.context.location = f"step {progress.step + 1}"
                try:
                    self.train_step(batch)
                except interruption.CompilationInterrupted:
                    assert stop.signal is not None
                    self._save_and_stop(stop.signal)
                self._after_step(stop, profiler)
                if progress.step == self.last_step:
                    break
        self.finish_files()

    def _finish_interrupted_step(self) -> None:
        """Run the evaluation and save the checkpoint that a killed run left undone."""
        progress = self.state.progress
        best = False
        if evaluates := progress.validation_due:
            best = self.validate()
        unsaved = progress.step >= self.last_step and (
            evaluates or self.context.broadcast_from_rank0(self.checkpointer.last_step_is_unsaved)
        )
        if unsaved or best:
            self.save(newest=unsaved, best=best)

    def _after_step(self, stop: StopRequest, profiler: StepProfiler) -> None:
        """Log, evaluate and save if they are due after this step. Stop if a signal came.

        Args:
            profiler: records the steps. Its step ends before the evaluation and the checkpoint.
        """
        progress = self.state.progress
        last = progress.step == self.last_step
        epoch_ended = progress.seen == 0
        evaluated = epoch_ended and progress.epoch % self.recipe.evaluate_every == 0
        progress.validation_due = evaluated or last
        self.logger.step(self.batch_size)
        if progress.step % self.recipe.log_every == 0 or last:
            self.log_interval()
        signal, overdue = self.context.async_all_reduce_max(
            stop.signal or 0, int(self.checkpointer.is_overdue())
        )
        if signal and not last:
            self._save_and_stop(signal)
        profiler.step()
        # Evaluate before saving, so that the checkpoint contains the result of its own step.
        best = progress.validation_due and self.validate()
        newest = self.checkpointer.is_due(bool(overdue), last)
        if newest or best:
            self.save(newest, best)

    @in_range("log")
    def log_interval(self) -> None:
        """Log the means over the steps since the last log line. Synchronizes with the device."""
        values = self.meter.read(self.context)  # before the clock, because this waits for the GPU
        images, seconds = self.logger.interval()
        self.logger.training(
            {
                **values,
                "images_per_second": images / seconds,
                **self.throughput.read(images, seconds),
                "learning_rate": float(self.state.optimizer.param_groups[0]["lr"]),
                "skipped_steps": self._check_skipped(),
            }
        )

    def _check_skipped(self) -> int:
        """Return the number of steps that the run has skipped so far.

        Raises:
            RunError: ``train.max_skipped`` or more consecutive steps were skipped.
        """
        total, row, longest = self.state.skipped.tolist()
        self.state.skipped[2] = row
        if longest:
            self.logger.line(
                f"skipped up to {longest} steps in a row: losses or gradients were not finite"
            )
        if longest >= self.recipe.train.max_skipped:
            saved = self.context.broadcast_from_rank0(self.checkpointer.newest_path)
            good = f"the last good checkpoint is {saved}" if saved else "no checkpoint is saved yet"
            raise RunError(
                f"losses or gradients were not finite for {longest} steps in a row: {good}; "
                "lower optimizer.learning_rate, or use another train.precision"
            )
        return total

    @in_range("evaluation")
    def validate(self) -> bool:
        """Evaluate on the validation images, and with ``watch_test`` also on the test images.

        The results on test images are only logged and never select a checkpoint.

        Returns:
            Whether the students have the best validation accuracy so far. False if
            ``train.select`` is not ``best``.
        """
        self.state.progress.validation_due = False
        best = False
        with self.logger.paused("evaluation"):
            if self.source.info.counts["val"]:
                best = self._is_best(self.evaluate("val"))
            if self.recipe.watch_test:
                self.evaluate("test")
        return best

    def evaluate(self, split: Split) -> dict[str, CalibrationResult]:
        """Evaluate each network on a split, log the results, and return them by name."""
        self.context.location = f"the evaluation after step {self.state.progress.step}"
        networks = self.state.evaluated_networks()
        results = evaluator_of(self.components, networks).evaluate(split)
        metrics = {n: values_of(result, validated=True) for n, result in results.items()}
        self.logger.evaluation(split, metrics)
        return results

    def _is_best(self, results: dict[str, CalibrationResult]) -> bool:
        if self.recipe.train.select != "best":
            return False
        judges = self.state.selection_networks()
        top1 = sum(results[name].top1 for name in judges) / len(judges)
        # Of equal results the later one is the best, because its learning rate was lower.
        if self.state.best is not None and top1 < self.state.best.top1:
            return False
        self.state.best = Best(self.state.progress.step, top1)
        return True

    @in_range("checkpoint")
    def save(self, newest: bool, best: bool) -> None:
        """Save this step as the newest checkpoint, the best checkpoint, or both."""
        with self.logger.paused("checkpoint"):
            self.logger.count_time()
            self.checkpointer.save(newest, best)

    def finish_files(self) -> None:
        """Wait until all files are written. Raise ``RunError`` if a checkpoint or the metrics could
        not be written."""
        self.checkpointer.finish()
        self.logger.flush()

    def _save_and_stop(self, signal_number: int) -> NoReturn:
        folder, step = self.checkpointer.folder, self.state.progress.step
        saved = "before the first step; nothing had to be saved"
        if step:
            self.save(newest=True, best=False)
            saved = f"at step {step}, saved in {folder.step_path(step)}"
        self.finish_files()
        command = ["bdkd", "train", *plugin_arguments(), "--resume", "--run-dir", str(folder.path)]
        raise Interrupted(
            signal_number,
            f"stopped {saved}; continue with: " + shlex.join(command),
        )
