"""Races the loss on a GPU: ours against eager, torch.compile, Liger and Quack, all in one run,
beside a device copy of the same bytes and the time that those bytes predict.

    python bench/loss_gpu.py --out FOLDER [--seconds 270]      # or bench/gpu.sh FOLDER

Forward and backward of both losses. Every time is a median over calls on rotating inputs, more of
them than fit in L2. "graph": GPU time of a CUDA-graph replay, launch gaps of the host left out;
"events": between two events around the call, where it cannot be captured. What the peers leave out
is in their names. Leaves loss_gpu.json and loss_gpu.txt; what the time ran out for says so.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from bdkd_kernels import available_backends, bdkd_loss, bdkd_loss_and_grad
from torch import Tensor

SHAPES = ((1024, 1000), (4096, 1000), (4096, 21841), (8192, 32000), (8192, 128256))
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Inputs:
    """As many sets of logits and labels as it takes to exceed L2 four times, at least two."""

    def __init__(self, rows: int, classes: int, dtype: torch.dtype) -> None:
        self.unit = rows * classes * dtype.itemsize
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        sets = max(2, min(32, -(-4 * cache // (4 * self.unit))))

        def draw():
            logits = torch.randn(rows, classes, device="cuda", dtype=dtype)
            return logits.mul_(2).requires_grad_()

        self.sets = [
            (draw(), draw(), torch.randint(classes, (rows,), device="cuda")) for _ in range(sets)
        ]
        self.buffers = [
            (torch.empty_like(s, requires_grad=False), torch.empty_like(t, requires_grad=False))
            for s, t, _ in self.sets
        ]


def medians(step: Callable[[int], object], sets: int, seconds: float = 0.6) -> tuple[float, str]:
    """Microseconds a step, and how they were measured."""
    for i in range(sets):
        step(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for i in range(sets):
                step(i)
        return _timed(graph.replay, seconds) / sets, "graph"
    except RuntimeError:  # it syncs or allocates in a way that no graph allows
        torch.cuda.synchronize()
    order = iter(range(10**9))
    return _timed(lambda: step(next(order) % sets), seconds), "events"


def _timed(call: Callable[[], object], seconds: float) -> float:
    times, until = [], time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < until and len(times) < 200):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def contenders(x: Inputs, temperature: float) -> dict[str, Callable[[int], object]]:
    """Steps by name: each takes the number of a set of inputs."""

    def backward(loss: Callable) -> Callable[[int], object]:
        def step(i: int):
            s, t, y = x.sets[i]
            s.grad = t.grad = None
            loss(s, t, y).backward()

        return step

    def both(backend: str):
        def loss(s: Tensor, t: Tensor, y: Tensor):
            out = bdkd_loss(s, t, y, temperature=temperature, backend=backend)
            return out.student + out.teacher

        return loss

    def at_once(i: int):
        s, t, y = x.sets[i]
        bdkd_loss_and_grad(s, t, y, temperature=temperature, backend="triton", grads=x.buffers[i])

    def copy(i: int):
        for into, logits in zip(x.buffers[i], x.sets[i][:2], strict=True):
            into.copy_(logits.detach())

    steps = {
        "copy of the same 4 units": copy,
        "bdkd_loss_and_grad": at_once,
        "bdkd_loss, backward": backward(both("triton")),
        "eager reference": backward(both("reference")),
    }
    for mode in ("default", "max-autotune-no-cudagraphs", "reduce-overhead"):
        compiled = torch.compile(both("reference"), mode=mode, dynamic=False)
        steps[f"torch.compile {mode}"] = backward(compiled)
    steps |= {name: backward(loss) for name, loss in _peers().items()}
    return steps


def _peers() -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    try:
        from liger_kernel.transformers import LigerJSD
    except ImportError:
        print("Liger is not installed: pip install liger-kernel", file=sys.stderr)
    else:
        jsd = LigerJSD()
        found["Liger JSD of log-softmaxes (no CE)"] = lambda s, t, y: jsd(
            torch.log_softmax(s.float(), -1), torch.log_softmax(t.detach().float(), -1)
        )
    try:
        from quack.cross_entropy import cross_entropy
    except ImportError:
        print("Quack is not installed: pip install quack-kernels", file=sys.stderr)
    else:
        found["Quack CE of both (no KL)"] = lambda s, t, y: (
            cross_entropy(s, y) + cross_entropy(t, y)
        )
    return found


def host_microseconds(call: Callable[[], object], times: int = 300) -> float:
    """From call to return, the GPU kept from being the one that is waited for."""
    taken = []
    for i in range(times):
        if i % 20 == 0:
            torch.cuda.synchronize()
        start = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - start) / 1e3)
    return statistics.median(taken)


def extra_memory(x: Inputs) -> float:
    """Peak bytes of a step above its inputs, in units of N x C of one network."""
    s, t, y = x.sets[0]
    s.grad = t.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = bdkd_loss(s, t, y, temperature=4.0, backend="triton")
    (out.student + out.teacher).backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    s.grad = t.grad = None
    return peak / x.unit


def check(x: Inputs, temperature: float) -> None:
    """The first rows against float64, before anything is timed."""
    s, t, y = (v.detach()[:8] for v in x.sets[0])
    options = {"temperature": temperature, "reduction": "sum"}
    out, (ds, dt) = bdkd_loss_and_grad(s, t, y, backend="triton", **options)
    wide, gradients = bdkd_loss_and_grad(s.double(), t.double(), y, backend="reference", **options)
    for got, want in ((out.student, wide.student), (out.teacher, wide.teacher)):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    for got, want in zip((ds, dt), gradients, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < (1e-5 if s.dtype == torch.float32 else 5e-3), f"gradient off by {error:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=270.0, help="start nothing after these")
    options = parser.parse_args()
    if not available_backends()["triton"]:
        sys.exit(f"no Triton kernel here: {available_backends()['triton']}")
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + options.seconds
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
               "triton": triton.__version__}  # fmt: skip
    results: dict = {"machine": machine, "times": [], "small": {}, "memory": {}, "not_run": []}
    lines = [f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}"]

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
        (options.out / "loss_gpu.txt").write_text("\n".join(lines) + "\n")
        (options.out / "loss_gpu.json").write_text(json.dumps(results, indent=1))

    _small(results, say)
    say(f"{'N x C':>14} {'dtype':5} {'tau':>3}  {'what':36}{'us':>10}{'predicted':>10}"
        f"{'of copy':>8}{'TB/s':>6}  by")  # fmt: skip
    # Ours, the copy and eager everywhere first; the compiler takes what time is left.
    for compilers in (False, True):
        for rows, classes in SHAPES:
            for dtype_name, dtype in DTYPES.items():
                for temperature in (4.0, 1.0):
                    where = f"{rows}x{classes} {dtype_name} tau {temperature:g}"
                    if time.monotonic() > until:
                        results["not_run"].append(where + (" compiled" if compilers else ""))
                        continue
                    if not compilers or temperature == 4.0:
                        _race(rows, classes, dtype_name, dtype, temperature, compilers, until,
                              results, say)  # fmt: skip
    if results["not_run"]:
        say("time ran out for: " + "; ".join(results["not_run"]))


def _race(rows, classes, dtype_name, dtype, temperature, compilers, until, results, say) -> None:
    x = Inputs(rows, classes, dtype)
    if not compilers:
        check(x, temperature)
        if temperature == 4.0:
            results["memory"][f"{rows}x{classes} {dtype_name}"] = extra_memory(x)
    copied = None
    for name, step in contenders(x, temperature).items():
        late = not ("bdkd" in name or "copy" in name or "eager" in name)
        if late != compilers and "copy" not in name:
            continue
        if time.monotonic() > until:
            results["not_run"].append(f"{rows}x{classes} {dtype_name} {name}")
            continue
        try:
            microseconds, by = medians(step, len(x.sets))
        except torch.OutOfMemoryError:
            say(f"{rows}x{classes} {dtype_name}: {name} does not fit in memory")
            continue
        copied = copied or microseconds
        # 4 units on chip; 6 where the rows in flight, one a multiprocessor, exceed L2.
        card = torch.cuda.get_device_properties(0)
        in_flight = card.multi_processor_count * 2 * classes * dtype.itemsize
        units = 6 if classes > 4096 and in_flight > card.L2_cache_size else 4
        predicted = copied * units / 4
        row = {"rows": rows, "classes": classes, "dtype": dtype_name, "temperature": temperature,
               "what": name, "microseconds": microseconds, "by": by,
               "predicted": predicted if "bdkd" in name else None,
               "of_copy_bandwidth": copied / microseconds}  # fmt: skip
        results["times"].append(row)
        shown = f"{predicted:10.1f}" if "bdkd" in name else f"{'':10}"
        of_copy, rate = copied / microseconds, 4 * x.unit / microseconds / 1e6
        say(f"{rows:>6} x {classes:<6}{dtype_name:>5} {temperature:3g}  {name:36}"
            f"{microseconds:10.1f}{shown}{of_copy:8.2f}{rate:6.2f}  {by}")  # fmt: skip
    torch._dynamo.reset()


def _small(results: dict, say: Callable[[str], None]) -> None:
    """ImageNet's 1024 x 1000 in bf16: the launch and the Python around it."""
    x = Inputs(1024, 1000, torch.bfloat16)
    s, t, y = x.sets[0]

    def forward():
        return bdkd_loss(s, t, y, temperature=4.0)

    def both_ways():
        s.grad = t.grad = None
        out = forward()
        torch.autograd.backward((out.student, out.teacher))

    def at_once():
        bdkd_loss_and_grad(s, t, y, temperature=4.0, grads=x.buffers[0])

    for name, call in (("bdkd_loss, call to return", forward),
                       ("bdkd_loss and backward, call to return", both_ways),
                       ("bdkd_loss_and_grad, call to return", at_once)):  # fmt: skip
        for _ in range(20):
            call()
        results["small"][name] = host_microseconds(call)
        say(f"1024 x 1000 bf16: {name}: {results['small'][name]:.1f} us")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            at_once()
    results["small"]["graph replay"] = _timed(graph.replay, 0.5) / 20
    say(f"1024 x 1000 bf16: bdkd_loss_and_grad, graph replay: "
        f"{results['small']['graph replay']:.2f} us")  # fmt: skip


if __name__ == "__main__":
    main()
