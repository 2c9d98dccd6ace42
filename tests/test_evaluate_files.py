"""``bdkd evaluate`` on exported files: an int8 file compared with its fp32 file, any two files
compared with each other, and ONNX files of other programs."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from small_runs import SMALL, torchrun
from test_untrusted import EXTERNAL, constants, forge, model_of, scores, vector

from bdkd import device
from bdkd.cli import main
from bdkd.config import load_recipe
from bdkd.data import create_source
from bdkd.device import Processor
from bdkd.export import measure as measuring
from bdkd.export.facts import Quantization
from bdkd.export.formats import read_exported


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a student in all formats, its int8 file, and foreign files."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", *SMALL, "--max-steps", "30", "--train.ema-decay", "None",
          "--run-dir", str(folder)])  # fmt: skip
    for kind in ("onnx", "export", "safetensors"):
        main(["export", str(folder), "--to", kind])
    files = folder / "export" / "student"
    fp32 = read_exported(files / "model.onnx")
    quantized = files / "foreign-int8.onnx"
    quantize(files / "model.onnx", quantized)
    made = Quantization(64, "model.onnx", fp32.weights)
    write(files / "model-int8.onnx", onnx.load(quantized), fp32.facts, quantization=made)
    foreign = onnx.load(files / "model.onnx")
    del foreign.metadata_props[:]
    rename(foreign, {"images": "pixel_values", "logits": "scores"})
    (files / "foreign.onnx").write_bytes(foreign.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def files(run) -> Path:
    return run / "export" / "student"


@pytest.fixture
def here(files, tmp_path) -> Path:
    """Return a folder with copies of the files that a test may change."""
    return Path(shutil.copytree(files, tmp_path / "files"))


def images_of(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of a split of the run's data."""
    recipe = load_recipe("digits")
    source = create_source(recipe.data, recipe.seed, torch.device("cpu"), torch.contiguous_format,
                           torch.float32)  # fmt: skip
    batches = list(source.eval_batches(split, 1000))
    images = torch.cat([batch.views[0] for batch in batches])
    return images.numpy(), torch.cat([batch.target for batch in batches]).numpy()


def quantize(path: Path, target: Path) -> None:
    images, _ = images_of("val")

    class Reader(CalibrationDataReader):
        batches = iter(np.split(images[:64], 2))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    model = onnx.load(path)
    del model.metadata_props[:]
    quantize_static(
        model, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )  # fmt: skip


def write(path: Path, model, facts, **changes) -> Path:
    """Write a model with changed metadata and a valid checksum."""
    del model.metadata_props[:]
    text = msgspec.json.encode(dataclasses.replace(facts, **changes)).decode()
    return forge(path, model, text)


def rename(model, names: dict[str, str]) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]


def evaluated(capsys, *arguments) -> dict:
    capsys.readouterr()
    main(["evaluate", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def shown(capsys, *arguments) -> str:
    capsys.readouterr()
    main(["evaluate", *map(str, arguments)])
    return capsys.readouterr().out


def fail(capsys, *arguments) -> tuple[int, str]:
    """Return the exit code and the line of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *map(str, arguments)])
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    assert len(message) < 1000
    return exit_.value.code, message


# --- comparison with onnxruntime and NumPy -------------------------------------------------------


def logits_by_onnxruntime(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    [entry] = session.get_inputs()
    return session.run(None, {entry.name: images})[0].astype(np.float64)


def metrics_by_numpy(logits: np.ndarray, target: np.ndarray) -> dict[str, float]:
    log_p = log_softmax(logits, axis=1)
    p, rows = np.exp(log_p), np.arange(len(target))
    correct, confidence = p.argmax(1) == target, p.max(1)
    bins = np.ceil(confidence * 15)
    gaps = [abs((correct - confidence)[bins == k].sum()) for k in range(1, 16)]
    brier = ((p - np.eye(p.shape[1])[target]) ** 2).sum(1)
    return {"top1": correct.mean(), "nll": -log_p[rows, target].mean(), "brier": brier.mean(),
            "ece": sum(gaps) / len(target)}  # fmt: skip


def temperature_by_scipy(logits: np.ndarray, target: np.ndarray) -> float:
    def nll(log_t: float) -> float:
        return metrics_by_numpy(logits / np.exp(log_t), target)["nll"]

    bounds = (np.log(0.05), np.log(100))
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return float(np.exp(found.x))


@pytest.mark.parametrize("split", ["val", "test"])
def test_all_metrics_agree_with_onnxruntime_and_numpy(split, files, capsys):
    came = evaluated(capsys, files / "model-int8.onnx", "--split", split)
    images, target = images_of(split)
    val_images, val_target = images_of("val")
    expected: dict[str, dict[str, float]] = {}
    predicted = {}
    for side, name in (("before", "model.onnx"), ("after", "model-int8.onnx")):
        logits = logits_by_onnxruntime(files / name, images)
        predicted[side] = logits.argmax(1)
        temperature = temperature_by_scipy(
            logits_by_onnxruntime(files / name, val_images), val_target
        )
        scaled = metrics_by_numpy(logits / temperature, target)
        expected[side] = metrics_by_numpy(logits, target) | {"temperature": temperature}
        expected[side] |= {f"{key}_scaled": scaled[key] for key in ("ece", "nll", "brier")}
    compared, [network] = came["comparison"], came["networks"].values()
    assert (came["images"], compared["images"]) == (len(target), len(target))
    assert compared["validation_images"] == len(val_target)
    assert set(compared["changes"]) == set(expected["after"])
    for metric, change in compared["changes"].items():
        for side in ("before", "after"):
            assert change[side] == pytest.approx(expected[side][metric], rel=1e-4, abs=2e-5), metric
        assert change["after"] == network[metric]
        assert change["difference"] == change["after"] - change["before"]
        assert change["low"] <= change["high"]
    agreement = (predicted["before"] == predicted["after"]).mean()
    assert compared["agreement"]["value"] == pytest.approx(agreement)
    assert compared["agreement"]["low"] < agreement <= compared["agreement"]["high"]
    for entry, name in ((compared, "model.onnx"), (network, "model-int8.onnx")):
        assert entry["bytes"] == (files / name).stat().st_size
    assert (compared["file"], compared["precision"]) == ("model.onnx", "fp32")
    assert network["precision"] == "int8"


def test_the_metrics_of_a_file_equal_those_in_the_summary_of_its_run(run, files, capsys):
    """This includes the metrics after temperature scaling."""
    summary = json.loads((run / "summary.json").read_text())["networks"]["student"]
    came = evaluated(capsys, files / "model.onnx", "--split", "test")
    assert "comparison" not in came
    assert "temperature_gain" not in came
    network = came["networks"]["student"]
    assert network.pop("precision") == "fp32"
    assert network.pop("bytes") == (files / "model.onnx").stat().st_size
    assert network.keys() == summary.keys()
    for key, value in summary.items():
        same = isinstance(value, str)
        assert network[key] == (value if same else pytest.approx(value, rel=1e-3, abs=1e-4)), key


def test_the_gain_of_a_folded_temperature_is_shown(files, here, capsys):
    fp32 = read_exported(here / "model.onnx")
    path = write(here / "t.onnx", onnx.load(here / "model.onnx"), fp32.facts, temperature=2.5)
    gain = evaluated(capsys, path, "--split", "test")["temperature_gain"]
    images, target = images_of("test")
    logits = logits_by_onnxruntime(path, images)
    assert gain["temperature"] == 2.5
    assert list(gain["changes"]) == ["top1", "nll", "ece", "brier"]
    for side, factor in (("before", 2.5), ("after", 1)):
        expected = metrics_by_numpy(factor * logits, target)
        for metric, change in gain["changes"].items():
            assert change[side] == pytest.approx(expected[metric], rel=1e-4, abs=2e-5)
    assert gain["changes"]["top1"] | {"before": 0, "after": 0} == dict.fromkeys(
        ("before", "after", "difference", "low", "high"), 0
    )
    assert "Gain of the temperature 2.5 in the last layer" in shown(capsys, path)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_an_invalid_temperature_in_a_file_is_refused(temperature, here, capsys):
    fp32 = read_exported(here / "model.onnx")
    path = write(here / "t.onnx", onnx.load(here / "model.onnx"), fp32.facts,
                 temperature=temperature)  # fmt: skip
    assert fail(capsys, path)[0] == 1


# --- text ----------------------------------------------------------------------------------------


def test_the_table_of_an_int8_file_compares_it_with_fp32(files, capsys):
    out = shown(capsys, files / "model-int8.onnx", "--split", "test")
    assert all(len(line) <= 80 for line in out.splitlines()[1:]), out  # line 0 has a path
    size, small = ((files / name).stat().st_size for name in ("model.onnx", "model-int8.onnx"))
    for part in (f"model-int8.onnx, int8, {small:,} bytes, step", "fp32    int8  difference",
                 "The predictions agree on", f"{size:,} and {small:,} bytes", "times smaller",
                 "ECE changes by", "(95% interval)", "by paired bootstrap"):  # fmt: skip
        assert part in out
    for metric in ("top-1 %", "NLL", "ECE %", "Brier", "T ", "ECE % at T"):
        assert f"\n{metric}" in out


@pytest.mark.parametrize(("metric", "low", "high", "words"), [
    ("ece", -0.0031, 0.0042, "ECE changes by -0.31 to +0.42 points (95% interval): no significant "
                             "change, but every change in this interval is possible."),
    ("ece", 0.001, 0.02, "ECE changes by +0.10 to +2.00 points (95% interval): ECE rises."),
    ("ece", -0.02, -0.001, "ECE falls."),
    ("ece", 1e-9, 2e-9, "ECE does not change in its first 2 decimals."),  # rounding errors of fp32
    ("ece", None, None, "cannot be computed"),
    ("top1", -0.02, -0.001, "top-1 falls."),
    ("top1", -0.001, 0.0, "no significant change"),
    ("nll", 0.01, 0.02, "NLL changes by +0.0100 to +0.0200 (95% interval): NLL rises."),
])  # fmt: skip
def test_a_sentence_describes_the_interval_of_a_change(metric, low, high, words):
    from bdkd.cli.changes import _conclusion

    change = {"before": 0.1, "after": 0.1, "difference": 0.0, "low": low, "high": high}
    assert words in _conclusion(metric, change)


def test_without_validation_images_there_is_no_fitted_temperature(tmp_path, capsys):
    run = tmp_path / "run"
    main(["train", *SMALL, "--max-steps", "1", "--data.validation", "0", "--train.select", "last",
          "--run-dir", str(run)])  # fmt: skip
    main(["export", str(run), "--to", "onnx"])
    [path] = run.glob("export/*/model.onnx")
    came = evaluated(capsys, path, "--split", "test", "--against", path)
    [network] = came["networks"].values()
    empty = ("temperature", "ece_scaled", "nll_scaled", "brier_scaled")
    assert [network[key] for key in empty] == [None] * 4
    for metric, change in came["comparison"]["changes"].items():
        assert set(change.values()) == {None} if metric in empty else change["difference"] == 0
    out = shown(capsys, path, "--split", "test", "--against", path)
    assert "There are no validation images" in out
    assert re.search(r"\nT( +–){4}\n", out)
    assert "the validation images" not in fail(capsys, path)[1]


# --- the file for the comparison -----------------------------------------------------------------


def warned(capsys, *arguments) -> tuple[dict, str]:
    capsys.readouterr()
    main(["evaluate", *map(str, arguments), "--json"])
    came = capsys.readouterr()
    return json.loads(came.out), came.err


def test_a_missing_or_different_fp32_file_causes_one_line(here, capsys):
    path = here / "model-int8.onnx"
    assert warned(capsys, path)[1] == ""
    other = here / "model.onnx"
    fp32 = read_exported(other)
    write(other, model_of(scores("w"), [vector(), *constants()]), fp32.facts)
    came, line = warned(capsys, path)
    assert "comparison" not in came
    assert line.count("\n") == 1
    assert "'model.onnx', the fp32 file that model-int8.onnx was made from, has been" in line
    assert "--against FILE" in line
    other.write_bytes(b"damaged")
    assert "cannot be used" in warned(capsys, path)[1]
    other.unlink()
    came, line = warned(capsys, path)
    assert "is not in the same folder: --against FILE" in line
    came, line = warned(capsys, path, "--against", here / "model.safetensors")
    assert line == ""
    assert came["comparison"]["file"] == "model.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx",
        "/dev/zero",
        "..",
        "a\x1b[31m.onnx",
        "model",
        "x\0.onnx",
        "é" * 200 + ".onnx",
    ],
)
def test_false_names_of_fp32_files_are_not_followed(name, here, capsys):
    """The name comes from an untrusted file. Only names of files in the same folder are
    accepted."""
    fp32 = read_exported(here / "model.onnx")
    path = write(here / "evil.onnx", onnx.load(here / "model-int8.onnx"), fp32.facts,
                 quantization=Quantization(64, name, fp32.weights))  # fmt: skip
    came, line = warned(capsys, path)
    assert "comparison" not in came
    assert line.count("\n") == 1
    assert "\x1b" not in line


@pytest.mark.parametrize("other", ["model.pt2", "model.safetensors", "model-int8.onnx"])
def test_any_two_exported_files_can_be_compared(other, files, capsys):
    came = evaluated(capsys, files / "model.onnx", "--against", files / other)
    compared = came["comparison"]
    assert compared["file"] == other
    assert compared["bytes"] == (files / other).stat().st_size
    changes = compared["changes"]
    if other != "model-int8.onnx":
        assert compared["agreement"]["value"] == 1
        assert all(abs(change["difference"]) < 1e-3 for change in changes.values())
    assert changes["nll"]["after"] == came["networks"]["student"]["nll"]


def test_files_of_different_data_sets_are_not_compared(here, capsys):
    fp32 = read_exported(here / "model.onnx")
    facts, norm = fp32.facts, fp32.facts.normalisation
    for change, words in (
        ({"classes": facts.classes[::-1]}, "class 0 is '9' and was '0'"),
        ({"classes": facts.classes[:9]}, "it has 9 classes and had 10"),
        ({"image_size": (8, 9)}, "the shape (1, 8, 9), and not (1, 8, 8)"),
        ({"normalisation": dataclasses.replace(norm, mean=(0.0,))}, "another mean"),
    ):
        other = write(here / "other.onnx", onnx.load(here / "model.onnx"), facts, **change)
        code, message = fail(capsys, here / "model.onnx", "--against", other)
        assert code == 1
        assert f"other.onnx cannot be compared with {here / 'model.onnx'}" in message
        assert words in message


def test_against_needs_two_exported_files(run, files, capsys):
    for arguments in ((run, "--against", files / "model.onnx"),
                      (files / "model.onnx", "--against", run),
                      (files / "model.onnx", "--against", run / "config.toml")):  # fmt: skip
        code, message = fail(capsys, *arguments)
        assert code == 2
        assert "--against needs an exported file" in message
    code, message = fail(capsys, files / "model.onnx", "--against", files / "no.onnx")
    assert (code, "No such file" in message) == (1, True)


def test_several_ranks_print_the_same_as_one(here, capsys):
    """3 ranks have 120, 120 and 119 of 359 images, in 8, 8 and 7 batches of 17."""
    facts = read_exported(here / "model-int8.onnx").facts
    recipe, count = re.subn(r"(?m)^batch_size = \d+$", "batch_size = 51", facts.recipe)
    assert count == 1
    path = here / "model-int8.onnx"
    write(path, onnx.load(path), facts, recipe=recipe)
    alone = evaluated(capsys, path, "--split", "test")
    done = torchrun(3, "evaluate", str(path), "--split", "test", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)
    assert together.pop("networks").keys() == alone["networks"].keys()
    changes = together["comparison"].pop("changes")
    for metric, change in alone["comparison"].pop("changes").items():
        assert changes[metric] == pytest.approx(change, rel=1e-4, abs=1e-5), metric
    del alone["networks"]
    assert together == alone


# --- processors ----------------------------------------------------------------------------------

X86 = "processor : 0\nmodel name : Old {n}\nflags : fpu sse avx2 {flags}\n\nmodel name : second\n"


@pytest.mark.parametrize(("text", "expected"), [
    (X86.format(n=1, flags=""), ("Old 1", False)),
    (X86.format(n=2, flags="avx512_vnni"), ("Old 2", True)),
    (X86.format(n=3, flags="avx_vnni"), ("Old 3", True)),
    (X86.format(n=4, flags="avx512_vnnix"), ("Old 4", False)),
    ("processor : 0\nFeatures : fp asimd\n", (None, None)),
    (None, (None, None)),
])  # fmt: skip
def test_vnni_is_read_from_the_flags_of_the_processor(text, expected, tmp_path):
    information = tmp_path / "cpuinfo"
    if text is not None:
        information.write_text(text)
    came = device.processor(information)
    assert came.vnni is expected[1]
    assert came.name == expected[0] if expected[0] else came.name


def test_int8_files_warn_on_processors_without_vnni(files, capsys, monkeypatch):
    for vnni, file, warns in (
        (False, "model-int8.onnx", True),
        (True, "model-int8.onnx", False),
        (None, "model-int8.onnx", False),
        (False, "model.onnx", False),
    ):
        monkeypatch.setattr(measuring, "processor", lambda vnni=vnni: Processor("Old", vnni))
        line = warned(capsys, files / file)[1]
        assert ("Old has no VNNI instructions: onnxruntime may saturate" in line) == warns
        assert line.count("\n") == warns


# --- foreign files -------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["digits", "toml", "run"])
def test_a_foreign_file_is_evaluated_on_the_data_of_a_recipe(recipe, run, files, capsys):
    """The input and output of the file have other names than in files of bdkd."""
    given = {"digits": "digits", "toml": run / "config.toml", "run": run}[recipe]
    path = files / "foreign.onnx"
    came = evaluated(capsys, path, "--recipe", given, "--split", "test")
    own = evaluated(capsys, files / "model.onnx", "--split", "test")["networks"]["student"]
    network = came["networks"]["foreign"]
    assert came["step"] is None
    facts = {"model": "ONNX", "role": "foreign", "parameters": None, "precision": "fp32"}
    assert network | facts == network
    assert network["bytes"] == path.stat().st_size
    assert network["nll"] == own["nll"]
    assert network["temperature"] == own["temperature"]
    assert "foreign (ONNX)           –" in shown(capsys, path, "--recipe", given)


def test_foreign_files_are_compared(files, capsys):
    came = evaluated(capsys, files / "foreign-int8.onnx", "--recipe", "digits", "--against",
                     files / "foreign.onnx")  # fmt: skip
    own = evaluated(capsys, files / "model-int8.onnx")
    assert came["networks"]["foreign-int8"]["precision"] == "int8"
    assert came["comparison"]["precision"] == "fp32"
    assert came["comparison"]["changes"] == own["comparison"]["changes"]
    came = evaluated(capsys, files / "model-int8.onnx", "--against", files / "foreign.onnx")
    assert came["comparison"]["changes"] == own["comparison"]["changes"]


def test_a_foreign_file_without_a_recipe_causes_one_line(files, capsys):
    code, message = fail(capsys, files / "foreign.onnx")
    assert code == 1
    assert "was not written by bdkd export" in message
    assert "--recipe RECIPE" in message
    code, message = fail(capsys, files / "foreign.onnx", "--recipe", "digit")
    assert (code, "'digits'" in message) == (2, True)


def test_a_recipe_does_not_replace_the_metadata_or_the_checksum(run, here, capsys):
    """A file of bdkd contains its recipe. --recipe does not make a damaged file valid."""
    code, message = fail(capsys, here / "model.onnx", "--recipe", "digits")
    assert code == 2
    assert "contains its own recipe: leave out --recipe" in message
    for suffix in (".pt2", ".safetensors"):
        assert "leave out --recipe" in fail(
            capsys, here / f"model{suffix}", "--recipe", "digits"
        )[1]  # fmt: skip
    code, message = fail(capsys, run, "--recipe", "digits")
    assert (code, "--recipe needs an exported file" in message) == (2, True)
    good = onnx.load(here / "model.onnx")
    for kept in ({"bdkd", "bdkd_sha256"}, {"bdkd"}, {"bdkd_sha256"}):
        model = onnx.ModelProto.FromString(good.SerializeToString())
        relu = next(node for node in model.graph.node if node.op_type == "Relu")
        relu.op_type = "Tanh"
        entries = {e.key: e.value for e in model.metadata_props if e.key in kept}
        del model.metadata_props[:]
        helper.set_model_props(model, entries)
        path = here / "changed.onnx"
        path.write_bytes(model.SerializeToString())
        for arguments in ([path, "--recipe", "digits"], [here / "model.onnx", "--against", path]):
            code, message = fail(capsys, *arguments)
            assert code == 1
            assert "damaged or changed" in message or "bdkd's metadata is missing" in message


def test_foreign_files_of_other_formats_are_refused(here, capsys):
    from safetensors.torch import save_file

    path = here / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    for arguments in ([path], [path, "--recipe", "digits"]):
        code, message = fail(capsys, *arguments)
        assert code == 1
        assert "was not written by bdkd export" in message
    assert "ONNX files only" in fail(capsys, here / "model.onnx", "--against", path)[1]


@pytest.mark.parametrize("place", EXTERNAL)
def test_hostile_foreign_files_are_refused(place, files, tmp_path, monkeypatch, capsys):
    """The same checks apply to files of bdkd."""
    monkeypatch.chdir(tmp_path)
    Path("secret.bin").write_bytes(b"\0" * 40)
    path = tmp_path / "hostile.onnx"
    model = onnx.ModelProto.FromString(EXTERNAL[place].SerializeToString())
    del model.metadata_props[:]
    path.write_bytes(model.SerializeToString())
    for arguments in ([path, "--recipe", "digits"], [files / "model.onnx", "--against", path]):
        assert "hostile.onnx is refused" in fail(capsys, *arguments)[1]


def network_of(images, logits, nodes=None, initializers=None, kind=TensorProto.FLOAT):
    """Return a model with these shapes, which returns the sum of an image and a vector."""
    model = model_of(nodes or scores("w"), initializers or [vector(), *constants()])
    for value, shape in ((model.graph.input[0], images), (model.graph.output[0], logits)):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, shape))
    model.graph.output[0].type.tensor_type.elem_type = kind
    return model


def wider(count: int):
    """Return nodes that compute logits of ``count`` classes."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [count], [0.0] * count)
    return scores("w"), [tensor, *constants()]


def second_input():
    model = network_of(["N", 1, 8, 8], ["N", 10])
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    return model


def labels():
    nodes = [*scores("w"), helper.make_node("ArgMax", ["logits"], ["label"], axis=1)]
    model = network_of(["N", 1, 8, 8], ["N", 10], nodes)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("label", TensorProto.INT64, None))
    return model


def probabilities():
    nodes = [*scores("w"), helper.make_node("Softmax", ["logits"], ["p"], axis=1)]
    model = network_of(["N", 1, 8, 8], ["N", 10], nodes)
    model.graph.output[0].name = "p"
    return model


def bytes_as_input():
    model = network_of(
        ["N", 1, 8, 8],
        ["N", 10],
        [helper.make_node("Cast", ["raw"], ["images"], to=1), *scores("w")],
    )
    model.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("raw", TensorProto.UINT8, ["N", 1, 8, 8])
    )
    return model


CONSTANT = [helper.make_node("Identity", ["w"], ["logits"])]
FOREIGN = {
    "classes": (network_of(["N", 1, 8, 8], ["N", 7], *wider(7)),
                "has 7 classes, and the data set has 10"),
    "classes when it runs": (network_of(["N", 1, 8, 8], ["N", "C"], *wider(7)),
                             "has 7 classes, and the data set has 10"),
    "channels": (network_of(["N", 3, 8, 8], ["N", 10]),
                 "takes images of the shape (3, 8, 8) (channels, height, width), and those of the "
                 "data set have (1, 8, 8)"),
    "size": (network_of(["N", 1, 32, 32], ["N", 10]), "(1, 32, 32)"),
    "flat": (network_of(["N", 1, 8], ["N", 10], CONSTANT),
             "must be float32 images of the shape (N, C, H, W)"),
    "batch": (network_of([4, 1, 8, 8], [4, 10]), "takes batches of 4 images only"),
    "inputs": (second_input(), "must have one input (images) and one output (logits), and has 2"),
    "type": (bytes_as_input(), "must be float32 images"),
    "labels": (labels(), "must be logits (N, C), and is tensor(int64)"),
    "probabilities": (probabilities(), "is probabilities, and logits are needed"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_networks_that_do_not_fit_the_data_are_refused(case, tmp_path, capsys):
    model, words = FOREIGN[case]
    path = tmp_path / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    code, message = fail(capsys, path, "--recipe", "digits")
    assert code == 1
    assert words in message
    assert "foreign.onnx" in message


@pytest.mark.parametrize("shape", [["N", 1, 8, 8], [None, None, None, None], [1, 1, 8, 8]])
def test_foreign_networks_that_fit_the_data_are_evaluated(shape, tmp_path, capsys):
    """The image size is dynamic, or the batch size is fixed to 1."""
    path = tmp_path / "foreign.onnx"
    model = network_of(shape, [shape[0], 10])
    path.write_bytes(model.SerializeToString())
    network = evaluated(capsys, path, "--recipe", "digits", "--split", "test")["networks"][
        "foreign"
    ]
    _, target = images_of("test")
    logits = np.tile(np.arange(10.0), (len(target), 1))
    for metric, value in metrics_by_numpy(logits, target).items():
        assert network[metric] == pytest.approx(value, abs=1e-5), metric


def test_logits_of_nan_give_null_metrics(tmp_path, capsys):
    nan = helper.make_tensor("w", TensorProto.FLOAT, [10], [float("nan")] * 10)
    model = network_of(["N", 1, 8, 8], ["N", 10], scores("w"), [nan, *constants()])
    path = tmp_path / "foreign.onnx"
    path.write_bytes(model.SerializeToString())
    came = evaluated(capsys, path, "--recipe", "digits", "--against", path)
    network, changes = came["networks"]["foreign"], came["comparison"]["changes"]
    assert (network["top1"], network["nll"], network["temperature"]) == (0, None, None)
    assert set(changes["ece"].values()) == {None}
    assert came["comparison"]["agreement"]["value"] is None
    out = shown(capsys, path, "--recipe", "digits", "--against", path)
    assert "cannot be compared: the logits are not finite" in out
