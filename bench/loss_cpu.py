"""The loss on the CPU beside its peers: the whole step as a user writes it, in one process.

    python bench/loss_cpu.py [--trials 30] [--threads 2] [--temperature 4] [--dtype fp32]

A round times every contender once, in turn, so that a busy spell of the machine hits them all;
each entry is the median over the rounds with the 20th and 80th percentile. A step is the loss,
``backward()`` of both networks and fresh gradients; a copy is two ``copy_`` of the logits' size.
Errors are against the reference in float64: the larger loss's relative error, and the largest
gradient error over the largest gradient.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from bdkd_kernels import available_backends, bdkd_loss, bdkd_loss_and_grad
from torch import Tensor

SIZES = ((128, 100), (1024, 1000), (256, 21841), (64, 128256))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def draw(n: int, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher (n, c), leaves, and labels (n,)."""
    rng = torch.Generator().manual_seed(n + c)
    s, t = (x.to(dtype).requires_grad_() for x in torch.randn(2, n, c, generator=rng))
    return s, t, torch.randint(c, (n,), generator=rng)


def contenders(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> dict[str, Callable]:
    """Each by name; the first three are whole steps, the first of them ours."""
    torch._dynamo.reset()
    ds, dt = torch.empty_like(s), torch.empty_like(t)

    def of(backend: str, compiled: bool = False) -> Callable:
        def loss(s, t, y):
            out = bdkd_loss(s, t, y, temperature=temperature, backend=backend)
            return out.student + out.teacher

        loss = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss

        def step():
            s.grad = t.grad = None
            total = loss(s, t, y)
            total.backward()
            return total, s.grad, t.grad

        return step

    def at_once():
        out, grads = bdkd_loss_and_grad(s, t, y, temperature=temperature, grads=(ds, dt))
        return out.student + out.teacher, *grads

    def copy():
        with torch.no_grad():
            ds.copy_(s)
            dt.copy_(t)

    def forward():
        with torch.no_grad():
            bdkd_loss(s, t, y, temperature=temperature)

    return {
        "step": of("auto"),
        "eager": of("reference"),
        "compile": of("reference", compiled=True),
        "copy": copy,
        "loss_and_grad": at_once,
        "no gradient": forward,
    }


def error(got, s: Tensor, t: Tensor, y: Tensor, temperature: float) -> tuple[float, float]:
    """Of ``(total, ds, dt)`` against float64: of the loss, and of the worst gradient entry."""
    a, b = (x.detach().double().requires_grad_() for x in (s, t))
    out = bdkd_loss(a, b, y, temperature=temperature, backend="reference")
    (out.student + out.teacher).backward()
    total = (out.student + out.teacher).item()
    worst = max(
        ((mine.double() - right).abs().max() / right.abs().max()).item()
        for mine, right in zip(got[1:], (a.grad, b.grad), strict=True)
    )
    return abs(got[0].item() - total) / abs(total), worst


def measure(steps: dict[str, Callable], trials: int) -> dict[str, list[float]]:
    """Seconds of one call, by name, a list over the rounds."""
    repeats = {}
    for name, step in steps.items():
        step()
        begin = time.perf_counter()
        step()
        repeats[name] = max(1, int(2e-3 / (time.perf_counter() - begin)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(trials):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            seconds[name].append((time.perf_counter() - begin) / repeats[name])
    return seconds


def row(name: str, seconds: list[float], ours: float) -> str:
    low, *_, high = statistics.quantiles(seconds, n=5)
    middle = statistics.median(seconds)
    ratio = f"{middle / ours:8.2f}x" if name != "step" else " " * 9
    return f"  {name:14s}{middle * 1e3:10.3f} ms  [{low * 1e3:.3f}, {high * 1e3:.3f}]{ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=30, help="rounds (30)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (2)")
    parser.add_argument("--temperature", type=float, default=4.0, help="of both divergences (4)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the logits (fp32)")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(
        f"{platform.machine()} {platform.processor()} torch {torch.__version__}, native: "
        f"{available_backends()['native']}, {a.threads} threads, {a.trials} trials, "
        f"temperature {a.temperature:g}, {a.dtype}"
    )
    for n, c in SIZES:
        s, t, y = draw(n, c, DTYPES[a.dtype])
        steps = contenders(s, t, y, a.temperature)
        seconds = measure(steps, a.trials)
        ours = statistics.median(seconds["step"])
        copies = ours / statistics.median(seconds["copy"])
        print(f"{n} x {c}: the step takes {copies:.2f} copies; the others, over our step:")
        for name, taken in seconds.items():
            print(row(name, taken, ours))
        loss_error, gradient_error = error(steps["step"](), s, t, y, a.temperature)
        print(f"  off float64 by {loss_error:.1e} in the loss, {gradient_error:.1e} in a gradient")


if __name__ == "__main__":
    main()
