"""``bdkd benchmark FILE...``: the order of the measurements, the numbers computed from the times,
and refused files. No test asserts the speed of this machine."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from onnx import TensorProto, helper
from scipy import stats
from small_runs import TINY_RUN, bdkd

from bdkd import create_model
from bdkd.cli import benchmark_files, main
from bdkd.cli.benchmark import names_file
from bdkd.config import load_recipe, to_toml
from bdkd.export import inference_process, latency
from bdkd.export.facts import Facts, Quantization
from bdkd.export.formats import FORMATS, encode
from bdkd.export.latency import STARTS, WARMUP_ROUNDS, Inference, Measurement, ratio_of, time_rounds
from bdkd.export.runnable import Runnable, read_runnable

FEW = ["--rounds", "20"]
SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return the folder of a small network in all formats, and of ONNX files of other programs."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    network = create_model("resnet8", num_classes=3, in_channels=3).eval()
    facts = Facts(
        version=1, network="student", model="resnet8", role="student", parameters=77_587,
        method="bdkd", seed=0, step=1, recipe=to_toml(load_recipe(TINY_RUN[0])),
        classes=("a", "b", "c"), channels=3, image_size=(8, 8), normalisation=None, measured_on="",
        images=0, metrics={}, versions={"torch": str(torch.__version__)},
    )  # fmt: skip
    for kind, known in FORMATS.items():
        (folder / f"model{known.suffix}").write_bytes(encode(kind, network, facts))
    for name, graph in {
        "foreign": graph_of(["N", *SHAPE]), "batch4": graph_of([4, *SHAPE]),
        "any-size": graph_of(["N", 3, "H", 8]), "bytes": graph_of(["N", 4], TensorProto.UINT8),
        "scalar": graph_of([]), "two": graph_of(["N", 4], extra=True), "huge": huge(),
    }.items():  # fmt: skip
        opsets = [helper.make_opsetid("", 20)]
        onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opsets),
                  folder / f"{name}.onnx")  # fmt: skip
    return folder


def graph_of(shape, kind=TensorProto.FLOAT, extra=False):
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    if extra:
        inputs.append(helper.make_tensor_value_info("z", kind, shape))
    outputs = [helper.make_tensor_value_info("y", kind, shape)]
    return helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", inputs, outputs)


def huge():
    """Write a model of a few bytes that allocates 2^42 bytes for an image."""
    fill = helper.make_tensor("fill", TensorProto.FLOAT, [1], [1.0])
    return helper.make_graph(
        [
            helper.make_node("ConstantOfShape", ["sizes"], ["zeros"], value=fill),
            helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
            helper.make_node("Add", ["x", "sum"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *SHAPE])],
        [helper.make_tensor("sizes", TensorProto.INT64, [2], [2**20, 2**20])],
    )  # fmt: skip


def measured(capsys, *arguments: object) -> dict:
    main(["benchmark", *map(str, arguments), *FEW, "--json"])
    return json.loads(capsys.readouterr().out)  # exactly one JSON object


def fail(capsys, *arguments: object) -> tuple[int, str]:
    """Return the exit code and the line of a command that must fail before it measures anything."""
    with pytest.raises(SystemExit) as ended:
        main(["benchmark", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1), err
    return ended.value.code, err


# --- order of the measurements -------------------------------------------------------------------


def test_files_take_turns_and_the_order_rotates():
    calls = []

    def run_of(name):
        def run():
            calls.append(name)
            return float(len(calls))

        return run

    times = time_rounds([run_of(name) for name in "abc"], 4)
    rounds = ["".join(calls[k : k + 3]) for k in range(0, len(calls), 3)]
    assert len(rounds) == WARMUP_ROUNDS + 4
    assert rounds[WARMUP_ROUNDS:] == ["abc", "bca", "cab", "abc"]
    assert times.shape == (4, 3)
    first = 3 * WARMUP_ROUNDS  # calls before the measured rounds
    assert (times[1] - first).tolist() == [6, 4, 5], "each time is in the column of its file"


def test_only_the_last_inference_of_a_turn_is_timed(monkeypatch):
    """The inferences advance a fake clock. Short inferences run until 1 ms has passed. The last
    inference of a turn takes 5 s, and only this time is recorded."""
    clock, calls = [0.0], []

    def infer_in(*seconds):
        def infer():
            clock[0] += seconds[len(calls)]
            calls.append(1)

        return infer

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert inference_process.timed(infer_in(0.0007, 0.0004, 5.0, 9.0)) == pytest.approx(5.0)
    calls.clear()
    short = [0.0003] * 4 + [5.0, 9.0]  # four inferences reach 1 ms
    assert inference_process.timed(infer_in(*short)) == pytest.approx(5.0)
    calls.clear()
    assert inference_process.timed(infer_in(2.0, 2.0, 5.0, 9.0)) == pytest.approx(5.0), "at least 2"


def test_a_ratio_does_not_depend_on_the_drift_of_the_machine():
    """The second file takes twice as long, while the machine becomes 10 times slower."""
    speed = np.linspace(1, 10, STARTS * 40).reshape(STARTS, 40)
    ratio = ratio_of(2 * speed, speed)
    assert ratio == pytest.approx((2, 2, 2))


def test_the_interval_of_a_ratio_is_students_over_starts():
    generator = np.random.default_rng(1)
    reference = generator.lognormal(0, 0.1, (STARTS, 30))
    times = 1.5 * reference * generator.lognormal(0, 0.2, (STARTS, 1))
    times *= generator.lognormal(0, 0.01, (STARTS, 30))
    medians = np.log([np.median(a / b) for a, b in zip(times, reference, strict=True)])
    low, high = stats.t.interval(0.95, STARTS - 1, medians.mean(), stats.sem(medians))
    ratio = ratio_of(times, reference)
    expected = (math.exp(medians.mean()), math.exp(low), math.exp(high))
    assert ratio == pytest.approx(expected, rel=1e-3)
    # The rounds of one start are not independent, so that more rounds do not narrow the interval.
    again = ratio_of(np.tile(times, 100), np.tile(reference, 100))
    assert again == pytest.approx(ratio)
    # Exchanging the files inverts the ratio and its interval.
    inverse = ratio_of(reference, times)
    assert inverse == pytest.approx((1 / ratio.value, 1 / ratio.high, 1 / ratio.low))


def test_quantiles_agree_with_numpy():
    generator = np.random.default_rng(2)
    times = [generator.lognormal(-7, 0.5, (STARTS, 8)) for _ in range(2)]
    file = Runnable(Path("a.onnx"), "onnx", "fp32", 1, b"", (1,), None, "x", None)
    made = [Measurement(x, 2**20, 2**19, None) for x in times]
    failed = Measurement(None, None, None, "a reason")
    rows = benchmark_files.describe_measurements([file] * 3, 16, [*made, failed])
    for row, seconds in zip(rows, times, strict=False):
        ms = 1000 * seconds.ravel()
        assert row["ms"]["median"] == pytest.approx(np.median(ms))
        assert row["ms"]["p95"] == pytest.approx(np.percentile(ms, 95))
        assert (row["ms"]["min"], row["ms"]["max"]) == (ms.min(), ms.max())
        assert row["images_per_second"] == pytest.approx(16 / np.median(seconds))
    assert rows[0]["ratio"] is None
    assert rows[1]["ratio"] == ratio_of(times[1], times[0])._asdict()
    assert {key: rows[2][key] for key in ("ms", "images_per_second", "ratio", "memory")} == {
        "ms": None, "images_per_second": None, "ratio": None, "memory": None,
    }  # fmt: skip
    assert rows[2]["failure"] == "a reason"
    rows = benchmark_files.describe_measurements([file] * 2, 16, [failed, made[0]])
    assert (rows[0]["ms"], rows[1]["ratio"]) == (None, None), "no ratio to a file that failed"
    assert rows[1]["ms"] is not None


# --- results -------------------------------------------------------------------------------------


def test_files_of_all_formats_and_of_other_programs_are_measured_together(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(latency, "STARTS", 2)  # each start imports torch, which takes seconds
    names = ["model.onnx", "model.pt2", "model.safetensors", "foreign.onnx"]
    results = measured(capsys, *(folder / name for name in names), "--batch", 3)
    assert [Path(file["file"]).name for file in results["files"]] == names
    assert [file["format"] for file in results["files"]] == [
        "onnx", "export", "safetensors", "onnx"
    ]  # fmt: skip
    for file in results["files"]:
        assert file["bytes"] == os.path.getsize(file["file"])
        assert (file["image_shape"], file["precision"]) == ([3, 8, 8], "fp32")
    assert [file["model"] for file in results["files"]] == ["resnet8"] * 3 + [None]
    assert (results["starts"], results["rounds"]) == (2, 20)
    processor, versions = results["processor"], results["versions"]
    assert processor.keys() == {"name", "vnni", "cores", "load"}
    assert processor["name"]
    assert versions["onnxruntime"] == onnxruntime.__version__
    assert versions["torch"] == str(torch.__version__)
    [setting] = results["settings"]
    assert (setting["threads"], setting["batch"]) == (1, 3)
    for number, row in enumerate(setting["files"]):
        assert row["failure"] is None
        ms = row["ms"]
        assert 0 < ms["min"] <= ms["p25"] <= ms["median"] <= ms["p75"] <= ms["p95"] <= ms["max"]
        assert row["images_per_second"] == pytest.approx(3000 / ms["median"])
        assert row["memory"]["peak_bytes"] >= row["memory"]["runtime_bytes"] > 2**20
        if number:
            ratio = row["ratio"]
            assert 0 < ratio["low"] <= ratio["value"] <= ratio["high"]
    assert setting["files"][0]["ratio"] is None
    native, program = (row["memory"]["runtime_bytes"] for row in setting["files"][:2])
    assert native < program / 2, "the process of an ONNX file has not imported torch"


def test_every_number_of_threads_is_combined_with_every_batch_size(folder, capsys):
    results = measured(capsys, folder / "foreign.onnx", "--threads", 1, 2, 1, "--batch", 2, 5)
    combined = [(setting["threads"], setting["batch"]) for setting in results["settings"]]
    assert combined == [(1, 2), (1, 5), (2, 2), (2, 5)]


def test_the_table_shows_names_times_ratios_and_memory(folder):
    done = bdkd("benchmark", "model.onnx", "foreign.onnx", *FEW, "--batch", "1", "8", cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "onnxruntime" in lines[0] + lines[1]
    for title in ("1 thread, batch 1", "1 thread, batch 8"):
        at = lines.index(title)
        assert lines[at + 1].split()[:2] == ["file", "median"]
        assert [line.split()[0] for line in lines[at + 3 : at + 5]] == [
            "model.onnx",
            "foreign.onnx",
        ]
        assert "[" in lines[at + 4], "the ratio to the first file has an interval"
    progress = [x for x in done.stderr.splitlines() if not x.startswith("warning: the load")]
    assert progress == [
        "timing 2 files, 1 thread, batch 1 (1 of 2)", "timing 2 files, 1 thread, batch 8 (2 of 2)",
    ]  # fmt: skip


def test_the_precision_of_an_int8_file_is_read_from_its_metadata(folder):
    file = read_runnable(folder / "model.onnx")
    assert file.facts is not None
    assert file.precision == "fp32"
    facts = file.facts.__class__(**vars(file.facts) | {"quantization": Quantization(9, "m", "")})
    network = create_model("resnet8", num_classes=3, in_channels=3).eval()
    path = folder / "model-int8.onnx"
    path.write_bytes(encode("onnx", network, facts))
    assert read_runnable(path).precision == "int8"


@pytest.mark.parametrize(
    ("paths", "width", "expected"),
    [
        (["runs/a/model.onnx"], 30, ["model.onnx"]),
        (["r/a/model.onnx", "r/a/model-int8.onnx"], 30, ["model.onnx", "model-int8.onnx"]),
        (["r/a/x.onnx", "r/b/x.onnx"], 30, ["a/x.onnx", "b/x.onnx"]),
        (["r/a/x.onnx", "r/a/x.onnx"], 30, ["1 x.onnx", "2 x.onnx"]),
        (["r/aaaaaaaaaaaaaaa/x.onnx", "y.onnx"], 16, ["r/aaaaa...x.onnx",
                                                      "y.onnx"]),
        (["a" * 99 + ".pt2", "b" * 99 + ".pt2"], 16, ["aaaa...aaaaa.pt2", "bbbb...bbbbb.pt2"]),
        (["x" * 99 + "1.pt2", "x" * 99 + "1" + "x" * 9 + ".pt2"], 16,
         ["xxxx...xxxx1.pt2", "xxxx...xxxxx.pt2"]),
        (["a" * 50 + "1" + "a" * 50, "a" * 50 + "2" + "a" * 50], 16,
         ["1 aa...aaaaaaaaa", "2 aa...aaaaaaaaa"]),
    ],
)  # fmt: skip
def test_file_names_in_tables_are_short_and_distinct(paths, width, expected):
    names = benchmark_files.short_names(paths, width)
    assert names == expected
    assert max(map(len, names)) <= width


def test_tables_with_wide_numbers_fit_80_columns():
    row = {
        "ms": {"median": 12_345.6, "p95": 99_999.9}, "images_per_second": 9_876_543.0,
        "ratio": {"value": 1234.5, "low": 1000.0, "high": 2000.0},
        "memory": {"peak_bytes": 12_345 * 2**20, "runtime_bytes": 0}, "failure": None,
    }  # fmt: skip
    text = benchmark_files.describe({
        "processor": {"name": "A" * 99, "vnni": False, "cores": 256, "load": 300.0},
        "versions": {"bdkd": "1", "onnxruntime": "1", "torch": "2"}, "starts": 5, "rounds": 100_000,
        "files": [{"file": f"{name * 99}.onnx", "precision": "int8", "bytes": 2**40,
                   "image_shape": [3, 224, 224]} for name in "ab"],
        "settings": [{"threads": 1024, "batch": 2**20, "files": [row, {**row, "ms": None}]}],
    })  # fmt: skip
    wide = [line for line in text.splitlines() if len(line) > 80]
    assert wide == []
    assert "no VNNI" in text
    assert "failed" in text


# --- processes -----------------------------------------------------------------------------------


def test_the_process_of_an_onnx_file_imports_neither_torch_nor_bdkd(folder):
    file = read_runnable(folder / "model.onnx")
    one = Inference(file, threads=1, batch=2)
    try:
        one.start()
        assert one.failure is None
        libraries = {Path(m.path).name for m in psutil.Process(one.process.pid).memory_maps()}
        assert any("onnxruntime" in name for name in libraries)
        assert not [name for name in libraries if name.startswith(("libtorch", "libc10"))]
    finally:
        one.close()
    script = (
        "import runpy, sys; part = runpy.run_path(sys.argv[1]); part['preload']('onnx'); "
        "part['load']('onnx', sys.stdin.buffer.read(), {'shape': [1, 3, 8, 8], 'threads': 1, "
        "'memory': 2**30, 'name': 'images'})(); "
        "print({m.split('.')[0] for m in sys.modules} & {'torch', 'bdkd', 'bdkd_kernels', 'onnx'})"
    )
    done = subprocess.run([sys.executable, "-c", script, inference_process.__file__],
                          input=file.content, capture_output=True, check=True)  # fmt: skip
    assert done.stdout.decode().strip() == "set()"


def test_the_peak_memory_includes_the_images(folder):
    """The images take 154 MB. The peak rises by at least their size."""
    one = Inference(read_runnable(folder / "foreign.onnx"), threads=1, batch=200_000)
    try:
        one.start()
        assert one.peak - one.runtime > 4 * 200_000 * 3 * 8 * 8
        assert one.runtime < 2**30
    finally:
        one.close()


def test_the_inference_process_has_a_memory_limit(folder, capsys):
    """The other files are measured. The value of the failed file is null, and one line names the
    reason."""
    with pytest.raises(SystemExit) as ended:
        measured(capsys, folder / "foreign.onnx", folder / "huge.onnx")
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    good, bad = json.loads(out)["settings"][0]["files"]
    assert (good["failure"], bad["ms"], bad["memory"]) == (None, None, None)
    assert good["ms"]["median"] > 0
    line = err.splitlines()[-1]
    assert line.startswith(f"bdkd: onnxruntime cannot run {folder / 'huge.onnx'}: ")
    assert line == f"bdkd: {bad['failure']}"
    with pytest.raises(SystemExit):
        measured(capsys, folder / "huge.onnx")
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", line), "no table without a value"


def test_killed_and_hanging_processes_are_reported_as_failures(folder, monkeypatch):
    file = read_runnable(folder / "foreign.onnx")
    killed, stopped, healthy = (Inference(file, threads=1, batch=1) for _ in range(3))
    try:
        for one in (killed, stopped, healthy):
            one.start()
        os.kill(killed.process.pid, signal.SIGKILL)
        assert math.isnan(killed.run())
        expected = f"onnxruntime cannot run {file.path}: its process ended with SIGKILL"
        assert killed.failure == f"{expected} (possibly out of memory)"
        monkeypatch.setattr(latency, "ANSWER_SECONDS", 0.3)
        os.kill(stopped.process.pid, signal.SIGSTOP)
        assert math.isnan(stopped.run())
        assert stopped.failure is not None
        assert stopped.failure.endswith("its process did not answer for 0.3 s")
        assert stopped.process.wait(timeout=10) == -signal.SIGKILL
        assert healthy.run() > 0
    finally:
        for one in (killed, stopped, healthy):
            one.close()
    assert not any(psutil.pid_exists(one.process.pid) for one in (killed, stopped, healthy))


def test_a_file_that_fails_in_one_start_does_not_stop_the_others(folder, monkeypatch):
    run, runs = Inference.run, []

    def run_or_kill(one: Inference) -> float:
        if one.file.path.name == "model.onnx":
            runs.append(one)
            if len(runs) == 2 * (WARMUP_ROUNDS + 4):  # the last run of the second start
                one.process.kill()
        return run(one)

    monkeypatch.setattr(Inference, "run", run_or_kill)
    files = [read_runnable(folder / name) for name in ("foreign.onnx", "model.onnx")]
    good, bad = latency.measure(files, threads=1, batch=1, rounds=4)
    assert len(runs) == 2 * (WARMUP_ROUNDS + 4), "it is not started again"
    assert bad[:3] == (None, None, None)
    assert "SIGKILL" in bad.failure
    assert good.times.shape == (STARTS, 4)
    assert np.isfinite(good.times).all()


def test_ctrl_c_prints_one_line_and_leaves_no_process(folder):
    command = [sys.executable, "-m", "bdkd", "benchmark", str(folder / "foreign.onnx"),
               str(folder / "model.onnx"), "--rounds", "100000"]  # fmt: skip
    # A background job of a shell ignores SIGINT, and processes that it starts inherit this.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    started: list[psutil.Process] = []
    while len(started) < 2 and process.poll() is None:
        started = psutil.Process(process.pid).children()
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    watchdog.cancel()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "bdkd: interrupted"
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []


def test_a_killed_command_leaves_no_process(folder):
    """The inference processes notice that their connection was closed."""
    command = [sys.executable, "-m", "bdkd", "benchmark", str(folder / "foreign.onnx"),
               "--rounds", "100000"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started: list[psutil.Process] = []
    while not started and process.poll() is None:
        started = psutil.Process(process.pid).children()
        time.sleep(0.05)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []


# --- refused files and options -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("any-size", ["the shape (any, 3, any, 8)", "all sizes but the first must be fixed"]),
        ("scalar", ["the shape (any)", "must be fixed"]),
        ("bytes", ["its input must be float32"]),
        ("two", ["2 inputs, and must have one"]),
    ],
)
def test_a_file_of_another_program_must_define_its_image_shape(name, words, folder, capsys):
    code, line = fail(capsys, folder / "foreign.onnx", folder / f"{name}.onnx")
    assert code == 1
    for word in [f"{name}.onnx", *words]:
        assert word in line


def test_weights_may_be_listed_as_inputs(folder, capsys):
    graph = graph_of(["N", 4])
    graph.node[0].CopyFrom(helper.make_node("Add", ["x", "w"], ["y"]))
    graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    graph.initializer.append(helper.make_tensor("w", TensorProto.FLOAT, [4], [1.0] * 4))
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, folder / "weights.onnx")
    [file] = measured(capsys, folder / "weights.onnx")["files"]
    assert file["image_shape"] == [4]


def test_a_file_name_that_is_not_utf8_causes_one_line(folder, tmp_path, capsys):
    content = onnx.load(folder / "foreign.onnx")
    content.graph.input[0].name = content.graph.node[0].input[0] = "name"
    path = tmp_path / "name.onnx"
    path.write_bytes(content.SerializeToString().replace(b"name", b"\xff\xfe\xfd\xfc"))
    code, line = fail(capsys, path)
    assert code == 1
    assert f"cannot read {path}: it is corrupt" in line


def test_a_file_with_a_fixed_batch_size_runs_only_with_that_size(folder, capsys):
    code, line = fail(capsys, folder / "batch4.onnx", "--batch", 4, 1)
    assert code == 2
    assert "--batch 1: " in line
    assert "takes batches of 4 only: pass --batch 4" in line
    [setting] = measured(capsys, folder / "batch4.onnx", "--batch", 4)["settings"]
    assert setting["files"][0]["failure"] is None


def test_a_modified_file_of_bdkd_is_refused(folder, tmp_path, capsys):
    model = onnx.load(folder / "model.onnx")
    [digest] = [entry for entry in model.metadata_props if entry.key == "bdkd_sha256"]
    digest.value = "0" * 64
    onnx.save(model, tmp_path / "changed.onnx")
    code, line = fail(capsys, folder / "model.onnx", tmp_path / "changed.onnx")
    assert code == 1
    assert "changed.onnx was damaged or changed since bdkd export wrote it" in line
    model.metadata_props.remove(digest)
    onnx.save(model, tmp_path / "changed.onnx")
    assert fail(capsys, tmp_path / "changed.onnx")[0] == 1


def test_a_refused_file_is_not_run(folder, tmp_path, capsys):
    model = onnx.load(folder / "foreign.onnx")
    model.graph.node[0].domain = "com.microsoft"
    onnx.save(model, tmp_path / "custom.onnx")
    code, line = fail(capsys, tmp_path / "custom.onnx")
    assert code == 1
    assert "custom.onnx is refused: it uses the operator 'Identity' of the domain" in line


@pytest.mark.parametrize("suffix", [".pt2", ".safetensors"])
def test_files_of_other_programs_are_refused_if_torch_would_run_them(suffix, tmp_path, capsys):
    path = tmp_path / f"other{suffix}"
    if suffix == ".pt2":
        program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
        torch.export.save(program, path)
    else:
        from safetensors.torch import save_file

        save_file({"w": torch.zeros(2)}, path)
    code, line = fail(capsys, path)
    assert code == 1
    assert f"{path} was not written by bdkd export" in line


def test_a_path_that_is_not_an_exported_file_is_named(folder, tmp_path, capsys, monkeypatch):
    file = folder / "foreign.onnx"
    code, line = fail(capsys, file, "digits")
    assert code == 2
    assert "digits is not an exported file (.onnx, .pt2, .safetensors)" in line
    code, line = fail(capsys, file, tmp_path / "missing.onnx")
    assert (code, "missing.onnx: No such file" in line) == (1, True)
    (tmp_path / "folder.onnx").mkdir()
    code, line = fail(capsys, tmp_path / "folder.onnx")
    assert (code, "folder.onnx" in line) == (1, True)
    (tmp_path / "text.onnx").write_text("text")
    assert fail(capsys, tmp_path / "text.onnx")[0] == 1


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(package, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    code, line = fail(capsys, folder / "foreign.onnx")
    assert code == 1
    assert f"ONNX files need {package}: pip install 'bdkd[export]'" in line


def test_torch_files_need_no_onnxruntime(folder, capsys, monkeypatch):
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(latency, "STARTS", 2)
    results = measured(capsys, folder / "model.safetensors")
    assert results["versions"]["onnxruntime"] is None
    assert results["settings"][0]["files"][0]["failure"] is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], ["--threads must be in [1, 1024], got"]),
        (["--threads", "2000"], ["--threads must be in [1, 1024], got"]),
        (["--threads"], ["--threads needs a value"]),
        (["--batch", "0"], ["--batch must be in [1, 1048576], got"]),
        (["--batch", "x"], ["--batch must be integers", "got 'x'"]),
        (["--batch"], ["--batch needs a value"]),
        (["--rounds", "19"], ["--rounds must be in [20, 100000], got"]),
        (["--steps", "5"], ["unknown option '--steps'"]),
        (["--device", "cuda"], ["unknown option '--device'"]),
    ],
)
def test_a_wrong_option_is_one_line(arguments, words, folder, capsys):
    code, line = fail(capsys, folder / "foreign.onnx", *arguments)
    assert code == 2
    for word in words:
        assert word in line


def test_images_that_do_not_fit_into_memory_are_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr("bdkd.export.facts.memory_limit", lambda: 2**20)
    code, line = fail(capsys, folder / "foreign.onnx", "--batch", 5000)
    assert code == 2
    assert "--batch 5000: images for " in line
    assert "3,840,000 bytes, and the limit on this machine is 1,048,576" in line


def test_too_few_cores_cause_a_warning(capsys):
    processor = {"cores": 4, "load": 0.1}
    benchmark_files.warn_of_load({"processor": processor}, [1, 4])
    assert capsys.readouterr().err == ""
    benchmark_files.warn_of_load({"processor": processor}, [1, 5])
    assert "--threads 5 is more than the 4 cores" in capsys.readouterr().err
    benchmark_files.warn_of_load({"processor": processor | {"load": 2.5}}, [1])
    assert capsys.readouterr().err == ""
    benchmark_files.warn_of_load({"processor": processor | {"load": 2.5}}, [2])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the load average is 2.5, and the files need 2 of 4 cores" in err


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.onnx"], True), (["--rounds", "50", "m.pt2"], True), (["m.pt2", "--help"], True),
        ([], False), (["digits"], False), (["--help"], False), (["my.toml", "--json"], False),
        (["digits", "--networks.student.weights", "m.safetensors"], False),
    ],
)  # fmt: skip
def test_files_and_recipes_are_distinguished(arguments, expected):
    assert names_file(arguments) is expected


def test_the_help_of_recipes_and_of_files_name_each_other(capsys):
    for arguments, words in (
        (["--help"], ["bdkd benchmark RECIPE", "bdkd benchmark FILE..."]),
        (["model.onnx", "--help"], ["FILE [FILE ...]", "--threads", "GPUs are not"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["benchmark", *arguments])
        assert ended.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for word in words:
            assert word in text


def test_the_inference_process_loads_the_plugin_of_a_model(folder, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from bdkd import register_model\n"
        '@register_model("mine")\n'
        "def mine(num_classes, in_channels=3):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))\n"
    )
    arguments = ["--plugin", "mine.py"]
    recipe = [*TINY_RUN, "--networks.student.model", "mine", "--networks.teacher.model", "resnet8"]
    done = bdkd("train", *recipe, "--run-dir", "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = bdkd("export", "run", "--to", "safetensors", "--output", "m.safetensors", *arguments,
                cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = bdkd("benchmark", "m.safetensors", *FEW, "--json", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [setting] = json.loads(done.stdout)["settings"]
    assert setting["files"][0]["failure"] is None
