"""The command line: ``bdkd COMMAND``. A failure prints one line; ``--debug`` prints a traceback."""

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from bdkd.cli.streams import open_closed_streams
from bdkd.errors import Interrupted, RunError, UsageError
from bdkd.extras import bdkd_version, missing_packages
from bdkd.interrupts import exit_now, is_interrupted, remember_interrupt

COMMANDS = {
    "train": "train the networks of a recipe together",
    "benchmark": "measure the speed and memory of training steps, or of exported files",
    "evaluate": "evaluate the networks of a run, or an exported network",
    "compare": "compare several objectives and seeds on one recipe",
    "tune": "choose options of objectives by their accuracy on validation images",
    "report": "write one HTML page about runs: results, curves, diagrams",
    "update-bn": "recompute the batch norm statistics of a run's networks",
    "export": "export one network of a run as ONNX, torch.export or safetensors",
    "recipes": "list the shipped recipes, or print one to start your own",
    "models": "list the networks of bdkd, timm and torchvision",
    "data": "download a data set, or check one",
    "completion": "print a script that completes command lines in bash, zsh or fish",
    "doctor": "show what is installed on this machine, and how to install the rest",
}

LONGEST = 2000  # maximum number of characters of a message


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with 0, 1 (failure), 2 (wrong usage) or 128 + n (signal n)."""
    open_closed_streams()
    if message := missing_packages():
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one line for each machine under torchrun
            print(f"bdkd: {message}", file=sys.stderr)
        sys.exit(1)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if os.environ.get("NO_COLOR"):  # https://no-color.org; tyro reads another variable
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    with remember_interrupt():
        try:
            run(given)
            code = 0
        except Exception as error:
            code = _report_interrupt() if is_interrupted() else _report(error, debug)
        except KeyboardInterrupt:
            code = _report_interrupt()
    if arguments is None:  # not called from Python
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command has ended
    if "RANK" in os.environ:
        from bdkd.distributed.launch import exit_rank, is_initialized

        if is_initialized():
            exit_rank(code)
    if code == 130 and is_interrupted() and arguments is None:
        exit_now(code)
    if code:  # else return, so that Python callers can continue
        sys.exit(code)


def _report_interrupt() -> int:
    print("bdkd: interrupted", file=sys.stderr)
    return 130


def _report(error: Exception, debug: bool) -> int:
    """Print an error, and return the exit code."""
    if debug:
        traceback.print_exc()
    if isinstance(error, BrokenPipeError):
        # The reader has closed the pipe, so do not print. 128 + SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    code, message = outcome(error)
    if "RANK" in os.environ:  # started by torchrun together with other ranks
        from bdkd.distributed.launch import report_failure

        if not report_failure(error):
            return code
    print(f"bdkd: {_one_line(message)}", file=sys.stderr)
    return code


def _one_line(message: str) -> str:
    """Escape the control characters of a message, such as a line feed in a file name, and shorten
    long values in it."""
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in message)
    text = "".join(escaped)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def outcome(error: Exception) -> tuple[int, str]:
    """Return the exit code of an error, and the line to print."""
    if isinstance(error, UsageError | RunError):
        return 2 if isinstance(error, UsageError) else 1, str(error)
    if isinstance(error, Interrupted):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):
        return 1, f"cannot use {error.filename}: {error.strerror}; give another path, or fix it"
    if isinstance(error, OSError) and error.strerror:  # of a stream, such as standard output
        return 1, f"cannot read or write a stream: {error.strerror}; fix this and try again"
    text = " ".join(str(error).split())[:500]
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        what = f" ({text})" if isinstance(error, MemoryError) and text else ""
        return 1, f"not enough memory{what}: use smaller networks, images, batches or counts"
    return 1, f"{type(error).__name__}: {text} (--debug shows where)"


def take_plugins(given: list[str]) -> list[str]:
    """Import the plugins that ``--plugin NAME`` names, and return the other arguments."""
    from bdkd.plugins import load_plugins

    others, names, arguments = [], [], iter(given)
    for argument in arguments:
        option, equals, name = argument.partition("=")
        if option != "--plugin":
            others.append(argument)
            continue
        name = name if equals else next(arguments, "")
        if not name or name.startswith("-"):
            raise UsageError("--plugin needs a module or a .py file: --plugin my_plugin")
        names.append(name)
    load_plugins(names)
    return others


def run(given: list[str]) -> None:
    """Run a command. Each command is a module with a function ``run``."""
    given = take_plugins(given)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return
    if given[0] == "--version":
        print(f"bdkd {bdkd_version()}")
        return
    command, *rest = given
    if command not in COMMANDS:
        from bdkd.config import nearest

        options = ["--version", "--help", "--debug", "--plugin"]
        known = [*COMMANDS, *(options if command.startswith("-") else [])]
        raise UsageError(f"unknown command {command!r}: {nearest(command, known)}")
    try:
        import_module(f"bdkd.cli.{command.replace('-', '_')}").run(rest)
    finally:
        if {"-h", "--help"} & set(rest):
            print("Every command has the options --plugin MODULE and --debug; see bdkd --help.")


def usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join([
        "usage: bdkd COMMAND [options]   (bdkd COMMAND --help lists the options)",
        "",
        *(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()),
        "",
        "  --plugin MODULE (import a module or .py file that registers objectives, models, ...),",
        "  --version, --debug (print tracebacks of failures)",
    ])  # fmt: skip
