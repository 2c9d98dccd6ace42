"""Run the suites, compare and draw their results. ``python bench --help`` shows every option; see
README.md in this folder for the method.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

if not torch.cuda.is_available():
    # Compile in this process: compile workers would count as load from other processes.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import comparison
import machine
import results
from harness import Case, Clock, race
from progress import Progress
from suites import SUITES, Settings, cannot_run, clock_of, device_of


def run(names: list[str], trials: int, seconds: float, budget: float, threads: int, quick: bool,
        out: Path) -> None:  # fmt: skip
    """Measure suites. Writes ``out/SUITE.json``, ``.csv`` and ``.txt`` after every case."""
    out.mkdir(parents=True, exist_ok=True)  # an error here is reported before minutes of work
    torch.set_num_threads(threads)
    until = time.monotonic() + budget
    for name in names:
        title, make_all = SUITES[name]
        device = device_of(name)
        makers = make_all(Settings(device, machine.last_level_cache(device), quick))
        neighbours = machine.Neighbours()
        result = {
            "schema": results.SCHEMA,
            "suite": name,
            "title": title,
            "date": machine.now(),
            "command": " ".join(["python bench", *sys.argv[1:]]),
            "commit": machine.commit(),
            "machine": machine.describe(threads, device),
            "others_share": None,
            "cases": [],
        }
        text = [f"{title}\n{results.head(result)}"]
        print(f"\n=== {text[0]}", flush=True)
        clock = clock_of(name, quick)
        with Progress(f"{name}: case", len(makers)) as progress:
            for make in makers:
                if time.monotonic() > until:
                    break
                progress.start("making its inputs")
                # No variable holds the case, so its memory is free before the next case is made.
                measured = _race(make(), clock, trials, seconds, progress)
                result["cases"].append(measured)
                result["others_share"] = neighbours.share()
                text.append(results.case_table(measured))
                progress.print(f"\n{text[-1]}")
                _leave(out, name, result, text)
        if left := len(makers) - len(result["cases"]):
            text.append(f"--budget is used up: {left} of {len(makers)} cases were not run")
        if warning := results.busy_warning(result):
            text.append(warning)
        for line in text[len(result["cases"]) + 1 :]:
            print(f"\n{line}", flush=True)
        _leave(out, name, result, text)
    files = ", ".join(f"{name}.json" for name in names)
    print(f"\n{files} are in {out}, with the same results as .csv and .txt")


def _race(case: Case, clock: Clock, trials: int, seconds: float, progress: Progress) -> dict:
    progress.name = case.name
    return race(case, clock, trials, seconds, progress.update)


def _leave(out: Path, name: str, result: dict, text: list[str]) -> None:
    results.write(out / f"{name}.json", result)
    results.write_text(out / f"{name}.csv", results.csv_text(result))
    results.write_text(out / f"{name}.txt", "\n\n".join(text) + "\n")


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["compare"]:
            return _compare(arguments[1:])
        if arguments[:1] == ["plot"]:
            return _plot(arguments[1:])
        if arguments[:1] == ["history"]:
            return _history(arguments[1:])
        return _run(arguments)
    except (results.ResultsError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; the results of finished cases are kept", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """Argument parser that prints an error as one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message}; see python bench --help\n")


USAGE = """\
python bench [SUITE ...] [options]         measure; all suites by default
       python bench compare A B                   compare two results
       python bench plot FOLDER [--out FOLDER]    draw the results as PNG files
       python bench history FOLDER ... --out PNG  draw our times over commits"""


def _help() -> str:
    suites = "\n".join(f"  {name:<20}  {title}" for name, (title, _) in SUITES.items())
    return f"suites:\n{suites}"


def _run(arguments: list[str]) -> int:
    parser = Parser(
        usage=USAGE, epilog=_help(),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 24, 80),
    )  # fmt: skip
    parser.add_argument("suites", nargs="*", help=argparse.SUPPRESS)
    add = parser.add_argument
    add("--trials", type=_positive(int), default=20, metavar="N",
        help="rounds per case (default: 20)")  # fmt: skip
    add("--seconds", type=_positive(float), default=4.0, metavar="S",
        help="time limit of a case after 5 rounds; hot: half (default: 4)")  # fmt: skip
    add("--budget", type=_positive(float), default=1e9, metavar="S",
        help="start no further case after S seconds (default: no limit)")  # fmt: skip
    add("--threads", type=_positive(int), default=torch.get_num_threads(), metavar="N",
        help="torch threads of every contender (default: torch's default)")  # fmt: skip
    add("--quick", action="store_true", help="run each kind of case once, at a small size")
    add("--out", type=Path, metavar="FOLDER",
        help="folder for the results (default: .benchmarks/DATE-COMMIT)")  # fmt: skip
    options = parser.parse_args(arguments)
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"no suite is named {name!r}: use {', '.join(SUITES)}")
        if reason := cannot_run(name):
            print(f"bench: {name} cannot run: {reason}", file=sys.stderr)
            return 1
    names = options.suites
    if not names:
        names = [name for name in SUITES if not cannot_run(name)]
        for name in SUITES.keys() - set(names):
            print(f"{name} is skipped: {cannot_run(name)}")
    commit = machine.commit()
    dirty = "-changed" if commit["dirty"] else ""
    default = machine.ROOT / ".benchmarks" / f"{machine.now()[:10]}-{commit['id']}{dirty}"
    run(names, options.trials, options.seconds, options.budget, options.threads, options.quick,
        options.out or default)  # fmt: skip
    return 0


def _compare(arguments: list[str]) -> int:
    parser = Parser(prog="python bench compare", description=comparison.__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="file or folder of results")
    parser.add_argument("b", type=Path, metavar="B", help="file or folder of results")
    options = parser.parse_args(arguments)
    print(comparison.compare(results.read_all(options.a), results.read_all(options.b)))
    return 0


def _plot(arguments: list[str]) -> int:
    import figures

    parser = Parser(prog="python bench plot", description="Draw results as PNG files.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of results")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: FOLDER)")
    options = parser.parse_args(arguments)
    for path in figures.draw_all(results.read_all(options.folder), options.out or options.folder):
        print(path)
    return 0


def _history(arguments: list[str]) -> int:
    import figures

    parser = Parser(prog="python bench history", description="Draw our times over commits.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="the picture, a PNG")
    options = parser.parse_args(arguments)
    figures.draw_history([results.read_all(folder) for folder in options.folders], options.out)
    print(options.out)
    return 0


def _positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
