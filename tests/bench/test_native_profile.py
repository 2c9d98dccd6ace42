"""bench/native_profile.py prints a table, or one line if perf is not installed."""

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "bench" / "native_profile.py"


def test_without_perf_one_line_says_what_to_install():
    done = subprocess.run(
        [sys.executable, PROGRAM], env={"PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "native_profile.py needs perf, which is not installed: apt install linux-perf"
    )


def test_a_report_is_summed_by_pass(tmp_path):
    """A fake perf is used, because CI machines may not have perf."""
    perf = tmp_path / "perf"
    perf.write_text(
        "#!/bin/sh\n[ $1 = record ] && exit\n"
        "echo '# a head'\n"
        "echo '    50.00%  [.] avx2::(anonymous namespace)::sums_and_gradients<float, 4, true>'\n"
        "echo '    10.00%  [.] avx2::(anonymous namespace)::sums<float, 4, true>'\n"
        "echo '    30.00%  [.] avx2::(anonymous namespace)::gradients<float, 4, true>'\n"
        "echo '     9.00%  [.] avx2::(anonymous namespace)::RowWorker<float>::run'\n"
    )
    perf.chmod(0o755)
    done = subprocess.run(
        [sys.executable, PROGRAM], env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("1024 x 1000"))
    assert row.split()[-6:] == ["50%", "10%", "30%", "9%", "0%", "0%"]
