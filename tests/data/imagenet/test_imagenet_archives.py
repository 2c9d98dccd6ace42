"""The index of archives, its cache, and the checksums of archives."""

import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from imagenet_trees import checksum, example, labelled, record

from bdkd.cli import main
from bdkd.data.imagenet import archives
from bdkd.data.imagenet.archives import masked_crc32c
from bdkd.data.imagenet.index import Index, names_array
from bdkd.data.imagenet.index_cache import cached_index
from bdkd.data.imagenet.layout import find
from bdkd.data.images.check import check
from bdkd.errors import RunError

COLUMNS = ("container", "names", "labels", "offsets", "sizes")


def same(a, b) -> bool:
    return (a.root, a.containers) == (b.root, b.containers) and all(
        np.array_equal(getattr(a, column), getattr(b, column)) for column in COLUMNS
    )


@pytest.fixture
def reads(monkeypatch):
    """Return a list to which each archive is added whose headers are read."""
    seen = []
    for name in ("_images_of_tar", "_images_of_tfrecord"):
        read = getattr(archives, name)
        monkeypatch.setattr(archives, name, lambda path, r=read: seen.append(path.name) or r(path))
    return seen


@pytest.mark.parametrize(("format", "fixture"), [("webdataset", "tars"), ("tfrecord", "tfrecords")])
def test_headers_are_read_once(format, fixture, request, reads, cache):
    root = request.getfixturevalue(fixture)
    first = find(root, format)
    assert len(reads) == 6
    again = find(root, format)
    assert len(reads) == 6
    assert same(first.train, again.train)
    assert same(first.val, again.val)
    assert first.classes == again.classes
    find(root, format, fresh=True)
    assert len(reads) == 12
    assert len(list(cache.iterdir())) == 2  # one file per split, no partial file


@pytest.mark.parametrize(("format", "fixture"), [("webdataset", "tars"), ("tfrecord", "tfrecords")])
def test_archives_have_the_identity_of_their_labels_and_members(format, fixture, request, tmp_path):
    root = request.getfixturevalue(fixture)
    first = find(root, format)
    copy = shutil.copytree(root, tmp_path / "copy")
    again = find(copy, format)
    assert again.train.digest(again.classes) == first.train.digest(first.classes)
    assert first.train.digest(first.classes).images == 120
    assert first.val.digest(first.classes) != first.train.digest(first.classes)
    (copy / "classes.txt").write_text("cat\ndog\nowl\nemu\nant\n")
    named = find(copy, format)
    assert named.train.digest(named.classes) != first.train.digest(first.classes)


def test_an_archive_that_changed_is_read_again(tfrecords, tmp_path, reads):
    """This holds even if its size and its modification time are the same as before."""
    root = shutil.copytree(tfrecords, tmp_path / "copy")
    before, file = find(root, "tfrecord"), root / "train-00001-of-00003"
    times, whole = file.stat(), file.read_bytes()
    frames = [0]
    while frames[-1] < len(whole):
        frames.append(frames[-1] + 16 + int.from_bytes(whole[frames[-1] :][:8], "little"))
    file.write_bytes(whole[frames[1] :] + whole[: frames[1]])  # the first record comes last
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    reads.clear()
    after = find(root, "tfrecord")
    assert len(reads) == 3  # those of train; val is unchanged
    assert not same(before.train, after.train)
    (root / "train-00002-of-00003").unlink()
    assert len(find(root, "tfrecord").train) == 80


def test_an_archive_that_is_written_while_it_is_read_is_read_again(tmp_path, cache):
    """The archive is still being copied. The index of its first part must not be used later."""
    file = tmp_path / "train.tar"
    file.write_bytes(b"a part")
    made = []

    def make():
        made.append(file.read_bytes())
        file.write_bytes(b"a part and the rest")
        names = names_array(["0.jpg"])
        zero = np.zeros(1, np.int64)
        return Index(tmp_path, ("train.tar",), zero.astype(np.int32), names, zero, zero, zero + 1)

    for _ in range(3):
        cached_index("tar", tmp_path, [file], make, fresh=False)
        time.sleep(0.01)  # a file system's clock ticks every few milliseconds
    assert made[1] == b"a part and the rest"


def test_the_cache_depends_on_the_path_and_the_format(tmp_path):
    """Archives of two data sets have the same names, sizes and times. One has two formats."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "train.tar").touch()
    os.link(tmp_path / "a" / "train.tar", tmp_path / "b" / "train.tar")
    zero, names = np.zeros(1, np.int64), names_array(["0"])

    def labels(kind: str, folder: str, number: int) -> list[int]:
        root = tmp_path / folder
        made = Index(root, ("train.tar",), zero.astype(np.int32), names, zero + number, zero, zero)
        found = cached_index(kind, root, [root / "train.tar"], lambda: made, fresh=False)
        return found.labels.tolist()

    places = (("tar", "a"), ("tar", "b"), ("tfrecord", "a"))
    first = [labels(*place, number) for number, place in enumerate(places)]
    again = [labels(*place, 9) for place in places]
    assert first == again == [[0], [1], [2]]


@pytest.mark.parametrize("harm", ["cut", "text", "other"])
def test_a_damaged_cache_is_rebuilt(harm, tars, reads, cache):
    first = find(tars, "webdataset")
    for file in cache.iterdir():
        if harm == "cut":
            file.write_bytes(file.read_bytes()[:500])
        elif harm == "text":
            file.write_text("no index")
        else:
            np.savez(file, stamps=np.zeros(3))
    assert same(find(tars, "webdataset").train, first.train)
    assert len(reads) == 12


@pytest.mark.parametrize("place", ["a file", "no home", "read-only"])
def test_without_a_cache_headers_are_read_again(place, tars, reads, tmp_path, monkeypatch):
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        monkeypatch.chdir(tmp_path)
    else:
        # No folder can be created in /proc, not even by root, who may ignore permissions.
        (tmp_path / "file").touch()
        nowhere = {"a file": tmp_path / "file", "read-only": "/proc/bdkd"}[place]
        monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere))
    for _ in range(2):
        assert len(find(tars, "webdataset").train) == 120
    assert len(reads) == 12
    assert not (tmp_path / "~").exists()


def test_concurrent_runs_write_one_index(tars, cache):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: find(tars, "webdataset", fresh=True).train, range(8)))
    assert all(same(found[0], other) for other in found)
    assert same(find(tars, "webdataset").train, found[0])
    assert len(list(cache.iterdir())) == 2


def test_checksums_are_those_of_the_definition():
    # RFC 3720, appendix B.4; the mask is TFRecord's
    for content, crc in ((bytes(32), 0x8A9136AA), (bytes(range(32)), 0x46DD794E),
                         (b"\xff" * 32, 0x62A8AB43), (b"123456789", 0xE3069283),
                         (b"", 0)):  # fmt: skip
        rotated = (crc >> 15) | ((crc & 0x7FFF) << 17)
        assert masked_crc32c(content) == (rotated + 0xA282EAD8) % 2**32
    noise = np.random.default_rng(0)
    for length in (4, 5, 31, 32, 33, 63, 64, 65, 4095, 4096, 4097, 110_001):
        content = noise.bytes(length)
        assert masked_crc32c(content).to_bytes(4, "little") == checksum(content)


def test_tfrecords_without_google_crc32c_name_the_extra(tfrecords, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(RunError, match=r"google-crc32c is not installed.*pip install 'bdkd\[im"):
        find(tfrecords, "tfrecord", fresh=True)


@pytest.fixture
def broken(tfrecords, tmp_path):
    """TFRecords with one flipped bit in the third record of one file."""

    def make(where: str):
        root = shutil.copytree(tfrecords, tmp_path / "broken")
        file = root / "train-00001-of-00003"
        content, start = bytearray(file.read_bytes()), 0
        for _ in range(2):
            start += 16 + int.from_bytes(content[start : start + 8], "little")
        length = int.from_bytes(content[start : start + 8], "little")
        content[start + {"length": 1, "of length": 9, "data": 12 + length // 2,
                         "of data": 12 + length + 2}[where]] ^= 16  # fmt: skip
        file.write_bytes(content)
        return root

    return make


@pytest.mark.parametrize("where", ["length", "of length"])
def test_a_damaged_length_is_named_with_its_record(where, broken):
    with pytest.raises(RunError, match=r"train-00001-of-00003, record 2: the checksum") as raised:
        find(broken(where), "tfrecord")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("where", ["data", "of data"])
def test_damaged_data_are_found_by_the_check_and_left_out(where, broken, tmp_path, capfd):
    root, listed = broken(where), tmp_path / "bad.txt"
    assert len(find(root, "tfrecord").train) == 120
    with pytest.raises(SystemExit) as exit_:
        main(["data", "check", str(root), "--format", "tfrecord", "--to", str(listed),
              "--workers", "1"])  # fmt: skip
    assert exit_.value.code == 1
    out, err = capfd.readouterr()
    assert "bad    train-00001-of-00003#2: the record's data do not match its checksum" in out
    assert re.search(r"^bdkd: 1 of 145 images cannot be decoded", err, re.MULTILINE)
    assert listed.read_text().splitlines()[1].startswith("train-00001-of-00003#2\t")


@pytest.mark.parametrize(("train", "val", "labels"), [
    ((1, 1, 2, 2), (1, 2), [0, 0, 1, 1]),  # from 1, as in common TFRecords
    ((0, 0, 1, 1), (0, 1), [0, 0, 1, 1]),
    ((1, 1, 0, 0), (1, 1), [1, 1, 0, 0]),  # a class that val lacks
])  # fmt: skip
def test_labels_of_tfrecords_begin_at_0_or_at_1_in_both_splits(train, val, labels, tmp_path):
    for split, given in (("train", train), ("validation", val)):
        content = b"".join(record(example(b"an image", label)) for label in given)
        (tmp_path / split).write_bytes(content)
    found = find(tmp_path, "tfrecord")
    assert found.train.labels.tolist() == labels
    assert found.val.labels.tolist() == [label - min(*train, *val) for label in val]
    assert found.classes == ("0", "1")


@pytest.mark.parametrize(("train", "val", "message"), [
    ((0, 0, 1, 1), (0, -1), r"validation \(1\) has the negative label -1"), ((-1, 0, 1, 1), (0, 1),
     r"train \(0\) has the negative label -1"),
    ((0, 0, 1, 1), (0, 7), "hold 4 training images and labels up to 7"),
])  # fmt: skip
def test_impossible_labels_of_either_split_are_refused(train, val, message, tmp_path):
    for split, given in (("train", train), ("validation", val)):
        content = b"".join(record(example(b"an image", label)) for label in given)
        (tmp_path / split).write_bytes(content)
    with pytest.raises(RunError, match=message):
        find(tmp_path, "tfrecord")


def test_classes_txt_may_name_more_classes_than_there_are_labels_but_not_fewer(tmp_path):
    for split in ("train", "validation"):
        content = b"".join(record(example(b"an image", label)) for label in (0, 0, 2, 2))
        (tmp_path / split).write_bytes(content)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncow\ndog\n")
    found = find(tmp_path, "tfrecord")
    assert found.classes == ("ant", "bee", "cow", "dog")
    with pytest.raises(RunError, match=r"the class bee in .* holds 0 images"):
        found.require_images()
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(RunError, match="names 2 classes, but there are labels up to 2"):
        find(tmp_path, "tfrecord")


def test_each_image_is_read_from_its_place_in_its_archive(tars, tfrecords, tree):
    """The index returns the bytes and labels of every file in order, also for a subset."""
    for root, format in ((tars, "webdataset"), (tfrecords, "tfrecord")):
        for split, index in zip(("train", "val"), find(root, format)[1:], strict=True):
            files = labelled(tree, split)
            assert index.labels.tolist() == [label for _, label in files]
            items = [index.item(i) for i in range(len(index))]
            assert [item.read() for item in items] == [file.read_bytes() for file, _ in files]
            some = np.arange(len(files))[::-3]
            part = index.take(some)
            assert [part.item(i) for i in range(len(some))] == [items[i] for i in some]
            assert part.labels.tolist() == index.labels[some].tolist()
            names = [index.identity(i) for i in range(len(index))]
            assert len(set(names)) == len(names)
            assert [part.identity(i) for i in range(len(some))] == [names[i] for i in some]
            assert np.flatnonzero(index.find({names[3], names[7]})).tolist() == [3, 7]


def test_a_record_with_a_valid_checksum_but_no_image_is_bad(tmp_path):
    """The image was damaged before the record was written."""
    content = b"".join(record(example(b"no image", label)) for label in (0, 1))
    for split in ("train", "validation"):
        (tmp_path / split).write_bytes(content)
    bad = check(tmp_path, "tfrecord", workers=1).bad
    assert [name for name, _ in bad] == ["train#0", "train#1", "validation#0", "validation#1"]
    assert all("cannot identify image file" in reason for _, reason in bad)


def with_text_label(text: bytes) -> bytes:
    """Return an Example whose label is text. An earlier version read the text as a number."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    features = {b"image/encoded": b"an image", b"image/class/label": text}
    entries = [field(1, field(1, name) + field(2, field(1, field(1, value))))
               for name, value in features.items()]  # fmt: skip
    return field(1, b"".join(entries))


def test_records_that_are_cut_or_empty_are_named(tmp_path):
    whole = record(example(b"an image", 1))
    (tmp_path / "validation").write_bytes(whole)
    for content, match in (
        (whole * 2 + whole[:7], r"train is not a complete TFRecord file \(record 2"),
        (whole + whole[:-3], r"train is not a complete TFRecord file \(record 1"),
        (record(b""), r"train, record 0: no Example"),
        (record(b"\x0a\xff\xff\xff\xff\xff\x01"), r"train, record 0: no Example"),
        (record(b"\x0a\x14\x0a\x12\x0a\x0dimage/encoded\x12\x00"), r"train, record 0: no Example"),
        (
            record(with_text_label(b"cat")),
            r"train, record 0: .*image/class/label must be the number of a class, got b'cat'",
        ),
    ):
        (tmp_path / "train").write_bytes(content)
        with pytest.raises(RunError, match=match) as raised:
            find(tmp_path, "tfrecord")
        assert "\n" not in str(raised.value)
