"""``bdkd export --quantize int8 --temperature fitted`` writes standard ONNX, the same file every
time, and a calibrated network."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime import quantization
from small_runs import SMALL
from test_export import fail
from torch import nn

from bdkd.cli import main
from bdkd.errors import RunError
from bdkd.evaluation.temperature import HIGHEST, LOWEST, fit_temperature
from bdkd.export.facts import VERSION, Facts
from bdkd.export.formats import decode, encode, read_exported
from bdkd.export.quantize import float_operators, quantize
from bdkd.export.temperature import check_fit, fold_temperature
from bdkd.export.trained import open_trained
from bdkd.runs.folder import selected_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a finished run whose student misclassifies some validation images."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", *SMALL, "--max-steps", "30", "--train.ema-decay", "None",
          "--run-dir", str(folder)])  # fmt: skip
    main(["export", str(folder), "--to", "onnx", "--quantize", "int8"])
    return folder


def exported(run: Path, name: str) -> Path:
    return run / "export" / "student" / name


@pytest.fixture(scope="module")
def images(run) -> np.ndarray:
    """Return normalised test images (359, 1, 8, 8)."""
    return split(run, "test")[0]


def split(run: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of a split, normalised as in the run, and the labels."""
    trained = open_trained(selected_checkpoint(run), None, None)
    batches = list(trained.components.source.eval_batches(name, 64))
    return (
        torch.cat([batch.views[0] for batch in batches]).numpy(),
        torch.cat([batch.target for batch in batches]).numpy(),
    )


def logits(path: Path, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """Return the logits of a file with the default settings of onnxruntime, without bdkd."""
    session = onnxruntime.InferenceSession(path)
    starts = range(0, len(images), batch)
    return np.concatenate([session.run(None, {"images": images[i : i + batch]})[0] for i in starts])


def plain_facts(network: nn.Module, shape: tuple[int, int, int]) -> Facts:
    return Facts(
        version=VERSION, network="student", model="plain", role="student",
        parameters=sum(p.numel() for p in network.parameters()), method="bdkd", seed=0, step=1,
        recipe="", classes=("a", "b"), channels=shape[0], image_size=shape[1:],
        normalisation=None, measured_on="", images=0, metrics={}, versions={},
    )  # fmt: skip


def fp32_file(network: nn.Module, shape: tuple[int, int, int]):
    facts = plain_facts(network, shape)
    return decode(Path("model.onnx"), "onnx", encode("onnx", network.eval(), facts)), facts


# --- the int8 file -------------------------------------------------------------------------------


def test_the_graph_is_standard_onnx_in_int8(run):
    model = onnx.load(exported(run, "model-int8.onnx"))
    assert [(entry.domain, entry.version > 12) for entry in model.opset_import] == [("", True)]
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights, activations = 0, 0
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in arrays:
            weight, scale = arrays[node.input[0]], arrays[node.input[1]]
            if weight.dtype == np.int32:  # it is a bias
                continue
            assert weight.dtype == np.int8
            [axis] = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
            assert scale.shape == (weight.shape[axis],)  # per channel
            weights += 1
        elif node.op_type == "QuantizeLinear":
            assert (arrays[node.input[2]].dtype, arrays[node.input[2]].shape) == (np.uint8, ())
            activations += 1
    float_model = onnx.load(exported(run, "model.onnx"))
    layers = sum(node.op_type in ("Conv", "Gemm") for node in float_model.graph.node)
    assert weights == layers
    assert activations > layers


def test_int8_is_smaller_and_nearly_as_accurate(run):
    sizes = [exported(run, name).stat().st_size for name in ("model.onnx", "model-int8.onnx")]
    assert sizes[0] > 2.5 * sizes[1]
    fp32, int8 = (
        logits(exported(run, n), split(run, "test")[0]) for n in ("model.onnx", "model-int8.onnx")
    )
    assert (fp32.argmax(1) == int8.argmax(1)).mean() > 0.97
    assert np.abs(fp32 - int8).max() > 0


@pytest.mark.parametrize("batch", [1, 7, 359])
def test_int8_logits_do_not_depend_on_the_batch_size(batch, run, images):
    path = exported(run, "model-int8.onnx")
    assert np.array_equal(logits(path, images, batch), logits(path, images))


def test_quantization_is_deterministic(run, tmp_path):
    """A different hash seed and number of threads give the same bytes."""
    target = tmp_path / "model-int8.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "bdkd", "export", str(run), "--to", "onnx", "--quantize", "int8",
         "--output", str(target)],
        env=os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == exported(run, "model-int8.onnx").read_bytes()
    assert target.with_name("model.onnx").read_bytes() == exported(run, "model.onnx").read_bytes()


def test_calibration_reads_validation_images_only(run, tmp_path, monkeypatch):
    from bdkd.data import in_memory

    splits = []
    before = in_memory.InMemory.eval_batches

    def watched(self, split, *arguments):
        splits.append(split)
        return before(self, split, *arguments)

    monkeypatch.setattr(in_memory.InMemory, "eval_batches", watched)
    target = str(tmp_path / "a.onnx")
    main(["export", str(run), "--to", "onnx", "--quantize", "int8", "--output", target,
          "--no-evaluate", "--temperature", "fitted"])  # fmt: skip
    assert set(splits) == {"val"}


def test_calibration_images_are_spread_over_the_split(run, tmp_path):
    """A split may be sorted by class, so its first images would not represent all classes."""
    from bdkd.export.export import Options, _calibration_images

    trained = open_trained(selected_checkpoint(run), None, None)
    everything = split(run, "val")[0]
    for count in (1, 10, 100, len(everything)):
        chosen = _calibration_images(trained, Options(True, count))
        step = len(everything) // count
        assert np.array_equal(chosen, everything[::step][:count])
    assert len(_calibration_images(trained, Options(True))) == min(512, len(everything))


class Depthwise(nn.Module):
    """A depthwise network that has one channel with large weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand = nn.Conv2d(3, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.project = nn.Conv2d(32, 16, 1)
        self.classifier = nn.Linear(16, 10)
        with torch.no_grad():
            self.expand.bias.zero_()
            # relu(x / 100) * 100 = relu(x): the function does not change.
            self.expand.weight[0] /= 100
            self.depthwise.weight[0] *= 100

    def forward(self, x):
        x = self.project(self.depthwise(self.expand(x).relu()).relu()).relu()
        return self.classifier(x.mean((2, 3)))


def test_per_channel_scales_keep_depthwise_networks_accurate(tmp_path):
    network = Depthwise()
    images = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1)).numpy()
    fp32, facts = fp32_file(network, (3, 8, 8))
    ours, theirs = tmp_path / "ours.onnx", tmp_path / "per-tensor.onnx"
    ours.write_bytes(quantize(fp32, images, facts))

    class Reader(quantization.CalibrationDataReader):
        batches = iter([{"images": images}])

        def get_next(self):
            return next(self.batches, None)

    quantization.quantize_static(
        onnx.ModelProto.FromString(fp32.content), theirs, Reader(), per_channel=False,
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    (tmp_path / "fp32.onnx").write_bytes(fp32.content)
    expected = logits(tmp_path / "fp32.onnx", images)
    errors = [np.abs(logits(path, images) - expected).mean() for path in (ours, theirs)]
    assert 4 * errors[0] < errors[1]


def test_operators_that_stay_in_float_are_named(tmp_path):
    class Gelu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 8, 3), nn.Linear(8, 2)

        def forward(self, x):
            return self.last(nn.functional.gelu(self.first(x)).mean((2, 3)))

    images = np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32)
    for network, named in ((Gelu(), {"Gelu", "Erf"}), (Depthwise(), set())):
        channels = next(network.parameters()).shape[1]
        given = np.repeat(images, channels, 1)
        fp32, facts = fp32_file(network, (channels, 8, 8))
        int8 = decode(Path("a.onnx"), "onnx", quantize(fp32, given, facts))
        shares = float_operators(int8, given)
        assert bool(named & shares.keys()) == bool(named), shares
        assert not {"QLinearConv", "Conv", "QuantizeLinear"} & shares.keys()
        assert all(0 <= share <= 1 for share in shares.values())
        assert sum(shares.values()) < 1


def test_a_network_without_quantisable_operators_is_refused():
    class Sine(nn.Module):
        def forward(self, x):
            return x.sin().flatten(1)

    fp32, facts = fp32_file(Sine(), (1, 1, 2))
    with pytest.raises(RunError, match="no operator that onnxruntime can quantise"):
        quantize(fp32, np.ones((4, 1, 1, 2), np.float32), facts)


# --- facts and model card ------------------------------------------------------------------------


def test_facts_are_those_of_the_int8_network(run, images):
    fp32, int8 = (read_exported(exported(run, n)) for n in ("model.onnx", "model-int8.onnx"))
    made = int8.facts.quantization
    assert (fp32.facts.precision, int8.facts.precision) == ("fp32", "int8")
    assert (made.baseline, made.baseline_weights) == ("model.onnx", fp32.weights)
    assert made.calibration_images == len(split(run, "val")[0])
    assert (int8.facts.measured_on, int8.facts.images) == ("test", 359)
    target = split(run, "test")[1]
    x = logits(exported(run, "model-int8.onnx"), images).astype(np.float64)
    x -= np.log(np.exp(x).sum(1, keepdims=True))
    assert int8.facts.metrics["top1"] == (x.argmax(1) == target).mean()
    nll = -x[np.arange(len(x)), target].mean()
    assert int8.facts.metrics["nll"] == pytest.approx(nll, rel=1e-9)
    assert fp32.facts.metrics["nll"] == pytest.approx(
        json.loads((run / "summary.json").read_text())["networks"]["student"]["nll"], rel=1e-5
    )


def test_the_card_shows_fp32_and_int8_side_by_side(run):
    text = exported(run, "README.md").read_text()
    fp32, int8 = (read_exported(exported(run, n)).facts for n in ("model.onnx", "model-int8.onnx"))
    assert "| metric | fp32 | int8 |" in text
    for key, name in (("top1", "top-1 accuracy"), ("brier", "Brier score")):
        assert f"| {name} | {fp32.metrics[key]:.6g} | {int8.metrics[key]:.6g} |" in text
    change = int8.quantization.changes["nll"]
    assert f"{change['difference']:+.4g} | {change['low']:+.4g} to {change['high']:+.4g} |" in text
    assert change["difference"] == pytest.approx(
        int8.metrics["nll"] - fp32.metrics["nll"], abs=1e-6
    )


def test_the_json_is_what_evaluate_prints(run, capsys):
    path = exported(run, "model-int8.onnx")
    capsys.readouterr()
    main(["evaluate", str(path), "--split", "test", "--json"])
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(path.with_suffix(".json").read_text())
    assert printed["comparison"] == written["comparison"]
    assert printed["networks"] == written["networks"]


def test_an_existing_fp32_file_is_kept(run, tmp_path):
    target = tmp_path / "model.onnx"
    main(["export", str(run), "--to", "onnx", "--output", str(target)])
    before = target.stat().st_mtime_ns
    int8 = ["export", str(run), "--to", "onnx", "--quantize", "int8", "--no-evaluate", "--output"]
    main([*int8, str(tmp_path / "model-int8.onnx")])
    assert target.stat().st_mtime_ns == before
    main([*int8, str(tmp_path / "small.onnx")])
    assert read_exported(tmp_path / "small-fp32.onnx").weights == read_exported(target).weights
    assert read_exported(tmp_path / "small.onnx").facts.quantization.baseline == "small-fp32.onnx"


def test_the_comparison_of_a_replaced_file_is_removed(run, tmp_path, capsys):
    """A file with this name and other content is kept."""
    command = ["export", str(run), "--to", "onnx", "--quantize", "int8", "--force", "--output",
               str(tmp_path / "a-int8.onnx")]  # fmt: skip
    comparison = tmp_path / "a-int8.json"
    main(command)
    assert comparison.exists()
    main([*command, "--no-evaluate"])
    assert not comparison.exists()
    main(command)
    (tmp_path / "a-int8.onnx").unlink()
    code, message = fail(capsys, *[a for a in command if a != "--force"], "--no-evaluate")
    assert (code, "a-int8.json exists: --force" in message) == (1, True)
    comparison.write_text('{"mine": 1}')
    main([*command, "--no-evaluate"])
    assert comparison.read_text() == '{"mine": 1}'


# --- temperature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_fitted_file_is_calibrated_on_the_validation_images(precision, run, tmp_path, capsys):
    """Fitting a temperature to the new file gives 1. Its logits are the old logits divided by T."""
    target = tmp_path / ("a-int8.onnx" if precision == "int8" else "a.onnx")
    quantized = ["--quantize", "int8"] if precision == "int8" else []
    main(["export", str(run), "--to", "onnx", "--temperature", "fitted", *quantized,
          "--output", str(target)])  # fmt: skip
    out = capsys.readouterr().out
    facts = read_exported(target).facts
    assert f"temperature {facts.temperature:.4g}, folded into the last layer" in out
    validation, labels = split(run, "val")
    came = logits(target, validation)
    refitted = fit_temperature(torch.from_numpy(came), torch.from_numpy(labels))
    assert refitted == pytest.approx(1, abs=1e-3 if precision == "fp32" else 0.02)
    name = "model-int8.onnx" if precision == "int8" else "model.onnx"
    before = logits(exported(run, name), validation)
    largest = np.abs(before).max()
    tolerance = 1e-4 if precision == "fp32" else 0.03
    assert np.abs(came * facts.temperature - before).max() < tolerance * largest
    gain = json.loads(target.with_suffix(".json").read_text())["temperature_gain"]
    assert gain["temperature"] == facts.temperature
    assert gain["changes"]["top1"]["difference"] == 0
    test, labels = split(run, "test")
    came = logits(target, test).astype(np.float64)
    for scale, key in ((1.0, "after"), (facts.temperature, "before")):
        x = came * scale
        x -= np.log(np.exp(x).sum(1, keepdims=True))
        nll = -x[np.arange(len(x)), labels].mean()
        assert gain["changes"]["nll"][key] == pytest.approx(nll, rel=1e-6)
    assert facts.metrics["nll"] == pytest.approx(gain["changes"]["nll"]["after"], rel=1e-6)


@pytest.mark.parametrize("kind", ["export", "safetensors"])
def test_other_formats_also_contain_the_temperature(kind, run, tmp_path):
    suffix = {"export": "pt2", "safetensors": "safetensors"}[kind]
    target = tmp_path / f"a.{suffix}"
    main(["export", str(run), "--to", kind, "--temperature", "fitted", "--output", str(target)])
    facts = read_exported(target).facts
    assert facts.temperature != 1
    assert facts.measured_on == "test"


class TwoHeads(nn.Module):
    """A network whose logits are not the output of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.last(x) + self.first(x)


def test_a_temperature_that_cannot_be_folded_is_refused():
    images = torch.randn(8, 1, 2, 2)
    with pytest.raises(RunError, match="cannot be folded into student"):
        fold_temperature(TwoHeads(), 2.0, images, "student")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    folded = fold_temperature(plain, 2.0, images, "student")
    torch.testing.assert_close(folded(images), plain(images) / 2)


def test_fits_without_a_minimum_are_refused():
    for value, reason in (
        (None, "not finite"), (LOWEST, "every validation image correctly"),
        (HIGHEST, "worse than chance"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=reason):
            check_fit(value, "student")
    assert check_fit(1.5, "student") == 1.5


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "needed"),
    [
        (["--to", "safetensors", "--quantize", "int8"], 2, "--quantize needs --to onnx"),
        (["--to", "onnx", "--quantize", "int4"], 2, "int8"),
        (["--to", "onnx", "--calibration-images", "8"], 2, "needs --quantize int8"),
        (["--to", "onnx", "--no-evaluate"], 2, "needs --quantize or --temperature"),
        (["--to", "onnx", "--temperature", "2"], 2, "fitted"),
        (["--to", "onnx", "--quantize", "int8", "--output", "./-int8.onnx"], 2, "needs a name"),
        (["--to", "onnx", "--quantize", "int8", "--calibration-images", "100000"], 2, "at most"),
        (["--to", "onnx", "--quantize", "int8", "--calibration-images", "0"], 2, "at least 1"),
    ],
)
def test_wrong_arguments(arguments, code, needed, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    came, message = fail(capsys, "export", str(run), *arguments, "--force")
    assert (came, needed in message) == (code, True), message
    assert not list(tmp_path.iterdir())


def test_exported_files_are_refused(run, capsys):
    for name, needed in (
        ("model-int8.onnx", "exported file (int8): it is quantised already; give the folder"),
        ("model.onnx", "exported file (fp32): give the folder of its run"),
    ):
        code, message = fail(
            capsys, "export", str(exported(run, name)), "--to", "onnx", "--quantize", "int8"
        )
        assert (code, needed in message) == (1, True), message


def test_a_run_without_validation_images(tmp_path, capsys):
    folder = tmp_path / "run"
    main(["train", *SMALL, "--max-steps", "1", "--data.validation", "0",
          "--train.select", "last", "--run-dir", str(folder)])  # fmt: skip
    for options in (["--quantize", "int8"], ["--temperature", "fitted"]):
        code, message = fail(capsys, "export", str(folder), "--to", "onnx", *options)
        assert (code, f"{options[0]} needs validation images" in message) == (1, True), message
    assert not (folder / "export").exists()


def test_images_of_another_size_are_refused(run):
    from bdkd.export.export import Options, _calibration_images

    trained = open_trained(selected_checkpoint(run), None, None)
    other = dataclasses.replace(trained.facts, image_size=(9, 9))
    with pytest.raises(RunError, match=r"have the shape \(1, 8, 8\), and the network takes"):
        _calibration_images(trained._replace(facts=other), Options(True))


def test_an_existing_file_is_kept(run, tmp_path, capsys):
    here = ["export", str(run), "--to", "onnx", "--quantize", "int8", "--no-evaluate", "--output"]
    (tmp_path / "a.onnx").write_text("mine")
    code, message = fail(capsys, *here, str(tmp_path / "a-int8.onnx"))
    assert (code, "a.onnx exists: --force" in message) == (1, True)
    (tmp_path / "b-int8.json").write_text("mine")
    code, message = fail(capsys, *[a for a in here if a != "--no-evaluate"],
                         str(tmp_path / "b-int8.onnx"))  # fmt: skip
    assert (code, "b-int8.json exists: --force" in message) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b-int8.json"]


def test_no_room_for_temporary_files(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    code, message = fail(
        capsys, "export", str(run), "--to", "onnx", "--quantize", "int8", "--no-evaluate",
        "--output", str(tmp_path / "a.onnx"),
    )  # fmt: skip
    assert (code, "cannot write temporary files" in message) == (1, True), message
    assert "TMPDIR" in message
    assert not list(tmp_path.iterdir())
