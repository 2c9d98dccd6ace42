"""Pillow's warnings name the image and are shown once. Decompression bombs are refused by name."""

import contextlib
import io
import os
import resource
import subprocess
import sys
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bdkd.data import decode, image_warnings
from bdkd.data.decode import read_images
from bdkd.data.image_warnings import recorded, show, shown
from bdkd.errors import RunError

TRAINING = Path(__file__).parents[1] / "training"


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch):
    monkeypatch.setattr(image_warnings, "_shown", set())


def encoded(kind: str, seed: int = 0, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def corrupt_exif(seed: int = 0) -> bytes:
    """Return a good image whose EXIF data declare more entries than they have."""
    return encoded("JPEG", seed, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0")


def huge_png(width: int, height: int) -> bytes:
    """Return a PNG that declares this size but does not have the pixels."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b""))
    return decode.PNG + b"".join(
        len(c).to_bytes(4, "big") + kind + c + zlib.crc32(kind + c).to_bytes(4, "big")
        for kind, c in chunks
    )


def make_folder(root: Path) -> list[Path]:
    """Write a data set of two classes. In each, one training image has corrupt EXIF data."""
    for split in ("train", "val"):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(6):
                (folder / f"{number}.jpg").write_bytes(encoded("JPEG", 10 * label + number))
            if split == "train":
                (folder / "3.jpg").write_bytes(corrupt_exif(label))
    return [root / "train" / f"class{label}" / "3.jpg" for label in range(2)]


def bdkd(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bdkd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# --- warnings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [
    pytest.param(None, marks=pytest.mark.soak, id="folder"),
    pytest.param(0, marks=pytest.mark.soak, id="imagenet"),
    pytest.param(2, id="imagenet, workers"),
])  # fmt: skip
def test_training_shows_each_warning_once_with_its_file(workers, tmp_path):
    """The run has two epochs, each with new worker processes."""
    files = make_folder(tmp_path / "data")
    (tmp_path / "data" / "train" / "class0" / "3.jpg").touch()
    options = ["--data.source", "folder"]
    if workers is not None:
        options = ["--data.source", "imagenet", "--data.workers", str(workers), "--data.loader",
                   "pillow"]  # fmt: skip
    done = bdkd(
        "train", str(TRAINING / "tiny.toml"), *options, "--data.root", str(tmp_path / "data"),
        "--data.image-size", "8", "--data.validation", "0", "--train.select", "last",
        "--train.epochs", "2", "--run-dir", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "EXIF" in line]
    assert sorted(line.split(": ")[1] for line in lines) == sorted(f"the image {f}" for f in files)
    assert all("Corrupt EXIF data" in line for line in lines)


def test_the_check_names_the_file(tmp_path):
    files = make_folder(tmp_path / "data")
    done = bdkd("data", "check", str(tmp_path / "data"), "--workers", "2", "--to",
                str(tmp_path / "bad.txt"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(line.split(": ")[1] for line in done.stderr.splitlines()) == sorted(
        f"the image {file}" for file in files
    )


def test_other_warnings_and_filters_of_the_caller_stay(capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with shown("a.jpg"):
            decode.decode_rgb(corrupt_exif())
        warnings.warn("mine", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["mine"]
    assert capsys.readouterr().err.startswith("warning: the image a.jpg: Corrupt EXIF data")


def test_a_warning_of_an_image_that_is_refused_is_not_shown(capsys):
    with contextlib.suppress(ValueError), shown("a.jpg"):
        decode.decode_rgb(corrupt_exif())
        raise ValueError("refused")
    assert capsys.readouterr().err == ""


def test_a_fault_of_every_image_does_not_fill_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(image_warnings, "MOST", 3)
    for number in range(10):
        with recorded(f"{number}.jpg") as lines:
            decode.decode_rgb(corrupt_exif())
        show(lines)
    *first, last = capsys.readouterr().err.splitlines()
    assert len(first) == 3
    assert last == "warning: there are more than 3 such warnings: the others are not shown"


# --- decompression bombs --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_an_error_of_one_line_with_its_name(size, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(huge_png(*size))
    with pytest.raises(RunError, match=r"cannot read the image .*bomb\.png: .*pixels") as raised:
        read_images([path], 8)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    """The test uses a sparse file of a terabyte, which needs no space on the disk."""
    make_folder(tmp_path / "data")
    bad = tmp_path / "data" / "train" / "class1" / "9.jpg"
    bad.touch()
    os.truncate(bad, 1 << 40)
    with pytest.raises(RunError, match=r"9\.jpg: it has 1,099,511,627,776 bytes, more than"):
        read_images([bad], 8)
    done = bdkd("data", "check", str(tmp_path / "data"), "--to", str(tmp_path / "bad.txt"))
    assert done.returncode == 1
    assert "bad    train/class1/9.jpg: it has 1,099,511,627,776 bytes" in done.stdout


def test_large_pictures_are_decoded_one_after_the_other(monkeypatch):
    monkeypatch.setattr(decode, "LARGE", 1)
    with decode._one_large_image:
        assert decode._one_large_image.locked()
    assert decode.decode_rgb(encoded("PNG")).size == (12, 12)
    assert not decode._one_large_image.locked()


def test_a_sparse_member_of_a_shard_is_refused_by_name(tmp_path):
    """Its 512 bytes declare a terabyte of zeros."""
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            label = tarfile.TarInfo("0.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"0"))
            member = tarfile.TarInfo("0.jpg")
            member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
            header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
            header[386:410] = b"%011o\0%011o\0" % (0, 0)
            header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            assert tar.fileobj is not None
            tar.fileobj.write(header)
            tar.offset += len(header)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = bdkd("data", "check", str(tmp_path), "--format", "webdataset", "--to",
                str(tmp_path / "bad.txt"))  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "train-0.tar is refused: 0.jpg is a sparse file: pack it again" in line
    # In KiB, for the largest child so far. Children of other tests may have been larger.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 2_000_000)
