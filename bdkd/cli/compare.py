"""``bdkd compare``: methods and seeds on one recipe, a run folder each, and one table of them."""

import dataclasses
import fcntl
import json
import os
import shlex
import sys
import textwrap
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, BinaryIO

import msgspec
import tyro

from bdkd.cli.processes import Job, Outcome, run_jobs
from bdkd.cli.table import table
from bdkd.config import (
    NetworkConfig,
    ObjectiveConfig,
    Recipe,
    check_recipe,
    differing_keys,
    load_recipe,
    nearest,
    shipped_recipes,
)
from bdkd.errors import Interrupted, RunError, UsageError
from bdkd.identity import refuse_other_data

TEACHERS = "independent"  # the method that trains teachers for methods that need trained ones


@dataclass(frozen=True)
class Arguments:
    """Train several methods with several seeds on one recipe, and set them side by side.

    Finished runs are taken as they are and half-done ones continued, so that the same command goes
    on where it was stopped."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A shipped recipe's name or a TOML file."""
    config: Annotated[Recipe, tyro.conf.arg(name="")]
    methods: tuple[str, ...] = ()
    """Methods, the first being what the others are tested against; an option of a method after a
    colon (bdkd:gamma=1,temperature=2). The recipe's [objective] is for its own method, others have
    their own defaults. Without it, all methods against independent."""
    seeds: tuple[int, ...] = (3,)
    """One number N: the seeds 0 to N-1. Several: those seeds."""
    jobs: int | None = None
    """Runs at a time; without it, as many as the CPU has room for, or one on a GPU."""
    folder: Path | None = None
    """Folder of the runs and tables; without it, runs/compare-<recipe>."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the content of comparison.json instead of tables."""


@dataclass(frozen=True)
class PlannedRun:
    """One method with one seed."""

    method: str  # as the user wrote it
    seed: int
    recipe: Recipe  # resolved but for the weights of ``teachers``
    frozen: frozenset[str]  # networks that the method does not train
    teachers: tuple[str, ...]  # those that start from the independent run of the same seed

    @property
    def name(self) -> str:
        return run_name(self.method, self.seed)

    @property
    def path(self) -> Path:
        assert self.recipe.run_dir is not None
        return Path(self.recipe.run_dir)


def run_name(method: str, seed: int) -> str:
    return f"{method.replace(':', '-').replace(',', '-')}-seed{seed}"


def run(given: list[str]) -> None:
    """Parse, train what is not yet trained, write and print the tables."""
    name = given[0] if given and not given[0].startswith("-") else None
    if name is None and not {"-h", "--help"} & set(given):
        raise UsageError(
            "compare needs a recipe as its first argument: "
            f"{', '.join(shipped_recipes())} or a TOML file"
        )
    name = name or shipped_recipes()[0]
    default = Arguments(recipe=name, config=load_recipe(name))
    line = given if given[:1] == [name] else [name, *given]
    arguments = tyro.cli(Arguments, prog="bdkd compare", args=line, default=default)
    for key, remedy in (("seed", "--seeds"), ("run_dir", "--folder")):
        if getattr(arguments.config, key) != getattr(default.config, key):
            raise UsageError(f"--{key.replace('_', '-')} is not for compare: use {remedy}")

    folder = arguments.folder or Path("runs") / f"compare-{arguments.config.name}"
    methods, seeds = chosen_methods(arguments.methods), chosen_seeds(arguments.seeds)
    runs = plan_runs(arguments.config, methods, seeds, folder)
    jobs = arguments.jobs if arguments.jobs is not None else room_for(arguments.config)
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    command = shlex.join(["bdkd", "compare", *given])

    with locked(folder):
        outcomes = train_all(runs, jobs, folder, command, sys.stderr if arguments.json else None)
        failed = {name: outcome for name, outcome in outcomes.items() if outcome.code}
        listed = [run for run in runs if run.method in methods and run.name not in failed]
        if listed:
            report(listed, methods, folder, command, failed, arguments)
        if failed:
            first, outcome = next(iter(failed.items()))
            raise RunError(
                f"{len(failed)} of {len(runs)} runs failed; {first}: {outcome.message}"
                + (f" (the others: {', '.join(list(failed)[1:])})" if len(failed) > 1 else "")
                + "; mend that and give the same command again"
            )


# --- what to run ----------------------------------------------------------------------------------


def chosen_methods(given: Sequence[str]) -> list[str]:
    from bdkd.objectives import OBJECTIVES

    methods = list(given) or [TEACHERS, *(name for name in OBJECTIVES if name != TEACHERS)]
    doubled = [method for method in methods if methods.count(method) > 1]
    if doubled:
        raise UsageError(f"--methods has {doubled[0]!r} more than once")
    return methods


def chosen_seeds(given: Sequence[int]) -> list[int]:
    """One number is how many, several are which."""
    if not given or min(given) < 0:
        raise UsageError(f"--seeds must be a number of seeds or several seeds, got {list(given)}")
    seeds = list(range(max(1, given[0]))) if len(given) == 1 else list(given)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds must be different seeds, got {' '.join(map(str, seeds))}")
    return seeds


def parse_method(label: str, recipe: Recipe) -> ObjectiveConfig:
    """``kd:temperature=2`` as an objective, with every option set."""
    from bdkd.objectives import OBJECTIVES, resolve_options, switch_method

    name, _, text = label.partition(":")
    if name not in OBJECTIVES:
        raise UsageError(f"unknown method {name!r}: {nearest(name, list(OBJECTIVES))}")
    config = recipe.objective
    if name != config.name:
        config = switch_method(config, name)
    types = typing.get_type_hints(ObjectiveConfig)
    options: dict[str, Any] = {}
    for option in filter(None, text.split(",")):
        key, equals, value = option.partition("=")
        if key not in OBJECTIVES[name].options:
            known = sorted(OBJECTIVES[name].options)
            raise UsageError(f"--methods {label}: {name} has no option {key!r}: "
                             f"{nearest(key, known)}")  # fmt: skip
        if not equals:
            raise UsageError(f"--methods {label}: {key!r} needs a value, as in {key}=1")
        try:
            options[key] = msgspec.convert(value, types[key], strict=False)
        except msgspec.ValidationError as error:
            raise UsageError(f"--methods {label}: {key}: {error}") from error
    return resolve_options(dataclasses.replace(config, **options))


def plan_runs(
    recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], folder: Path
) -> list[PlannedRun]:
    """Every run, seed by seed, so that a comparison that is stopped is an even one; runs that only
    make teachers are among them.

    Raises:
        UsageError: a method, option or value that does not fit.
        RunError: a folder holds a run that was made otherwise.
    """
    from bdkd.training.run_folder import RunFolder

    objectives = {method: parse_method(method, recipe) for method in methods}
    frozen = {method: frozen_networks(recipe, own) for method, own in objectives.items()}
    teachers = {
        method: tuple(name for name in names if not _has_weights(recipe.networks[name]))
        for method, names in frozen.items()
    }
    if any(teachers.values()) and TEACHERS not in methods:
        objectives = {TEACHERS: parse_method(TEACHERS, recipe), **objectives}
        frozen[TEACHERS], teachers[TEACHERS] = frozenset(), ()
    runs = []
    for seed in seeds:
        for method, objective in objectives.items():
            resolved = dataclasses.replace(
                recipe, objective=objective, seed=seed,
                run_dir=str(folder / run_name(method, seed)),
            )  # fmt: skip
            check_recipe(resolved)
            runs.append(PlannedRun(method, seed, resolved, frozen[method], teachers[method]))
    for planned in runs:
        if (stored := RunFolder(planned.path)).config.exists():
            weights = {f"networks.{name}.weights" for name in planned.teachers}
            changed = set(differing_keys(stored.read_config(), planned.recipe))
            if changed := changed - weights - {"run_dir"}:
                raise RunError(
                    f"{planned.path} holds a run with other {', '.join(sorted(changed))}: choose "
                    "another --folder, or remove it"
                )
    return runs


def frozen_networks(recipe: Recipe, objective: ObjectiveConfig) -> frozenset[str]:
    """Networks that the method does not train.

    Raises:
        UsageError: the networks do not suit the method.
    """
    from bdkd.objectives import create_objective

    filled = {
        name: dataclasses.replace(network, weights=network.weights or "to be trained")
        for name, network in recipe.networks.items()
    }
    return create_objective(objective, filled).frozen


def _has_weights(network: NetworkConfig) -> bool:
    return bool(network.frozen or network.weights or network.options.get("pretrained"))


def room_for(recipe: Recipe) -> int:
    """Runs at a time that do not get into each other's way."""
    import torch

    if recipe.device.startswith("cuda") or (recipe.device == "auto" and torch.cuda.is_available()):
        return 1
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // (recipe.threads or torch.get_num_threads()))


# --- running --------------------------------------------------------------------------------------


def locked(folder: Path) -> IO[str]:
    """The folder, made, and ours until the file is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 - held by the caller
    except OSError as error:
        raise RunError(
            f"cannot write the folder {folder}: {error.strerror or error}; choose another --folder"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise RunError(
            f"another bdkd compare works in {folder}: wait for it or choose another --folder"
        ) from error
    return lock


def train_all(
    runs: Sequence[PlannedRun], at_once: int, folder: Path, command: str, stream: IO[str] | None
) -> dict[str, Outcome]:
    """Train what is not yet finished; how each run ended, by name."""
    from tqdm import tqdm

    from bdkd.training.run_folder import RunFolder
    from bdkd.training.signals import StopRequest

    outcomes = {run.name: Outcome(0) for run in runs if RunFolder(run.path).summary.exists()}
    by_name = {run.name: run for run in runs}
    bar = tqdm(total=len(runs), initial=len(outcomes), unit="run", disable=not sys.stderr.isatty(),
               dynamic_ncols=True)  # fmt: skip

    def say(text: str) -> None:
        bar.write(text, file=stream or sys.stdout) if not bar.disable else print(
            text, file=stream or sys.stdout, flush=True
        )

    broken: list[str] = []  # what is wrong with the recipe itself: then no run can go well
    foreign: list[RunError] = []  # a run that was trained on another data set than the others

    def done(job: Job, outcome: Outcome) -> None:
        outcomes[job.name] = outcome
        bar.update(1)
        count = f"[{len(outcomes)}/{len(runs)}] {job.name}"
        if outcome.code == 2:
            broken.append(outcome.message)
        elif outcome.code and stop.signal is None:
            say(f"{count}  failed: {outcome.message}")
        elif not outcome.code:
            say(f"{count}  {headline(read_summary(by_name[job.name]))}")
            try:
                refuse_other_data(
                    [
                        (str(run.path), read_summary(run).get("data"))
                        for run in runs
                        if run.name in outcomes and not outcomes[run.name].code
                    ]
                )
            except RunError as error:
                foreign.append(error)

    jobs = [
        Job(
            run.name, partial(prepare, run, folder), run.path / "output.log",
            (run_name(TEACHERS, run.seed),) if run.teachers and
            run_name(TEACHERS, run.seed) not in outcomes else (),
        )
        for run in runs
        if run.name not in outcomes
    ]  # fmt: skip
    try:
        with StopRequest() as stop:
            before = f"{len(outcomes)} of them finished before"
            say(f"{len(runs)} runs in {folder}, {before}, {at_once} at a time")
            run_jobs(
                jobs, at_once, done, lambda: stop.signal is not None or bool(broken or foreign)
            )
    finally:
        bar.close()
    if stop.signal is not None:
        finished = sum(RunFolder(run.path).summary.exists() for run in runs)
        raise Interrupted(
            stop.signal,
            f"stopped; {finished} of {len(runs)} runs are finished, the others saved where they "
            f"are; continue with the same command: {command}",
        )
    if broken:
        raise UsageError(broken[0])
    if foreign:
        raise foreign[0]
    return outcomes


def prepare(run: PlannedRun, folder: Path) -> list[str]:
    """Write the run's ``config.toml``, unless it is there; the command that trains or continues
    it."""
    from bdkd.training.run_folder import RunFolder, selected_checkpoint

    stored = RunFolder(run.path)
    if not stored.config.exists():
        teachers = folder / run_name(TEACHERS, run.seed)
        networks = dict(run.recipe.networks)
        for name in run.teachers:
            weights = str(selected_checkpoint(teachers))
            networks[name] = dataclasses.replace(networks[name], weights=weights)
        stored.path.mkdir(parents=True, exist_ok=True)
        stored.write_config(dataclasses.replace(run.recipe, networks=networks))
    return ["train", "--resume", "require", "--run-dir", str(run.path)]


def read_summary(run: PlannedRun) -> dict[str, Any]:
    """``RunError`` names a ``summary.json`` that is none."""
    path = run.path / "summary.json"
    try:
        summary = json.loads(path.read_text("utf-8"))
        if summary["networks"].keys() and summary["wall_seconds"] >= 0:
            return summary
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"cannot read {path}: remove it, and the same command writes it anew"
                       ) from error  # fmt: skip
    raise RunError(f"{path} holds no networks: remove it, and the same command writes it anew")


def headline(summary: Mapping[str, Any]) -> str:
    shown = "  ".join(
        f"{name} top-1 {100 * network['top1']:.2f}% ECE {100 * network['ece']:.2f}%"
        for name, network in summary["networks"].items()
    )
    return f"{shown}  {summary['wall_seconds']:.0f} s"


# --- telling --------------------------------------------------------------------------------------


def report(
    planned: Sequence[PlannedRun],
    methods: Sequence[str],
    folder: Path,
    command: str,
    failed: Mapping[str, Outcome],
    arguments: Arguments,
) -> None:
    """Write ``comparison.json``, ``.csv``, ``.md`` and ``.png``; print them."""
    from bdkd.evaluation import comparison
    from bdkd.evaluation.comparison_figure import comparison_figure
    from bdkd.training.checkpoint import write_atomically
    from bdkd.training.run_folder import to_json

    runs = [comparison.Run(run.method, run.seed, read_summary(run), run.frozen) for run in planned]
    refuse_other_data(
        [(str(plan.path), run.summary.get("data")) for run, plan in zip(runs, planned, strict=True)]
    )
    rows = comparison.compare(runs, methods)
    some = runs[0].summary
    notes = comparison.notes(methods[0], some["images"], rows)
    made = sorted({run.method for run in planned if run.teachers})
    if made:
        notes.append(
            f"{', '.join(made)}: the teacher is that of the run of {TEACHERS} with the same seed, "
            "trained before and frozen; the time that took is not in train s."
        )
    if failed:
        notes.append(f"Without the runs that failed: {', '.join(failed)}.")
    torch_version, device = some["torch"], some["device"]
    content = to_json(
        {
            "command": command,
            "recipe": some["recipe"],
            "methods": list(methods),
            "torch": torch_version,
            "device": device,
            "notes": notes,
            "failed": {name: outcome.message for name, outcome in failed.items()},
            "rows": [dataclasses.asdict(row) for row in rows],
            "runs": [
                {"method": run.method, "seed": run.seed, "folder": plan.path.name, **run.summary}
                for run, plan in zip(runs, planned, strict=True)
            ],
        },
        indent=2,
    )
    networks = list(dict.fromkeys((row.network, row.model, row.role) for row in rows))
    plain, marked = [], [f"# {some['recipe']}: {', '.join(methods)}", f"`{command}`"]
    for network, model, role in networks:
        head = f"{network} ({model}, {role})"
        tables = [comparison.results(rows, network), comparison.differences(rows, network)]
        for header, lines in tables:
            if lines:
                plain.append(f"{head}\n\n{table(header, lines)}")
                marked.append(f"## {head}" if not head.startswith("difference") else head)
                marked.append(comparison.to_markdown(header, lines))
            head = f"differences of {network} from {methods[0]}"
    marked += [*notes, f"torch {torch_version}, {device}.", "![seeds and means](comparison.png)"]

    texts = {"json": content, "csv": comparison.to_csv(rows), "md": "\n\n".join(marked)}
    for suffix, text in texts.items():
        write_atomically(folder / f"comparison.{suffix}", partial(_write_text, text))
    figure = folder / "comparison.png"
    try:
        comparison_figure(rows, figure, f"{some['recipe']}: test images")
    except OSError as error:
        raise RunError(
            f"cannot write {figure}: {error.strerror or error}; mend that and give the same "
            "command again (the tables are written)"
        ) from error
    if arguments.json:
        print(content)
        return
    print()
    print("\n\n".join(plain))
    print()
    for note in notes:
        print(textwrap.fill(note, 100))
    print(f"\ntables and figure    {folder}/comparison.md, .csv, .json, .png")


def _write_text(text: str, file: BinaryIO) -> None:
    file.write(f"{text.rstrip()}\n".encode())
