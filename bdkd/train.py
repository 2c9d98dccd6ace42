"""``bdkd train``: parse the command line, join the other ranks, train, and print the results."""

import contextlib
import io
import shlex
import sys
from pathlib import Path

from bdkd.extras import missing_packages

if message := missing_packages(("tyro",)):
    raise ImportError(message)

from bdkd.cli.table import results_table
from bdkd.cli.train import Arguments, continue_launch, parse_command, resolve_run
from bdkd.device import is_out_of_memory
from bdkd.distributed.context import DistributedContext
from bdkd.distributed.launch import (
    init_distributed,
    launch_id,
    only_rank0_prints,
    redirect_output,
)
from bdkd.engine.components import Components, build_components
from bdkd.runs import plan
from bdkd.runs.folder import RunFolder
from bdkd.runs.weights import check_initial_weights, check_pretrained, load_initial_weights
from bdkd.trainer import Trainer


def main(given: list[str]) -> None:
    """Train, or print the plan of a run, on all ranks that torchrun started.

    Args:
        given: the arguments after ``bdkd train``.
    """
    with only_rank0_prints():
        command = parse_command(given)
    config, quiet = command.arguments.config, command.arguments.quiet
    quiet = quiet and not command.arguments.dry_run
    with (
        contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext(),
        init_distributed(config.distributed.timeout, config.device) as context,
    ):
        arguments = context.broadcast_from_rank0(
            lambda: resolve_run(continue_launch(command, launch_id()))
        )
        folder = RunFolder(Path(str(arguments.config.run_dir)))
        if not arguments.dry_run:
            if not context.is_rank0:
                redirect_output(folder.logs, context.rank)
            train(arguments, folder, context)
        elif context.is_rank0:
            print(describe_plan(arguments, context.world_size))
    if quiet and context.is_rank0:
        print(arguments.config.run_dir)


def describe_plan(arguments: Arguments, ranks: int) -> str:
    """Return the text of ``--dry-run``, with the measured speed of a few steps. Write no files."""
    from bdkd.probe import check_memory

    check_pretrained(arguments.config)
    components = build_components(arguments.config)
    check_initial_weights(components)
    each, memory, available, warning = check_memory(components, ranks)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if arguments.images_per_second is not None:
        rows = [plan.assumed_row(components, arguments.images_per_second)]
    elif reason := _why_not_measured(arguments, ranks, warning is None):
        rows = [("time", [f"not measured: {reason}"])]
    else:
        rows = _measured_rows(components)
    return plan.describe(components, ranks, each, plan.memory_row(memory, available, ranks), rows)


def _why_not_measured(arguments: Arguments, ranks: int, enough: bool) -> str | None:
    if arguments.no_probe:
        return "--no-probe (--images-per-second N estimates it)"
    if ranks > 1:
        return "not supported with several ranks (run it without torchrun to time steps)"
    return None if enough else "there is not enough memory"


def _measured_rows(components: Components) -> list[plan.Row]:
    from bdkd.probe import measure

    where = f"timing steps on {components.device}"
    print(f"{where}; --no-probe skips this", file=sys.stderr, flush=True)
    try:
        return plan.measured_rows(components, *measure(components))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    remedy = plan.memory_remedy(components.recipe)
    print(f"warning: out of memory while timing steps: {remedy}", file=sys.stderr, flush=True)
    return [("time", ["not measured: the steps ran out of memory"])]


def train(arguments: Arguments, folder: RunFolder, context: DistributedContext) -> None:
    """Train, or resume, the run in a folder. Rank 0 prints the results."""
    begins = context.broadcast_from_rank0(
        lambda: arguments.resume == "never" or not folder.resumable_paths()
    )
    if begins:
        check_pretrained(arguments.config)
    components = build_components(arguments.config, context)
    if begins:
        load_initial_weights(components)
    summary = Trainer(components).train(
        folder,
        resume=arguments.resume,
        launch=launch_id(),
        progress_bar=not arguments.quiet,
        profile_steps=arguments.profile,
    )
    if context.is_rank0:
        print(f"\n{results_table(summary)}\n")
        print(f"run folder           {folder.path}")
        print(f"reliability diagram  {folder.figures / 'reliability.png'}")
        print(f"export the student   bdkd export {shlex.quote(str(folder.path))} --to onnx")
