"""Every command refuses to continue a run with another data set, and says what differs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdkd.cli import main
from bdkd.errors import RunError
from bdkd.identity import difference, refuse_other_data

pytestmark = pytest.mark.usefixtures("without_figures")

SMALL = [
    "digits", "--data.source", "folder", "--data.crop", "0", "--data.image-size", "8",
    "--networks.teacher.model", "resnet8", "--networks.student.model", "resnet8",
    "--train.batch-size", "8", "--train.epochs", "1", "--checkpoint.every-steps", "2",
    "--log", "--threads", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(without_figures, tmp_path_factory):
    """A data set of three classes and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for label, name in enumerate(("ant", "bee", "cow")):
            images = folder / "data" / split / name
            images.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (8, 8, 3)).astype(np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(images / f"{i}.png")
    run = folder / "run"
    main(["train", *SMALL, "--data.root", str(folder / "data"), "--run-dir", str(run), "--quiet"])
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of the data set and the run that a test may change."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copytree(made / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rename_class(data: Path) -> None:
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "zant")


def rename_file(data: Path) -> None:
    (data / "train" / "bee" / "3.png").rename(data / "train" / "bee" / "33.png")


def move_between_classes(data: Path) -> None:
    (data / "val" / "bee" / "3.png").rename(data / "val" / "cow" / "9.png")


def remove_a_test_image(data: Path) -> None:
    (data / "val" / "cow" / "0.png").unlink()


def add_a_class(data: Path) -> None:
    for split in ("train", "val"):
        shutil.copytree(data / split / "cow", data / split / "dog")


CHANGES = [
    (rename_class, "class 0 is 'bee' and was 'ant'"),
    (rename_file, "its train images are other files"),
    (move_between_classes, "its test images are other files"),
    (remove_a_test_image, "it has 11 test images and had 12"),
    (add_a_class, "it has 4 classes and had 3 (with 'dog')"),
]


def last_step(run: Path) -> int:
    """Return the last training step in the run's metrics."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return max(json.loads(line).get("step", 0) for line in lines)


def refused(*arguments: str, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("change", "said"), CHANGES, ids=lambda value: getattr(value, "__name__", "")
)
def test_another_data_set_is_refused(here, capsys, change, said):
    change(here / "data")
    before = (here / "run" / "metrics.jsonl").read_bytes()
    data = str(here / "data")
    for command in (
        ["evaluate", "run", "--data-root", data],
        ["export", "run", "--to", "safetensors", "--data-root", data],
        ["update-bn", "run", "--data-root", data],
        ["train", "--resume", "--run-dir", "run", "--data.root", data, "--train.epochs", "2"],
    ):
        line = refused(*command, capsys=capsys)
        assert said in line
        assert "trained on" in line
    assert (here / "run" / "metrics.jsonl").read_bytes() == before


def test_a_moved_data_set_is_the_same_data_set(here):
    """The path, the modification times and hidden files are not part of its identity."""
    (here / "data").rename(here / "moved")
    (here / "moved" / "train" / "ant" / "._0.png").write_bytes(b"Mac OS X")
    main(["evaluate", "run", "--data-root", "moved", "--split", "test"])
    steps = last_step(here / "run")
    main(["train", "--resume", "--run-dir", "run", "--data.root", "moved", "--train.epochs", "2"])
    assert last_step(here / "run") == 2 * steps > 0


def test_validation_noise_and_seed_do_not_change_the_identity(here):
    summary = json.loads((here / "run" / "summary.json").read_text())
    main(["train", *SMALL, "--data.root", str(here / "data"), "--run-dir", "other", "--quiet",
          "--data.validation", "0.4", "--data.label-noise", "0.2", "--seed", "3"])  # fmt: skip
    other = json.loads((here / "other" / "summary.json").read_text())
    assert other["data"] == summary["data"]


def test_compare_and_report_refuse_runs_of_two_data_sets(here, capsys):
    compare = ["compare", *SMALL, "--data.root", str(here / "data"), "--folder", "several",
               "--methods", "independent", "kd", "--seeds", "1", "--jobs", "1"]  # fmt: skip
    main([*compare[:-5], "--seeds", "1", "--jobs", "1"])
    main(["report", "several", "--output", "page.html", "--no-tsne"])
    rename_class(here / "data")
    line = refused(*compare, capsys=capsys)  # the teacher was trained before the class was renamed
    assert "class 0 is 'bee' and was 'ant'" in line
    more = [*compare[:-5], "--seeds", "3", "--jobs", "1"]
    assert "class 0 is 'bee' and was 'ant'" in refused(*more, capsys=capsys)
    # The error is raised after the first run, not after all runs.
    assert not (here / "several" / "independent-seed2").exists()
    main(["train", *SMALL, "--data.root", str(here / "data"), "--run-dir", "other", "--quiet"])
    page = (here / "page.html").read_bytes()
    line = refused("report", "run", "other", "--output", "page.html", capsys=capsys)
    assert "other has another data set than run: class 0 is 'bee' and was 'ant'" in line
    assert (here / "page.html").read_bytes() == page


def test_a_frozen_teacher_of_other_classes_is_refused(here, capsys):
    """Its labels would be permuted. A network that is trained may start from any weights."""
    rename_class(here / "data")
    start = ["train", *SMALL, "--data.root", str(here / "data"), "--quiet",
             "--networks.teacher.weights", "run"]  # fmt: skip
    line = refused(*start, "--networks.teacher.frozen", "--run-dir", "one", capsys=capsys)
    assert "networks.teacher.weights" in line
    assert "class 0 is 'bee' and was 'ant'" in line
    main([*start, "--run-dir", "two"])


def test_older_runs_without_an_identity_are_accepted():
    known = {"source": "a", "classes": ["x"], "images": {"train": 1}, "digests": {"train": "0"}}
    assert difference(None, known) == ""
    assert difference(known, None) == ""
    for odd in (None, {}, [], {"source": 1}, {"source": "a", "classes": 3}):
        refuse_other_data([("one", known), ("two", odd), ("three", known)])


KNOWN = {
    "source": "folder", "classes": ["ant", "bee"], "images": {"train": 9, "test": 4},
    "digests": {"train": "00", "test": "11"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source": "digits"}, "it is digits and was folder"),
        ({"classes": ["bee", "ant"]}, "class 0 is 'bee' and was 'ant'"),
        ({"classes": ["ant", "cow"]}, "class 1 is 'cow' and was 'bee'"),
        ({"classes": ["ant"]}, "it has 1 classes and had 2 (without 'bee')"),
        ({"images": {"train": 8, "test": 4}}, "it has 8 train images and had 9"),
        ({"images": {"train": 9, "test": 5}}, "it has 5 test images and had 4"),
        ({"digests": {"train": "01", "test": "11"}}, "its train images are other files"),
        ({"digests": {"train": "00", "test": "12"}}, "its test images are other files"),
    ],
)
def test_every_part_of_an_identity_counts(change, said):
    other = {**KNOWN, **change}
    assert difference(KNOWN, {**KNOWN}) == ""
    assert difference(KNOWN, other).startswith(said)
    refuse_other_data([("one", KNOWN), ("two", {**KNOWN}), ("three", None)])
    with pytest.raises(RunError, match="three has another data set than one: "):
        refuse_other_data([("one", KNOWN), ("two", None), ("three", other)])


def test_two_unicode_forms_of_a_class_name_are_told_apart():
    """macOS writes "é" as two characters, which look like the single character on Linux."""
    one = {"source": "a", "classes": ["caf\u00e9"], "images": {}, "digests": {"train": "0"}}
    two = {**one, "classes": ["cafe\u0301"]}
    assert difference(one, two) == (
        "class 0 is 'cafe\\u0301' and was 'caf\\xe9', another Unicode form of the same text"
    )


def test_every_source_has_an_identity(tmp_path):
    """A source without digests would be considered equal to every other data set."""
    import torch

    from bdkd.data import create_source
    from bdkd.registry import SOURCES

    def info(**options):
        config = SOURCES.configure(options.pop("source"), validation=0.2, **options)
        source = create_source(config, 0, torch.device("cpu"), torch.contiguous_format)
        return source.info.identity()

    digits = info(source="digits")
    assert digits["digests"].keys() == digits["images"].keys() == {"train", "test"}
    assert difference(digits, info(source="digits")) == ""
    assert difference(digits, info(source="synthetic")) == "it is synthetic and was digits"
