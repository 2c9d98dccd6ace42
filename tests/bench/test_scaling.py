"""The projection to many GPUs follows its formulas, and the docs contain its output."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "bench"))

from scaling import Machine, Pair, all_reduce, best_interval, projection, step  # noqa: E402


def test_the_page_holds_what_the_command_prints():
    assert projection() in (ROOT / "docs" / "explanation" / "scaling.md").read_text("utf-8")


def test_all_reduce_follows_its_formula():
    machine = Machine(nvlink=100.0, network=10.0, hop=0.0)
    assert all_reduce(800, 1, machine) == 0
    assert all_reduce(800, 8, machine) == pytest.approx(2 * 7 / 8 * 8)
    assert all_reduce(800, 16, machine) == pytest.approx(2 * 7 / 8 * 8 + 2 * 1 / 2 * 10)
    assert all_reduce(800, 16, Machine(nvlink=1e9, network=1e9, hop=3.0), 2) == pytest.approx(
        12, rel=1e-5
    )


def test_the_backward_pass_hides_the_all_reduce():
    one, many = step(1, 256), step(512, 512 * 256)
    assert one.exposed == 0
    assert one.efficiency == 1
    assert 0 < many.exposed < many.all_reduce
    assert many.images == pytest.approx(512 * 256 / (many.compute + many.exposed))
    # a network a thousand times slower cannot be hidden
    slow = step(512, 512 * 256, Machine(network=40e6))
    assert slow.exposed == pytest.approx(slow.all_reduce - 2 / 3 * slow.compute)
    assert step(64, 4096, p=Pair(gradient_bytes=2)).exposed < step(64, 4096).exposed


def test_more_interruptions_require_more_checkpoints():
    assert best_interval(4096) == pytest.approx(best_interval(1024) / 2)


def test_two_ranks_are_measured():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "scaling.py"), "--measure", "--steps", "2",
         "--width", "32"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 gloo ranks" in done.stdout
    assert "hidden" in done.stdout
