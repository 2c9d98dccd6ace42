"""Runs the suites, and reads what they left.

    python bench [SUITE ...] [--trials 20] [--threads 2] [--out FOLDER]
    python bench compare A B             # what changed between two files or folders of results
    python bench plot FOLDER [--out FOLDER]
    python bench history FOLDER [FOLDER ...] --out PNG

Without SUITE, all that this machine can run. See README.md beside this file.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # Compile in this process: workers that wait beside it would count as somebody else's work.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import machine
import results
from harness import race
from suites import SUITES, Settings, cannot_run, clock_of, device_of


def run(names: list[str], trials: int, seconds: float, budget: float, threads: int, quick: bool,
        out: Path) -> None:  # fmt: skip
    """Measure suites and write ``out/SUITE.json`` and ``out/SUITE.txt`` after every case."""
    out.mkdir(parents=True, exist_ok=True)  # refused now, not after minutes
    torch.set_num_threads(threads)
    until = time.monotonic() + budget
    for name in names:
        title, make = SUITES[name]
        device = device_of(name)
        settings = Settings(device, machine.last_level_cache(device), quick)
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
        ran_out = False
        clock = clock_of(name, quick)
        for case in make(settings):
            if ran_out := time.monotonic() > until:
                break
            measured = race(case, clock, trials, seconds)
            result["cases"].append(measured)
            result["others_share"] = neighbours.share()
            text.append(results.case_table(measured))
            print(f"\n{text[-1]}", flush=True)
            _leave(out, name, result, text)
        if ran_out:
            text.append("time ran out: the remaining cases were not run")
        if warning := results.busy_warning(result):
            text.append(warning)
        for line in text[len(result["cases"]) + 1 :]:
            print(f"\n{line}", flush=True)
        _leave(out, name, result, text)
    print(f"\n{', '.join(f'{name}.json' for name in names)} in {out}")


def _leave(out: Path, name: str, result: dict, text: list[str]) -> None:
    results.write(out / f"{name}.json", result)
    (out / f"{name}.txt").write_text("\n\n".join(text) + "\n", "utf-8")


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
        print("bench: interrupted; the cases that were done are kept", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python bench", description="Race the suites.",
                                     epilog=f"suites: {', '.join(SUITES)}")  # fmt: skip
    parser.add_argument("suites", nargs="*", choices=[*SUITES, []], metavar="SUITE")
    parser.add_argument("--trials", type=_positive(int), default=20, help="rounds a case (20)")
    parser.add_argument("--seconds", type=_positive(float), default=4.0,
                        help="of a case's rounds, once there are five (4)")  # fmt: skip
    parser.add_argument("--budget", type=_positive(float), default=1e9,
                        help="seconds after which no case begins (none)")  # fmt: skip
    parser.add_argument("--threads", type=_positive(int), default=torch.get_num_threads(),
                        help="torch's, for all contenders (torch's choice)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="every kind of case once, small")
    parser.add_argument("--out", type=Path, help="folder of the results (.benchmarks/DATE-COMMIT)")
    options = parser.parse_args(arguments)
    for name in options.suites:
        if reason := cannot_run(name):
            print(f"bench: {name} cannot run: {reason}", file=sys.stderr)
            return 1
    names = options.suites
    if not names:
        names = [name for name in SUITES if not cannot_run(name)]
        for name in SUITES.keys() - set(names):
            print(f"{name} is left out: {cannot_run(name)}")
    commit = machine.commit()
    dirty = "-changed" if commit["dirty"] else ""
    default = machine.ROOT / ".benchmarks" / f"{machine.now()[:10]}-{commit['id']}{dirty}"
    run(names, options.trials, options.seconds, options.budget, options.threads, options.quick,
        options.out or default)  # fmt: skip
    return 0


def _compare(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python bench compare", description="B beside A.")
    parser.add_argument("a", type=Path, metavar="A", help="file or folder of results")
    parser.add_argument("b", type=Path, metavar="B", help="file or folder of results")
    options = parser.parse_args(arguments)
    print(results.compare(results.read_all(options.a), results.read_all(options.b)))
    return 0


def _plot(arguments: list[str]) -> int:
    import figures

    parser = argparse.ArgumentParser(prog="python bench plot", description="Pictures of results.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of results")
    parser.add_argument("--out", type=Path, help="folder of the pictures (FOLDER)")
    options = parser.parse_args(arguments)
    for path in figures.draw_all(results.read_all(options.folder), options.out or options.folder):
        print(path)
    return 0


def _history(arguments: list[str]) -> int:
    import figures

    parser = argparse.ArgumentParser(prog="python bench history", description="Over commits.")
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
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
