"""``bdkd train``: parse, join the other ranks, build the components, train, print the results."""

import contextlib
import io
from pathlib import Path

from bdkd.extras import missing_packages

if message := missing_packages(("tyro",)):
    raise ImportError(message)

from bdkd.cli.table import results_table
from bdkd.cli.train import Arguments, continue_launch, parse_command, resolve_run
from bdkd.distributed.context import DistributedContext
from bdkd.distributed.launch import (
    init_distributed,
    launch_id,
    only_rank0_prints,
    redirect_output,
)
from bdkd.engine.components import build_components
from bdkd.runs.folder import RunFolder
from bdkd.runs.plan import plan
from bdkd.runs.weights import check_initial_weights, check_pretrained, load_initial_weights
from bdkd.trainer import Trainer


def main(given: list[str]) -> None:
    """Train or plan as the command line says, on all the ranks that torchrun started."""
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
            check_pretrained(arguments.config)
            components = build_components(arguments.config)
            check_initial_weights(components)
            print(plan(components, arguments.images_per_second))
    if quiet and context.is_rank0:
        print(arguments.config.run_dir)


def train(arguments: Arguments, folder: RunFolder, context: DistributedContext) -> None:
    """Train a run in its folder and print the results."""
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
