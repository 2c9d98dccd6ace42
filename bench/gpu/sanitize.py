"""Run the Triton kernels under compute-sanitizer (part of stage 2 of the GPU session).

    python bench/gpu/sanitize.py OUT [--seconds 40] [--dry-run]

memcheck finds accesses out of bounds, and racecheck finds races in shared memory. Both run at the
same time, on few rows with four numbers of classes. Requires kernels, bench and bench/gpu on
PYTHONPATH.
"""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from measurements import Log
from prepare import SANITIZER_CLASSES

TOOLS = ("memcheck", "racecheck")
ERROR = 9  # exit code of compute-sanitizer if it found an error


def find_sanitizer() -> str | None:
    places = ("/usr/local/cuda*/bin/compute-sanitizer",
              "/usr/local/cuda*/compute-sanitizer/compute-sanitizer",
              "/opt/nvidia/*/compute-sanitizer")  # fmt: skip
    found = [path for place in places for path in sorted(glob.glob(place))]
    return shutil.which("compute-sanitizer") or (found[-1] if found else None)


def child(device: str, backend: str) -> None:
    """Call the loss with and without autograd. A class is masked, so that the masked branch of the
    kernel runs too."""
    import torch
    from bdkd_kernels import bdkd_loss, bdkd_loss_and_grad

    for classes in SANITIZER_CLASSES:
        logits = torch.randn(2, 9, classes, device=device).to(torch.bfloat16)
        # Each tensor has a separate allocation, so that every access out of bounds is detected.
        s, t = (x.clone() for x in logits.unbind())
        y = torch.randint(classes, (9,), device=device)
        s[2, 1] = t[2, 1] = -float("inf")
        s.requires_grad_()
        t.requires_grad_()
        grads = (torch.empty_like(s), torch.empty_like(t))
        bdkd_loss_and_grad(s, t, y, temperature=4.0, grads=grads, backend=backend)
        out = bdkd_loss(s, t, y, temperature=4.0, backend=backend)
        (out.student + out.teacher).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{classes} classes done", flush=True)


def main(options: argparse.Namespace) -> int:
    log = Log(options.out, "2 sanitizer" + ", dry run" * options.dry_run)
    sanitizer = find_sanitizer()
    if sanitizer is None and not options.dry_run:
        log.add("skipped", "compute-sanitizer", "not found")
        return 0
    folder = options.out / "logs"
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    running = {}
    for tool in TOOLS:
        command = [sys.executable, __file__, str(options.out), "--child"]
        if options.dry_run:
            command.append("--dry-run")
        else:
            command = [str(sanitizer), "--tool", tool, "--error-exitcode", str(ERROR), *command]
        with (folder / f"{tool}.log").open("w") as file:
            running[tool] = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
    failed = 0
    for tool, process in running.items():
        left = log.start + options.seconds - time.monotonic()
        try:
            code = process.wait(max(0.1, left))
        except subprocess.TimeoutExpired:
            process.kill()
            log.add("skipped", tool, f"not done after {options.seconds:.0f} s")
            continue
        text = (folder / f"{tool}.log").read_text(errors="replace")
        done = re.findall(r"^(\d+) classes done", text, re.MULTILINE)
        found = re.findall(r"SUMMARY: (.*)", text)
        ok = code == 0 and len(done) == len(SANITIZER_CLASSES)
        failed += not ok
        log.add("check", tool, "ok" if ok else f"WRONG: exit code {code}", summary=" ".join(found),
                classes=" ".join(done))  # fmt: skip
        if not ok:
            print(text[-2500:], flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=40.0, help="time limit")
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU, without the tools")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*(("cpu", "reference") if given.dry_run else ("cuda", "triton")))
    else:
        sys.exit(main(given))
