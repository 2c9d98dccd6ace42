"""Measure the training step of ResNet-50 with MobileNetV1 on one GPU (stage 4 of the GPU session).

    python bench/gpu/trainer.py OUT [--seconds 130] [--dry-run]

Each way to run our step is timed in alternation with a plain loop of the same two networks.
The compiled steps and the NCCL step run in separate processes. They compile while the other
measurements run, wait for permission to use the GPU, and are killed if they hang.
Requires kernels, the repository root, bench and bench/gpu on PYTHONPATH.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from harness import Contender, DeviceClock, WallClock, spread
from losses import plain
from measurements import Log
from suite_step import WAYS, Loop, Pair, Run

from bdkd.config import NetworkConfig, TrainConfig
from bdkd.device import AUTOCAST, set_flags
from bdkd.distributed.context import DistributedContext
from bdkd.engine.compiled import compiled
from bdkd.engine.cuda_graph import CapturedStep
from bdkd.objectives import create_objective
from bdkd.registry import OBJECTIVES
from bdkd.trainer import Trainer

GPU_PAIR = Pair("imagenet_resnet50", "imagenet_mobilenet_v1", 256, 224, 1000, "bf16")
DRY_PAIR = Pair("resnet8", "resnet8", 4, 16, 10, "bf16")
LOOP = "a plain loop of the pair"
TARGET, SUM_TARGET = 1.3, 0.97  # ratio of images/s to the plain loop; of time to both alone
COMPILE_THREADS = "6"  # for each of two processes, on 16 cores
Step = Callable[[int], object]


def roles(pair: Pair) -> dict[str, NetworkConfig]:
    return {"teacher": NetworkConfig(pair.teacher, "teacher"),
            "student": NetworkConfig(pair.student, "student")}  # fmt: skip


def seconds_per_step(step: Step, steps: int) -> float:
    """Return the mean time of ``steps`` calls, in seconds. On a GPU, it is the time between two
    events, else wall time."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(steps):
            step(0)
        return (time.perf_counter() - begin) / steps
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(steps):
        step(0)
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / steps


def warm_up(step: Step, before: int) -> int:
    """Run a step until it is warm. Return the peak memory of one step minus ``before``, in
    bytes."""
    seconds_per_step(step, 3)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds_per_step(step, 1)  # this is the fourth call, in which a CUDA graph is captured
    peak = torch.cuda.max_memory_allocated() - before
    seconds_per_step(step, 1)
    return peak


class Local:
    """A warmed-up contender in this process. ``make`` returns its step."""

    def __init__(self, make: Callable[[], Step]) -> None:
        before = torch.cuda.memory_allocated()
        self.step = make()
        self.peak = warm_up(self.step, before)

    def sample(self, steps: int) -> float:
        return seconds_per_step(self.step, steps)


class Remote:
    """A contender in a separate process, which answers each request with a line of JSON."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, str(options.out), "--child", kind]
        added = {"TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS, "NCCL_DEBUG": "WARN"}
        self.process = subprocess.Popen(
            command + ["--dry-run"] * options.dry_run, env=os.environ | added, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.answers: queue.Queue[dict[str, Any]] = queue.Queue()
        self.peak, self.limit, self.ready = 0, 30.0, False
        self.error: Exception | None = None
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for line in self.process.stdout or ():
            if line.startswith("answer {"):
                self.answers.put(json.loads(line.removeprefix("answer ")))
            elif line.strip():
                print(line.rstrip(), flush=True)
        self.answers.put({"error": "the process ended"})

    def answer(self, seconds: float, request: str = "") -> dict[str, Any]:
        """Return the next answer, after sending a request if there is one."""
        if request and self.process.stdin is not None:
            self.process.stdin.write(f"{request}\n")
            self.process.stdin.flush()
        try:
            answer = self.answers.get(timeout=max(0.01, seconds))
        except queue.Empty:
            raise TimeoutError(f"no answer within {seconds:.0f} s") from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def settled(self, seconds: float = 0.0) -> bool:
        """Return whether the process waits for permission to use the GPU (``ready``) or failed."""
        if not self.ready and self.error is None:
            try:
                self.ready = self.answer(seconds)["ready"]
            except TimeoutError:
                return False
            except Exception as error:
                self.error = error
        return True

    def sample(self, steps: int) -> float:
        return self.answer(self.limit, f"sample {steps}")["seconds"]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Stage:
    """The measurements of this stage, the time that is left and the failures so far."""

    def __init__(self, log: Log, pair: Pair, device: str, seconds: float) -> None:
        self.log, self.pair, self.device, self.until = log, pair, device, log.start + seconds
        self.rounds, self.steps = (5, 3) if device == "cuda" else (2, 1)
        self.base: Local | None = None
        self.times: dict[str, float] = {}  # median seconds of a step, by contender
        self.failed: list[str] = []

    def left(self) -> float:
        return self.until - time.monotonic()

    def attempt(self, name: str, seconds: float, part: Callable, *args: Any, ours=True) -> None:
        """Run ``part`` if ``seconds`` are left. Log a failure and continue."""
        if self.left() < seconds and self.device == "cuda":
            self.log.add("skipped", name, f"{self.left():.0f} s left, about {seconds:.0f} s needed")
            return
        for each in (lambda: part(*args), gc.collect, torch.cuda.empty_cache):
            try:
                each()
            except Exception as error:
                traceback.print_exc()
                late = isinstance(error, TimeoutError) and self.left() < 32
                self.log.add("skipped" if late else "failed", name, first_line(error))
                self.failed += [name] * (ours and not late)

    def run(self, way: str = "") -> Run:
        return Run(roles(self.pair), "bdkd", self.pair, self.device, **WAYS.get(way, {}))

    def plain_loop(self) -> None:
        def make() -> Step:
            run = self.run()
            members = [run.networks.members[name] for name in ("student", "teacher")]
            return Loop(members, run.batch, self.pair).step

        self.base = Local(make)
        seconds = self.base.sample(self.steps)  # it is measured again with each of our steps
        self.log.add("time", LOOP, self.pair.batch / seconds, "images/s", size=str(self.pair),
                     ms=1e3 * seconds, peak_gb=self.base.peak / 1e9)  # fmt: skip

    def step(self, way: str) -> None:
        self.measure(f"our step, {way}", Local(lambda: self.run(way).step))

    def measure(self, name: str, contender: Local | Remote, note: str = "") -> None:
        """Time a warm contender in alternation with the plain loop."""
        own: list[float] = []
        loops: list[float] = []
        try:
            if self.base is not None:
                self.base.sample(1)
        except Exception as error:
            self.log.add("failed", f"{LOOP}, again", first_line(error))
            self.base = None
        for i in range(self.rounds):
            if i >= 2 and self.left() < 3:
                break
            for each in (self.base, contender) if i % 2 else (contender, self.base):
                if each is not None:
                    (own if each is contender else loops).append(each.sample(self.steps))
        details = {f"ms_{key}": 1e3 * x for key, x in spread(own).items()}
        if loops:
            ratios = spread([loop / x for loop, x in zip(loops, own, strict=True)])
            details |= {f"of_plain_loop_{key}": x for key, x in ratios.items()}
            details |= {"plain_loop": self.pair.batch / median(loops), "target": TARGET}
        self.times[name] = median(own)
        self.log.add("time", name, self.pair.batch / median(own), "images/s", rounds=len(own),
                     peak_gb=contender.peak / 1e9, **details, note=note)  # fmt: skip

    def alone(self, role: str, model: str) -> None:
        """Time our step of one network alone, with its cross entropy."""
        networks = {"student": NetworkConfig(model, "student")}
        step = Local(lambda: Run(networks, "independent", self.pair, self.device).step)
        seconds = median(step.sample(self.steps) for _ in range(self.rounds))
        self.times[f"{role} alone"] = seconds
        self.log.add("time", f"our step, {role} alone", self.pair.batch / seconds, "images/s",
                     ms=1e3 * seconds, note="eager")  # fmt: skip

    def loss(self) -> None:
        """Time the loss, forward and backward to the logits, as a CUDA graph and eager."""
        pair, clock = self.pair, DeviceClock() if self.device == "cuda" else WallClock()
        objective = create_objective(OBJECTIVES.configure("bdkd"), roles(pair))
        shape, dtype = (pair.batch, pair.classes), AUTOCAST[pair.precision]
        logits = {name: torch.randn(shape, dtype=dtype, device=self.device, requires_grad=True)
                  for name in roles(pair)}  # fmt: skip
        labels = torch.randint(pair.classes, (pair.batch,), device=self.device)

        def forward_and_backward(i: int) -> None:
            for x in logits.values():
                x.grad = None
            output = objective(logits, labels, float(pair.batch), 1.0)
            torch.stack(list(output.losses.values())).sum().backward()

        for captured in (True, False):
            contender = Contender("loss", forward_and_backward, capturable=captured)
            sampler = clock.sampler(contender, sets=20)
            seconds = median(sampler.sample() for _ in range(5))
            self.times.setdefault("loss", seconds)
            self.log.add("time", "the loss alone", 1e6 * seconds, "us", by=sampler.by,
                         size=f"{pair.batch} x {pair.classes} {pair.precision}")  # fmt: skip

    def shares(self) -> None:
        """Log the time of each of our steps relative to both networks alone, and the loss's share
        of it."""
        alone = [x for name, x in self.times.items() if name.endswith(" alone")]
        for name, seconds in self.times.items():
            if name.startswith("our step, ") and len(alone) == 2:
                self.log.add("ratio", f"{name}: over both alone", seconds / sum(alone),
                             target=SUM_TARGET, note="alone: our eager steps")  # fmt: skip
            if name.startswith("our step, ") and "loss" in self.times:
                self.log.add("ratio", f"{name}: the loss's share", self.times["loss"] / seconds)

    def remote(self, name: str, remote: Remote, request: str = "go", wait: float = 0.0) -> None:
        """Allow another process to use the GPU, and measure its step."""
        if request == "go" and not remote.settled(wait):
            raise TimeoutError(f"not ready {self.left():.0f} s before the end")
        if remote.error is not None:
            raise remote.error
        torch.cuda.empty_cache()
        begin = time.monotonic()
        remote.peak = remote.answer(max(5.0, min(45.0, self.left() - 3)), request)["peak"]
        remote.limit = max(5.0, min(30.0, self.left()))
        self.measure(name, remote, f"its first five steps took {time.monotonic() - begin:.1f} s")

    def dali(self, out: Path) -> None:
        try:
            importlib.import_module("nvidia.dali")
        except ImportError:
            self.log.add("skipped", "DALI", "nvidia-dali is not installed on this machine")
            return
        subprocess.run([sys.executable, "bench", "loader", "--out", str(out), "--seconds", "1",
                        "--budget", "15"], check=True, timeout=max(5, self.left()))  # fmt: skip


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"[:300]


def main(options: argparse.Namespace) -> int:
    gpu = not options.dry_run
    log = Log(options.out, "4 trainer" if gpu else "4 trainer, dry run")
    pair = GPU_PAIR if gpu else DRY_PAIR
    stage = Stage(log, pair, "cuda" if gpu else "cpu", options.seconds)
    ours, peer, nccl = (Remote(kind, options) for kind in ("compiled", "compiled loop", "nccl"))

    def compiled_step(wait: float = 0.0) -> None:
        """Measure the compiled step once, when it is compiled or after ``wait`` seconds."""
        name = "our step, compiled"
        if ours.process.returncode is None and (wait or ours.settled()):
            stage.attempt(name, 8, stage.remote, name, ours, "go", wait)
            if gpu and name in stage.times:
                name += " and captured"
                stage.attempt(name, 8, stage.remote, name, ours, "capture")
            ours.end()  # frees its memory

    try:
        set_flags(torch.device(stage.device), TrainConfig(precision=pair.precision))
        stage.attempt(LOOP, 20, stage.plain_loop, ours=False)
        stage.attempt("our step, eager", 10, stage.step, "eager")
        stage.attempt("teacher alone", 5, stage.alone, "teacher", pair.teacher)
        stage.attempt("student alone", 5, stage.alone, "student", pair.student)
        stage.attempt("the loss alone", 4, stage.loss)
        for way in ("overlapped", "overlapped and captured", "captured"):
            compiled_step()
            if gpu or way == "overlapped":
                stage.attempt(f"our step, {way}", 9, stage.step, way)
            else:
                log.add("skipped", f"our step, {way}", "a CUDA graph needs a GPU")
        compiled_step()
        name = "our step, DDP and NCCL with one rank"
        stage.attempt(name, 6, stage.remote, name, nccl, "go", 15.0)
        nccl.end()
        compiled_step(max(1.0, stage.left() - 30) if gpu else 60.0)
        name = f"{LOOP}, compiled"
        wait = max(1.0, stage.left() - 25) if gpu else 60.0
        stage.attempt(name, 8, stage.remote, name, peer, "go", wait, ours=False)
        stage.attempt("DALI", 1, stage.dali, options.out, ours=False)
    finally:
        for remote in (ours, peer, nccl):
            remote.end()
        stage.shares()
    log.add("check", "stage 4 ended", f"failed: {stage.failed}" if stage.failed else "ok")
    return 1 if stage.failed else 0


# Code of the processes that Remote starts.


class OneRank(DistributedContext):
    """A single rank that trains through DDP like one of several ranks."""

    is_distributed = True  # type: ignore[assignment]


class CompiledLoop(Loop):
    """The plain loop, with its forward passes and loss compiled as one graph."""

    def compile(self, backend: Callable) -> Step:
        self.loss = torch.compile(self.forward_and_loss, dynamic=False, backend=backend)
        return self.compiled_step

    def forward_and_loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(labels.device.type, self.dtype, enabled=self.dtype is not None):
            student, teacher = (network(images) for network in self.networks)
        return plain(student, teacher, labels, 1.0)

    def compiled_step(self, i: int) -> None:
        self.loss(self.batch.views[0], self.batch.target).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def answer(**values: Any) -> None:
    print(f"\nanswer {json.dumps(values)}", flush=True)


def wait_for_permission() -> None:
    answer(ready=True)
    if sys.stdin.readline().strip() != "go":
        os._exit(0)  # the main process has ended


def child(kind: str, dry_run: bool) -> None:
    """Build one contender, wait for permission to use the GPU, and answer requests."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the main process
    pair, device = (DRY_PAIR, "cpu") if dry_run else (GPU_PAIR, "cuda")
    set_flags(torch.device(device), TrainConfig(precision=pair.precision))
    # The backward of the plain loop is also compiled before it waits for permission.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Callable:
        """Compile with Inductor. The first graph waits before it runs."""
        if dry_run:
            from torch._dynamo.backends.debugging import aot_eager as compile_graph
        else:
            from torch._inductor.compile_fx import compile_fx as compile_graph
        graphs.append(compile_graph(graph, inputs))
        if len(graphs) == 1:
            wait_for_permission()
        return graphs[-1]

    run = Run(roles(pair), "bdkd", pair, device)
    step: Step = run.step
    if kind == "nccl":
        torch.backends.cudnn.benchmark = False  # its search takes longer than the measurement
        dist.init_process_group("gloo" if dry_run else "nccl", store=dist.HashStore(), rank=0,
                                world_size=1, timeout=datetime.timedelta(seconds=30))  # fmt: skip
        context = OneRank(0, 1, group=dist.group.WORLD)
        run.trainer = Trainer(dataclasses.replace(run.components, context=context))
        wait_for_permission()
    elif kind == "compiled":
        os.nice(10)
        trainer = run.trainer
        trainer.forward_backward = compiled(trainer.state, trainer.objective, backend=backend)
    else:
        os.nice(10)
        members = [run.networks.members[name] for name in ("student", "teacher")]
        step = CompiledLoop(members, run.batch, pair).compile(backend)
    answer(peak=warm_up(step, 0))
    print(f"{kind}: {len(graphs)} compiled graphs", flush=True)
    for line in sys.stdin:
        request, *numbers = line.split()
        if request == "capture":
            trainer = run.trainer
            trainer.compute_step = CapturedStep(
                trainer.compute_step, trainer.state.optimizer, trainer.state.device
            )
            answer(peak=warm_up(step, 0))
        else:
            answer(seconds=seconds_per_step(step, int(numbers[0])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=130.0, help="time limit")
    parser.add_argument("--dry-run", action="store_true", help="run tiny networks on the CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dry_run:
        torch.set_num_threads(1)  # there are four processes on few cores
    if given.child is None:
        sys.exit(main(given))
    try:
        child(given.child, given.dry_run)
    except BaseException as error:
        traceback.print_exc()
        answer(error=first_line(error))
        os._exit(1)
    os._exit(0)  # do not wait for threads of NCCL or of the compiler
