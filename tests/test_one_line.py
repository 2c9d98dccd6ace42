"""Unusual arguments of the command line cause one line on stderr, without delay and without
errno."""

import os

import pytest

from bdkd.cli import main

LONG = "a" * 300
RECIPE = """
name = "tiny"
threads = 1
log = []
data = {source = "synthetic", image_size = 8, images = 60, classes = 3, validation = 0.2}
networks.teacher = {model = "resnet8", role = "teacher"}
networks.student = {model = "resnet8", role = "student"}
train = {epochs = 1, batch_size = 16}
"""


def failure(arguments, capsys, quiet: bool = True) -> tuple[int, str]:
    """Return the exit code and the message of a command that fails before it prints anything
    else."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert out == "" or not quiet
    # bdkd looks up unknown names in timm, which imports torchvision.
    lines = [x for x in err.splitlines() if not x.startswith("warning: the installed torchvision")]
    err = "\n".join([*lines, ""])
    assert err.startswith("bdkd: ")
    assert err.count("\n") == 1
    assert "Errno" not in err
    assert "--debug" not in err, "an error that was not expected"
    assert len(err) < 2100
    return ended.value.code, err


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("train LONG", 2), ("train LONG.toml", 1), ("train tiny.toml --run-dir LONG", 1),
        ("train --resume --run-dir LONG", 1), ("train tiny.toml --plugin LONG.py", 2),
        ("train tiny.toml --networks.teacher.weights LONG", 1),
        ("train tiny.toml --data.source folder --data.root LONG", 1),
        ("train tiny.toml --data.source imagenet --data.root LONG", 1),
        ("train tiny.toml --data.source cifar10 --data.root LONG", 1),
        ("evaluate LONG", 1), ("evaluate LONG.onnx", 1), ("update-bn LONG", 1), ("report LONG", 1),
        ("export LONG --to onnx", 1), ("export . --to onnx --output LONG.onnx", 1),
        ("compare tiny.toml --methods bdkd --seeds 0 --folder LONG", 1),
        ("data check LONG", 1), ("data fetch cifar10 --to LONG", 1),
    ],
)  # fmt: skip
def test_a_name_that_is_too_long_causes_one_line(line, code, capsys):
    found, message = failure(line.replace("LONG", LONG).split(), capsys)
    assert found == code
    assert "aaa" in message
    assert code == 2 or "File name too long" in message


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\nb", r"a\nb"), ("\x1b[31mred", r"\x1b[31mred"), ("x" * 9000, "xx ... xx"),
     ("\udcff", r"\udcff")],
    ids=["feed", "escape", "long", "bytes"],
)  # fmt: skip
def test_names_in_messages_are_escaped_and_shortened(name, shown, capsys):
    _, message = failure(["train", "tiny.toml", "--networks.student.model", name], capsys)
    assert shown in message


def test_an_empty_recipe_and_another_unicode_form_of_a_name_are_explained(folder, capsys):
    assert failure(["train", ""], capsys) == (
        2, "bdkd: the recipe must be a name or a TOML file, got an empty string\n",
    )  # fmt: skip
    (folder / "caf\u00e9.toml").write_text(RECIPE)
    _, message = failure(["train", "cafe\u0301.toml"], capsys)
    assert r"'cafe\u0301.toml' and 'caf\xe9.toml' look the same" in message


def test_paths_of_a_recipe_must_be_utf8_text(folder, capsys):
    (folder / "nul.toml").write_text('run_dir = "a\\u0000b"' + RECIPE)
    code, message = failure(["train", "nul.toml"], capsys)
    assert (code, "run_dir must be UTF-8 text without NUL" in message) == (2, True)
    code, message = failure(["train", "tiny.toml", "--run-dir", "\udcff"], capsys)
    assert (code, "run_dir must be UTF-8 text without NUL" in message) == (2, True)


def test_a_plugin_that_exits_is_named(folder, capsys):
    (folder / "leaves.py").write_text("import sys; sys.exit(3)")
    code, message = failure(["train", "tiny.toml", "--plugin", "leaves.py"], capsys)
    assert code == 1
    assert "cannot import the plugin leaves.py: SystemExit: 3" in message


def test_a_report_is_not_written_to_a_pipe_without_a_reader(folder, capsys):
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text(RECIPE)
    os.mkfifo(folder / "pipe")
    code, message = failure(["report", "run", "--no-tsne", "--output", "pipe"], capsys)
    assert code == 1
    assert "cannot write pipe" in message
    main(["report", "run", "--no-tsne", "--output", os.fsdecode(b"\xe9.html")])
    assert capsys.readouterr().out == "\\udce9.html\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train.epochs", "many"], ["--train.epochs", "'many'"]),
        (["--train.epochs="], ["--train.epochs", "''"]),
        (["--train.epoch", "3"], ["'--train.epoch'", "--train.epochs"]),
        (["--train.precision", "fp8"], ["--train.precision", "'fp8'", "'fp32', 'bf16' or 'fp16'"]),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options, words, capsys):
    code, message = failure(["train", "digits", *options], capsys)
    assert code == 2
    assert all(word in message for word in words)
