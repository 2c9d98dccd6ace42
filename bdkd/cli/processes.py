"""Run several ``bdkd`` commands, each in a separate process."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from bdkd import cli
from bdkd.errors import RunError, UsageError
from bdkd.text import without_waiting

# On Linux, processes are forked from a server that has imported these modules once: a fork takes a
# hundredth of the time of importing torch. None of the modules starts a thread or uses a GPU when
# it is imported, which would break a fork. macOS does not support forking such a server.
PRELOADED = [
    "torch", "bdkd.cli.train", "bdkd.trainer", "bdkd.engine.components", "matplotlib.figure",
    "sklearn.datasets", "torch.utils.tensorboard",
]  # fmt: skip
_FORKS = sys.platform == "linux"
_POLL_SECONDS = 0.2  # between two calls of ``stop``
_END_SECONDS = 5.0  # between SIGTERM and the end of a process that ignores it


class Job(NamedTuple):
    """A command that runs after the jobs that it needs have succeeded."""

    name: str
    arguments: Callable[[], Sequence[str]]  # of ``bdkd``; called just before the command starts
    output: Path  # the command's output is appended to this file
    needs: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """The exit code of a command, and its error message if the code is not 0."""

    code: int
    message: str = ""


class _Running(NamedTuple):
    job: Job
    process: BaseProcess
    answer: Connection


def run_jobs(
    jobs: Sequence[Job], at_once: int, done: Callable[[Job, Outcome], None],
    stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Run jobs in their order, ``at_once`` of them concurrently.

    Args:
        done: called with every job that ended. A job whose needs failed ends without running.
        stop: called several times a second. If it returns True, no more jobs start, the running
            jobs get SIGTERM, and this function returns when they have ended.
    """
    context = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
    if _FORKS:
        multiprocessing.set_forkserver_preload(PRELOADED)
        with _sigint_blocked():
            forkserver.ensure_running()
    pending, running = list(jobs), list[_Running]()
    outcomes: dict[str, Outcome] = {}

    def end(job: Job, outcome: Outcome) -> None:
        outcomes[job.name] = outcome
        done(job, outcome)

    stopping = False
    try:
        while running or (pending and not stopping):
            if not stopping and stop():
                stopping = True
                for one in running:
                    one.process.terminate()
            while not stopping and len(running) < at_once:
                job = next((job for job in pending if outcomes.keys() >= set(job.needs)), None)
                if job is None:
                    break  # nothing is pending, or the pending jobs need running ones
                pending.remove(job)
                if failed := [name for name in job.needs if outcomes[name].code]:
                    end(job, Outcome(1, f"not run: it needs {failed[0]}, which failed"))
                    continue
                try:
                    running.append(_start(context, job, job.arguments()))
                except (RunError, UsageError) as error:
                    end(job, Outcome(*cli.outcome(error)))
            ready = wait([one.process.sentinel for one in running], timeout=_POLL_SECONDS)
            for one in [one for one in running if one.process.sentinel in ready]:
                running.remove(one)
                end(one.job, _outcome(one))
    finally:
        for one in running:  # after an error in this process or a second Ctrl-C
            one.process.kill()


def _start(context, job: Job, arguments: Sequence[str]) -> _Running:
    answer, remote = context.Pipe(duplex=False)
    given = (list(arguments), str(job.output), remote)
    process = context.Process(target=_run, args=given, name=job.name)
    # The server's children inherit its blocked SIGINT.
    with contextlib.nullcontext() if _FORKS else _sigint_blocked():
        process.start()  # may take seconds until the server has imported the modules
    remote.close()
    return _Running(job, process, answer)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT in processes that start in this context, even while they import. A terminal
    sends SIGINT to all processes, but only this one must handle it, after the context."""
    resource_tracker.ensure_running()  # starting it later would unblock SIGINT
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _outcome(one: _Running) -> Outcome:
    one.process.join()
    code = one.process.exitcode or 0
    with one.answer, contextlib.suppress(EOFError):  # the process ended without an answer
        return Outcome(*one.answer.recv())
    how = f"code {code}"
    if code < 0:
        how = signal.Signals(-code).name
        how += " (is there too little memory?)" if -code == signal.SIGKILL else ""
    code = 128 - code if code < 0 else code or 1
    return Outcome(code, f"the process ended with {how}; see its output in {one.job.output}")


def _run(arguments: list[str], output: str, answer: Connection) -> None:
    """Run one command in a new process."""
    log = without_waiting(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    signal.signal(signal.SIGTERM, _end)  # until the run handles it
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        cli.run(arguments)
        answer.send((0, ""))
    except Exception as error:
        traceback.print_exc()
        answer.send(cli.outcome(error))
    finally:
        sys.stdout.flush()


def _end(number: int, frame: FrameType | None) -> None:
    """End this process with ``SystemExit``, so that multiprocessing releases its semaphores.
    Otherwise the resource tracker prints a warning. If an import discards the exception, a timer
    ends the process."""
    timer = threading.Timer(_END_SECONDS, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
    raise SystemExit(128 + number)


def _stop_with_parent() -> None:
    """Send SIGTERM to this process when its parent has ended, for example because of SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
