"""Estimate the time of a training step of ResNet-50 and MobileNetV1 on 8, 64, 512 and 4,096 GPUs.

    python bench/scaling.py             project from sizes and published speeds, without torch
    python bench/scaling.py --measure   measure the all-reduce of two gloo ranks on this machine
                                        and its overlap with the backward pass

docs/explanation/scaling.md explains the formulas and contains the output of the projection. A test
checks that this output is up to date.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """A node of eight H100 GPUs. Speeds are in bytes per second. Those of the networks are the
    published speeds times the fraction that NCCL usually reaches."""

    gpus: int = 8
    resnet50_images: float = 7000  # images/s per GPU, MLPerf v3.0, 8 x H100, MXNet + DALI
    pair_cost: float = 1.5  # time of both networks over the time of ResNet-50: our assumption
    step_floor: float = 0.010  # s, host time to launch a step of two networks: our assumption
    nvlink: float = 450e9 * 0.8  # per GPU and direction
    network: float = 50e9 * 0.8  # per GPU and direction: each GPU has a 400 Gb/s port
    hop: float = 10e-6  # s, one message between nodes
    pcie: float = 25e9  # GPU to pinned memory
    disk: float = 1e9  # one process that writes one file
    core_jpegs: float = 280  # images/s per core, decode and crop: measured with DALI on a CPU
    cores: int = 112  # per node
    interruptions: float = 419 / (54 * 86400 * 16384)  # per GPU and second: published for Llama 3


@dataclass(frozen=True)
class Pair:
    """The networks and the data set."""

    parameters: int = 25_557_032 + 4_231_976  # ResNet-50 and MobileNetV1, 1,000 classes
    student: int = 4_231_976
    images: int = 1_281_167
    validation: int = 50_000
    image_bytes: float = 138e9 / 1_281_167  # the training set is 138 GB of JPEG
    gradient_bytes: int = 4  # 2 with distributed.compress = bf16
    buckets: int = 5  # of 25 MB each, DDP's default


@dataclass(frozen=True)
class Step:
    """The times of one step in seconds, and its rates."""

    compute: float
    all_reduce: float
    exposed: float  # part of the all-reduce after the end of the backward pass
    images: float  # images per second, all GPUs
    read: float  # bytes per second, all GPUs
    cores: float  # decoding cores per node

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed

    @property
    def efficiency(self) -> float:
        return self.compute / self.seconds


def all_reduce(size: float, gpus: int, m: Machine, messages: int = 1) -> float:
    """Return the seconds of an all-reduce of ``size`` bytes: reduce-scatter and all-gather within a
    node, and an all-reduce of each GPU's share among the nodes."""
    inside, nodes = min(gpus, m.gpus), math.ceil(gpus / m.gpus)
    within = 2 * (inside - 1) / inside * size / m.nvlink
    between = 2 * (nodes - 1) / nodes * (size / inside) / m.network
    return within + between + messages * 2 * math.ceil(math.log2(nodes)) * m.hop


def step(gpus: int, batch: int, m: Machine = Machine(), p: Pair = Pair()) -> Step:
    """Return the times of a step with a global batch of ``batch`` images.

    The backward pass is two thirds of the computation. A bucket is reduced as soon as it is full,
    so that at best only the all-reduce of the last bucket is exposed.
    """
    share = batch / gpus
    compute = max(m.step_floor, share * m.pair_cost / m.resnet50_images)
    size = p.parameters * p.gradient_bytes
    total = all_reduce(size, gpus, m, p.buckets)
    last = all_reduce(size / p.buckets, gpus, m)
    exposed = max(last, total - 2 / 3 * compute) if gpus > 1 else 0.0
    images = batch / (compute + exposed)
    return Step(compute, total, exposed, images, images * p.image_bytes,
                images / math.ceil(gpus / m.gpus) / m.core_jpegs)  # fmt: skip


def checkpoint_bytes(p: Pair = Pair()) -> float:
    """Return the bytes of the float32 weights and momentum of both networks and of the student's
    average."""
    return 4 * (2 * p.parameters + p.student)


def best_interval(gpus: int, m: Machine = Machine(), p: Pair = Pair()) -> float:
    """Return the interval between checkpoints, in seconds, that loses the least time:
    sqrt(2 x stall x time between interruptions) (Young 1974). Only the snapshot stalls training,
    because the file is written in the background."""
    stall = checkpoint_bytes(p) / m.pcie
    return math.sqrt(2 * stall / (m.interruptions * gpus))


def table(weak: int | None, m: Machine = Machine(), p: Pair = Pair()) -> str:
    """Return the projection as a table, for ``weak`` images per GPU, or for a global batch of 4,096
    if ``weak`` is None."""
    head = (
        "| GPUs | batch | per GPU | compute ms | all-reduce ms | exposed ms | in bf16 | "
        "efficiency | images/s | epoch s | read GB/s | cores per node | evaluate s |"
    )
    lines = [head, "| --- " * (head.count("|") - 1) + "|"]
    for gpus in (8, 64, 512, 4096):
        batch = weak * gpus if weak else 4096
        s = step(gpus, batch, m, p)
        half = step(gpus, batch, m, Pair(gradient_bytes=2))
        evaluation = p.validation / gpus * m.pair_cost / m.resnet50_images / 3
        lines.append(
            f"| {gpus:,} | {batch:,} | {batch // gpus} | {1e3 * s.compute:.1f} | "
            f"{1e3 * s.all_reduce:.2f} | {1e3 * s.exposed:.2f} | {1e3 * half.exposed:.2f} | "
            f"{s.efficiency:.1%} | {s.images:,.0f} | {p.images / s.images:,.1f} | "
            f"{s.read / 1e9:,.1f} | {s.cores:,.0f} | {evaluation:.2f} |"
        )
    return "\n".join(lines)


def reliability(m: Machine = Machine(), p: Pair = Pair()) -> str:
    """Return the projection of interruptions and checkpoint intervals."""
    size = checkpoint_bytes(p)
    lines = [
        f"A checkpoint is {size / 1e6:.0f} MB: {1e3 * size / m.pcie:.0f} ms to pinned memory, "
        f"{size / m.disk:.2f} s to write, in the background.",
        "",
        "| GPUs | hours between interruptions | best checkpoint.every_minutes | lost time |",
        "| --- | --- | --- | --- |",
    ]
    for gpus in (8, 64, 512, 4096):
        between = 1 / (m.interruptions * gpus)
        interval = best_interval(gpus, m, p)
        lost = size / m.pcie / interval + interval / 2 / between
        lines.append(f"| {gpus:,} | {between / 3600:,.1f} | {interval / 60:.1f} | {lost:.3%} |")
    return "\n".join(lines)


def projection() -> str:
    return "\n\n".join(
        (
            "256 images per GPU; the batch grows with the number of GPUs:",
            table(256),
            "A global batch of 4,096 for any number of GPUs:",
            table(None),
            reliability(),
        )
    )


def _rank(rank: int, world: int, folder: str, steps: int, width: int) -> None:
    """Run one of the measured ranks."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from bdkd.distributed.launch import exit_rank

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=world)  # fmt: skip
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers)
    size = 4 * sum(p.numel() for p in model.parameters())
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=True)
    images = torch.randn(64, width)
    flat = torch.zeros(size // 4)

    def train() -> None:
        ddp(images).square().mean().backward()

    def alone() -> None:
        with ddp.no_sync():
            train()

    def exchange() -> None:
        dist.all_reduce(flat)

    def median(run) -> float:
        times = []
        for index in range(steps + 3):
            dist.barrier()
            begin = time.perf_counter()
            run()
            if index >= 3:
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    together, computing, exchanging = median(train), median(alone), median(exchange)
    if rank == 0:
        hidden = 1 - max(0.0, together - computing) / exchanging
        print(
            f"{world} gloo ranks, one thread each, {size / 1e6:.1f} MB of gradients, medians of "
            f"{steps} steps\n"
            f"  forward and backward      {1e3 * computing:8.2f} ms\n"
            f"  all-reduce alone          {1e3 * exchanging:8.2f} ms  "
            f"({2 * (world - 1) / world * size / exchanging / 1e9:.2f} GB/s per rank)\n"
            f"  both, overlapped by DDP   {1e3 * together:8.2f} ms\n"
            f"  hidden all-reduce time    {hidden:8.0%}"
        )
    dist.barrier()  # no rank may exit while another still communicates with it
    dist.destroy_process_group()
    exit_rank(0)


def measure(ranks: int, steps: int, width: int) -> None:
    import torch
    import torch.multiprocessing as mp

    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (ranks, folder, steps, width), ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="measure two ranks on this machine")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--width", type=int, default=512, help="width of the layers of the measured network"
    )
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.ranks, arguments.steps, arguments.width)
    else:
        print(projection())


if __name__ == "__main__":
    main()
