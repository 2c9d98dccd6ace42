"""The commands of the command line: what they print, and how they fail."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SMALL, TINY_RUN, bdkd, shown_step

from bdkd.cli import main
from bdkd.config import load_recipe, parse_recipe, shipped_recipes, to_toml
from bdkd.errors import DamagedFile, Interrupted, RunError, UsageError

QUICK = [*SMALL, "--max-steps", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return the folder of a short finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", *QUICK, "--run-dir", str(folder), "--log", "tensorboard"])
    return folder


def best_of(run: Path) -> Path:
    """Return the only best checkpoint of a finished run."""
    [path] = (run / "checkpoints").glob("best-*.pt")
    return path


def fail(capsys, *arguments: str) -> tuple[int, str]:
    """Return the exit code and stderr of a command that must fail. It runs in this process."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    return exit_.value.code, capsys.readouterr().err


# --- the files of a run --------------------------------------------------------------------------


def test_the_folder_of_a_run_contains_the_documented_files(run):
    config = parse_recipe((run / "config.toml").read_text(), "config.toml")
    assert config.networks["teacher"].model == "resnet8"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3]
    for line in lines:
        for network in ("student", "teacher"):
            assert line[network].keys() >= {"top1", "top5", "ece", "nll", "entropy"}
    assert train[0].keys() >= {"epoch", "forward_weight", "images_per_second"}
    assert "loss" in train[0]["student"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == "bdkd"
    assert summary["seed"] == 0
    assert summary["wall_seconds"] > 0
    assert summary["images_per_second"] > 0
    student = summary["networks"]["student"]
    assert student["model"] == "resnet8"
    assert student["parameters"] == 77_754
    for metric in ("top1", "top5", "ece", "mce"):
        assert 0 <= student[metric] <= 1
    assert student.keys() >= {"nll", "brier"}
    for figure in ("reliability.png", "curves.png"):
        assert (run / "figures" / figure).read_bytes().startswith(b"\x89PNG")
    assert any((run / "events").iterdir())
    assert not list(run.rglob("*.tmp"))


def test_tensorboard_can_read_the_events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "events"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/student/loss")] == [1, 2, 3]


def test_evaluate_prints_the_metrics_of_the_run_and_of_its_checkpoint(run, capsys):
    main(["evaluate", str(run), "--split", "test", "--json"])
    came = json.loads(capsys.readouterr().out)["networks"]
    kept = json.loads((run / "summary.json").read_text())["networks"]
    for name, network in kept.items():  # also contains metrics after temperature scaling
        assert came[name].items() <= network.items()
    assert came.keys() == kept.keys()
    main(["evaluate", str(run), "--split", "test"])
    rows = {line.split()[0]: line.split()[2:] for line in capsys.readouterr().out.splitlines()[3:6]
            if line.strip()}  # fmt: skip
    for name in ("teacher", "student"):
        network = kept[name]
        assert rows[name] == [
            f"{network['parameters']:,}", f"{100 * network['top1']:.2f}%", f"{network['nll']:.4f}",
            f"{100 * network['ece']:.2f}%", f"{100 * network['ece_if_calibrated']:.2f}%",
        ]  # fmt: skip
    code, message = fail(capsys, "evaluate", str(run), "--device", "cuda:9")
    assert (code, "no device cuda:9" in message) == (1, True)
    main(["evaluate", str(best_of(run))])
    out = capsys.readouterr().out
    assert "216 validation images" in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    [validated] = [line for line in lines if line["split"] == "val"]
    for name in ("teacher", "student"):  # the checkpoint is of the validated step
        assert f"{100 * validated[name]['top1']:.2f}%" in out
        assert f"{100 * validated[name]['ece']:.2f}%" in out


def test_train_prints_no_progress_bar_into_a_pipe(tmp_path):
    done = bdkd("train", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert sum(shown_step(line) is not None for line in done.stdout.splitlines()) >= 3
    assert "perfectly calibrated" in done.stdout
    assert "runs/digits-bdkd-seed0/figures/reliability.png" in done.stdout


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--train.accumulate", "2", "--max-steps", "100", "--no-probe"]
    main(["train", "digits", "--dry-run", *options])
    plan = capsys.readouterr().out
    for fact in ("1,222 train, 216 val, 359 test", "691,386 parameters", "77,754 parameters",
                 "30 epochs of 19 steps", "stopping after 100", "in 2 micro-batches"):  # fmt: skip
        assert fact in plan
    assert not list(tmp_path.iterdir())


def test_doctor_names_every_package_and_how_to_install_it(capsys):
    main(["doctor"])
    text = capsys.readouterr().out
    for name in ("torch", "GPU", "triton kernel", "native kernel", "DALI", "apex"):
        assert name in text
    main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert all(finding["found"] or finding["remedy"] for finding in findings)


def test_doctor_recognises_the_unrelated_apex_of_pypi(tmp_path):
    """The package apex of PyPI is unrelated to NVIDIA's. It has no fused optimizers."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "bdkd", "doctor"], capture_output=True, text=True,
                          env=environment, check=True)  # fmt: skip
    assert "not NVIDIA's" in done.stdout


def test_help_all_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "digits", "--help-all"])
    assert exit_.value.code in (0, None)
    text = capsys.readouterr().out
    for option in ("--run-dir", "--seed", "--device", "--max-steps", "--data.root",
                   "--train.epochs", "--train.batch-size", "--train.precision", "--train.compile",
                   "--checkpoint.every-steps", "--objective.name", "--objective.backend",
                   "--networks.student.model", "--networks.student.weights", "--train.accumulate",
                   "--resume", "--log", "--dry-run"):  # fmt: skip
        assert option in text
    for meaning in ("Peak learning rate", "Optimizer steps between checkpoints"):
        assert meaning in text


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_can_be_written_and_read_back(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(to_toml(recipe), "text") == recipe


# --- bad input -----------------------------------------------------------------------------------

USAGE = {
    "command": (["trian"], ["unknown command 'trian'", "'train'"]),
    "recipe": (["train", "digit"], ["unknown recipe 'digit'", "'digits'"]),
    "no recipe": (["train", "--seed", "1"], ["needs a recipe", "bdkd recipes"]),
    "model": (
        ["train", "digits", "--networks.student.model", "resnet9"],
        ["resnet9", "resnet8"],
    ),
    "model option": (
        ["train", "digits", "--networks.student.options", "depth", "3"],
        ["depth", "width"],
    ),
    "method": (
        ["train", "digits", "--objective.name", "bdk"],
        ["unknown objective 'bdk'", "'bdkd'"],
    ),
    "option of another method": (
        ["train", "digits", "--objective.name", "independent", "--objective.gamma", "3"],
        ["objective.gamma", "independent"],
    ),
    "data source": (["train", "digits", "--data.source", "digit"], ["'digit'", "'digits'"]),
    "roles": (
        ["train", "digits", "--networks.student.role", "teacher"],
        ["no network is a student", "networks.teacher.role"],
    ),
    "value": (["train", "digits", "--train.epochs", "0"], ["train.epochs", "at least 1", "0"]),
    "accumulate": (["train", "digits", "--train.accumulate", "3"], ["train.accumulate", "64"]),
    "batch": (["train", "digits", "--train.batch-size", "5000"], ["1222", "5000"]),
    "device": (["train", "digits", "--device", "tpu0"], ["device", "'tpu0'"]),
    "no arguments": (["train"], ["needs a recipe"]),
    "not finite": (["train", "digits", "--schedule.warmup", "inf"], ["schedule.warmup", "finite"]),
    "betas": (
        ["train", "digits", "--optimizer.name", "adamw", "--optimizer.betas", "2", "3"],
        ["optimizer.betas", "[0, 1)"],
    ),
    "seed": (["train", "digits", "--seed", "9" * 30], ["seed", "2**63"]),
    "loss option": (
        ["train", "digits", "--objective.temperature", "0"],
        ["temperature", "[0.0001, 10000]"],
    ),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_exits_2_with_one_line(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = USAGE[case]
    code, message = fail(capsys, *arguments)
    assert code == 2
    assert message.count("\n") == 1
    for part in expected:
        assert part in message
    assert not list(tmp_path.iterdir()), "a refused command must leave nothing behind"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train.epoch", "3"], "--train.epochs"),
        (["--train.precision", "fp8"], "bf16"),
        (["--train.epochs", "three"], "--train.epochs"),
        (["--objective.backend", "cuda"], "native"),
    ],
)
def test_unknown_options_exit_2_and_name_the_nearest(arguments, expected, capsys):
    code, message = fail(capsys, "train", "digits", *arguments)
    assert code == 2
    assert expected in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nepoch = 3", ["train.epoch", "'epochs'"]),
        ("[networks.a]\nmodle = 'x'", ["networks.a.modle", "'model'"]),
        ("[train]\ncompile = 'no'", ["true or false", "train.compile"]),
        ("name = ", ["not valid TOML"]),
        ("name = 'x'", ["networks"]),
    ],
)
def test_an_error_in_a_recipe_names_the_file_and_the_key(text, expected, capsys, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    code, message = fail(capsys, "train", str(file))
    assert code == 2
    assert message.count("\n") == 1
    for part in (str(file), *expected):
        assert part in message


@pytest.mark.parametrize(
    "name", ["a.b", "", "step", "items", "x_ema", "a b", "train", "teacher_active"]
)
def test_an_invalid_network_name_is_refused(name, capsys, tmp_path):
    text = to_toml(load_recipe("digits")).replace("networks.teacher", f'networks."{name}"')
    (tmp_path / "mine.toml").write_text(text)
    code, message = fail(capsys, "train", str(tmp_path / "mine.toml"))
    assert (code, message.count("\n")) == (2, 1)
    assert f"the network name {name!r}" in message


def test_a_refused_resume_changes_nothing(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = (copy / "config.toml").read_bytes()
    resume = ["train", "--resume", "--run-dir", str(copy)]
    for change in (["--networks.student.model", "resnet20"], ["--data.validation", "0.3"]):
        code, _ = fail(capsys, *resume, *change)
        assert code == 1
        assert (copy / "config.toml").read_bytes() == before
    main([*resume, "--max-steps", "4"])
    assert "continuing at step 3" in capsys.readouterr().out


def test_a_refused_start_creates_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    target = tmp_path / "run"
    code, message = fail(capsys, "train", *QUICK, "--run-dir", str(target), "--log", "wandb")
    assert (code, "pip install wandb" in message) == (1, True)
    code, _ = fail(capsys, "train", "digits", "--resume", "--run-dir", str(target))
    assert code == 1
    assert not target.exists()


def test_resume_repairs_damaged_metrics_and_names_a_missing_checkpoint(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    file = copy / "metrics.jsonl"
    good = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(good[0] + b"5\n" + good[1] + b"\xff\xfe\n" + good[2] + b'{"step": 3, "ep')
    main(["train", "--resume", "--run-dir", str(copy)])
    kept = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3]
    best_of(copy).unlink()
    code, message = fail(capsys, "train", "--resume", "--run-dir", str(copy))
    assert (code, "--train.select last" in message) == (1, True)
    main(["train", "--resume", "--run-dir", str(copy), "--train.select", "last"])


def test_resume_names_the_values_of_an_edited_recipe_that_it_ignores(tmp_path, capsys):
    """The run uses the values with which it began, and names those that differ in the file."""
    file, target = tmp_path / "mine.toml", str(tmp_path / "run")
    text = Path(TINY_RUN[0]).read_text()
    file.write_text("max_steps = 2\n" + text)
    main(["train", str(file), "--run-dir", target])
    edited = text.replace("learning_rate = 0.05", "learning_rate = 0.5")
    assert edited != text
    file.write_text("max_steps = 3\n" + edited)
    capsys.readouterr()
    main(["train", str(file), "--resume", "--run-dir", target])
    said = capsys.readouterr().out
    assert f"which differs from {file}: max_steps, optimizer.learning_rate\n" in said
    assert "nothing is left to train" in said
    config = load_recipe(f"{target}/config.toml")
    assert (config.max_steps, config.optimizer.learning_rate) == (2, 0.05)


def test_a_resumed_run_keeps_its_options_unless_the_command_line_changes_them(tmp_path, capsys):
    """The values of the run override the recipe. The command line overrides both."""
    run = tmp_path / "run"
    train = ["train", *TINY_RUN, "--run-dir", str(run), "--max-steps", "1"]
    main([*train, "--optimizer.learning-rate", "0.02", "--log-every", "7"])
    capsys.readouterr()
    main([*train, "--resume", "--optimizer.momentum", "0.5", "--log-every", "3"])
    said = capsys.readouterr().out
    assert "resuming with changed log_every, optimizer.momentum\n" in said
    assert f"using {run / 'config.toml'}, which differs from {TINY_RUN[0]}: " in said
    kept = said.partition("differs from ")[2].splitlines()[0]
    assert kept.endswith(": optimizer.learning_rate")
    config = load_recipe(str(run / "config.toml"))
    assert (config.optimizer.learning_rate, config.optimizer.momentum) == (0.02, 0.5)
    assert (config.log_every, config.max_steps) == (3, 1)
    code, message = fail(capsys, "train", "digits", "--resume", "--run-dir", str(run))
    assert code == 1
    assert "contains a run of the recipe 'tiny', not of 'digits'" in message


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no such key"), 2, "no such key"),
        (RunError("no such file"), 1, "no such file"),
        (DamagedFile("cut off"), 1, "cut off"),
        (Interrupted(signal.SIGTERM, "stopped"), 143, "stopped"),
        (Interrupted(signal.SIGINT, "stopped"), 130, "stopped"),
        (KeyError("x"), 1, "KeyError: 'x' (--debug shows where)"),
        (ValueError("two\nlines"), 1, "ValueError: two lines (--debug shows where)"),
    ],
)
def test_every_kind_of_failure_has_an_exit_code_and_prints_one_line(
    error, code, line, monkeypatch, capsys
):
    def fail(_):
        raise error

    monkeypatch.setattr("bdkd.cli.run", fail)
    for debug in (False, True):
        with pytest.raises(SystemExit) as ended:
            main(["doctor", *["--debug"] * debug])
        assert ended.value.code == code
        said = capsys.readouterr().err
        assert said.endswith(f"bdkd: {line}\n")
        assert ("Traceback" in said) == debug
        assert debug or said.count("\n") == 1


def test_a_closed_pipe_causes_no_error_message():
    command = f"'{sys.executable}' -m bdkd doctor | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141)  # 0 if everything was written before the pipe closed
    assert done.stderr == ""


def test_missing_files_exit_1_with_one_line(capsys, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "notes.pt"
    notes.write_text("no checkpoint")
    plain = tmp_path / "plain.pt"
    torch.save({"a": torch.ones(1)}, plain)
    blocked = tmp_path / "file"
    blocked.touch()
    other = "networks.student.model"
    cases = [
        (["train", "missing.toml"], ["missing.toml"]),
        (["evaluate", str(tmp_path / "none")], ["no run and no checkpoint", "none"]),
        (["evaluate", str(tmp_path)], ["no run and no checkpoint"]),
        (["evaluate", str(notes)], [str(notes), "not a checkpoint"]),
        (["evaluate", str(plain)], [str(plain), "not a bdkd checkpoint"]),
        (
            ["train", "digits", "--networks.student.weights", str(notes)],
            [str(notes), "not a file of torch"],
        ),
        (
            ["train", "digits", "--networks.student.weights", str(plain)],
            ["networks.student.weights", str(plain), "needs 'conv.weight'"],
        ),
        (["train", "digits", "--networks.student.weights", "gone.pt"], ["gone.pt"]),
        (["train", "digits", "--run-dir", str(blocked / "run")], [str(blocked), "--run-dir"]),
        (["train", "digits", "--run-dir", "/proc/bdkd"], ["/proc/bdkd", "--run-dir"]),
        (["train", "digits", "--run-dir", str(run)],
         [str(run), "already contains a run", "--resume"]),
        (["train", "digits", "--resume", "--run-dir", str(blocked)], [str(blocked)]),
        (["train", "digits", "--resume", "--run-dir", "new"], ["nothing to resume", "new"]),
        (["train", "digits", "--device", "cuda:7"], ["cuda:7", "--device cpu"]),
        (
            ["train", "--resume", "--run-dir", str(run), f"--{other}", "resnet20"],
            ["other networks", "config.toml"],
        ),
    ]  # fmt: skip
    for arguments, expected in cases:
        code, message = fail(capsys, *arguments)
        assert code == 1, (arguments, message)
        assert message.count("\n") == 1, message
        for part in expected:
            assert part in message, message


@pytest.mark.soak  # test_evaluate_files.py compares three ranks with one process
def test_two_ranks_print_the_same_evaluation_as_one_process(run, capsys):
    main(["evaluate", str(run), "--split", "test", "--json", "--device", "cpu"])
    alone = json.loads(capsys.readouterr().out)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         "-m", "--", "bdkd", "evaluate", str(run), "--split", "test", "--json", "--device", "cpu"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    together = json.loads(done.stdout)  # only one rank prints
    for name, values in alone.pop("networks").items():
        for key, value in together["networks"][name].items():
            same = value == values[key] if not isinstance(value, float) else None
            assert same or value == pytest.approx(values[key], rel=1e-9), (name, key)
    assert {key: together[key] for key in alone} == alone


def test_a_run_can_start_from_the_weights_of_another_run(run, tmp_path):
    """Weights come from the network of the same name in a checkpoint, a state dict or
    safetensors."""
    from safetensors.torch import save_file

    from bdkd.runs.checkpoint import load_checkpoint
    from bdkd.runs.weights import network_weights

    best = best_of(run)
    weights = network_weights(load_checkpoint(best)[1], "student_ema", best)  # as in timm
    weights = {key: value.contiguous() for key, value in weights.items()}  # for safetensors
    torch.save(weights, tmp_path / "weights.pt")
    save_file(weights, tmp_path / "weights.safetensors")
    for file in (best, tmp_path / "weights.pt", tmp_path / "weights.safetensors"):
        target = tmp_path / f"from-{file.name}"
        main(["train", *QUICK, "--max-steps", "1", "--networks.student.weights", str(file),
              "--run-dir", str(target), "--optimizer.learning-rate", "1e-30"])  # fmt: skip
        saved = load_checkpoint(target / "checkpoints" / "step-00000001.pt")[1]
        began = network_weights(saved, "student", file)
        for key, value in weights.items():
            if "running" not in key and "num_batches" not in key:
                torch.testing.assert_close(began[key], value)


def test_an_untrusted_weight_file_runs_no_code(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch '{tmp_path}/ran'",))

    file = tmp_path / "evil.pt"
    torch.save({"format": 1, "recipe": "", "state": Evil()}, file)
    code, message = fail(capsys, "evaluate", str(file))
    assert code == 1
    assert "could run code" in message
    assert not (tmp_path / "ran").exists()


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    from bdkd.runs.folder import RunFolder

    first = RunFolder(tmp_path / "run")
    first.open_for_training("never")
    code, message = fail(capsys, "train", *QUICK, "--run-dir", str(first.path))
    assert code == 1
    assert "another process is training" in message


def test_diverging_training_stops_and_names_the_last_good_checkpoint(tmp_path, capsys):
    run = tmp_path / "run"
    code, message = fail(
        capsys, "train", *SMALL, "--run-dir", str(run), "--optimizer.learning-rate", "1e18",
        "--schedule.warmup", "0", "--checkpoint.every-steps", "1", "--train.max-skipped", "3",
    )  # fmt: skip
    assert code == 1
    assert "not finite for 3 steps in a row" in message
    assert str(run / "checkpoints" / "step-") in message
    # Nothing is saved during skipped steps, so the checkpoint is from an earlier step.
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-00000001.pt"]


def test_a_full_disk_ends_training_with_one_line_and_an_intact_older_checkpoint(tmp_path):
    """A file size limit replaces the full disk, because writes fail in the same place."""
    run = tmp_path / "run"
    script = (
        "import resource, sys; from bdkd.cli import main\n"
        "import bdkd.runs.folder as f\n"
        "save = f.RunFolder.save\n"
        "def limited(self, step, *a):\n"
        "    if step == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "    return save(self, step, *a)\n"
        "f.RunFolder.save = limited\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "train", *SMALL, "--checkpoint.every-steps", "1",
               "--max-steps", "4", "--run-dir", str(run)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
    assert "--resume" in done.stderr
    warned = re.findall(
        r"^warning: .* without this checkpoint: .*step-(\d+)\.pt", done.stdout, re.M
    )
    assert warned[:2] == ["00000002", "00000003"]  # training tried again
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000001.pt"]
    again = bdkd("train", "--resume", "--max-steps", "3", "--run-dir", str(run))
    assert again.returncode == 0, again.stderr
    assert "continuing at step 1" in again.stdout


# --- image folders -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a small image folder with two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (rng.integers(0, 128, (12, 10, 3)) + 127 * label).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index}.png")
    return tmp_path / "data"


def folder_arguments(folder: Path, *more: str) -> list[str]:
    return [
        "train", "digits", "--data.source", "folder", "--data.root", str(folder),
        "--data.image-size", "16", "--train.batch-size", "8", "--train.epochs", "1", "--log",
        "--networks.teacher.model", "resnet8", "--run-dir", str(folder.parent / "run"), *more,
    ]  # fmt: skip


def test_bdkd_trains_on_an_image_folder(folder, capsys):
    main(folder_arguments(folder, "--data.flip"))
    assert "8 test images" in capsys.readouterr().out


def break_image(folder: Path) -> Path:
    file = folder / "train" / "dark" / "3.png"
    file.write_bytes(file.read_bytes()[:60])
    return file


def empty_class(folder: Path) -> str:
    for file in (folder / "train" / "dark").iterdir():
        file.unlink()
    return f"the class dark in {folder / 'train'} holds 0 images"


def drop_class(folder: Path) -> str:
    (folder / "test" / "dark").rename(folder / "test" / "drak")
    return "must hold the same classes"


@pytest.mark.parametrize("damage", [break_image, empty_class, drop_class])
def test_an_error_about_broken_data_names_the_file(damage, folder, capsys):
    named = damage(folder)
    code, message = fail(capsys, *folder_arguments(folder))
    assert code == 1
    assert message.count("\n") == 1
    assert str(named) in message


def test_an_error_about_missing_data_names_the_key_of_the_recipe(folder, capsys):
    code, message = fail(capsys, *folder_arguments(folder / "nowhere"))
    assert (code, "data.root" in message) == (1, True)
    code, message = fail(capsys, "train", "digits", "--data.source", "folder")
    assert (code, "data.root" in message) == (2, True)
