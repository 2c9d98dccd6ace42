"""Time the loss, eager PyTorch, torch.compile and other packages (stage 2 of the GPU session).

    python bench/gpu/race.py OUT [--seconds 165] [--dry-run]

The first pass measures our loss and eager PyTorch at all sizes, and the second pass Liger's losses.
The third pass measures torch.compile, its default mode first, and orda-kernel, which starts from
hidden states. Each contender is timed in the same rounds as a copy of the same bytes and as our
loss. Its times are logged immediately.

During these passes, other processes compile the graphs of torch.compile into the cache that this
process reads. They are stopped during measurements. Requires kernels, bench and bench/gpu on
PYTHONPATH.
"""

import argparse
import ctypes
import functools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import Contender, DeviceClock, Sampler, WallClock
from losses import (
    _NO_CE,
    DTYPES,
    MODES,
    Loss,
    Race,
    Size,
    _heads,
    _kd,
    _kl_in_float64,
    ours,
    plain,
    plain_jsd,
)
from measurements import Log
from smoke import (
    COPY,
    SIZES,
    TAU,
    Machine,
    first_line,
    gradient_error,
    make_race,
    repeated,
    shown,
    timed,
)

DRY_SIZES = [Size(16, 10, "bf16"), Size(16, 10, "fp32")]
BASE = "bdkd_loss, backward"
KD_BASE = "bdkd_loss, student's KD alone"
CHECKED_ROWS = 256
AHEAD = 4  # processes that compile at a time, on 16 cores
LARGE = 2**29  # bytes of one network's logits; only few processes of this size fit into memory
HEADS_SIZES = [Size(4096, 1000, "bf16"), Size(8192, 32000, "bf16")]


class PooledClock(DeviceClock):
    """A DeviceClock whose CUDA graphs share one memory pool. This is safe because they never run at
    the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def sampler(self, contender: Contender, sets: int) -> Sampler:
        graph = functools.partial(torch.cuda.graph, pool=self.pool)
        with mock.patch.object(torch.cuda, "graph", graph):
            return super().sampler(contender, sets)


# Compiling ahead


def is_large(size: Size) -> bool:
    return size.rows * size.classes * DTYPES[size.dtype].itemsize > LARGE


class Ahead:
    """Processes that compile the graphs of torch.compile, one for each size. The most important
    sizes are first."""

    def __init__(self, options: argparse.Namespace, sizes: list[Size]) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.waiting, self.options, self.large = list(sizes), options, False
        self.running: dict[Size, subprocess.Popen] = {}
        self.log = options.out / "logs" if (options.out / "logs").exists() else options.out

    def start(self) -> None:
        """Replace processes that have ended by new ones."""
        self.running = {s: p for s, p in self.running.items() if p.poll() is None}
        for size in list(self.waiting):
            if len(self.running) >= AHEAD:
                return
            if is_large(size) and (not self.large or any(s.classes == size.classes
                                                       for s in self.running)):  # fmt: skip
                continue
            self.waiting.remove(size)
            command = [sys.executable, __file__, str(self.options.out), "--ahead", str(self.folder),
                       "--size", str(size.rows), str(size.classes), size.dtype]  # fmt: skip
            environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "3"}
            name = f"compile-{size.rows}x{size.classes}-{size.dtype}.log"
            with (self.log / name).open("w") as file:
                self.running[size] = subprocess.Popen(
                    command + ["--dry-run"] * self.options.dry_run, env=environment, stdout=file,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip

    def has_compiled(self, size: Size, mode: str) -> bool:
        """Return whether another process has compiled a mode, or will never compile it."""
        self.start()
        ended = size not in self.running and size not in self.waiting
        return ended or (not is_large(size) and self.marker(size, mode).exists())

    def marker(self, size: Size, mode: str) -> Path:
        return self.folder / f"{size.rows}-{size.classes}-{size.dtype}-{mode}"

    def signal(self, number: int) -> None:
        for process in self.running.values():
            if process.poll() is None:
                os.killpg(process.pid, number)

    def __enter__(self) -> None:
        """Stop the processes during a measurement."""
        self.signal(signal.SIGSTOP)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        time.sleep(0.03)  # wait until the kernels that they launched have ended

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        self.signal(signal.SIGKILL)


def compile_ahead(size: Size, folder: Path, machine: Machine) -> None:
    """Compile one size in every mode. Create a marker file after each mode."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the main process
    os.nice(5)
    race = make_race(size, machine)
    race.inputs = [race.inputs[0]._replace(into=(torch.empty(0), torch.empty(0)))]
    for mode in MODES:
        try:
            torch.compiler.reset()
            step = race.step(compiled(mode, machine))
            step(0)
            machine.synchronize()
            print(f"{mode}: compiled after {time.process_time():.0f} s of this process", flush=True)
        except Exception:
            traceback.print_exc()
        race.drop()
        machine.free()
        (folder / f"{size.rows}-{size.classes}-{size.dtype}-{mode}").touch()


def compiled(mode: str, machine: Machine) -> Loss:
    eager = functools.partial(plain, temperature=TAU)
    backend: dict[str, Any] = {"backend": "aot_eager"} if machine.dry_run else {"mode": mode}
    return torch.compile(eager, fullgraph=True, dynamic=False, **backend)


# Measuring


class Stage:
    def __init__(self, log: Log, machine: Machine, ahead: Ahead, until: float) -> None:
        self.log, self.machine, self.ahead, self.until, self.failed = log, machine, ahead, until, 0

    def left(self) -> float:
        return self.until - time.monotonic()

    def attempt(self, name: str, least: float, function: Callable[..., None], *more: Any) -> None:
        """Run one measurement. Log if it fails or is skipped because too little time is left."""
        if self.left() < least:
            self.log.add("skipped", name, f"{self.left():.0f} s left")
            return
        try:
            function(*more)
        except Exception as error:
            traceback.print_exc()
            self.log.add("failed", name, first_line(error))
            self.failed += 1
        try:
            self.machine.free()
        except RuntimeError as error:  # a device error: this process cannot use the GPU any more
            self.log.add("failed", f"the device, after {name}", first_line(error))
            self.failed += 1


class Field:
    """The copy and the base at one size. Other contenders are measured together with them."""

    def __init__(
        self, stage: Stage, race: Race, base: Contender, truth: Loss | None, units: int = 4
    ) -> None:
        self.stage, self.race, self.base = stage, race, base
        dry = stage.machine.dry_run
        self.clock: Any = WallClock(shortest=1e-4) if dry else PooledClock()
        self.rows = torch.arange(0, race.size.rows, max(1, race.size.rows // CHECKED_ROWS),
                                 device=stage.machine.device)  # fmt: skip
        self.samplers = {COPY: self.sampler(Contender(COPY, race.copy))}
        if truth is None:
            self.samplers[base.name] = self.sampler(base)
        else:
            self.measure(base, truth, units)

    def sampler(self, contender: Contender) -> Sampler:
        again, calls = repeated(contender.call, len(self.race.inputs), self.race.unit)
        capturable = contender.capturable
        found = self.clock.sampler(Contender("", again.call, capturable=capturable), calls)
        self.race.drop()  # free gradients in the pool for the next capture
        return found

    def error(self, contender: Contender, truth: Loss) -> float:
        """Return the largest error of a gradient, divided by its largest entry, on some rows."""
        x = self.race.inputs[0]
        self.race.drop()
        for buffer in x.into:
            buffer.fill_(float("nan"))
        contender.call(0)
        got = [v.grad for v in (x.student, x.teacher)]
        if got == [None, None]:
            got = list(x.into)
        exact = [v[self.rows].detach().double() for v in x[:2]]
        for v, gradient in zip(exact, got, strict=True):
            v.requires_grad_(gradient is not None)
        share = len(self.rows) / self.race.size.rows
        (truth(*exact, x.labels[self.rows]) * share).backward()
        pairs = [(g, v.grad) for g, v in zip(got, exact, strict=True)
                 if g is not None and v.grad is not None]  # fmt: skip
        error = max(gradient_error((g, g), (r, r), self.rows) for g, r in pairs)
        self.race.drop()
        return error

    def measure(self, contender: Contender, truth: Loss, units: int = 4, note: str = "") -> None:
        """Check one contender, time it in rounds with the copy and the base, and log the result.

        If a peer fails, most often because memory is exhausted, the failure is logged.
        """
        log, size = self.stage.log, shown(self.race.size)
        try:
            error = self.error(contender, truth)
            self.stage.machine.free()
            sampler = self.sampler(contender)
        except Exception as problem:
            if contender.kind != "peer":
                raise
            self.race.drop()
            log.add("skipped", contender.name, first_line(problem), size=size)
            self.stage.machine.free()
            return
        self.samplers.setdefault(self.base.name, sampler)
        racing = {key: self.samplers[key] for key in (COPY, self.base.name)}
        with self.stage.ahead:
            times = timed(racing | {contender.name: sampler}, 11, 0.8)
        self.race.drop()
        seconds = statistics.median(times[contender.name])

        def over(name: str) -> float:
            pairs = zip(times[contender.name], times[name], strict=True)
            return statistics.median(x / y for x, y in pairs)

        log.add("time", contender.name, 1e6 * seconds, "us", size=size, l2="flushed",
                of_copy=units / 4 / over(COPY), ratio=over(self.base.name), over=self.base.name,
                error=error, by=sampler.by, gb_per_s=units * 1e-9 * self.race.unit / seconds,
                note=note or contender.note)  # fmt: skip


def field(stage: Stage, size: Size, truth: Loss | None = None) -> Field:
    """Return our loss at one size as the base of other measurements. With ``truth``, also measure
    and log it."""
    race = make_race(size, stage.machine)
    base = Contender(BASE, race.step(ours(TAU, stage.machine.backend)), "ours")
    return Field(stage, race, base, truth)


def first_pass(stage: Stage, size: Size) -> None:
    truth = ours(TAU, "reference")
    mine = field(stage, size, truth)
    race = mine.race
    with mock.patch("losses.bdkd_loss_and_grad", functools.partial(
            losses_and_grad, backend=stage.machine.backend)):  # fmt: skip
        mine.measure(Contender("bdkd_loss_and_grad", race.at_once, "ours"), truth)
    eager = Contender("eager", race.step(functools.partial(plain, temperature=TAU)))
    mine.measure(eager, truth, note="torch.nn.functional; no statistics of the samples")


def losses_and_grad(*arguments: Any, **options: Any) -> Any:
    from bdkd_kernels import bdkd_loss_and_grad

    return bdkd_loss_and_grad(*arguments, **options)


def compile_pass(stage: Stage, size: Size, mode: str) -> None:
    torch.compiler.reset()
    mine, truth = field(stage, size), ours(TAU, "reference")
    begin = time.monotonic()
    contender = Contender(f"torch.compile {mode}", mine.race.step(compiled(mode, stage.machine)),
                          capturable=mode != "reduce-overhead")  # fmt: skip
    mine.measure(contender, truth, note="the eager loss, compiled; its graphs are its own"
                 if mode == "reduce-overhead" else "the eager loss, compiled")  # fmt: skip
    print(f"  {time.monotonic() - begin:.1f} s for {contender.name} at {size}", flush=True)
    torch.compiler.reset()


def peers_pass(stage: Stage, size: Size) -> None:
    """Measure Liger's KLDiv and JSD from raw logits, relative to only the student's divergence."""
    race = make_race(size, stage.machine, "kd")
    contenders, absent = _kd(race, ())
    for name, why in absent.items():
        stage.log.add("skipped", name, why, size=shown(size))
    kl = functools.partial(_kl_in_float64, temperature=TAU)
    truths: dict[str, Loss] = {
        "eager KL": kl, "Liger KLDiv": kl,
        "Liger JSD": functools.partial(plain_jsd, temperature=1.0),
    }  # fmt: skip
    mine = Contender(KD_BASE, race.step(ours(TAU, stage.machine.backend, **_NO_CE)), "ours",
                     note="both divergences, weighted; the other rows compute one")  # fmt: skip
    truth = ours(TAU, "reference", **_NO_CE)
    kd = Field(stage, race, mine, truth, 3)
    for contender in contenders:
        if contender.name in truths:
            kd.measure(contender, truths[contender.name], 3)


def heads_pass(stage: Stage, size: Size) -> None:
    """Measure orda-kernel from hidden states through two linear heads. Times are between events,
    without CUDA graphs."""
    race = make_race(size, stage.machine, "heads")
    contenders, absent = _heads(race, ())
    for name, why in absent.items():
        stage.log.add("skipped", name, why, size=shown(size))
    clock = stage.machine.clock()
    base: Sampler | None = None
    for contender in contenders:
        try:
            sampler = clock.sampler(contender, 1)
        except Exception as problem:
            stage.log.add("skipped", contender.name, first_line(problem), size=shown(size))
            continue
        base = base or sampler
        with stage.ahead:
            times = timed({"base": base, "this": sampler}, 9, 0.8)
        ratio = statistics.median(x / y for x, y in zip(times["this"], times["base"], strict=True))
        stage.log.add("time", contender.name, 1e6 * statistics.median(times["this"]), "us",
                      size=shown(size), ratio=ratio, over=contenders[0].name, by=sampler.by,
                      note=contender.note)  # fmt: skip
        race.drop()


def compile_passes(stage: Stage, sizes: list[Size], idle: list[Callable[[], None]]) -> None:
    """Measure the modes of torch.compile at every size, each as soon as it is compiled.

    While no compiled mode is ready, run the measurements in ``idle``.
    """
    waiting = [(size, mode) for mode in MODES for size in sizes]
    while waiting and stage.left() > 5:
        ready = [pair for pair in waiting if stage.ahead.has_compiled(*pair)]
        if ready:
            size, mode = ready[0]
            waiting.remove(ready[0])
            name = f"torch.compile {mode} at {shown(size)}"
            stage.attempt(name, 5, compile_pass, stage, size, mode)
        elif idle:
            idle.pop(0)()
        else:
            time.sleep(0.3)
    for size, mode in waiting:
        stage.log.add("skipped", f"torch.compile {mode}", "not compiled in time", size=shown(size))
    for measure in idle:
        measure()


def main(options: argparse.Namespace) -> int:
    log = Log(options.out, "2 race" + ", dry run" * options.dry_run)
    machine = Machine(options.dry_run)
    sizes = DRY_SIZES if options.dry_run else SIZES
    ahead = Ahead(options, sizes)
    stage = Stage(log, machine, ahead, log.start + options.seconds)
    try:
        ahead.start()
        for size in sizes:
            stage.attempt(f"first pass at {shown(size)}", 4, first_pass, stage, size)
            ahead.start()
        ahead.large = True  # eager no longer needs the memory
        ahead.start()
        for package in ("liger-kernel", "orda-kernel"):
            try:
                log.add("machine", package, version(package))
            except ImportError:
                log.add("machine", package, "not installed")
        for size in sizes:
            stage.attempt(f"peers at {shown(size)}", 6, peers_pass, stage, size)
        idle = [functools.partial(stage.attempt, f"heads at {shown(size)}", 6, heads_pass, stage,
                                  size)
                for size in (DRY_SIZES[:1] if options.dry_run else HEADS_SIZES)]  # fmt: skip
        compile_passes(stage, sizes, idle)
    finally:
        ahead.end()
    log.add("check", "stage 2 ended", f"{stage.failed} parts failed" if stage.failed else "ok")
    return 1 if stage.failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=165.0, help="time limit")
    parser.add_argument("--dry-run", action="store_true", help="run tiny sizes on the CPU")
    parser.add_argument("--ahead", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ahead is None:
        code = main(given)
        sys.stdout.flush()
        os._exit(code)  # do not wait for the compiler's processes
    asked = Size(int(given.size[0]), int(given.size[1]), given.size[2])
    compile_ahead(asked, given.ahead, Machine(given.dry_run))
    os._exit(0)
