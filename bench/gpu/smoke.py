"""Check the Triton kernels on a GPU, and time them (stage 1 of the GPU session).

    python bench/gpu/smoke.py OUT [--seconds 80] [--dry-run]

At each size, this checks that every element is written, that 64 rows agree with float64, and that
gradients written over the logits have the same bits. It times a call and a copy of the same bytes,
and then the host's part of a call. Requires kernels, bench and bench/gpu on PYTHONPATH.
"""

import argparse
import functools
import gc
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import losses
import prepare
import torch
from bdkd_kernels import bdkd_loss, bdkd_loss_and_grad
from bdkd_kernels.options import STATISTICS
from harness import Contender, DeviceClock, Sampler, WallClock, _rounds
from losses import Race, Size
from measurements import Log
from torch import Tensor

SIZES = [Size(*size) for size in prepare.SIZES]
REDUCTION_SIZES = [Size(*size) for size in prepare.REDUCTION_SIZES]
HOST_SIZES = [(128, 100), (1024, 1000)]
DRY_SIZES = [Size(64, 10, "bf16"), Size(32, 100, "fp32")]
TAU = 4.0
COPY = "copy of both logits into both gradients"
LAST_KERNEL = "bdkd_loss_and_grad"
# Allowed error of a gradient over its largest entry: half a unit in the last place of the storage
# type plus the error of float32 arithmetic. Allowed error of a statistic over its largest value.
GRADIENT_TOLERANCE = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 2e-5}
STATISTICS_TOLERANCE = 2e-4


class Machine:
    """The measured device, or the CPU in a dry run."""

    def __init__(self, dry_run: bool) -> None:
        self.device, self.backend = ("cpu", "reference") if dry_run else ("cuda", "triton")
        self.dry_run = dry_run
        self.l2 = 2**20
        if not dry_run:
            self.l2 = torch.cuda.get_device_properties(0).L2_cache_size

    def clock(self) -> Any:
        return WallClock(shortest=1e-4) if self.dry_run else DeviceClock()

    def synchronize(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if not self.dry_run:
            torch.cuda.empty_cache()
            # If the capture of a CUDA graph fails, its stream remains the current stream.
            torch.cuda.set_stream(torch.cuda.default_stream())


def shown(size: Size) -> str:
    return f"{size.rows} x {size.classes} {size.dtype}"


def buffer_sets(bytes_a_set: int, cache: int) -> int:
    """Return the number of buffer sets that keeps the data of each call out of L2. One set is
    enough if it is 16 times as large as L2."""
    return 1 if bytes_a_set >= 16 * cache else max(2, -(-2 * cache // bytes_a_set))


def make_race(size: Size, machine: Machine, work: str = "both") -> Race:
    with mock.patch.object(losses, "buffer_sets", buffer_sets):
        return Race(size, work, machine.device, machine.l2)


def repeated(call: Callable[[int], object], sets: int, unit: int) -> tuple[Contender, int]:
    """Return a contender and its number of calls. Small sizes are repeated, so that a CUDA graph is
    long enough."""
    calls = sets * max(1, 24 // sets) if unit < 2**26 else sets
    return Contender("", lambda i: call(i % sets)), calls


# Correctness


def loss_and_grad(race: Race, machine: Machine, i: int, reduction: str = "mean") -> Any:
    s, t, y, grads = race.inputs[i]
    return bdkd_loss_and_grad(s, t, y, temperature=TAU, reduction=reduction, grads=grads,
                              backend=machine.backend)  # fmt: skip


def truth(race: Race, rows: Tensor) -> tuple[Any, Tensor, Tensor]:
    """Return the output and the gradients of the reference for some rows, in float64. The gradients
    are those of the mean over all rows."""
    x = race.inputs[0]
    s, t = (v[rows].detach().double().requires_grad_() for v in x[:2])
    out = bdkd_loss(s, t, x.labels[rows], temperature=TAU, reduction="sum", backend="reference")
    ((out.student + out.teacher) / race.size.rows).backward()
    assert s.grad is not None
    assert t.grad is not None
    return out, s.grad, t.grad


def gradient_error(got: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], rows: Tensor) -> float:
    """Return the largest error of both gradients, each divided by its largest entry. NaN stays
    NaN."""
    errors = [((x[rows].double() - r).abs().max() / r.abs().max()).item()
              for x, r in zip(got, right, strict=True)]  # fmt: skip
    return max(errors) if all(e == e for e in errors) else float("nan")


def statistics_error(got: Tensor, right: Tensor) -> tuple[float, str]:
    """Return the largest error of a statistic divided by its largest value, and its name.

    The weights of both divergences are compared only in rows whose entropies differ by more than
    rounding.
    """
    errors = {}
    for name, x, r in zip(STATISTICS, got.double(), right, strict=True):
        off = (x - r).abs()
        if name in ("forward_weight", "reverse_weight"):
            off = off[(right[2] - right[3]).abs() > 1e-4 * right[2].abs()]
        most = off.max().item() if off.numel() else 0.0
        errors[name] = most / max(r.abs().max().item(), 1e-6)
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else 1e30)
    return errors[worst], worst


def mean_error(out: Any, gamma: float = 2.0) -> float:
    """Return the relative error of both means against the sums of the rows' statistics in
    float64."""
    F, R, _, _, ce_s, ce_t, d1, d2 = out.stats.table[:8].double()
    student = (ce_s + TAU**2 * (d1 * F + d2 * R)).mean().item()
    teacher = (ce_t + TAU**2 * R).mean().item()
    return max(abs(out.student.item() / student - 1), abs(out.teacher.item() / teacher - 1))


def check(race: Race, machine: Machine, log: Log, name: str, rows_checked: int) -> bool:
    """Check one call on poisoned buffers. Return whether all checks pass."""
    size, details = race.size, {"size": shown(race.size)}
    ds, dt = race.inputs[0].into
    ds.fill_(float("nan"))
    dt.fill_(float("nan"))
    out, _ = loss_and_grad(race, machine, 0)
    machine.synchronize()
    written = bool(ds.isfinite().all()) and bool(dt.isfinite().all())
    rng = torch.Generator(machine.device).manual_seed(1)
    rows = torch.randperm(size.rows, generator=rng, device=machine.device)[:rows_checked]
    right, *gradients = truth(race, rows)
    gradient = gradient_error((ds, dt), (gradients[0], gradients[1]), rows)
    statistic, which = statistics_error(out.stats.table[:, rows], right.stats.table)
    mean = mean_error(out)
    ok = (written and gradient <= GRADIENT_TOLERANCE[size.dtype]
          and statistic <= STATISTICS_TOLERANCE and mean <= 1e-5)  # fmt: skip
    log.add("error", name, gradient, "of largest", rows=len(rows), statistics=statistic,
            worst_statistic=which, mean=mean, **details)  # fmt: skip
    log.add("check", f"{name}: every element written, {len(rows)} rows against float64",
            "ok" if ok else "WRONG", written=written, **details)  # fmt: skip
    return ok


def check_in_place(race: Race, machine: Machine, log: Log) -> bool:
    """Write the gradients over the logits. Return whether they have the same bits as in separate
    tensors."""
    s, t, y, (ds, dt) = race.inputs[0]
    loss_and_grad(race, machine, 0)
    over = (s.detach().clone(), t.detach().clone())
    bdkd_loss_and_grad(*over, y, temperature=TAU, grads=over, backend=machine.backend)
    same = torch.equal(over[0], ds) and torch.equal(over[1], dt)
    log.add("check", "gradients written over the logits: the same bits", "ok" if same else "WRONG",
            size=shown(race.size))  # fmt: skip
    return same


# Time


def timed(samplers: dict[str, Sampler], trials: int, seconds: float) -> dict[str, list[float]]:
    return _rounds(samplers, trials, seconds, lambda: None)


def log_time(
    log: Log, race: Race, name: str, times: dict[str, list[float]], key: str, l2: str, **more: Any
) -> None:
    """Log the time of ``key`` and its share of the copy's bandwidth in the same rounds."""
    seconds, copied = statistics.median(times[key]), statistics.median(times[COPY])
    share = statistics.median(c / x for c, x in zip(times[COPY], times[key], strict=True))
    log.add("time", name, 1e6 * seconds, "us", size=shown(race.size), l2=l2, of_copy=share,
            copy_us=1e6 * copied, gb_per_s=4e-9 * race.unit / seconds, **more)  # fmt: skip


def time_call(race: Race, machine: Machine, log: Log) -> None:
    """Time a call and the copy in the same rounds, with L2 flushed and, if they fit, hot."""
    call = functools.partial(loss_and_grad, race, machine)
    modes = [("flushed", len(race.inputs))]
    if 4 * race.unit < machine.l2:
        modes.append(("hot", 1))
    for l2, sets in modes:
        samplers = {}
        for name, function in ((LAST_KERNEL, call), (COPY, race.copy)):
            contender, calls = repeated(function, sets, race.unit)
            samplers[name] = machine.clock().sampler(contender, calls)
        times = timed(samplers, 15, 0.4)
        log_time(log, race, LAST_KERNEL, times, LAST_KERNEL, l2, sets=sets,
                 by=samplers[LAST_KERNEL].by)  # fmt: skip


def time_reductions(size: Size, machine: Machine, log: Log) -> None:
    """Time each reduction. ``mean`` launches a kernel for the denominator before the row kernel
    and, above 2048 rows, a kernel that adds up the rows after it. ``sum`` launches only the last,
    and ``none`` launches neither."""
    race = make_race(size, machine)
    samplers = {}
    for name in ("mean", "sum", "none", COPY):
        call = functools.partial(loss_and_grad, race, machine, reduction=name)
        function = race.copy if name == COPY else call
        contender, calls = repeated(function, len(race.inputs), race.unit)
        samplers[name] = machine.clock().sampler(contender, calls)
    times = timed(samplers, 15, 0.5)
    for name in ("mean", "sum", "none"):
        log_time(log, race, f"reduction {name}", times, name, "flushed")


def host_time(rows: int, classes: int, machine: Machine, log: Log) -> None:
    """Time the host's part of a call, over 200 calls. The device is synchronized after every 40
    calls."""
    s, t, y, into = losses.draw(Size(rows, classes, "bf16"), machine.device, 0, True)

    def forward_backward() -> None:
        s.grad = t.grad = None
        out = bdkd_loss(s, t, y, temperature=TAU, backend=machine.backend)
        (out.student + out.teacher).backward()

    def at_once() -> None:
        bdkd_loss_and_grad(s, t, y, temperature=TAU, grads=into, backend=machine.backend)

    for name, call in (("bdkd_loss, backward", forward_backward), (LAST_KERNEL, at_once)):
        taken = []
        for i in range(20 if machine.dry_run else 200):
            if i % 40 == 0:
                machine.synchronize()
            begin = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begin)
        machine.synchronize()
        log.add("time", f"{name}, host", 1e6 * statistics.median(taken), "us",
                size=f"{rows} x {classes} bf16", note="host time of a call, not synchronized",
                best=1e6 * min(taken))  # fmt: skip


# The machine


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"[:300]


def ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return first_line(error)
    return done.stdout.strip()


def commit() -> str:
    """Return the commit of bench/gpu/prepare.py. The repository of a copied tree may differ."""
    carried = prepare.FOLDER / "commit"
    if carried.exists():
        return carried.read_text().strip()
    return ask("git", "-C", str(prepare.ROOT), "rev-parse", "HEAD") or "unknown"


CLOCK = ("nvidia-smi", "--format=csv,noheader", "--query-gpu=clocks.sm,clocks.mem,power.draw,"
         "temperature.gpu,clocks_event_reasons.active")  # fmt: skip


def describe(machine: Machine, log: Log) -> None:
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__,
                "python": sys.version.split()[0], "commit": commit()}  # fmt: skip
    for name, value in versions.items():
        log.add("machine", name, value)
    if machine.dry_run:
        log.add("machine", "device", "CPU (dry run: the numbers are meaningless)")
        return
    card = torch.cuda.get_device_properties(0)
    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    for name, value, unit in (
        ("device", card.name, ""), ("memory", card.total_memory / 2**30, "GiB"),
        ("multiprocessors", card.multi_processor_count, ""), ("L2", machine.l2 / 2**20, "MiB"),
        ("driver", driver, ""), ("CUDA of torch", torch.version.cuda, ""),
        ("triton_key", prepare.key(), ""),
    ):  # fmt: skip
        log.add("machine", name, value, unit)
    log.add("clock", "SM, memory, power, temperature, before", ask(*CLOCK))


def clock_under_load(machine: Machine, log: Log) -> None:
    """Log the clocks while the kernel runs."""
    race = make_race(SIZES[1], machine)
    call = functools.partial(loss_and_grad, race, machine)
    begin = time.monotonic()
    question = None
    while time.monotonic() - begin < 8:
        for _ in range(50):
            call(0)
        machine.synchronize()
        if question is None and time.monotonic() - begin > 0.5:
            question = subprocess.Popen(CLOCK, stdout=subprocess.PIPE, text=True)
        if question is not None and question.poll() is not None:
            break
    if question is not None:
        answer, _ = question.communicate(timeout=5)
        log.add("clock", "SM, memory, power, temperature, under load", answer.strip())


class CacheCounter:
    """Counts the kernels that Triton found in its cache and those that it compiled."""

    def __init__(self) -> None:
        import triton

        self.found = self.compiled = 0
        self.names: list[str] = []
        triton.knobs.compilation.listener = self

    def __call__(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        self.found += cache_hit
        self.compiled += not cache_hit
        if not cache_hit:
            self.names.append(src.name)

    def log(self, log: Log) -> None:
        log.add("check", "triton cache", f"{self.found} kernels found, {self.compiled} compiled",
                compiled_names=" ".join(self.names[:8]))  # fmt: skip


def main(options: argparse.Namespace) -> int:
    if options.describe:
        describe(Machine(options.dry_run), Log(options.out, "machine"))
        return 0
    log = Log(options.out, "1 smoke" + ", dry run" * options.dry_run)
    until = log.start + options.seconds
    cache = CacheCounter()
    machine = Machine(options.dry_run)
    failed = 0

    def attempt(name: str, least: float, function: Callable[..., Any], *arguments: Any) -> None:
        """Run one measurement. Log if it fails or is skipped because too little time is left."""
        nonlocal failed
        left = until - time.monotonic()
        if left < least:
            log.add("skipped", name, f"{left:.0f} s left")
            return
        try:
            failed += function(*arguments) is False
        except Exception as error:
            traceback.print_exc()
            log.add("failed", name, first_line(error))
            failed += 1
        try:
            machine.free()
        except RuntimeError as error:  # a device error: this process cannot use the GPU any more
            log.add("failed", f"the device, after {name}", first_line(error))
            failed += 1

    def one_size(size: Size) -> bool:
        race = make_race(size, machine)
        ok = check(race, machine, log, LAST_KERNEL, 64)
        time_call(race, machine, log)
        return check_in_place(race, machine, log) and ok

    attempt("machine", 0, describe, machine, log)
    for size in DRY_SIZES if options.dry_run else SIZES:
        attempt(f"smoke {shown(size)}", 5, one_size, size)
    cache.log(log)
    for size in DRY_SIZES[:1] if options.dry_run else REDUCTION_SIZES:
        attempt(f"reductions {shown(size)}", 5, time_reductions, size, machine, log)
    for shape in HOST_SIZES:
        attempt(f"host time {shape}", 4, host_time, *shape, machine, log)
    if not options.dry_run:
        attempt("clock under load", 8, clock_under_load, machine, log)
    cache.log(log)
    if not options.dry_run:
        attempt("clock after", 1, log.add, "clock", "SM, memory, power, temperature, after",
                ask(*CLOCK))  # fmt: skip
    log.add("check", "stage 1 ended", f"{failed} parts failed" if failed else "ok")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=80.0, help="time limit")
    parser.add_argument("--dry-run", action="store_true", help="run tiny sizes on the CPU")
    parser.add_argument("--describe", action="store_true", help="only log the machine")
    sys.exit(main(parser.parse_args()))
