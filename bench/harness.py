"""How everything here is measured: the contenders of a case race in one process, in turn.

A *case* is a piece of work at one size; its *contenders* do it. Each is called with the number of
a buffer set. Successive calls take successive sets, so many that no set is in the last-level cache
when its turn comes again: *cold*. A case with ``"hot"`` in its ``caches`` is measured a second time
with one set in every call.

After a warm-up, a *round* times every contender once. The order changes from round to round, so
that drift and busy periods affect all contenders alike. The result of a contender is the median of
its rounds with the 20th and 80th percentile, and the same three of its ratio to the case's base
*in the same round*.

A clock makes samplers: ``WallClock`` for the CPU, ``DeviceClock`` for a GPU (a replay of a CUDA
graph between two events, or the calls between two events where no graph can be captured).
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
HOT_SHARE = 0.5  # of the time of the cold rounds
SHORTEST_SAMPLE = 2e-3  # seconds: a clock's granularity and a call to it vanish in that


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work."""

    name: str
    call: Call
    kind: Literal["ours", "peer", "limit"] = "peer"
    bytes: int | None = None  # that the work has to read and write, at the least
    note: str = ""  # what it leaves out of the case's work, or does on top of it
    error: Callable[[], Mapping[str, float]] | None = None  # against float64
    capturable: bool = True  # by a CUDA graph
    images: int | None = None  # that a call trains on
    lead: int = 0  # calls before a sample, untimed: they use up what was made ready meanwhile


@dataclass(frozen=True)
class Case:
    """Work at one size; ratios are over the first contender of the kind "ours"."""

    name: str
    parameters: Mapping[str, Any]
    contenders: tuple[Contender, ...]
    sets: int = 1
    absent: Mapping[str, str] = field(default_factory=dict)  # peers that cannot run here: why
    forget: Callable[[], object] = lambda: None  # drops what calls have left in the buffer sets
    before: Callable[[], object] = lambda: None  # a sample: or it would pay for what others left
    memory: bool = True  # whether peak memory means something here
    patience: float = 1.0  # times as long as other cases may take
    device: str = "cpu"  # where its memory lies
    # The measurements by name and where their inputs are; the first one rotates through the sets.
    # Empty where the state of the caches is not controlled.
    caches: Mapping[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        return next(c.name for c in self.contenders if c.kind == "ours")


MakeCase = Callable[[], Case]  # allocates and compiles nothing before it is called
Say = Callable[[str], object]  # takes a few words about what is being done


@dataclass(frozen=True)
class Sampler:
    """A warmed-up contender."""

    by: str
    calls: int  # a sample's
    sample: Callable[[], float]  # seconds a call, averaged over one sample's calls


class Clock(Protocol):
    def sampler(self, contender: Contender, sets: int) -> Sampler: ...


class _Turns:
    """The numbers of the buffer sets, round and round."""

    def __init__(self, sets: int) -> None:
        self.sets, self.next = sets, 0

    def run(self, call: Call, calls: int) -> None:
        for _ in range(calls):
            call(self.next)
            self.next = (self.next + 1) % self.sets


class WallClock:
    """Real time; ``now`` returns seconds, ``settle`` when the work that was asked for is done."""

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
        # Caches and branch predictors: every set once, or a tenth of a second; once if it is slow.
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
    """GPU time between two events."""

    def sampler(self, contender: Contender, sets: int) -> Sampler:
        turns = _Turns(sets)
        # torch asks for a warm-up on a side stream before a capture.
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
            except RuntimeError:  # it syncs, or allocates as no graph may: the row says "events"
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
    """Measure all contenders of a case. Returns a plain dict, as it is written to the JSON.

    Stops after ``trials`` rounds, or after ``seconds`` once there are at least five rounds. The hot
    rounds take at most half as long. A peer that fails is a row that says why; a failure of ours
    is raised. ``say`` is called between samples.
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
        except Exception as error:  # whatever a foreign package raises is its row's content
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
        samplers.clear()  # frees the CUDA graphs, whose memory the next ones need
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
    """Measure contenders with the first buffer set in every call. Adds ``hot`` to their rows."""
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
    """Why a peer was not run, in one line. Raises the error if the contender is ours."""
    if contender.kind != "peer":
        raise error
    if case.device == "cuda":
        torch.cuda.empty_cache()  # what an allocation that failed had gathered
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {reason}"[:200]


def _statistics(
    case: Case, samplers: dict[str, Sampler], times: dict[str, list[float]], name: str
) -> dict[str, Any]:
    """What the rounds say about a contender."""
    contenders = {contender.name: contender for contender in case.contenders}
    ratios = [a / b for a, b in zip(times[name], times[case.base], strict=True)]
    found = {
        "trials": len(times[name]), "calls": samplers[name].calls, "by": samplers[name].by,
        "seconds": spread(times[name]), "ratio": spread(ratios),
    }  # fmt: skip
    limit = next((c.name for c in case.contenders if c.kind == "limit" and c.name in times), None)
    useful = contenders[name].bytes
    if useful is not None and limit is not None:
        # Useful bytes a second, as a share of those of the copy in the same rounds.
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
            # Turned and, every other time, reversed: nobody always runs after the same neighbour.
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
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return {"median": values[0], "p20": values[0], "p80": values[0]}
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": low, "p80": high}


def _peak_bytes(case: Case, contender: Contender) -> int:
    """Most bytes of tensors that a warmed-up call has alive at once, above what was there."""
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
    """The same on the CPU, from the profiler's record of torch's allocator.

    What a library allocates beside it is not seen (the native kernel's scratch: a row of
    exponentials a thread).
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without_usdt_lines(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        result = call()  # kept alive: it is part of the peak
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
    """torch 2.13's profiler writes "USDT:..." to the error stream at every start and stop."""
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
