"""Many ``bdkd`` commands, a process each, some at a time; stopped together, each by itself."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from bdkd import cli
from bdkd.errors import RunError, UsageError

# Imported once, by the server that the processes are forked from: torch and its company take
# seconds. None of them starts a thread or touches a GPU when imported; a fork would not bear that.
PRELOADED = [
    "torch", "bdkd.cli.train", "bdkd.trainer", "bdkd.engine.components", "matplotlib.figure",
    "sklearn.datasets", "torch.utils.tensorboard",
]  # fmt: skip
_POLL_SECONDS = 0.2  # between looks at whether we were asked to stop


@dataclass(frozen=True)
class Job:
    """One command, to be run once those that it needs have ended well."""

    name: str
    arguments: Callable[[], Sequence[str]]  # of ``bdkd``; asked for just before it starts
    output: Path  # where its output goes, after what is there
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a command ended: exit code 0, or its one line."""

    code: int
    message: str = ""


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    answer: Connection


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    done: Callable[[Job, Outcome], None],
    stop: Callable[[], bool],
) -> None:
    """Run the jobs in their order, ``at_once`` at a time.

    Args:
        done: told of every job that ended; of one whose needs failed, without it being run.
        stop: asked several times a second; once it says so, nothing new is started, SIGTERM goes to
            what runs, and this returns when all have ended.
    """
    # A fork of a bare server costs a hundredth of an import of torch; macOS does not bear it.
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
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
            while not stopping and pending and len(running) < at_once:
                index = next((i for i, job in enumerate(pending) if _ready(job, outcomes)), None)
                if index is None:
                    break  # all wait for one that runs
                job = pending.pop(index)
                failed = [name for name in job.needs if outcomes[name].code]
                if failed:
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
        for one in running:  # an error here, or a second Ctrl-C: at once
            one.process.kill()


def _ready(job: Job, outcomes: dict[str, Outcome]) -> bool:
    return all(name in outcomes for name in job.needs)


def _start(context, job: Job, arguments: Sequence[str]) -> _Running:
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_run, args=(list(arguments), str(job.output), theirs), name=job.name
    )
    if sys.platform == "linux":
        process.start()  # may wait for seconds until the server has imported all it should
    else:
        with _sigint_blocked():
            process.start()
    theirs.close()
    return _Running(job, process, answer)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A process that is started here never sees a SIGINT, not even while it imports: a Ctrl-C goes
    to every process of a terminal, and is for the one that started them to pass on. That one gets
    it when this ends."""
    resource_tracker.ensure_running()  # else it is started meanwhile, and unblocks SIGINT
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _outcome(one: _Running) -> Outcome:
    one.process.join()
    code = one.process.exitcode or 0
    try:
        return Outcome(*one.answer.recv())
    except EOFError:  # it ended without a word
        pass
    finally:
        one.answer.close()
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (is there too little memory?)" if -code == signal.SIGKILL else ""
        return Outcome(128 - code, f"ended by {name}{hint}; its output is in {one.job.output}")
    return Outcome(code or 1, f"ended with code {code}; its output is in {one.job.output}")


def _run(arguments: list[str], output: str, answer: Connection) -> None:
    """In the process: one command, as the command line would run it."""
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    threading.Thread(target=_stop_with_parent, daemon=True).start()

    try:
        cli.run(arguments)
    except Exception as error:
        import traceback

        traceback.print_exc()  # to the output; the line goes to whoever started us
        answer.send(cli.outcome(error))
    else:
        answer.send((0, ""))
    finally:
        sys.stdout.flush()


def _stop_with_parent() -> None:
    """Whoever started us may be killed: then we stop as if asked to."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
