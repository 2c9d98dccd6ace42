"""The available memory, and the estimate of a run's memory compared with a measured peak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bdkd.device import available_memory, is_out_of_memory, peak_memory_mib, process_memory

CPU = torch.device("cpu")
GIB = 2**30


def machine(root: Path, files: dict[str, str]) -> Path:
    """Write the kernel's files of a machine with 8 GiB of available memory to a folder."""
    files = {"proc/meminfo": "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 8),  # no cgroups
        ({"proc/self/cgroup": "0::/\n"}, 8),  # no limit
        (
            {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "max", f"{V2}/memory.current": "1"},
            8,
        ),
        (
            {
                "proc/self/cgroup": "0::/job\n",
                f"{V2}/job/memory.max": f"{4 * GIB}",
                f"{V2}/job/memory.current": f"{3 * GIB}",
                # the kernel can free cached files
                f"{V2}/job/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",  # the limit of the parent is lower
                f"{V2}/a/b/memory.max": f"{7 * GIB}",
                f"{V2}/a/b/memory.current": "0",
                f"{V2}/a/memory.max": f"{6 * GIB}",
                f"{V2}/a/memory.current": f"{GIB}",
                f"{V2}/a/memory.stat": "",
                f"{V2}/a/b/memory.stat": "",
            },
            5,
        ),
        (
            {
                "proc/self/cgroup": "0::/of/the/host\n",  # a container mounts its own cgroup
                f"{V2}/memory.max": f"{GIB}",
                f"{V2}/memory.current": "0",
                f"{V2}/memory.stat": "",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,memory:/job\n4:devices:/job\n",
                f"{V1}/job/memory.limit_in_bytes": f"{3 * GIB}",
                f"{V1}/job/memory.usage_in_bytes": f"{2 * GIB}",
                f"{V1}/job/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",  # more memory in use than the limit
                f"{V2}/memory.max": f"{GIB}",
                f"{V2}/memory.current": f"{2 * GIB}",
                f"{V2}/memory.stat": "",
            },
            0,
        ),
    ],
    ids=["none", "root", "max", "limit", "parent", "container", "version 1", "exceeded"],
)
def test_available_memory_on_a_cpu(files, gib, tmp_path):
    assert available_memory(CPU, machine(tmp_path, files)) == gib * GIB


def test_available_memory_is_unknown_on_other_systems(tmp_path):
    assert available_memory(CPU, tmp_path) is None


def test_this_machine_has_memory():
    available = available_memory(CPU)
    assert available is None or 2**20 < available < 2**50
    assert 50 * 2**20 < process_memory() <= peak_memory_mib(CPU) * 2**20


def test_available_memory_on_a_gpu(monkeypatch):
    """It is the free memory of the driver plus the memory that torch reserves without using it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    assert available_memory(torch.device("cuda", 0)) == 6 * GIB


def test_out_of_memory_errors_are_recognised():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))


MEASURE = """
import sys, json
from bdkd.cli.train import parse
from bdkd.config import load_recipe
from bdkd.engine.components import build_components
from bdkd.probe import Limit, check_memory, time_steps
from bdkd.trainer import Trainer

components = build_components(parse(sys.argv[1:], load_recipe("digits")).config)
estimate = check_memory(components, 1).estimate
steps = time_steps(Trainer(components), Limit(2, 2), Limit(1, 1))
print(json.dumps([estimate.total / 2**20, estimate.to_come / 2**20, steps.memory_mib]))
"""


@pytest.mark.parametrize(
    "options",
    [
        # Most of the memory is activations: 32x32 pixels, 96 images.
        ["--data.image-size", "32", "--networks.teacher.model", "wrn_16_2",
         "--train.batch-size", "96"],
        # Most of the memory is weights and their copies: 21 million parameters.
        ["--data.image-size", "16", "--networks.teacher.model", "imagenet_resnet34",
         "--optimizer.name", "adamw", "--train.batch-size", "16"],
    ],
    ids=["activations", "weights"],
)  # fmt: skip
def test_the_estimate_is_near_the_measured_peak(options):
    """Measure in a separate process. The bounds leave room for the overhead of allocators."""
    source = ["--data.source", "synthetic", "--data.images", "400"]
    command = [sys.executable, "-c", MEASURE, "digits", *source, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    total, to_come, measured = json.loads(done.stdout)
    assert to_come > 200
    assert measured == pytest.approx(total, rel=0.25)
    assert measured - (total - to_come) == pytest.approx(to_come, rel=0.4)
