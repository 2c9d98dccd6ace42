"""Every suite runs briefly and writes its table, JSON and CSV. A suite that cannot run prints the
reason. No test asserts a time."""

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accuracy
import figures
import pytest
import results
import torch
from harness import Case, Contender, DeviceClock, race
from suites import SUITES

ROOT = Path(__file__).parents[2]
main = runpy.run_path(str(ROOT / "bench" / "__main__.py"), run_name="bench_main")["main"]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("suite", [
    pytest.param(name, marks=pytest.mark.soak if name in ("startup", "loader") else ())
    for name in SUITES if not name.endswith("_gpu")
])  # fmt: skip
def test_suite_runs_and_leaves_a_table_json_and_csv(suite, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [suite, "--quick", "--trials", "1", "--seconds", "0.01", "--threads", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    result = results.read(out / f"{suite}.json")
    assert_csv_holds(result, out / f"{suite}.csv")
    assert result["commit"]["id"] in printed
    assert result["cases"]
    for case in result["cases"]:
        assert results.case_table(case) in printed
        assert any(row["name"] == case["base"] for row in case["rows"])
        for row in case["rows"]:
            if "not_run" in row:
                assert row["kind"] == "peer", row
                continue
            assert row["seconds"]["median"] > 0
            assert row["trials"] >= 1
            assert ("hot" in row) == (list(case["caches"]) == ["cold", "hot"])
            for kind, error in (row["error"] or {}).items():
                low_precision = kind == "gradient" and case["parameters"]["dtype"] != "fp32"
                assert error < (5e-3 if low_precision else 1e-6), (case["case"], row)
    assert (out / f"{suite}.txt").read_text() in printed + "\n"
    if suite.startswith("loss"):
        assert {tuple(case["caches"]) for case in result["cases"]} == {("cold", "hot"), ("hot",)}
        assert "cold: " in printed
        assert "hot: inputs in cache" in printed


def assert_csv_holds(result: dict, path: Path) -> None:
    """Check that the CSV has one line for each contender of each case, with cold and hot times in
    their columns."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [(case, row) for case in result["cases"] for row in case["rows"]]
    assert len(lines) == len(rows)
    for line, (case, row) in zip(lines, rows, strict=True):
        assert (line["suite"], line["case"], line["contender"], line["kind"]) == (
            result["suite"], case["case"], row["name"], row["kind"]
        )  # fmt: skip
        for key, value in case["parameters"].items():
            assert line[key] == str(value)
        assert line["torch"] == torch.__version__
        assert line["not_run"] == row.get("not_run", "")
        first = next(iter(case["caches"]), "")
        measured = {first: row, "hot" if first == "cold" else "-": row.get("hot", {})}
        for cache in ("", "cold", "hot"):
            median = line[f"{cache}_median_us".lstrip("_")]
            if "seconds" in measured.get(cache, {}):
                assert float(median) == 1e6 * measured[cache]["seconds"]["median"]
            else:
                assert median == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["los_cpu"], 2, "no suite is named 'los_cpu': use loss_cpu, "),
        (["loss_cpu", "--nothing"], 2, "unrecognized arguments: --nothing"),
        (["compare", "a"], 2, "the following arguments are required: B"),
        (["history", "a"], 2, "the following arguments are required: --out"),
        (["loss_cpu", "--trials", "0"], 2, "must be greater than 0"),
        (["loss_cpu", "--threads", "many"], 2, "invalid int"),
        (["metrics", "--quick", "--out", "a file"], 1, "a file"),
        (["compare", "nowhere.json", "nowhere.json"], 1, "nowhere.json"),
        (["plot", "."], 1, "contains no results"),
        (["history", "nowhere", "--out", "x.png"], 1, "nowhere"),
        pytest.param(["loss_gpu"], 1, "no GPU", marks=pytest.mark.skipif(
            torch.cuda.is_available(), reason="there is a GPU: bench/gpu.sh runs the suite")),
    ],
)  # fmt: skip
def test_wrong_arguments_print_one_line(arguments, code, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    try:
        ended = main(arguments)
    except SystemExit as error:
        ended = error.code
    assert ended == code
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.startswith("bench: ")
    assert len(errors.splitlines()) == 1


def test_help_fits_on_one_screen(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for word in (*SUITES, "compare A B", "plot FOLDER", "history FOLDER", "--trials", "--seconds",
                 "--budget", "--threads", "--quick", "--out"):  # fmt: skip
        assert word in text


@pytest.mark.soak
def test_suites_run_under_pytest_benchmark(tmp_path):
    """Runs in a separate process, because the plugin disables itself under xdist."""
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-k", "ce and not torch.compile",
               "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-only",
               "--benchmark-max-time", "0.001", "--benchmark-min-rounds", "1",
               "--benchmark-json", str(path)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {b["name"]: b["extra_info"] for b in json.loads(path.read_text())["benchmarks"]}
    ours = [info for name, info in found.items() if "cross entropies alone" in name]
    assert ours[0]["error"]["loss"] < 1e-6


def test_a_time_budget_ends_the_run_between_cases(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["step_cpu", "--quick", "--trials", "1", "--seconds", "0.01", "--budget", "1e-6",
                 "--out", str(out)]) == 0  # fmt: skip
    assert "--budget is used up: 2 of 2 cases were not run" in capsys.readouterr().out
    assert results.read(out / "step_cpu.json")["cases"] == []


class FakeCuda:
    """The part of torch.cuda that DeviceClock uses. Each call of a contender advances its clock."""

    def __init__(self, capture_fails: bool = False) -> None:
        self.now = 0.0  # milliseconds
        self.recorded: list = []
        self.capturing = False
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.now += self.length

        class Capture:
            def __init__(self, graph: Graph) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                self.before, fake.capturing = fake.now, True

            def __exit__(self, *raised) -> None:
                fake.capturing = False
                self.graph.length, fake.now = fake.now - self.before, self.before
                if capture_fails and raised[0] is None:
                    raise RuntimeError("operation not permitted when stream is capturing")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class Stream:
            def wait_stream(self, other: "Stream") -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *raised) -> None:
                pass

        self.CUDAGraph, self.graph, self.Event, self.Stream = Graph, Capture, Event, Stream
        self.stream = lambda stream: stream
        self.current_stream = Stream
        self.synchronize = lambda: None


@pytest.mark.parametrize(
    ("fails", "capturable", "by"),
    [(False, True, "graph"), (True, True, "events"), (False, False, "events")],
)
def test_the_device_clock_divides_by_the_number_of_calls(monkeypatch, fails, capturable, by):
    fake = FakeCuda(fails)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**vars(fake)))
    seen = []

    def call(i: int) -> None:
        seen.append(i)
        fake.now += 0.25

    # The fake namespace has copies of the bound methods, so they still advance this fake.
    sampler = DeviceClock().sampler(Contender("ours", call, "ours", capturable=capturable), 6)
    assert sampler.by == by
    assert sampler.sample() == pytest.approx(0.25e-3)
    assert sampler.calls % 6 == 0
    assert seen[:6] == [0, 1, 2, 3, 4, 5]


def sweep_result(commit: str, date: str, factor: float = 1.0) -> dict:
    def row(name, kind, seconds, units):
        spreads = {"median": seconds, "p20": 0.9 * seconds, "p80": 1.2 * seconds}
        return {"name": name, "kind": kind, "note": "", "bytes": 4000, "by": "wall", "trials": 5,
                "calls": 1, "seconds": spreads, "ratio": spreads, "of_copy": 0.5,
                "peak_bytes": 1000 * units, "error": None}  # fmt: skip

    cases = [
        {"case": f"both: {c}", "sets": 2, "base": "bdkd_loss, backward",
         "parameters": {"classes": c, "rows": 1000 // c, "sweep": True, "dtype": "fp32",
                        "temperature": 4.0},
         "rows": [row("copy of both logits", "limit", 1e-6, 0),
                  row("bdkd_loss, backward", "ours", factor * 2e-6, 2),
                  row("eager", "peer", 1e-5, 9)]}
        for c in (10, 100)
    ]  # fmt: skip
    return {"schema": 1, "suite": "loss_cpu", "date": date, "others_share": 0.0, "cases": cases,
            "commit": {"id": commit, "date": date, "dirty": False},
            "machine": {"cpu": "a", "threads": 1, "gpu": None, "versions": {"torch": "2"}},
    }  # fmt: skip


def test_pictures_are_made_of_stored_results_and_the_same_data_give_the_same_bytes(tmp_path):
    first = sweep_result("aaa", "2026-01-01T00:00:00+00:00")
    second = sweep_result("bbb", "2026-01-02T00:00:00+00:00", 0.5)
    (path,) = figures.draw_all({"loss_cpu": first}, tmp_path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    figures.draw_all({"loss_cpu": first}, tmp_path)
    assert path.read_bytes() == content
    history = tmp_path / "history.png"
    figures.draw_history([{"loss_cpu": first}, {"loss_cpu": second}], history)
    assert history.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(results.ResultsError, match="have a case of the loss in common"):
        figures.draw_history([{"loss_cpu": first}], history)
    with pytest.raises(results.ResultsError, match="have no sweep"):
        figures.draw_all({"metrics": first}, tmp_path)


def test_accuracy_sweep_passes_and_draws(tmp_path, capsys):
    assert accuracy.main(["--quick", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert_one_screen(lines)
    assert "pass: every error of ours is within its bound" in lines
    assert lines[-1].startswith("accuracy.json, accuracy.txt, accuracy.png in ")
    text = (tmp_path / "accuracy.txt").read_text()
    assert "bf16 equal to 1e-6" in text  # the long tables
    assert "\n".join(lines[1:-1]) in text
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    names = {row["name"] for row in json.loads((tmp_path / "accuracy.json").read_text())["worst"]}
    assert {"eager PyTorch", "eager, our reference"} <= names


def assert_one_screen(lines: list[str]) -> None:
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def cells_of(errors: dict[str, tuple[float, float]], cell: accuracy.Cell) -> list[dict]:
    return [{**cell._asdict(), "name": name, "loss": loss, "gradient": gradient}
            for name, (loss, gradient) in errors.items()]  # fmt: skip


def test_the_verdict_names_the_worst_error_of_each_implementation_and_its_place():
    """The output has all implementations, the largest numbers and the longest names."""
    mild = accuracy.Cell("fp32", "related", 1.0, 10, 1.0)
    hard = accuracy.Cell("bf16", "equal to 1e-6", 10_000.0, 32_768, 4.0)
    names = ["bdkd, triton", "bdkd, native", "eager, our reference", "eager PyTorch",
             "torch.compile"]  # fmt: skip
    measured = cells_of(dict.fromkeys(names, (0.5, 0.25)), mild)
    measured += cells_of({
        "bdkd, triton": (5.5, 0.2), "bdkd, native": (float("inf"), 0.9),
        "eager, our reference": (3.0, 0.1), "eager PyTorch": (1.2e6, 0.1),
        "torch.compile": (4.0, 0.1),
    }, hard)  # fmt: skip
    judged = accuracy.judge_all(measured)
    lines = accuracy.verdict(judged).splitlines()
    assert_one_screen(lines)
    # The bound is twice the best other error, 6. So 5.5 passes and inf fails.
    assert [" ".join(line.split()) for line in lines if line.startswith("bdkd, ")] == [
        "bdkd, triton loss 5.5 6 pass bf16 equal to 1e-6 10000 32768 4",
        "bdkd, triton grad 0.25 1 pass fp32 related 1 10 1",
        "bdkd, native loss inf 6 FAIL bf16 equal to 1e-6 10000 32768 4",
        "bdkd, native grad 0.9 1 pass bf16 equal to 1e-6 10000 32768 4",
    ]
    assert "eager PyTorch        loss 1.2e+06     1 over bf16 equal to 1e-6" in "\n".join(lines)
    assert lines[-1] == "FAIL: errors of ours that exceed their bounds: 1; --verbose lists them"
    assert [str(each) for each in accuracy.failures(judged)] == [
        "bdkd, native: loss error inf times the allowed error (best other: 3): bf16, equal to "
        "1e-6, spread 10000, 32768 classes, temperature 4"
    ]


def test_verbose_prints_the_long_tables(monkeypatch, capsys):
    cell = accuracy.Cell("fp32", "related", 1.0, 10, 4.0)
    for error, code in ((0.5, 0), (1.5, 1)):
        found = cells_of({"bdkd, native": (error, 0.1), "eager PyTorch": (0.5, 0.1)}, cell)
        monkeypatch.setattr(accuracy, "sweep", lambda *_, found=found: found)
        assert accuracy.main([]) == code
        short = capsys.readouterr().out
        assert_one_screen(short.splitlines())
        assert "fp16 disjoint" not in short
        assert accuracy.main(["--verbose"]) == code
        printed = capsys.readouterr().out
        assert "fp16 disjoint" in printed
        assert printed.endswith(short)
        assert ("bdkd, native: loss error 1.5 times the allowed error" in printed) == bool(code)


def test_accuracy_reports_an_implementation_with_wrong_results():
    """The verdict fails for a wrong loss and for NaN, but not if the other implementations are as
    bad."""
    cell = accuracy.Cell("fp32", "related", 1.0, 10, 4.0)
    inputs = accuracy.draw(cell, "cpu")

    def off(s, t, y, temperature):
        student, teacher = accuracy.ours("reference")(s, t, y, temperature)
        return 1.001 * student, teacher

    def broken(s, t, y, temperature):
        student, teacher = accuracy.ours("reference")(s, t, y, temperature)
        return student * torch.nan, teacher

    measured = []
    for name, rows in (("bdkd, off", off), ("bdkd, broken", broken), ("eager", accuracy.plain)):
        errors = accuracy.measure(rows, cell, *inputs)
        measured.append({**cell._asdict(), "name": name, **errors._asdict()})
    assert [row["loss"] > 1 for row in measured] == [True, True, False]
    found = accuracy.failures(accuracy.judge_all(measured))
    assert {each.name for each in found} == {"bdkd, off", "bdkd, broken"}
    as_bad = {**measured[0], "name": "peer"}
    found = accuracy.failures(accuracy.judge_all([measured[0], as_bad]))
    assert "loss" not in {each.kind for each in found}


def test_the_readme_lists_every_file_and_suite():
    text = (ROOT / "bench" / "README.md").read_text("utf-8")
    for path in (ROOT / "bench").glob("*.py"):
        if not path.name.startswith(("__main__", "suite_")):
            assert f"`{path.name}`" in text, path.name
    for suite in SUITES:
        assert f"`{suite}`" in text


def test_hot_and_cold_are_graphs_of_the_same_length_on_a_gpu(monkeypatch):
    """With graphs of different lengths, the launch of a graph would have a different share."""
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**vars(fake)))
    seen: list[int] = []

    def call(i: int) -> None:
        seen.append(i)
        fake.now += 0.25 if i == 0 else 0.5

    caches = {"cold": "inputs from memory", "hot": "inputs in cache"}
    case = Case("gpu", {}, (Contender("ours", call, "ours"),), sets=8, memory=False, caches=caches)
    (row,) = race(case, DeviceClock(), trials=2)["rows"]
    assert row["by"] == row["hot"]["by"] == "graph"
    assert row["seconds"]["median"] == pytest.approx((0.25 + 7 * 0.5) / 8 * 1e-3)
    assert row["hot"]["seconds"]["median"] == pytest.approx(0.25e-3)
    assert row["calls"] % 8 == row["hot"]["calls"] % 8 == 0
    # Warm-up and capture of each: all sets in turn, then only the first set.
    assert seen == [*range(8), *range(8), *[0] * 16]
