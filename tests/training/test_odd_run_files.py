"""Files of a run that were replaced by other content, pipes, folders or devices."""

import os
from pathlib import Path

import pytest

from bdkd.config import parse_recipe
from bdkd.errors import RunError, UsageError
from bdkd.evaluation.report.runs import read_run
from bdkd.runs.folder import RunFolder

RECIPE = 'name = "x"\n[networks.s]\nmodel = "resnet8"\nrole = "student"\n'


def fill(path: Path, content: bytes | str) -> None:
    """Write bytes to a path, or make it a "fifo", a "folder" or a link to a device."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "fifo":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    else:
        path.symlink_to(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("fifo", "not a regular file"),
        ("folder", "Is a directory"),
        ("/dev/zero", "not a regular file"),
        (RECIPE.encode("utf-16-le"), "NUL bytes"),
        (RECIPE.encode() + b"# caf\xe9", "not UTF-8 text"),
        (b"x = " + b"[" * 10_000, "nested too deeply"),
        (b"a." * 100_000 + b"a = 1", "100 parts"),
        (b"x = " + b"9" * 10_000, "digits"),
        (b"train = 3", "train must be a table"),
    ],
    ids=["fifo", "folder", "device", "utf16", "latin1", "deep", "dotted", "digits", "table"],
)
def test_an_unreadable_config_is_reported_in_one_line(tmp_path, content, words):
    folder = RunFolder(tmp_path)
    fill(folder.config, content)
    with pytest.raises((RunError, UsageError), match=words) as raised:
        folder.read_config()
    assert str(folder.config) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(RunError, match=r"config\.toml"):
        folder.selects_best()
    run = read_run(tmp_path)  # a report shows the other files and a note
    assert run.config == {"train": 3} or any("config.toml" in note for note in run.notes)


def test_a_utf16_config_with_a_byte_order_mark_is_read(tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_bytes(RECIPE.encode("utf-16"))
    assert folder.read_config() == parse_recipe(RECIPE, "x")


@pytest.mark.parametrize("content", ["fifo", "folder", "/dev/zero"])
def test_special_files_in_a_run_folder_do_not_block(tmp_path, content):
    folder = RunFolder(tmp_path)
    folder.config.write_text(RECIPE)
    for path in (folder.metrics, folder.summary, folder.predictions, tmp_path / ".lock"):
        fill(path, content)
    with pytest.raises(RunError, match=r"cannot read .*metrics\.jsonl"):
        folder.read_metrics()
    notes = " ".join(read_run(tmp_path).notes)
    for name in ("metrics.jsonl", "summary.json", "predictions.safetensors"):
        assert name in notes
    assert "Errno" not in notes
    assert not folder.launched_by("launch")
    if content != "/dev/zero":  # a device can be opened for writing and locked
        with pytest.raises(RunError, match="cannot write the run's folder"):
            folder.open_for_training("auto")


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b"[]", b'{"networks": {"s": 3}, "wall_seconds": 1}', b"", b"{", b"\xff",
     b'{"networks": {"s": {}}, "wall_seconds": NaN}', "fifo", "folder", "/dev/zero"],
    ids=["deep", "list", "number", "empty", "open", "latin1", "nan", "fifo", "folder", "device"],
)  # fmt: skip
def test_a_malformed_summary_is_reported_with_its_path(tmp_path, content):
    folder = RunFolder(tmp_path)
    fill(folder.summary, content)
    with pytest.raises(RunError) as raised:
        folder.read_summary("write it again")
    assert str(folder.summary) in str(raised.value)
    assert "\n" not in str(raised.value)
