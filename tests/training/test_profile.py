"""``--profile``: named ranges, the trace, the table of a step's time, and related metrics."""

import json
import re
import resource
import time

import pytest
import torch
from small_runs import SMALL, TINY_RUN, bdkd, objective_of, tiny_state, trainer_of
from test_step import a_batch

from bdkd.config import TrainConfig
from bdkd.device import peak_of
from bdkd.engine.ranges import named_range
from bdkd.runs.profile import (
    IDLE,
    OTHER,
    SETTLING_STEPS,
    StepProfiler,
    table,
    where_time_goes,
)

# In the order of a step. Time outside all ranges comes last.
RANGES = [
    "data wait", "teacher forward", "student forward", "loss", "backward", "statistics",
    "optimizer", OTHER,
]  # fmt: skip


def profiled(folder, steps: int, remaining: int, done: int, **options) -> list[str]:
    """Do ``done`` training steps with a profiler, and return what it prints."""
    said: list[str] = []
    state = tiny_state()
    objective = objective_of(state)
    state.networks.train()
    with StepProfiler(steps, remaining, folder, torch.device("cpu"), said.append, **options) as p:
        for seed in range(done):
            with named_range("data wait"):
                batch = a_batch(seed=seed)
            trainer_of(state, objective).train_step(batch)
            p.step()
    return said


def test_the_last_steps_of_a_short_run_are_recorded(tmp_path):
    said = profiled(tmp_path, steps=2, remaining=5, done=5)
    written = json.loads((tmp_path / "profile.json").read_text())
    rows = {row["name"]: row for row in written["phases"]}
    assert [*rows] == RANGES
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert all(row["milliseconds"] > 0 for row in rows.values())
    assert (written["steps"], written["device"]) == (2, "cpu")
    assert written["host"] == written["phases"]

    (trace,) = (tmp_path / "profile").glob("rank-0.*.pt.trace.json")
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert [name for name in names if str(name).startswith("ProfilerStep#")] == [
        "ProfilerStep#3", "ProfilerStep#4",
    ]  # fmt: skip
    assert names.count("teacher forward") == 2
    assert "student forward " in said[0]
    assert "mean of 2 steps" in said[0]
    assert said[1].endswith(str(trace))


def test_a_range_measures_wall_time(tmp_path):
    """Compare a sleep of 30 ms inside another range with a clock."""
    step, work, sleep = map(torch.profiler.record_function, ("ProfilerStep#0", "work", "sleep"))
    with torch.profiler.profile() as recorded, step, work:
        torch.randn(64, 64).sum()
        with sleep:
            began = time.perf_counter()
            time.sleep(0.03)
            slept = 1000 * (time.perf_counter() - began)
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    host, device = where_time_goes(events, {"work", "sleep"})
    rows = {row.name: row for row in host}
    assert rows["sleep"].milliseconds == pytest.approx(slept, rel=0.2)
    assert rows["work"].milliseconds > 0  # without the sleep inside it
    assert sum(row.share for row in host) == pytest.approx(1)
    assert device == []


def span(cat: str, name: str, ts: float, dur: float, tid: int = 1, correlation=None) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur,
            "args": args}  # fmt: skip


# One step of 100 us. The host spends 10 us waiting, 20 in forward, 30 in backward (which launches
# from thread 2) and 40 outside all ranges. The device starts at 15 us: 20 us of forward, a gap of
# 5, two streams of backward (20 and 10) that overlap by 10, and 5 of a copy, launched outside all
# ranges.
TRACE = [
    span("user_annotation", "ProfilerStep#7", 0, 100),
    span("user_annotation", "data wait", 0, 10),
    span("user_annotation", "forward", 10, 20),
    span("user_annotation", "Optimizer.step#SGD.step", 12, 3),  # a range of torch itself
    span("user_annotation", "backward", 30, 30),
    span("user_annotation", "backward", 30, 30, tid=9),  # a range of another thread
    span("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=1),
    span("kernel", "conv", 15, 20, tid=70, correlation=1),
    span("cuda_runtime", "cudaLaunchKernel", 31, 1, tid=2, correlation=2),
    span("kernel", "dgrad", 40, 20, tid=70, correlation=2),
    span("cuda_driver", "cuLaunchKernel", 33, 1, tid=2, correlation=3),
    span("kernel", "wgrad", 50, 10, tid=71, correlation=3),
    span("cuda_runtime", "cudaMemcpyAsync", 80, 1, correlation=4),
    span("gpu_memcpy", "Memcpy HtoD", 85, 5, tid=70, correlation=4),
    span("cuda_runtime", "cudaLaunchKernel", 150, 1, correlation=5),
    span("kernel", "of a later step", 151, 5, tid=70, correlation=5),
    span("kernel", "of an unknown launch", 60, 5, tid=70, correlation=6),
    {"ph": "M", "name": "process_name"},
]


def test_device_time_belongs_to_the_range_of_its_launch_and_gaps_are_idle():
    host, device = where_time_goes(TRACE, {"data wait", "forward", "backward"})
    assert {row.name: row.milliseconds for row in host} == pytest.approx(
        {"data wait": 0.01, "forward": 0.02, "backward": 0.03, OTHER: 0.04}
    )
    assert {row.name: row.milliseconds for row in device} == pytest.approx(
        {"forward": 0.02, "backward": 0.02, OTHER: 0.005, IDLE: 0.005 + 0.025}
    )
    assert sum(row.share for row in device) == pytest.approx(1)
    assert [row.name for row in device] == ["forward", "backward", OTHER, IDLE]
    text = table(host, device, steps=1, cold=False)
    lines = {line[:11].strip(): line for line in text.splitlines()}
    assert lines["device idle"].split()[2] == "40.0%"
    assert lines["data wait"].split() == ["data", "wait", "0.0%", "0.00", "0.01"]


def test_an_evaluation_between_two_steps_belongs_to_no_step():
    """The host evaluates from 0 to 60 and saves until 70. The device is partly busy then."""
    events = [
        span("user_annotation", "ProfilerStep#8", -300, 300),
        span("user_annotation", "ProfilerStep#9", 0, 100),
        span("user_annotation", "evaluation", 0, 60),
        span("user_annotation", "data wait", 10, 20),  # of the evaluation's images
        span("user_annotation", "checkpoint", 60, 10),
        span("user_annotation", "forward", 70, 20),
        span("cuda_runtime", "cudaLaunchKernel", -250, 1, correlation=1),
        span("kernel", "conv", -240, 5, tid=70, correlation=1),
        span("cuda_runtime", "cudaLaunchKernel", 12, 1, correlation=2),
        span("kernel", "conv of the evaluation", 15, 20, tid=70, correlation=2),
        span("cuda_runtime", "cudaLaunchKernel", 72, 1, correlation=3),
        span("kernel", "conv", 80, 5, tid=70, correlation=3),
        span("cuda_runtime", "cudaLaunchKernel", 73, 1, correlation=4),
        span("kernel", "conv", 90, 10, tid=70, correlation=4),
    ]
    host, device = where_time_goes(events, {"data wait", "forward", "evaluation", "checkpoint"})
    assert {row.name: 2 * row.milliseconds for row in host} == pytest.approx(
        {"forward": 0.02, OTHER: 0.3 + 0.01}
    )
    assert {row.name: 2 * row.milliseconds for row in device} == pytest.approx(
        {"forward": 0.015, OTHER: 0.005, IDLE: 0.005}
    )
    assert sum(row.share for row in device) == pytest.approx(1)


def test_times_are_means_over_steps():
    """There are two steps, of which the second enters no range."""
    events = [*TRACE, span("user_annotation", "ProfilerStep#8", 100, 100)]
    for rows in where_time_goes(events, {"data wait", "forward", "backward"}):
        found = {row.name: row.milliseconds for row in rows}
        assert found["forward"] == pytest.approx(0.02 / 2)
        assert sum(row.share for row in rows) == pytest.approx(1)


def test_kernels_of_a_captured_graph_belong_to_the_range_of_its_replay():
    """All kernels of a replay have the correlation of its one launch."""
    events = [
        span("user_annotation", "ProfilerStep#1", 0, 50),
        span("user_annotation", "step, captured", 5, 10),
        span("cuda_runtime", "cudaGraphLaunch", 6, 2, correlation=1),
        *(span("kernel", f"kernel {i}", 10 + 5 * i, 5, tid=70, correlation=1) for i in range(4)),
    ]
    _, device = where_time_goes(events, {"step, captured"})
    assert [(row.name, row.share) for row in device] == [("step, captured", 1.0)]


def test_an_empty_trace_has_no_rows():
    assert where_time_goes([], {"loss"}) == ([], [])


def test_without_a_profiler_all_ranges_are_one_empty_context(tmp_path):
    nothing = named_range("loss")
    assert nothing is named_range("backward")
    assert profiled(tmp_path, steps=0, remaining=9, done=1) == []
    assert list(tmp_path.iterdir()) == []
    with StepProfiler(1, 9, tmp_path, torch.device("cpu"), print):
        assert named_range("loss") is not nothing
    assert named_range("loss") is nothing


def test_a_run_that_ends_while_recording_leaves_no_partial_profile(tmp_path):
    assert profiled(tmp_path, steps=3, remaining=3, done=2) == []
    assert list(tmp_path.iterdir()) == []
    assert named_range("loss") is named_range("any")
    assert profiled(tmp_path, steps=1, remaining=1, done=1)  # and the profiler is free again


def test_settling_steps_are_left_out_if_the_run_is_long_enough(tmp_path):
    for remaining, cold in ((SETTLING_STEPS + 3, False), (SETTLING_STEPS + 2, True)):
        profiler = StepProfiler(3, remaining, tmp_path, torch.device("cpu"), print)
        assert profiler.cold == cold


def test_only_rank_0_prints_and_each_rank_writes_its_trace(tmp_path):
    assert profiled(tmp_path, steps=1, remaining=1, done=1, rank=1) == []
    assert [path.name[:6] for path in (tmp_path / "profile").iterdir()] == ["rank-1"]
    assert not (tmp_path / "profile.json").exists()


@pytest.mark.parametrize("which", ["profile", "profile.json"])
def test_training_continues_if_the_profile_cannot_be_written(tmp_path, which):
    if which == "profile":
        (tmp_path / which).write_text("in the way")
    else:
        (tmp_path / which).mkdir()
    (line,) = profiled(tmp_path, steps=1, remaining=3, done=3)
    assert re.match(r"warning: training continues without the profile: cannot write .*file", line)
    assert named_range("loss") is named_range("any")


def test_a_full_disk_ends_only_the_profile(tmp_path):
    """A limit on the size of files replaces the full disk, because the trace is larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        (line,) = profiled(tmp_path, steps=1, remaining=3, done=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith("warning: training continues without the profile: cannot write")
    assert list((tmp_path / "profile").iterdir()) == []


def test_a_range_does_not_break_a_compiled_graph(tmp_path):
    """A range inside a graph would split the graph in two."""

    def f(x: torch.Tensor) -> torch.Tensor:
        with named_range("loss"):
            return x.sin() + 1

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    with StepProfiler(1, 9, tmp_path, torch.device("cpu"), print):
        assert torch.equal(compiled(torch.ones(3)), f(torch.ones(3)))


def test_profile_on_the_command_line_writes_a_trace_and_prints_a_table(tmp_path):
    run = tmp_path / "run"
    done = bdkd(
        "train", *SMALL, "--max-steps", "4", "--run-dir", str(run), "--profile", "2", timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "where a step’s time went" in done.stdout
    assert "teacher forward" in done.stdout
    phases = json.loads((run / "profile.json").read_text())["phases"]
    assert sum(row["share"] for row in phases) == pytest.approx(1)
    assert {row["name"] for row in phases} >= {*RANGES, "log"}
    (trace,) = (run / "profile").iterdir()
    assert json.loads(trace.read_text())["traceEvents"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["split"] == "train"):
        assert 0 < line["data_wait"] < 1
        assert 50 < line["memory_mib"] < 1e5
        known = torch.cuda.is_available() and peak_of(torch.cuda.get_device_name(), TrainConfig())
        assert (line["mfu"] is None) == (not known)  # no peak is published for a CPU


@pytest.mark.parametrize("steps", [
    pytest.param(11, marks=pytest.mark.soak), 12, pytest.param(13, marks=pytest.mark.soak),
])  # fmt: skip
def test_a_short_run_records_only_training_steps(steps, tmp_path):
    """Epochs have 12 steps, and a checkpoint follows each fifth step. The evaluation at the end of
    an epoch and of the run belongs to no step."""
    run = tmp_path / "run"
    command = ["train", *TINY_RUN, "--max-steps", str(steps), "--profile", "3"]
    done = bdkd(*command, "--run-dir", str(run))
    assert done.returncode == 0, done.stderr
    written = json.loads((run / "profile.json").read_text())
    names = {row["name"] for row in written["host"]}
    assert names >= {*RANGES, "log"}
    assert not names & {"evaluation", "checkpoint"}
    (trace,) = (run / "profile").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    recorded = [x for x in events if str(x.get("name")).startswith("ProfilerStep#")]
    assert len(recorded) == written["steps"] == 3
    assert sum(x.get("name") == "optimizer" for x in events) == 3
    evaluations = sum(x.get("name") == "evaluation" for x in events)
    # The one at the end of the epoch, and never the one at the end of the run
    assert evaluations == (steps == 13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "-3"], "--profile must be a number of steps"),
        (["--profile", "--dry-run"], "--profile must be a number of steps"),
        (["--images-per-second", "100"], "give --dry-run"),
        (["--dry-run", "--images-per-second", "0"], "above 0"),
        (["--dry-run", "--images-per-second", "inf"], "must be finite, got inf"),
    ],
)
def test_profile_options_that_do_not_go_together_are_refused(options, message):
    from bdkd.cli.train import parse
    from bdkd.config import load_recipe
    from bdkd.errors import UsageError

    with pytest.raises(UsageError, match=message):
        parse(["digits", *options], load_recipe("digits"))


def test_profile_alone_means_eight_steps():
    from bdkd.cli.train import parse
    from bdkd.config import load_recipe

    recipe = load_recipe("digits")
    assert parse(["digits", "--profile"], recipe).profile == 8
    assert parse(["digits", "--profile", "--seed", "1"], recipe).profile == 8
    assert parse(["digits", "--profile", "20"], recipe).profile == 20
    assert parse(["digits"], recipe).profile == 0
