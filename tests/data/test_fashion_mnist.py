"""Fashion-MNIST from IDX files of the original size, which the tests write."""

import gzip
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from photo_folders import open_source

from bdkd.cli import main
from bdkd.data import fashion_mnist
from bdkd.data.digest import digest_pixels
from bdkd.errors import RunError, UsageError

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
REMEDY = "install Debian's package dataset-fashion-mnist, or run bdkd data fetch fashion-mnist"


def idx(values: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    return header + values.tobytes()


def arrays() -> dict[str, np.ndarray]:
    """Return pixels and labels. All images differ, and each class has a tenth of them."""
    found = {}
    for images, labels, count in ((TRAIN_IMAGES, TRAIN_LABELS, 60_000),
                                  (TEST_IMAGES, TEST_LABELS, 10_000)):  # fmt: skip
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 0, 0], pixels[:, 0, 1] = divmod(np.arange(count) + (count < 60_000), 256)
        pixels[:, 2] = np.arange(28)
        found[images] = pixels
        found[labels] = (np.random.default_rng(count).permutation(count) % 10).astype(np.uint8)
    return found


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> SimpleNamespace:
    """The arrays, and folders with the unpacked and the packed files."""
    files = arrays()
    unpacked, packed = (tmp_path_factory.mktemp(name) for name in ("unpacked", "packed"))
    for name, values in files.items():
        (unpacked / name).write_bytes(idx(values))
        (packed / f"{name}.gz").write_bytes(gzip.compress(idx(values), 1))
    return SimpleNamespace(arrays=files, unpacked=unpacked, packed=packed)


@pytest.fixture(autouse=True)
def no_package(monkeypatch, tmp_path, original) -> None:
    """Pretend that Debian's package is not installed, and that the arrays of this file are the
    original data set."""
    for name, values in original.arrays.items():
        known = hashlib.sha256(idx(values)).hexdigest()
        monkeypatch.setitem(fashion_mnist.SHA256, name, known)
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", tmp_path / "no package")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """Unpacked files that a test may replace."""
    target = tmp_path / "files"
    target.mkdir()
    for path in original.unpacked.iterdir():
        (target / path.name).symlink_to(path)
    return target


def replace(folder: Path, name: str, content: bytes) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def refused(root: Path | None) -> str:
    with pytest.raises(RunError) as raised:
        open_source("fashion-mnist", root)
    message = str(raised.value)
    assert "\n" not in message
    assert REMEDY in message
    return message


@pytest.mark.parametrize("kind", ["unpacked", "packed"])
def test_images_and_labels_are_those_of_the_files(kind, original):
    data = open_source("fashion-mnist", getattr(original, kind), validation=0.0)
    assert data.info.counts == {"train": 60_000, "val": 0, "test": 10_000}
    assert (data.info.channels, data.info.image_size) == (1, (28, 28))
    assert data.info.classes[0] == "T-shirt/top"
    assert data.info.classes[9] == "Ankle boot"
    assert len(data.info.classes) == 10
    for split, images, labels in (("train", TRAIN_IMAGES, TRAIN_LABELS),
                                  ("test", TEST_IMAGES, TEST_LABELS)):  # fmt: skip
        pixels = torch.from_numpy(original.arrays[images])[:, None]
        classes = torch.from_numpy(original.arrays[labels]).long()
        assert torch.equal(data.splits[split].pixels, pixels)
        assert torch.equal(data.splits[split].labels, classes)
        assert data.info.digests[split] == digest_pixels(pixels, classes).sha256


def test_a_tenth_of_each_class_is_held_out_and_the_seed_changes_nothing(original):
    data = open_source("fashion-mnist", original.unpacked)
    assert data.info.counts == {"train": 54_000, "val": 6_000, "test": 10_000}
    assert data.splits["val"].labels.bincount().tolist() == [600] * 10
    every = torch.cat([data.splits[split].pixels[:, 0, 0, :2] for split in ("train", "val")])
    assert len(every.unique(dim=0)) == 60_000  # no image is in both
    other = open_source("fashion-mnist", original.packed, seed=1)
    assert torch.equal(other.splits["val"].pixels, data.splits["val"].pixels)
    assert other.info.digests == data.info.digests


def test_files_are_found_in_a_subfolder_of_root_and_in_the_package_folder(
    original, tmp_path, monkeypatch
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fashion-mnist").symlink_to(original.unpacked)
    assert open_source("fashion-mnist", tmp_path / "data").info.counts["test"] == 10_000
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("fashion-mnist", Path("~/data")).info.counts["test"] == 10_000
    monkeypatch.setattr(fashion_mnist, "PACKAGE_FOLDER", original.packed)
    assert open_source("fashion-mnist", None).info.counts["test"] == 10_000
    # If data.root is set, the package is not used instead.
    assert f"no data set fashion-mnist at {tmp_path}/nothing" in refused(tmp_path / "nothing")


def test_an_unpacked_file_is_read_before_a_packed_one(folder):
    replace(folder, f"{TEST_LABELS}.gz", b"not gzip")
    assert open_source("fashion-mnist", folder).info.counts["test"] == 10_000


def test_without_files_the_message_says_how_to_get_them(tmp_path):
    package = tmp_path / "no package"
    assert f"no data set fashion-mnist at {package}: {REMEDY}" in refused(None)
    (tmp_path / "file").touch()
    assert "no data set fashion-mnist at" in refused(tmp_path / "file")


LABELS = (np.arange(10_000) % 10).astype(np.uint8)


def with_label(label: int) -> bytes:
    return idx(np.where(np.arange(10_000) == 77, np.uint8(label), LABELS))


HARMS = {
    "an int32 type": (TEST_LABELS, b"\0\0\x0c" + idx(LABELS)[3:], "not an IDX file of 10000 bytes"),
    "no magic": (TEST_LABELS, b"\1" + idx(LABELS)[1:], "it is not the original file"),
    "a small shape": (TEST_LABELS, idx(LABELS[:10]), "is not an IDX file of 10000 bytes"),
    "another shape": (TEST_LABELS, idx(LABELS.reshape(100, 100)), "is not an IDX file of 10000"),
    "truncated": (TEST_LABELS, idx(LABELS)[:-1], "is not an IDX file of 10000 bytes"),
    "longer": (TEST_LABELS, idx(LABELS) + b"\0", "is not an IDX file of 10000 bytes"),
    "empty": (TEST_LABELS, b"", "is not an IDX file of 10000 bytes"),
    "the images of the test": (TRAIN_IMAGES, idx(np.zeros((10_000, 28, 28), np.uint8)),
                               "is not an IDX file of 60000 x 28 x 28 bytes"),
    "a label of 10": (TEST_LABELS, with_label(10), "but different content (is it MNIST?)"),
    "one other label": (TEST_LABELS, with_label(1), "but different content (is it MNIST?)"),
    "the labels of Kuzushiji-MNIST": (TEST_LABELS, idx(LABELS[::-1].copy()), "different content"),
    "other images": (TEST_IMAGES, idx(np.ones((10_000, 28, 28), np.uint8)), "different content"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_a_file_that_is_not_the_original_is_named(harm, folder):
    name, content, words = HARMS[harm]
    replace(folder, name, content)
    message = refused(folder)
    assert str(folder / name) in message
    assert words in message


@pytest.mark.parametrize(("content", "words"), [
    (gzip.compress(idx(LABELS))[:-9], "is damaged or incomplete (Compressed file ended"),
    (gzip.compress(idx(LABELS))[:10] + b"\xff" * 200, "is damaged or incomplete ("),
    (b"<html>log in</html>", "is damaged or incomplete (Not a gzipped file"),
    (idx(LABELS), "is damaged or incomplete (Not a gzipped file"),
    (gzip.compress(idx(LABELS)) + b"more", "is damaged or incomplete ("),
    (gzip.compress(bytes(1 << 28), 1), "is not an IDX file of 10000 bytes"),
], ids=["cut", "damaged", "login page", "not packed", "appended", "bomb"])  # fmt: skip
def test_a_packed_file_that_is_not_the_original_is_named(content, words, folder, monkeypatch):
    (folder / TEST_LABELS).unlink()
    replace(folder, f"{TEST_LABELS}.gz", content)
    taken = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile, "read", lambda self, size=-1: taken.append(size) or read(self, size)
    )
    message = refused(folder)
    assert str(folder / f"{TEST_LABELS}.gz") in message
    assert words in message
    assert taken == [10_009]  # at most one byte more than expected, so a bomb is harmless


@pytest.mark.parametrize("name", [TRAIN_LABELS, TEST_IMAGES, TEST_LABELS])
def test_a_missing_file_is_named(name, folder, capsys):
    (folder / name).unlink()
    message = refused(folder)
    assert f"cannot read {folder / name}.gz: No such file or directory" in message
    # In bdkd data list, an incomplete data set is not ready.
    main(["data", "list", str(folder)])
    assert f"not ready: no {name} in {folder}: {REMEDY}" in capsys.readouterr().out


def test_a_pipe_is_refused_and_not_read(folder):
    (folder / TEST_LABELS).unlink()
    os.mkfifo(folder / f"{TEST_LABELS}.gz")
    with pytest.raises(RunError, match=r"cannot read .*labels.*gz: it is not a regular file"):
        open_source("fashion-mnist", folder)


def test_images_are_28_pixels_wide(original):
    with pytest.raises(UsageError, match=r"data.image_size does not apply .*28x28, got 32"):
        open_source("fashion-mnist", original.unpacked, image_size=32)


def test_a_run_names_the_files_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "fashion-5k", "--run-dir", str(tmp_path / "run")])
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("bdkd: no data set fashion-mnist at ")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_recipe_reads_the_files_of_another_folder(original, tmp_path, monkeypatch, capsys):
    shutil.copytree(original.packed, tmp_path / "data" / "fashion-mnist")
    monkeypatch.chdir(tmp_path)
    main([
        "train", "fashion-5k", "--data", "data", "--teacher", "resnet8", "--dry-run", "--no-probe",
    ])  # fmt: skip
    assert "fashion-mnist" in capsys.readouterr().out
