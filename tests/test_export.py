"""``bdkd export`` writes complete files that ``bdkd evaluate`` reads back, refuses damaged or
untrusted files, and prints one line for every error."""

import dataclasses
import errno
import io
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from small_runs import SMALL

from bdkd.cli import main
from bdkd.config import load_recipe
from bdkd.errors import RunError, UsageError
from bdkd.export.program_format import _difference
from bdkd.export.trained import choose_network
from bdkd.runs.checkpoint import load_checkpoint
from bdkd.runs.weights import network_weights

FILES = {"onnx": "model.onnx", "export": "model.pt2", "safetensors": "model.safetensors"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a finished short run without EMA, with its student exported in all formats."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", *SMALL, "--max-steps", "20", "--train.ema-decay", "None",
          "--run-dir", str(folder)])  # fmt: skip
    for kind in FILES:
        main(["export", str(folder), "--to", kind])
    return folder


@pytest.fixture
def file(request, run, tmp_path) -> Path:
    """Return a copy of one exported file, for tests that damage it."""
    name = FILES[request.param]
    return Path(shutil.copy(run / "export" / "student" / name, tmp_path / name))


each_format = pytest.mark.parametrize("file", FILES, indirect=True)


def fail(capsys, *arguments: str) -> tuple[int, str]:
    """Run a command that must fail. Return its exit code and its line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return exit_.value.code, message


def evaluated(capsys, path: Path, split: str = "test") -> dict:
    capsys.readouterr()
    main(["evaluate", str(path), "--split", split, "--json"])
    return json.loads(capsys.readouterr().out)


def exported(run: Path, kind: str) -> Path:
    return run / "export" / "student" / FILES[kind]


# --- what is written -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_evaluate_reads_back_the_same_student(kind, run, capsys):
    summary = json.loads((run / "summary.json").read_text())
    came = evaluated(capsys, exported(run, kind))
    assert came["step"] == summary["selected_step"]
    assert came["images"] == summary["images"]
    wanted = summary["networks"]["student"]
    student = came["networks"].pop("student")
    assert came["networks"] == {}
    assert (student["model"], student["parameters"]) == ("resnet8", 77_754)
    for metric in ("top1", "top5", "nll", "ece", "brier", "entropy"):
        assert student[metric] == pytest.approx(wanted[metric], rel=1e-5), metric


def test_no_path_of_this_machine_is_published(run):
    root = str(Path(__file__).parent.parent).encode()
    for written in (run / "export" / "student").iterdir():
        content = written.read_bytes()
        assert root not in content, written
        assert str(run).encode() not in content, written


def test_program_bytes_do_not_depend_on_the_hash_seed(run, monkeypatch):
    """A .pt2 file is loaded only if bdkd can export the same program again, byte for byte."""
    from small_runs import bdkd

    target = run.parent / "again.pt2"
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # this process has a different seed
    done = bdkd("export", str(run), "--to", "export", "--output", str(target))
    assert (done.returncode, done.stderr) == (0, "")
    # The facts are not compared. The commit, for example, may have changed in the meantime.
    assert _difference(target.read_bytes(), exported(run, "export").read_bytes()) == ""


def test_onnx_file_runs_without_bdkd(run):
    """A user without bdkd finds shapes, classes and normalisation in the file, and can run it."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(exported(run, "onnx"))
    [images], [logits] = session.get_inputs(), session.get_outputs()
    assert (images.name, images.shape) == ("images", ["batch", 1, 8, 8])
    assert (logits.name, logits.shape[1]) == ("logits", 10)
    facts = json.loads(session.get_modelmeta().custom_metadata_map["bdkd"])
    assert facts["classes"] == list("0123456789")
    assert facts["normalisation"]["largest"] == 16
    for batch in (1, 5):
        [came] = session.run(None, {"images": np.zeros((batch, 1, 8, 8), np.float32)})
        assert came.shape == (batch, 10)


def test_torch_alone_loads_the_program(run):
    program = torch.export.load(exported(run, "export"))
    for batch in (1, 5):
        assert program.module()(torch.zeros(batch, 1, 8, 8)).shape == (batch, 10)


def test_the_model_card_is_correct_and_its_code_runs(run, monkeypatch):
    text = (run / "export" / "student" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["library_name"] == "bdkd"
    [result] = card["model-index"][0]["results"]
    metrics = {m["type"]: m["value"] for m in result["metrics"]}
    summary = json.loads((run / "summary.json").read_text())
    assert metrics["accuracy"] == summary["networks"]["student"]["top1"]
    assert metrics["expected_calibration_error"] == summary["networks"]["student"]["ece"]
    monkeypatch.chdir(run / "export" / "student")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", body, re.S):
        exec(block, names)
    checkpoint = next((run / "checkpoints").glob("best-*.pt"))
    weights = network_weights(load_checkpoint(checkpoint)[1], "student", checkpoint)
    for key, value in names["network"].state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert len(names["mean"]) == len(names["std"]) == 1


def test_any_network_of_any_checkpoint_is_exported_by_name(run, tmp_path, capsys):
    checkpoint = sorted((run / "checkpoints").glob("step-*.pt"))[0]
    target = tmp_path / "new" / "t.safetensors"
    main(["export", str(checkpoint), "--to", "safetensors", "--network", "teacher",
          "--output", str(target)])  # fmt: skip
    assert "teacher (resnet8)" in capsys.readouterr().out
    networks = evaluated(capsys, target, "val")["networks"]
    assert {name: network["role"] for name, network in networks.items()} == {"teacher": "teacher"}


def test_exported_weights_start_another_run(run, tmp_path):
    target = tmp_path / "next"
    main(["train", *SMALL, "--max-steps", "1", "--optimizer.learning-rate", "1e-30",
          "--networks.student.weights", str(exported(run, "safetensors")),
          "--run-dir", str(target)])  # fmt: skip
    started = load_checkpoint(target / "checkpoints" / "step-00000001.pt")[1]
    began = network_weights(started, "student", target)
    from safetensors.torch import load_file

    for key, value in load_file(exported(run, "safetensors")).items():
        if "running" not in key and "num_batches" not in key:
            torch.testing.assert_close(began[key], value)


def test_the_default_network_of_an_export():
    recipe = load_recipe("digits")
    student = recipe.networks["student"]
    one = recipe
    two = dataclasses.replace(recipe, networks={**recipe.networks, "small": student})
    none = dataclasses.replace(recipe, networks={"teacher": recipe.networks["teacher"]})
    assert choose_network(one, [], None) == "student"
    assert choose_network(one, ["student_ema"], None) == "student_ema"
    assert choose_network(one, ["student_ema"], "student") == "student"
    assert choose_network(none, [], None) == "teacher"
    for averages, named in (([], "student, small"), (["student_ema", "small_ema"], "small_ema")):
        with pytest.raises(UsageError, match=named):
            choose_network(two, averages, None)
    with pytest.raises(UsageError, match="did you mean 'student'"):
        choose_network(one, [], "studnet")


def test_a_network_is_built_without_downloading_weights():
    """A teacher that was initialised from timm's weights is built without them, offline."""
    from bdkd.export.formats import without_others as alone

    recipe = load_recipe("digits")
    teacher = dataclasses.replace(
        recipe.networks["teacher"], model="timm:resnet18",
        options={"pretrained": True, "img_size": 8}, weights="gone.pt",
    )  # fmt: skip
    recipe = dataclasses.replace(recipe, networks={**recipe.networks, "teacher": teacher})
    for name in ("teacher", "teacher_ema"):
        [left] = alone(recipe, name).networks.values()
        assert (left.model, left.options) == ("timm:resnet18", {"img_size": 8})
        assert left.weights is None
    with pytest.raises(RunError, match="no such network"):
        alone(recipe, "other")


# --- what is refused -----------------------------------------------------------------------------


@each_format
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "directory"])
def test_damaged_files_are_refused(file, damage, capsys):
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0x10  # this byte is part of the weights
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) * 3 // 4])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "text":
        file.write_text("these are not weights\n" * 100)
    else:
        file.unlink()
        file.mkdir()
    code, message = fail(capsys, "evaluate", str(file))
    assert code == 1
    assert str(file) in message


@each_format
def test_changed_facts_are_refused(file, capsys):
    content = file.read_bytes()
    if file.suffix == ".pt2":
        content = rewrite_zip(
            content, {"archive/extra/bdkd": lambda b: b.replace(b"16.0", b"99.0")}
        )
    else:
        assert b"16.0" in content
        content = content.replace(b"16.0", b"99.0")
    file.write_bytes(content)
    code, message = fail(capsys, "evaluate", str(file))
    assert (code, "changed since bdkd export wrote it" in message) == (1, True)


def rewrite_zip(content: bytes, changes: dict) -> bytes:
    """Return an archive with some members changed and valid checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, changes[name](data) if name in changes else data)
    return file.getvalue()


class Evil:
    """An object that runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",))


def test_an_untrusted_program_is_not_loaded(run, tmp_path, capsys):
    """Each way in which torch.export.load would run code, in a file that is otherwise valid."""
    mark = tmp_path / "ran"
    content = exported(run, "export").read_bytes()
    evil = io.BytesIO()
    torch.save(Evil(mark), evil)
    weights = "archive/data/weights/model_weights_config.json"
    changes = {
        "example": {"archive/data/sample_inputs/model.pt": lambda _: evil.getvalue()},
        "weight": {weights: lambda b: b.replace(b'"use_pickle": false', b'"use_pickle": true')},
        "operator": {"archive/models/model.json": lambda b: b.replace(
            b"torch.ops.aten.relu_.default", b"torch.os.system")},
        "expression": {"archive/models/model.json": lambda b: b.replace(b"s77", b"exit()")},
    }  # fmt: skip
    for name, change in changes.items():
        file = tmp_path / f"{name}.pt2"
        file.write_bytes(rewrite_zip(content, change))
        assert file.read_bytes() != rewrite_zip(content, {}), name
        code, message = fail(capsys, "evaluate", str(file))
        assert (code, "not loaded" in message) == (1, True), message
    twice = tmp_path / "twice.pt2"
    twice.write_bytes(content)
    with zipfile.ZipFile(twice, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/sample_inputs/model.pt", evil.getvalue())
    code, message = fail(capsys, "evaluate", str(twice))
    assert code == 1
    assert not mark.exists()
    # torch.export.load does run the code in this file, so the test is meaningful.
    with pytest.raises(Exception):  # noqa: B017
        torch.export.load(tmp_path / "example.pt2")
    assert mark.exists()


def test_a_program_of_another_torch_version_is_refused(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.__version__", "9.9.9")
    monkeypatch.setattr("torch.torch_version.__version__", "9.9.9")
    file = tmp_path / "old.pt2"
    file.write_bytes(
        rewrite_zip(
            exported(run, "export").read_bytes(),
            {"archive/models/model.json": lambda b: b.replace(b"aten.relu", b"aten.Relu")},
        )
    )
    code, message = fail(capsys, "evaluate", str(file))
    assert (code, "this is torch 9.9.9" in message) == (1, True)


def test_foreign_files_are_refused(tmp_path, capsys):
    import onnx
    from safetensors.torch import save_file

    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt2")
    (tmp_path / "b.pt2").write_bytes(pickle.dumps({"a": 1}))
    save_file({"a": torch.ones(1)}, tmp_path / "c.safetensors")
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "d.onnx")
    outside = onnx.TensorProto(name="w", data_location=onnx.TensorProto.EXTERNAL)
    graph.initializer.append(outside)
    (tmp_path / "e.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    for file, needed in {
        "a.pt2": "not written by bdkd", "b.pt2": "corrupt", "c.safetensors": "not written by bdkd",
        "d.onnx": "not written by bdkd", "e.onnx": "other files", "none.onnx": "No such file",
    }.items():  # fmt: skip
        code, message = fail(capsys, "evaluate", str(tmp_path / file))
        assert (code, needed in message, file in message) == (1, True, True), message


def test_weights_of_another_network_are_refused(run, tmp_path, capsys):
    from safetensors.torch import load

    from bdkd.export.formats import encode, read_exported

    facts = read_exported(exported(run, "safetensors")).facts
    other = torch.nn.Linear(3, 3)
    file = tmp_path / "other.safetensors"
    file.write_bytes(encode("safetensors", other, facts))
    assert load(file.read_bytes()).keys() == {"weight", "bias"}
    code, message = fail(capsys, "evaluate", str(file))
    assert (code, "does not match resnet8: it lacks" in message) == (1, True)


def test_another_data_set_is_refused(run, tmp_path, capsys):
    from bdkd.export.formats import encode, read_exported

    read = read_exported(exported(run, "safetensors"))
    facts = dataclasses.replace(
        read.facts, normalisation=dataclasses.replace(read.facts.normalisation, mean=(1.0,))
    )
    from bdkd import create_model

    file = tmp_path / "other.safetensors"
    file.write_bytes(encode("safetensors", create_model("resnet8", 10, 1), facts))
    code, message = fail(capsys, "evaluate", str(file))
    assert (code, "not the one of" in message, "--data-root" in message) == (1, True, True)


def test_existing_files_are_kept_without_force(run, tmp_path, capsys):
    here = ["export", str(run), "--to"]
    before = exported(run, "onnx").read_bytes()
    code, message = fail(capsys, *here, "onnx")
    assert (code, "--force" in message) == (1, True)
    code, message = fail(capsys, *here, "safetensors")
    assert (code, "--force" in message) == (1, True)
    assert exported(run, "onnx").read_bytes() == before
    main([*here, "safetensors", "--force"])


def test_an_edited_or_foreign_card_is_kept(run, tmp_path, capsys):
    """The README of a project, an edited card, and the card of another network are kept."""
    card, target = tmp_path / "README.md", tmp_path / "a.safetensors"
    here = ["export", str(run), "--to", "safetensors", "--output", str(target)]
    card.write_text("# My project\n")
    main([*here, "--force"])
    assert f"{card} is not a model card of bdkd: it was left as it is" in capsys.readouterr().out
    assert card.read_text() == "# My project\n"
    card.unlink()
    main([*here, "--force"])
    written = card.read_text()
    main([*here, "--force"])
    assert card.read_text() == written
    target.unlink()
    card.write_text(written.replace("## Load", "## How to load it"))
    main(here)
    assert "was edited: it was left as it is (--force" in capsys.readouterr().out
    assert "## How to load it" in card.read_text()
    main([*here, "--force"])
    assert card.read_text() == written
    other = ["--network", "teacher", "--output", str(tmp_path / "t.safetensors")]
    main(["export", str(run), "--to", "safetensors", *other])
    assert "describes another network: it was left as it is" in capsys.readouterr().out
    assert card.read_text() == written


def test_a_card_lists_all_files_of_its_network(run):
    text = (run / "export" / "student" / "README.md").read_text()
    for name in FILES.values():
        assert (
            f"| `{name}` | fp32 | {(run / 'export' / 'student' / name).stat().st_size:,} |" in text
        )


@pytest.mark.parametrize(
    ("arguments", "code", "needed"),
    [
        (["--to", "onnx", "--output", "a.pt"], 2, "*.onnx"),
        (["--to", "onnx", "--output", "."], 2, "*.onnx"),
        (["--to", "onnx", "--network", "studnet"], 2, "did you mean 'student'"),
        (
            ["--to", "safetensors", "--output", "/proc/none/a.safetensors"],
            1,
            "choose another --output",
        ),
    ],
)
def test_wrong_arguments(arguments, code, needed, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    came, message = fail(capsys, "export", str(run), *arguments)
    assert (came, needed in message) == (code, True), message
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    code, message = fail(capsys, "export", str(tmp_path / "none"), "--to", "onnx")
    assert (code, "no run and no checkpoint" in message) == (1, True)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    target = tmp_path / "a.onnx"
    code, message = fail(capsys, "export", str(run), "--to", "onnx", "--output", str(target))
    assert (code, f"{package}: pip install 'bdkd[export]'" in message) == (1, True)
    assert not target.exists()


def test_a_full_disk_keeps_the_previous_file(run, tmp_path, capsys, monkeypatch):
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"before")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, message = fail(
        capsys, "export", str(run), "--to", "safetensors", "--output", str(target), "--force"
    )
    assert (code, "No space left" in message, "free some space" in message) == (1, True, True)
    assert "--resume" not in message
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.safetensors", b"before")]
