"""Text files from Windows are read wherever a user may write a text file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_sets import tiny_imagenet_files, write_files
from PIL import Image

from bdkd.config import load_recipe, to_toml
from bdkd.data import create_source
from bdkd.errors import RunError, UsageError
from bdkd.registry import SOURCES
from bdkd.text import decode_text, text_lines

ENCODINGS = {
    "utf-8": lambda text: text.encode(),
    "with a mark": lambda text: text.encode("utf-8-sig"),
    "of Windows": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "of PowerShell 5": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "of a big-endian machine": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "with empty lines": lambda text: (text + "\n \r\n\n").encode(),
}
ENCODED = pytest.mark.parametrize("encoding", ENCODINGS)


@ENCODED
def test_a_recipe_is_read(encoding, tmp_path):
    known = load_recipe("digits")
    text = to_toml(known) + "# größer\n"
    (tmp_path / "mine.toml").write_bytes(ENCODINGS[encoding](text))
    assert load_recipe(str(tmp_path / "mine.toml")) == known


@pytest.mark.parametrize(("content", "message"), [
    (b"# gr\xf6\xdfer\n", r"mine\.toml is not UTF-8 text .*save it as UTF-8"),
    ("a = 1\n".encode("utf-16-le"), r"mine\.toml contains NUL bytes.*save it as UTF-8"),
    (b"\xff\xfea", r"mine\.toml is not UTF-16 text"),
])  # fmt: skip
def test_other_encodings_are_refused_in_one_line(content, message, tmp_path):
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(RunError, match=message) as raised:
        load_recipe(str(tmp_path / "mine.toml"))
    assert "\n" not in str(raised.value)


def test_lines_end_only_at_line_feeds():
    """File names may contain the other line separators of ``str.splitlines``."""
    text = "a\u2028b\x1c.jpg\nc\x85\n\nd\n\n"
    assert text_lines(decode_text(text.encode(), "x")) == ["a\u2028b\x1c.jpg", "c\x85", "", "d"]
    assert text_lines("") == text_lines("\n \n") == []
    assert text_lines("\n  a\n\tb \n \t\n") == ["", "  a", "\tb"]  # line 1 is kept


def test_line_ends_of_windows_and_of_old_macs_are_line_feeds():
    assert decode_text(b"a\r\nb\rc\r\n\r\nd\n", "x") == "a\nb\nc\n\nd\n"


def test_bytes_that_are_not_utf_8_are_kept_in_file_names():
    """They are decoded as by ``os.fsdecode``. In other texts, they are an error."""
    assert decode_text(b"\xe9\n", "x", "surrogateescape") == "\udce9\n"
    with pytest.raises(RunError, match="x is not UTF-8 text"):
        decode_text(b"\xe9\n", "x")


@pytest.fixture
def folders(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dög"):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "d" / split / name / f"{i}.jpg")
    return tmp_path / "d"


def without(root, content: bytes):
    """Return the number of train and test images that an exclude list leaves."""
    (root / "list.txt").write_bytes(content)
    config = SOURCES.configure("imagenet", root=str(root), exclude=str(root / "list.txt"),
                        loader="pillow", workers=0, validation=0.0)  # fmt: skip
    counts = create_source(config, 0, torch.device("cpu"), torch.channels_last).info.counts
    return counts["train"], counts["test"]


@ENCODED
def test_every_line_of_an_exclude_list_counts(encoding, folders, capsys):
    lines = "val/cat/0.jpg\n# a comment\nval/dög/1.jpg\tno image\n\ntrain/cat/2.jpg\n"
    assert without(folders, ENCODINGS[encoding](lines)) == (7, 6)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("line", [r"val\cat\0.jpg", "./val/cat/0.jpg", r".\val\cat\0.jpg",
                                  "  val/cat/0.jpg  ", "val/cat/0.jpg\t\\ reason"])  # fmt: skip
def test_paths_as_other_tools_write_them_match(line, folders, capsys):
    assert without(folders, line.encode()) == (8, 7)
    assert not capsys.readouterr().err


def test_a_name_with_a_backslash_matches_itself(folders):
    (folders / "val" / "cat" / "0.jpg").rename(folders / "val" / "cat" / r"a\0.jpg")
    assert without(folders, rb"val/cat/a\0.jpg") == (8, 7)


def test_lines_that_name_no_image_are_reported(folders, capsys):
    listed = "val/cat/0.jpg\nval/cat/001.jpg\n" + "".join(f"x{i}\n" for i in range(9))
    assert without(folders, listed.encode()) == (8, 7)
    err = capsys.readouterr().err
    assert "10 of 11 lines of data.exclude" in err
    assert "name no image of" in err
    assert "val/cat/001.jpg, x0, x1 ..." in err
    assert err.count("\n") == 1
    with pytest.raises(UsageError, match="names no image of"):
        without(folders, b"val/cat/001.jpg\n")
    assert without(folders, b"# 0 of 16 images\n\n") == (8, 8)


@ENCODED
def test_lists_of_tiny_imagenet_are_read(encoding, tmp_path):
    files = tiny_imagenet_files()
    for name in ("val/val_annotations.txt", "words.txt"):
        path = f"tiny-imagenet-200/{name}"
        files[path] = ENCODINGS[encoding](files[path].decode())
    write_files(tmp_path, files)
    config = SOURCES.configure("tiny-imagenet", root=str(tmp_path))
    info = create_source(config, 0, torch.device("cpu"), torch.channels_last).info
    assert info.classes == tuple(f"thing n0{i}, object" for i in (7, 8, 9))
    assert info.counts["test"] == 12


def test_hidden_entries_of_tiny_imagenet_are_skipped(tmp_path):
    files, root = tiny_imagenet_files(), "tiny-imagenet-200/train"
    write_files(tmp_path, files)
    config = SOURCES.configure("tiny-imagenet", root=str(tmp_path))
    known = create_source(config, 0, torch.device("cpu"), torch.channels_last).info
    hidden = (
        ".ipynb_checkpoints/images/0.JPEG", "n07/images/._n07_0.JPEG", "__MACOSX/a.JPEG",
        "n08/images/.DS_Store", "n08/images/x.JPEG/0.JPEG", ".DS_Store", "n/.DS_Store",
    )  # fmt: skip
    write_files(tmp_path, {f"{root}/{name}": b"\0\5\x16\7" for name in hidden})
    found = create_source(config, 0, torch.device("cpu"), torch.channels_last).info
    assert (found.classes, found.counts, found.digests) == (
        known.classes, known.counts, known.digests,
    )  # fmt: skip
