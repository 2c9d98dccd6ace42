"""All sources and ``bdkd data check`` have the same rules for which files are data."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from imagenet_trees import encoded, example, record
from PIL import Image

from bdkd.cli import main
from bdkd.data import create_source
from bdkd.data.listing import archive_files, class_folders, image_files, record_files
from bdkd.errors import RunError, UsageError
from bdkd.registry import SOURCES

APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(64)


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (40, 40), (20 * number, 90, 90))


def make(root, splits=("train", "val")):
    for split in splits:
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                picture(number).save(root / split / name / f"{number}.jpg")
    return root


def load(kind, root, **options):
    """Load a data set. ``kind`` is "folder", or a format of the source imagenet."""
    if kind != "folder source":
        options |= {"format": kind, "loader": "pillow", "workers": 0}
    source = "folder" if kind == "folder source" else "imagenet"
    config = SOURCES.configure(source, root=str(root), image_size=32, validation=0.0, **options)
    return create_source(config, 0, torch.device("cpu"), torch.channels_last)


def facts(source):
    info = source.info
    return info.classes, info.counts, info.digests


FOLDERS = pytest.mark.parametrize("kind", ["folder source", "folder"])


def test_names_are_sorted_for_any_order_of_the_file_system(tmp_path):
    """Names are sorted by code point, because labels and the order of an epoch depend on them."""
    names = [f"{number:04d}.jpg" for number in range(60)] + ["Z.jpg", "a.jpg", "ä.jpg"]
    for name in sorted(names, key=lambda name: name[::-1]):
        (tmp_path / name).touch()
        (tmp_path / "folders" / name).mkdir(parents=True)
    assert image_files(tmp_path) == sorted(names)
    assert archive_files(tmp_path) == [tmp_path / name for name in sorted(names)]
    assert class_folders(tmp_path / "folders") == tuple(sorted(names))


def test_only_files_named_like_tfrecords_are_read_if_there_are_any():
    names = ("train-00000-of-00002", "train-00001-of-00002", "notes", "train.bak")
    files = [Path(name) for name in names]
    assert record_files(files) == files[:2]
    assert record_files(files[2:]) == files[2:]  # without such names, all files may be records


@FOLDERS
def test_hidden_entries_are_skipped_at_every_level(kind, tmp_path, capfd):
    root, splits = make(tmp_path / "d"), ("train", "val")
    known = facts(load(kind, root))
    (root / ".git" / "train").mkdir(parents=True)
    for split in splits:
        for name in (".ipynb_checkpoints", "__MACOSX", ".Trash", "only hidden"):
            (root / split / name).mkdir()
        (root / split / "only hidden" / ".DS_Store").write_bytes(b"\0")
        (root / split / "only hidden" / ".0.jpg").write_bytes(b"\0")
        picture(1).save(root / split / ".ipynb_checkpoints" / "0-checkpoint.jpg")
        picture(1).save(root / split / "a picture.jpg")  # in no class
        for name in ("._0.jpg", ".DS_Store", ".hidden.JPG", "Thumbs.db", "desktop.ini"):
            (root / split / "cat" / name).write_bytes(APPLE_DOUBLE)
            (root / split / name).write_bytes(APPLE_DOUBLE)
        (root / split / "cat" / ".ipynb_checkpoints").mkdir()
        (root / split / "cat" / "folder.jpg").mkdir()
        picture(1).save(root / split / "cat" / "folder.jpg" / "0.jpg")
        os.mkfifo(root / split / "dog" / "pipe.jpg")  # reading it would wait for ever
    assert facts(load(kind, root)) == known
    if kind == "folder source":  # the check is the same for both
        return
    main(["data", "check", str(root), "--workers", "1", "--to", str(tmp_path / "bad.txt")])
    out, _ = capfd.readouterr()
    assert "train  8 images of 2 classes, 4 to 4 in a class" in out
    assert "val    8 images of 2 classes, 4 to 4 in a class" in out


@FOLDERS
def test_every_image_suffix_is_read_in_any_case(kind, tmp_path):
    root = make(tmp_path / "d")
    for suffix in ("jpeg", "JPG", "png", "BMP", "webp", "ppm", "PGM", "tif", "TIFF"):
        picture(1).save(root / "train" / "cat" / f"more.{suffix}", "PNG")
    for name in ("notes.txt", "0.jpg.txt", "jpg", "0.gif", "0.jpg~"):
        (root / "train" / "cat" / name).write_text("no image")
    assert load(kind, root).info.counts["train"] == 8 + 9


@FOLDERS
def test_an_empty_class_folder_is_refused_by_name(kind, tmp_path):
    root = make(tmp_path / "d")
    for split in ("train", "val"):
        (root / split / "emu").mkdir()
    with pytest.raises(RunError, match=r"emu.* holds 0 images: it needs at least"):
        load(kind, root)


@FOLDERS
def test_symbolic_links_are_followed(kind, tmp_path):
    root = make(tmp_path / "d")
    known = facts(load(kind, root))
    other = tmp_path / "elsewhere"
    other.mkdir()
    (root / "train" / "cat").rename(other / "cats")
    (root / "train" / "cat").symlink_to(other / "cats")
    (root / "train" / "dog" / "0.jpg").rename(other / "x")
    (root / "train" / "dog" / "0.jpg").symlink_to(other / "x")
    (root / "val").rename(other / "v")
    (root / "val").symlink_to(other / "v")
    assert facts(load(kind, root)) == known
    (root / "train" / "dog" / "all.jpg").symlink_to(other)  # a folder
    assert facts(load(kind, root)) == known


@FOLDERS
def test_a_broken_symbolic_link_is_named(kind, tmp_path, capfd):
    root = make(tmp_path / "d")
    for name, target in (("emu", "nowhere"), ("gnu", "gnu")):
        link = root / "train" / name
        link.symlink_to(target)
        with pytest.raises(RunError, match=f"{link} is a symbolic link to something that does not"):
            load(kind, root)
        link.unlink()
    link = root / "train" / "cat" / "9.jpg"
    link.symlink_to("nowhere")
    with pytest.raises(RunError, match=f"cannot read the image {link}: No such file"):
        list(load(kind, root).train_batches(0, 0, 9, 1))
    with pytest.raises(SystemExit):
        main(["data", "check", str(root), "--workers", "1", "--to", str(tmp_path / "bad.txt")])
    assert "bad    train/cat/9.jpg: cannot read the image" in capfd.readouterr().out


@FOLDERS
def test_names_that_are_not_valid_text_are_read(kind, tmp_path, capfd):
    root = make(tmp_path / "d")
    odd = os.fsdecode(b"\xe9t\xe9 \xff")
    for split in ("train", "val"):
        shutil.copytree(root / split / "cat", root / split / odd)
        picture(3).save(root / split / odd / (odd + "\u2028.jpg"))
    source = load(kind, root)
    assert source.info.classes == ("cat", "dog", odd)  # the order of the labels
    assert source.info.counts["train"] == 13
    list(source.train_batches(0, 0, 13, 1))
    (root / "val" / odd / "0.jpg").write_bytes(b"")
    listed = tmp_path / "bad.txt"
    with pytest.raises(SystemExit):
        main(["data", "check", str(root), "--workers", "1", "--to", str(listed)])
    assert "bad    val/" in capfd.readouterr().out
    if kind == "folder":
        assert load(kind, root, exclude=str(listed)).info.counts["test"] == 12


def test_a_name_with_a_line_break_is_one_line_of_the_list(tmp_path, capfd):
    root, listed = make(tmp_path / "d"), tmp_path / "bad.txt"
    for name in ("a\tb.jpg", "a\nb.jpg"):
        (root / "val" / "cat" / name).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(["data", "check", str(root), "--workers", "1", "--to", str(listed)])
    assert len(listed.read_text().splitlines()) == 3
    assert load("folder", root, exclude=str(listed)).info.counts["test"] == 8


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shard(prefix="", labels=b"%d"):
    """Return the members of 8 images in 2 classes."""
    found = {}
    for number in range(8):
        found[f"{prefix}{number}.cls"] = labels % (number % 2)
        found[f"{prefix}{number}.jpg"] = encoded(picture(number), "JPEG")
    return found


@pytest.mark.parametrize("prefix", ["", "./", "cats.and/dogs/"])
def test_hidden_members_and_shards_are_skipped(prefix, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "x.tar").mkdir()
        hidden = {f"{prefix}{folder}{name}": APPLE_DOUBLE for folder in ("", "a/")
                  for name in ("._0.jpg", "._0.cls", ".DS_Store", ".1.jpg")}  # fmt: skip
        hidden |= {f"{folder}/0{s}": b"?" for folder in ("__MACOSX", "x/.thumbs", ".x/y")
                   for s in (".jpg", ".cls")}  # fmt: skip
        tar(tmp_path / split / "0.tar", hidden | shard(prefix))
        for name in ("._0.tar", ".0.tar.XyZ12", "0.tar.idx", "0.json"):
            (tmp_path / split / name).write_bytes(APPLE_DOUBLE)
    (tmp_path / "._train-0.tar").write_bytes(APPLE_DOUBLE)
    (tmp_path / ".train").mkdir()
    shutil.copy(tmp_path / "train" / "0.tar", tmp_path / ".train" / "0.tar")
    source = load("webdataset", tmp_path)
    assert source.info.counts == {"train": 8, "val": 0, "test": 8}
    assert len(next(iter(source.train_batches(0, 0, 8, 1))).target) == 8


def test_images_in_shards_have_the_same_suffixes_as_files(tmp_path):
    members = shard()
    for number, suffix in enumerate(("JPEG", "png", "ppm", "pgm", "tif", "TIFF"), 10):
        members |= {f"{number}.cls": b"1", f"{number}.{suffix}": encoded(picture(1), "PNG")}
    members |= {"0.seg.png": b"no image", "0.json": b"{}", "10.txt": b"a caption"}
    for split in ("train", "val"):
        tar(tmp_path / f"{split}.tar", members)
    assert load("webdataset", tmp_path).info.counts["train"] == 8 + 6


@pytest.mark.parametrize("labels", [b"%d", b"%d\n", b"\xef\xbb\xbf%d\r\n", b"  %d \r\n\r\n"])
def test_labels_that_windows_wrote_are_read(labels, tmp_path):
    for split in ("train", "val"):
        tar(tmp_path / f"{split}.tar", shard(labels=labels))
    assert load("webdataset", tmp_path).splits["train"].labels.tolist() == [0, 1] * 4
    utf16 = {name: (content.decode() + "\r\n").encode("utf-16") if name.endswith("cls") else content
             for name, content in shard().items()}  # fmt: skip
    tar(tmp_path / "train.tar", utf16)
    assert load("webdataset", tmp_path).splits["train"].labels.tolist() == [0, 1] * 4


@pytest.mark.parametrize(("label", "shown"), [
    (b"cat", "'cat'"), (b"", "''"), (b"1.5", "'1.5'"), (b"1 2", "'1 2'"), (b"1_0", "'1_0'"),
    (b"9" * 30, "'9999"), (b"1" * 200, "'1111"), (b"\xff", r"b'\\xff'"),
    (b"\0\1", r"b'\\x00\\x01'"), ("\u0663".encode(), "'\u0663'"),
    (b"\xff\xfe1\x001", r"b'\\xff\\xfe1"),
])  # fmt: skip
def test_an_error_shows_a_label_that_is_not_a_number(label, shown, tmp_path):
    for split in ("train", "val"):
        tar(tmp_path / f"{split}.tar", shard() | {"5.cls": label})
    needed = r"train\.tar: the label 5\.cls must hold the number of a class, got "
    with pytest.raises(RunError, match=needed + shown) as raised:
        load("webdataset", tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200 + len(str(tmp_path))


def test_labels_far_beyond_the_images_are_refused(tmp_path):
    for split in ("train", "val"):
        tar(tmp_path / f"{split}.tar", shard() | {"5.cls": b"2000000000"})
    with pytest.raises(RunError, match=r"labels up to 2000000000 \(.*train\.tar \(5\.jpg\)\)"):
        load("webdataset", tmp_path)


STRAYS = (".DS_Store", "._train-00000-of-00002", "dataset_info.json", "features.json", "README",
          "README.md", "LICENSE", "labels.txt", "train-00000-of-00002.idx", "Thumbs.db",
          "train.csv", "checksums.sha256", ".train-00000-of-00002.Ab12")  # fmt: skip


@pytest.mark.parametrize("names", [
    ("train-00000-of-00002", "train-00001-of-00002"),  # the TPU scripts
    ("imagenet2012-train.tfrecord-00000-of-00002", "imagenet2012-train.tfrecord-00001-of-00002"),
    ("0.tfrecord", "1.tfrecord"), ("0.TFRecords", "1.tfrec"), ("train0", "train1"), ("a", "b.data"),
])  # fmt: skip
def test_other_files_next_to_tfrecords_are_skipped(names, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        for first, name in enumerate(names):
            content = b"".join(
                record(example(encoded(picture(number), "JPEG"), number % 2))
                for number in range(4 * first, 4 * first + 4)
            )
            (tmp_path / split / name).write_bytes(content)
        for stray in STRAYS:
            (tmp_path / split / stray).write_bytes(APPLE_DOUBLE)
        (tmp_path / split / "a folder").mkdir()
    (tmp_path / "._train").write_bytes(APPLE_DOUBLE)
    source = load("tfrecord", tmp_path)
    assert source.info.counts == {"train": 8, "val": 0, "test": 8}
    broken = tmp_path / "train" / names[0]
    broken.unlink()
    broken.symlink_to("nowhere")
    with pytest.raises(RunError, match=f"{names[0]} is a symbolic link to something that does not"):
        load("tfrecord", tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_class_names_are_read_as_windows_writes_them(encoding, tmp_path):
    for split in ("train", "val"):
        tar(tmp_path / f"{split}.tar", shard())
    (tmp_path / "classes.txt").write_bytes("cät\r\ndog \r\n\r\n".encode(encoding))
    assert load("webdataset", tmp_path).info.classes == ("cät", "dog")
    (tmp_path / "classes.txt").write_bytes("cat\n\ndog\n".encode(encoding))
    with pytest.raises(RunError, match=r"classes\.txt, line 2 is empty: it must name a class"):
        load("webdataset", tmp_path)


NFC, NFD = "caf\u00e9", "cafe\u0301"
LOOK_THE_SAME = r"'caf(e\\u0301|\\xe9)' and 'caf(e\\u0301|\\xe9)' look the same .* Unicode forms"


@FOLDERS
@pytest.mark.parametrize("place", ["val", "train"])
def test_two_unicode_forms_of_a_class_are_explained(kind, place, tmp_path):
    """macOS writes NFD and most other systems NFC. Folders from two machines can have both."""
    root = make(tmp_path)
    (root / "train" / "cat").rename(root / "train" / NFC)
    (root / "val" / "cat").rename(root / "val" / NFD)
    if place == "train":
        shutil.copytree(root / "val" / NFD, root / "train" / NFD)
    with pytest.raises(RunError, match=LOOK_THE_SAME):
        load(kind, root)


def test_an_exclude_list_in_another_unicode_form_is_explained(tmp_path, capfd):
    root = make(tmp_path / "d")
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / NFC)
    listed = tmp_path / "bad.txt"
    listed.write_text(f"train/{NFD}/0.jpg\n")
    with pytest.raises(UsageError, match=r"names no image .*look the same"):
        load("folder", root, exclude=str(listed))
    listed.write_text(f"train/{NFD}/0.jpg\ntrain/dog/0.jpg\n")
    assert load("folder", root, exclude=str(listed)).info.counts["train"] == 7
    assert "look the same but have different Unicode forms" in capfd.readouterr().err


def test_a_data_set_at_another_unicode_form_of_a_path_is_explained(tmp_path):
    make(tmp_path / NFC)
    for kind in ("folder", "folder source"):
        with pytest.raises(RunError, match=LOOK_THE_SAME):
            load(kind, tmp_path / NFD)
