"""The command line: ``bdkd COMMAND``. Failures are one line; ``--debug`` shows where they arose."""

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from bdkd.errors import Interrupted, RunError, UsageError
from bdkd.extras import missing_packages

COMMANDS = {
    "train": "train the networks of a recipe together",
    "evaluate": "accuracy and calibration of a run's networks, or of an exported one",
    "compare": "several methods and seeds on one recipe, side by side",
    "report": "one HTML page of runs: results, curves, diagrams",
    "update-bn": "recompute the batch norm statistics of a run's networks",
    "export": "one network of a run as ONNX, torch.export or safetensors",
    "data": "bring a data set here, or look one through",
    "doctor": "what this machine can do, and how to bring what is missing",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0; 1 for a failure; 2 for wrong usage; 128 + n after signal n."""
    _require_trainer()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if os.environ.get("NO_COLOR"):  # https://no-color.org; tyro, imported later, has its own name
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    try:
        run(given)
        code = 0
    except Exception as error:
        code = _report(error, debug)
    except KeyboardInterrupt:
        print("bdkd: interrupted", file=sys.stderr)
        code = 130
    _exit(code)


def _require_trainer() -> None:
    """Exit with 1 and one line if the extra ``bdkd[train]`` is not installed."""
    if message := missing_packages():
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a machine under torchrun
            print(f"bdkd: {message}", file=sys.stderr)
        sys.exit(1)


def _report(error: Exception, debug: bool) -> int:
    """Say what failed; the exit code."""
    if debug:
        traceback.print_exc()
    if isinstance(error, BrokenPipeError):
        # The reader of our output has left: nothing more can be said to it. 128 + SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    code, message = outcome(error)
    if _this_rank_speaks(error):
        print(f"bdkd: {message}", file=sys.stderr)
    return code


def _exit(code: int) -> None:
    """Leave with a code; success by returning, for a caller in Python."""
    if "RANK" in os.environ:
        from bdkd.distributed.launch import exit_rank, is_initialized

        if is_initialized():
            exit_rank(code)
    if code:
        sys.exit(code)


def _this_rank_speaks(error: Exception) -> bool:
    if "RANK" not in os.environ:
        return True
    from bdkd.distributed.launch import report_failure  # torchrun started this process and others

    return report_failure(error)


def outcome(error: Exception) -> tuple[int, str]:
    """Exit code and the one line to print."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, RunError):
        return 1, str(error)
    if isinstance(error, Interrupted):
        return error.exit_code, str(error)
    text = " ".join(str(error).split())[:500]
    return 1, f"{type(error).__name__}: {text} (--debug shows where)"


def run(given: list[str]) -> None:
    """Dispatch to a command's module."""
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return
    if given[0] == "--version":
        print(f"bdkd {version('bdkd')}")
        return
    command, *rest = given
    if command not in COMMANDS:
        from bdkd.config import nearest

        known = [*COMMANDS, *(["--version", "--help", "--debug"] if command[0:1] == "-" else [])]
        raise UsageError(f"unknown command {command!r}: {nearest(command, known)}")
    import_module(f"bdkd.cli.{command.replace('-', '_')}").run(rest)


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: bdkd COMMAND [options]   (bdkd COMMAND --help tells them)",
            "",
            *lines,
            "",
            "  --version, --debug (tracebacks of failures)",
        ]
    )
