"""Profile the native kernel in one thread: print the share of time of each pass over the rows.

    python bench/native_profile.py [--seconds 2]

Requires perf (Debian: apt install linux-perf). perf samples the processor's clock, which also works
in a virtual machine without hardware counters. The inputs are larger than the caches. Each call
computes both losses and both gradients at temperature 4.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import machine
import results
from progress import Progress

SIZES = [(128, 100, "float32"), (1024, 1000, "float32"), (256, 21841, "float32"),
         (64, 128256, "float32"), (64, 128256, "bfloat16")]  # fmt: skip
# Parts of symbol names; the first match counts. The compiler may inline the maxima into RowWorker.
# With AVX-512, most maxima are computed in the loop of the sums, and so are large gradients.
PASSES = {
    "::sums_and_gradients<": "fused",
    "row_max": "maxima",
    "::RowWorker<": "maxima",
    "::sums<": "sums",
    "::gradients<": "gradients",
    "::scalars": "scalars",
}
_LOOP = """
import sys, time, torch
from bdkd_kernels import bdkd_loss_and_grad
rows, classes, dtype, seconds = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]), float(sys.argv[4])
torch.set_num_threads(1)
count = max(2, min(64, (128 << 20) // (4 * rows * classes * dtype.itemsize)))
sets = [tuple((2 * torch.randn(rows, classes)).to(dtype) for _ in range(4)) for _ in range(count)]
target = torch.randint(classes, (rows,))
until = time.perf_counter() + seconds
while time.perf_counter() < until:
    for s, t, ds, dt in sets:
        bdkd_loss_and_grad(s, t, target, temperature=4.0, backend="native", grads=(ds, dt))
"""  # noqa: E501


def profile(perf: str, rows: int, classes: int, dtype: str, seconds: float) -> Counter:
    """Return each pass's share of the library's samples, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder, "perf.data"))
        size = [str(rows), str(classes), dtype, str(seconds)]
        record = [perf, "record", "-q", "-e", "cpu-clock", "-F", "2000", "-o", data]
        loop = [sys.executable, "-c", _LOOP, *size]
        subprocess.run([*record, *loop], check=True, capture_output=True)
        report = [perf, "report", "-i", data, "--stdio", "--dso", "libbdkd_native.so"]
        report += ["--sort", "symbol", "--percentage", "relative"]
        lines = subprocess.run(report, check=True, capture_output=True, text=True).stdout
    shares: Counter = Counter()
    for line in lines.splitlines():
        share, _, symbol = line.strip().partition("%")
        if not line.startswith("#") and symbol:
            name = next((p for mark, p in PASSES.items() if mark in symbol), "the rest")
            shares[name] += float(share)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per size")
    seconds = parser.parse_args().seconds
    perf = shutil.which("perf")
    if perf is None:
        sys.exit("native_profile.py needs perf, which is not installed: apt install linux-perf")
    command = f"python bench/native_profile.py --seconds {seconds:g}"
    print(results.head({"machine": machine.describe(1, "cpu"), "commit": machine.commit(),
                        "date": machine.now(), "command": command}), end="\n\n")  # fmt: skip
    names = ["fused", "sums", "gradients", "maxima", "scalars", "the rest"]
    rows = []
    progress = Progress("native_profile: size", len(SIZES))
    for size in SIZES:
        progress.start(f"{size[0]} x {size[1]} {size[2]}")
        shares = profile(perf, *size, seconds)
        rows.append(
            [f"{size[0]} x {size[1]} {size[2]}", *(f"{shares[name]:.0f}%" for name in names)]
        )
    progress.print(results.aligned(["", *names], rows))


if __name__ == "__main__":
    main()
