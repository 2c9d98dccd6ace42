"""Measure the contenders of a case in one process, in turn.

A *case* is a computation at one size. Its *contenders* are implementations of this computation. A
contender is called with the number of a buffer set. Successive calls use successive sets. There are
so many sets that no set is in the last-level cache when it is used again: the caches are *cold*. A
case with ``"hot"`` in its ``caches`` is measured a second time, with the same set in every call.

After a warm-up, a *round* times every contender once. The order changes from round to round, so
that drift and busy periods affect all contenders alike. The result of a contender is the median,
the 20th and the 80th percentile of its times, and of the ratios of its times to the times of the
case's base *in the same round*.

A clock makes samplers. ``WallClock`` is for the CPU. ``DeviceClock`` is for a GPU: it times replays
of a CUDA graph between two events, or the calls themselves if no graph can be captured.
"""

import functools
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

Call = Callable[[int], object]  # takes the number of a buffer set

FEWEST_ROUNDS = 5
HOT_SHARE = 0.5  # time limit of the hot rounds, relative to the cold rounds
SHORTEST_SAMPLE = 2e-3  # seconds; the resolution and overhead of the clock are negligible


@dataclass(frozen=True)
class Contender:
    """An implementation of a case's computation."""

    name: str
    call: Call
    kind: Literal["ours", "peer", "limit"] = "peer"
    bytes: int | None = None  # least number of bytes that the computation reads and writes
    note: str = ""  # what it omits from the case's computation, or does in addition
    error: Callable[[], Mapping[str, float]] | None = None  # errors against float64
    capturable: bool = True  # whether a CUDA graph can capture it
    images: int | None = None  # number of images that a call trains on
    lead: int = 0  # untimed calls before a sample, which use up batches that a loader prefetched


@dataclass(frozen=True)
class Case:
    """A computation at one size. Ratios are relative to its base, the first contender of the kind
    "ours"."""

    name: str
    parameters: Mapping[str, Any]
    contenders: tuple[Contender, ...]
    sets: int = 1
    absent: Mapping[str, str] = field(default_factory=dict)  # peers that cannot run, with reasons
    forget: Callable[[], object] = lambda: None  # frees what calls have left in the buffer sets
    before: Callable[[], object] = lambda: None  # called before a sample, to free others' leftovers
    memory: bool = True  # whether to measure peak memory
    patience: float = 1.0  # factor of the time limit
    device: str = "cpu"  # device of its memory
    # Names of the measurements, and where their inputs are. The first measurement rotates through
    # the sets. Empty if the state of the caches is not controlled.
    caches: Mapping[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return next(c.name for c in self.contenders if c.kind == "ours")


MakeCase = Callable[[], Case]  # nothing is allocated or compiled before this call
Say = Callable[[str], object]  # takes a short description of the current activity


@dataclass(frozen=True)
class Sampler:
    """A warmed-up contender."""

    by: str
    calls: int  # number of calls in a sample
    sample: Callable[[], float]  # returns seconds per call, averaged over one sample


class Clock(Protocol):
    def sampler(self, contender: Contender, sets: int) -> Sampler: ...


class _Turns:
    """Call a contender with the numbers of the buffer sets in turn."""

    def __init__(self, sets: int) -> None:
        self.sets, self.next = sets, 0

    def run(self, call: Call, calls: int) -> None:
        for _ in range(calls):
            call(self.next)
            self.next = (self.next + 1) % self.sets


class WallClock:
    """Measure wall time.

    Args:
        now: returns the time in seconds.
        shortest: least duration of a sample, in seconds.
        settle: waits until all submitted work is done.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        shortest: float = SHORTEST_SAMPLE,
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self.now, self.shortest, self.settle = now, shortest, settle

    def sampler(self, contender: Contender, sets: int) -> Sampler:
        turns = _Turns(sets)
        turns.run(contender.call, 1)  # compiles
        self.settle()
        # Warm up caches and branch predictors: every set once or for 0.1 s, at least one call.
        taken, begin = 0, self.now()
        while taken == 0 or (taken < max(3, sets) and self.now() - begin < 0.1):
            turns.run(contender.call, 1)
            self.settle()
            taken += 1
        each = max((self.now() - begin) / taken, 1e-9)
        calls = max(1, round(self.shortest / each))

        def sample() -> float:
            turns.run(contender.call, contender.lead)
            self.settle()
            begin = self.now()
            turns.run(contender.call, calls)
            self.settle()
            return (self.now() - begin) / calls

        return Sampler("wall", calls, sample)


class DeviceClock:
    """Measure GPU time between two events."""

    def sampler(self, contender: Contender, sets: int) -> Sampler:
        turns = _Turns(sets)
        # torch requires a warm-up on a side stream before a capture.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            turns.run(contender.call, max(3, sets))
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if contender.capturable:
            graph = torch.cuda.CUDAGraph()
            turns.next = 0
            try:
                with torch.cuda.graph(graph):
                    turns.run(contender.call, sets)
            except RuntimeError:  # a graph cannot capture its synchronization or allocations
                torch.cuda.synchronize()
            else:
                return self._of("graph", graph.replay, sets)
        return self._of("events", lambda: turns.run(contender.call, sets), sets)

    def _of(self, by: str, run: Callable[[], object], calls: int) -> Sampler:
        run()
        once = self._seconds(run, 1)
        repeats = max(1, round(SHORTEST_SAMPLE / max(once, 1e-7)))
        return Sampler(by, calls * repeats, lambda: self._seconds(run, repeats) / (calls * repeats))

    def _seconds(self, run: Callable[[], object], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)


def race(
    case: Case,
    clock: Clock,
    trials: int = 20,
    seconds: float = 20.0,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure all contenders of a case. Return a dict for the JSON file.

    Stops after ``trials`` rounds, or after ``seconds`` once there are at least five rounds. The hot
    rounds take at most half as long. If a peer fails, its row contains the reason. If one of our
    contenders fails, the error is raised. ``say`` is called between samples.
    """
    rows: dict[str, dict[str, Any]] = {}
    samplers: dict[str, Sampler] = {}
    for number, contender in enumerate(case.contenders, 1):
        say(f"preparing {contender.name} ({number} of {len(case.contenders)})")
        row: dict[str, Any] = {
            "name": contender.name, "kind": contender.kind, "note": contender.note,
            "bytes": contender.bytes, "images": contender.images,
        }  # fmt: skip
        try:
            row["error"] = dict(contender.error()) if contender.error else None
            row["peak_bytes"] = _peak_bytes(case, contender) if case.memory else None
            samplers[contender.name] = clock.sampler(contender, case.sets)
        except Exception as error:  # other packages may raise anything; the row shows the reason
            row = {"name": contender.name, "kind": contender.kind, "note": contender.note,
                   "not_run": _reason(error, case, contender)}  # fmt: skip
        rows[contender.name] = row
    first = next(iter(case.caches), "")
    times = _rounds(samplers, trials, seconds * case.patience, case.before,
                    lambda text: say(f"{first} {text}".strip()))  # fmt: skip
    for name in times:
        rows[name] |= _statistics(case, samplers, times, name)
    if "hot" in [*case.caches][1:]:
        raced = [contender for contender in case.contenders if contender.name in samplers]
        samplers.clear()  # frees the CUDA graphs: the next graphs need their memory
        _race_hot(case, raced, rows, clock, trials, HOT_SHARE * seconds, say)
    absent = [
        {"name": name, "kind": "peer", "note": "", "not_run": why}
        for name, why in case.absent.items()
    ]
    return {
        "case": case.name,
        "parameters": dict(case.parameters),
        "sets": case.sets,
        "caches": dict(case.caches),
        "base": case.base,
        "rows": [*rows.values(), *absent],
    }


def _race_hot(
    case: Case, contenders: list[Contender], rows: dict[str, dict[str, Any]], clock: Clock,
    trials: int, seconds: float, say: Say,
) -> None:  # fmt: skip
    """Measure contenders with the first buffer set in every call. Add ``hot`` to their rows."""
    samplers: dict[str, Sampler] = {}
    for number, contender in enumerate(contenders, 1):
        say(f"preparing {contender.name}, hot ({number} of {len(contenders)})")
        try:
            # As many calls as with rotating sets, so that a CUDA graph has the same length.
            samplers[contender.name] = clock.sampler(
                replace(contender, call=functools.partial(_call_first, contender.call)), case.sets
            )
        except Exception as error:
            rows[contender.name]["hot"] = {"not_run": _reason(error, case, contender)}
    times = _rounds(samplers, trials, seconds * case.patience, case.before,
                    lambda text: say(f"hot {text}"))  # fmt: skip
    for name in times:
        rows[name]["hot"] = _statistics(case, samplers, times, name)


def _call_first(call: Call, i: int) -> object:
    return call(0)


def _reason(error: Exception, case: Case, contender: Contender) -> str:
    """Return why a peer was not run, in one line. Raise the error if the contender is ours."""
    if contender.kind != "peer":
        raise error
    if case.device == "cuda":
        torch.cuda.empty_cache()  # frees blocks that were allocated before the allocation failed
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {reason}"[:200]


def _statistics(
    case: Case, samplers: dict[str, Sampler], times: dict[str, list[float]], name: str
) -> dict[str, Any]:
    """Return the statistics of a contender's rounds."""
    contenders = {contender.name: contender for contender in case.contenders}
    ratios = [a / b for a, b in zip(times[name], times[case.base], strict=True)]
    found = {
        "trials": len(times[name]), "calls": samplers[name].calls, "by": samplers[name].by,
        "seconds": spread(times[name]), "ratio": spread(ratios),
    }  # fmt: skip
    limit = next((c.name for c in case.contenders if c.kind == "limit" and c.name in times), None)
    useful = contenders[name].bytes
    if useful is not None and limit is not None:
        # Useful bytes per second, as a share of those of the copy in the same rounds.
        of_copy = useful / contenders[limit].bytes  # type: ignore[operator]
        found["of_copy"] = statistics.median(
            of_copy * copied / taken
            for copied, taken in zip(times[limit], times[name], strict=True)
        )
    return found


def _rounds(
    samplers: dict[str, Sampler], trials: int, seconds: float, before: Callable[[], object],
    say: Say = lambda text: None,
) -> dict[str, list[float]]:  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in samplers}
    names = list(samplers)
    until = time.monotonic() + seconds
    gc.collect()
    gc.disable()
    try:
        for done in range(trials):
            if done >= FEWEST_ROUNDS and time.monotonic() > until:
                break
            say(f"round {done + 1} of at most {trials}")
            # Rotate the order, and reverse it in every other round, so that no contender always
            # runs after the same one.
            turn = done // 2 % len(names)
            order = names[turn:] + names[:turn]
            for name in reversed(order) if done % 2 else order:
                before()
                times[name].append(samplers[name].sample())
            gc.collect(0)
    finally:
        gc.enable()
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Return the median, the 20th and the 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": low, "p80": high}


def _peak_bytes(case: Case, contender: Contender) -> int:
    """Return the peak bytes of tensors during a warmed-up call, above the bytes before it."""
    contender.call(0)
    case.forget()
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender.call(0)
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        peak = cpu_peak_bytes(lambda: contender.call(0))
    case.forget()
    return peak


def cpu_peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak bytes of CPU tensors during a call, from the profiler's record of torch's
    allocator.

    Memory that a library allocates itself is not included, such as the scratch memory of the native
    kernel: one row of exponentials per thread.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without_usdt_lines(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        result = call()  # the result stays alive, because it is part of the peak
    del result
    results = profile.profiler.kineto_results if profile.profiler else None
    assert results is not None
    memory = [event for event in results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(memory, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextmanager
def _without_usdt_lines() -> Iterator[None]:
    """Suppress the "USDT:..." lines that torch 2.13's profiler writes to stderr at every start and
    stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file.read().decode(errors="replace").splitlines():
                if not line.startswith("USDT:"):
                    print(line, file=sys.stderr)
