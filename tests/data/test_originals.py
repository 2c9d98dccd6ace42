"""CIFAR and Tiny-ImageNet in their original formats, image folders, and synthetic images."""

import gzip
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_sets import cifar_files, python2_pickle, tar_gz, tiny_imagenet_files, write_files
from torch import nn

from bdkd.data import InMemoryConfig, Shard, SourceContext, create_source
from bdkd.data.in_memory import Images, InMemory
from bdkd.errors import RunError, UsageError
from bdkd.registry import SOURCES

CPU = torch.device("cpu")
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}


def source(name: str, root: Path | None = None, **options):
    config = SOURCES.configure(name, root=None if root is None else str(root), **options)
    return create_source(config, 0, CPU, torch.channels_last)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_cifar_is_read_from_its_folder_its_parent_and_its_archive(tmp_path, name):
    files = cifar_files(name)
    write_files(tmp_path / "unpacked", files)
    archive = tmp_path / "archived" / ARCHIVES[name]
    archive.parent.mkdir()
    archive.write_bytes(tar_gz(dict(sorted(files.items(), reverse=True))))
    roots = [
        tmp_path / "unpacked", tmp_path / "unpacked" / FOLDERS[name], archive, archive.parent
    ]  # fmt: skip
    sources = [source(name, root) for root in roots]
    classes = {"cifar10": 10, "cifar100": 100}[name]
    assert sources[0].info.classes == tuple(f"class {i}" for i in range(classes))
    assert (
        sources[0].info.counts
        == {
            "cifar10": {"train": 90, "val": 10, "test": 20},
            "cifar100": {"train": 1800, "val": 200, "test": 2000},
        }[name]
    )
    for other in sources[1:]:
        for split in ("train", "val", "test"):
            assert torch.equal(other.splits[split].pixels, sources[0].splits[split].pixels)
            assert torch.equal(other.splits[split].labels, sources[0].splits[split].labels)


def test_cifar_rows_are_the_red_the_green_and_the_blue_plane(tmp_path):
    files = cifar_files("cifar10")
    write_files(tmp_path, files)
    content = pickle.loads(files["cifar-10-batches-py/test_batch"], encoding="bytes")
    test = source("cifar10", tmp_path).splits["test"]
    assert test.labels.tolist() == content[b"labels"]
    row = content[b"data"][7]
    for channel, y, x in [(0, 0, 0), (0, 3, 5), (1, 31, 0), (2, 17, 31)]:
        assert test.pixels[7, channel, y, x] == row[1024 * channel + 32 * y + x]


def test_cifar100_has_its_fine_labels(tmp_path):
    files = cifar_files("cifar100", per_file=1)
    write_files(tmp_path, files)
    content = pickle.loads(files["cifar-100-python/test"], encoding="bytes")
    assert content[b"fine_labels"] != content[b"coarse_labels"]
    data = source("cifar100", tmp_path, validation=0.0)
    assert data.splits["test"].labels.tolist() == content[b"fine_labels"]


def test_training_batches_of_cifar_show_the_images_of_the_files(tmp_path):
    """Three ranks together show each training image once, with its label."""
    files = cifar_files("cifar10")
    write_files(tmp_path, files)
    rows = [
        pickle.loads(files[f"cifar-10-batches-py/data_batch_{i}"], encoding="bytes")
        for i in range(1, 6)
    ]
    known = {
        row.tobytes(): label
        for part in rows
        for row, label in zip(part[b"data"], part[b"labels"], strict=True)
    }
    data = source("cifar10", tmp_path)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in
                 (data.info.normalisation.mean, data.info.normalisation.std))  # fmt: skip
    seen = set()
    for rank in range(3):
        for batch in data.train_batches(0, 0, 30, 1, Shard(rank, 3)):
            assert len(batch.target) == 10
            for image, label in zip(batch.views[0], batch.target, strict=True):
                pixels = (image * std + mean).round().to(torch.uint8).contiguous().numpy().tobytes()
                assert known[pixels] == label
                seen.add(pixels)
    assert len(seen) == 90


BROKEN = {
    "a missing batch": ("data_batch_3", None, "cannot read .*data_batch_3.*bdkd data fetch"),
    "a truncated batch": ("data_batch_3", lambda b: b[: len(b) // 2], "data_batch_3 is damaged"),
    "no labels": ("test_batch", lambda b: b.replace(b"labels", b"babels"),
                  "test_batch of cifar10 holds no list 'labels'"),
    "no names": ("batches.meta", lambda b: python2_pickle({b"names": []}), "no list 'label_names'"),
    "a label out of range": ("test_batch", lambda b: python2_pickle(
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "from 0 to 9 for each"),
    "a label too few": ("test_batch", lambda b: python2_pickle(
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}), "from 0 to 9 for each"),
    "a label too many": ("test_batch", lambda b: python2_pickle(
        {b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}), "from 0 to 9 for each"),
    "other pixels": ("test_batch", lambda b: python2_pickle(
        {b"data": np.zeros((1, 300), np.uint8), b"labels": [1]}), "no rows of 3072 bytes"),
    "a program": ("test_batch", lambda b: b"cos\nsystem\n(S'exit 1'\ntR.",
                  "refused: it asks for os.system"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_cifar_is_an_error_of_one_line_that_names_the_file(tmp_path, case):
    file, change, message = BROKEN[case]
    files = cifar_files("cifar10")
    path = f"cifar-10-batches-py/{file}"
    if change is None:
        del files[path]
    else:
        files[path] = change(files[path])
    write_files(tmp_path, files)
    with pytest.raises(RunError, match=message) as raised:
        source("cifar10", tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.95])
def test_a_truncated_archive_is_an_error_of_one_line(tmp_path, keep):
    content = tar_gz(cifar_files("cifar100"))
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(RunError, match=r"cifar-100-python.tar.gz .*damaged|it lacks") as raised:
        source("cifar100", tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_1", "more/zeros"])
def test_a_member_that_declares_too_much_is_refused_before_it_is_unpacked(tmp_path, kind, name):
    """An archive of 100 MB can unpack to 100 GB of zeros, in a file or in a header."""
    bomb = tarfile.TarInfo(name)
    bomb.type, bomb.size = kind, 100 << 30
    path = tmp_path / "cifar-10-python.tar.gz"
    with gzip.open(path, "wb") as stream:
        stream.write(bomb.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20))
    with pytest.raises(RunError, match=r"cifar-10-python.tar.gz is .*107,374,18\d,\d{3}") as raised:
        source("cifar10", tmp_path)
    assert "\n" not in str(raised.value)


def test_an_archive_of_the_other_cifar_is_refused(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(tar_gz(cifar_files("cifar100")))
    with pytest.raises(RunError, match="is not the archive of cifar10: it lacks"):
        source("cifar10", tmp_path / "x.tar.gz")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny-imagenet"])
def test_a_missing_set_is_an_error_that_names_the_download_command(tmp_path, name):
    with pytest.raises(RunError, match=f"bdkd data fetch {name} --to '?{tmp_path}"):
        source(name, tmp_path)
    with pytest.raises(RunError, match=f"no data set {name} at .*nowhere"):
        source(name, tmp_path / "nowhere")
    with pytest.raises(UsageError, match=f"data.root must name .*bdkd data fetch {name} --to DIR"):
        source(name)


def test_tiny_imagenet_in_its_own_layout(tmp_path):
    write_files(tmp_path, tiny_imagenet_files())
    data = source("tiny-imagenet", tmp_path, validation=0.2)
    assert data.info.counts == {"train": 15, "val": 3, "test": 12}
    assert data.info.image_size == (64, 64)
    # Classes are in the order of their WordNet ids, as in ImageFolder, with names from words.txt.
    assert data.info.classes == tuple(f"thing n0{i}, object" for i in (7, 8, 9))
    for split in ("train", "test"):
        for image, label in zip(*data.splits[split], strict=True):
            brightest = image.float().mean((1, 2)).argmax()
            grey = image.float().std(0).max() < 1
            assert grey or brightest == 2 - label
    at_32 = source("tiny-imagenet", tmp_path / "tiny-imagenet-200", image_size=32)
    assert at_32.info.image_size == (32, 32)


@pytest.mark.parametrize("words", [b"n08\tthing n08\nno tab\n", None], ids=["one", "no file"])
def test_a_class_of_tiny_imagenet_without_words_has_its_wordnet_id_as_name(tmp_path, words):
    files = tiny_imagenet_files()
    del files["tiny-imagenet-200/words.txt"]
    if words is not None:
        files["tiny-imagenet-200/words.txt"] = words
    write_files(tmp_path, files)
    middle = "n08" if words is None else "thing n08"
    assert source("tiny-imagenet", tmp_path).info.classes == ("n07", middle, "n09")


TINY_BROKEN = {
    "an unreadable image": ("train/n08/images/n08_2.JPEG", b"\xff\xd8no", "n08_2.JPEG.*replace or"),
    "a missing image": ("val/images/val_3.JPEG", None, "cannot read the image .*val_3.JPEG"),
    "an unknown class": ("val/val_annotations.txt", b"val_0.JPEG\tn99\t0\n", "annotations.txt, li"),
    "a path": ("val/val_annotations.txt", b"../val_0.JPEG\tn09\t0\n", "annotations.txt, line 1"),
    "no lines": ("val/val_annotations.txt", b"", "val_annotations.txt is empty"),
    "a class that is not text": ("val/val_annotations.txt", b"\xff\n", "is not UTF-8 text"),
}


@pytest.mark.parametrize("case", TINY_BROKEN)
def test_a_broken_tiny_imagenet_is_an_error_that_names_the_file(tmp_path, case):
    file, content, message = TINY_BROKEN[case]
    files = tiny_imagenet_files()
    del files[f"tiny-imagenet-200/{file}"]
    if content is not None:
        files[f"tiny-imagenet-200/{file}"] = content
    write_files(tmp_path, files)
    with pytest.raises(RunError, match=message) as raised:
        source("tiny-imagenet", tmp_path)
    assert "\n" not in str(raised.value)


def test_a_class_of_tiny_imagenet_without_images_is_refused(tmp_path):
    write_files(tmp_path, tiny_imagenet_files())
    (tmp_path / "tiny-imagenet-200" / "train" / "n00" / "images").mkdir(parents=True)
    with pytest.raises(RunError, match=r"no images \(\*.JPEG\) in .*n00"):
        source("tiny-imagenet", tmp_path)


def test_an_image_folder_is_read_at_its_size(tmp_path):
    from PIL import Image

    for split, count in (("train", 4), ("test", 2)):
        for label, colour in {"blue": (0, 0, 255), "red": (255, 0, 0)}.items():
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), colour).save(tmp_path / split / label / f"{i}.png")
    data = source("folder", tmp_path, validation=0.25)
    assert data.info.classes == ("blue", "red")
    assert data.info.counts == {"train": 6, "val": 2, "test": 4}
    assert data.info.image_size == (30, 30)  # the shorter side
    assert source("folder", tmp_path, image_size=24).info.image_size == (24, 24)
    assert (data.splits["test"].pixels[data.splits["test"].labels == 1, 0] == 255).all()
    (tmp_path / "train" / "red" / "2.png").write_bytes(b"")
    with pytest.raises(RunError, match=r"cannot read the image .*red/2.png"):
        source("folder", tmp_path)


def make_folders(root, **classes):
    """Write two images of each class, as in ``make_folders(root, train="cat dog")``."""
    from PIL import Image

    for split, names in classes.items():
        for name in names.split():
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (100 * i, 0, len(split))).save(
                    root / split / name / f"{i}.png"
                )


def test_the_test_folder_takes_precedence_over_val(tmp_path):
    """If both exist, ``val`` is for model selection, not for the reported result."""
    make_folders(tmp_path, train="cat dog", val="cat dog", test="cat dog")
    pixels = source("folder", tmp_path, validation=0.0).splits["test"].pixels
    assert (pixels[:, 2] == len("test")).all()


@pytest.mark.parametrize(("splits", "message"), [
    ({"train": "cat dog emu", "val": "cat dog"}, r"class emu in .*/val holds 0 images"),
    ({"train": "cat dog", "val": "cat dog emu"}, r"must hold the same classes: .* not hold emu"),
    ({"train": "cat", "val": "cat"}, "each of at least 2 classes"),
])  # fmt: skip
def test_folders_of_other_classes_are_refused(splits, message, tmp_path):
    make_folders(tmp_path, **splits)
    with pytest.raises(RunError, match=message):
        source("folder", tmp_path)


def test_a_class_folder_with_one_image_is_refused(tmp_path):
    make_folders(tmp_path, train="cat dog", val="cat dog")
    (tmp_path / "train" / "dog" / "1.png").unlink()
    with pytest.raises(RunError, match=r"dog in .*/train holds 1 image: it needs at least 2"):
        source("folder", tmp_path)


def test_pixel_statistics_equal_numpy():
    """The statistics are per channel, over all images. 2,500 images are counted in parts."""
    rng = np.random.default_rng(0)
    pixels = rng.integers((0, 100, 200), (60, 250, 256), (2500, 5, 4, 3), dtype=np.uint8)
    pixels[1500:] //= 2
    images = Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(2500) % 2)
    other = Images(images.pixels[:9] // 4, images.labels[:9])
    data = InMemory(
        {"train": images, "val": other, "test": other}, ("0", "1"), InMemoryConfig("made"),
        SourceContext(0, CPU, torch.channels_last),
    )  # fmt: skip
    np.testing.assert_allclose(data.info.normalisation.mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.info.normalisation.std, pixels.std((0, 1, 2)), rtol=1e-9)
    (batch,) = data.eval_batches("test", 9)
    expected = (pixels[:9] // 4 - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2))
    np.testing.assert_allclose(batch.views[0].permute(0, 2, 3, 1), expected, atol=1e-5)


def test_images_of_one_colour_are_not_divided_by_zero():
    """The deviation is at least 1/255 of the largest pixel value, which is 16 here."""
    images = Images(torch.full((4, 1, 2, 2), 7, dtype=torch.uint8), torch.arange(4) % 2)
    other = Images(images.pixels + 1, images.labels)
    data = InMemory(
        {"train": images, "val": other, "test": other}, ("0", "1"), InMemoryConfig("made"),
        SourceContext(0, CPU, torch.channels_last), scale=16,
    )  # fmt: skip
    (batch,) = data.eval_batches("test", 4)
    torch.testing.assert_close(batch.views[0], torch.full((4, 1, 2, 2), 255 / 16))


def test_synthetic_images_are_patterns_with_clipped_noise():
    """No two images are equal. The noise has a deviation of 48, so about one pixel in two hundred
    is clipped to 255, and as many to 0."""
    options = {"images": 400, "classes": 5, "image_size": 16}
    data = source("synthetic", validation=0.0, **options)
    train, test = data.splits["train"], data.splits["test"]
    every = torch.cat((train.pixels, test.pixels))
    assert len(every.flatten(1).unique(dim=0)) == 400 + 80
    assert train.labels.bincount().tolist() == [80] * 5
    for extreme in (0, 255):
        assert 0.003 < (every == extreme).double().mean() < 0.02
    pixels = train.pixels.double()
    patterns = torch.stack([pixels[train.labels == label].mean(0) for label in range(5)])
    noise = pixels - patterns[train.labels]
    assert noise.std().item() == pytest.approx(48, abs=1.5)
    assert ((noise > -1) & (noise < 1)).double().mean() < 0.03  # drawn separately for each pixel
    of_test = test.pixels.double() - patterns[test.labels]  # with the same patterns
    assert of_test.std().item() == pytest.approx(48, abs=1.5)


def test_synthetic_images_can_be_learnt_and_are_the_same_for_every_seed():
    options = {"images": 1000, "classes": 5, "image_size": 16}
    data = source("synthetic", **options)
    assert data.info.counts == {"train": 900, "val": 100, "test": 200}
    assert data.info.image_size == (16, 16)
    assert data.info.num_classes == 5
    other = create_source(SOURCES.configure("synthetic", **options), 9, CPU, torch.channels_last)
    assert torch.equal(other.splits["train"].pixels, data.splits["train"].pixels)
    torch.manual_seed(0)
    network = nn.Linear(3 * 16 * 16, 5)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for batch in data.train_batches(0, 0, 50, 1):
        loss = nn.functional.cross_entropy(network(batch.views[0].flatten(1)), batch.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (batch,) = data.eval_batches("test", 200)
    top1 = (network(batch.views[0].flatten(1)).argmax(1) == batch.target).float().mean()
    assert top1 > 0.6


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100"])
def test_a_size_that_a_source_does_not_have_is_refused(tmp_path, name):
    if name != "digits":
        write_files(tmp_path, cifar_files(name))
    with pytest.raises(UsageError, match=f"data.image_size does not apply to the source '{name}'"):
        source(name, tmp_path, image_size=64)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("cifar-10", "cifar10"), ("cifar1000", "cifar100"), ("tinyimagenet", "tiny-imagenet")],
)
def test_an_unknown_source_names_the_nearest(given, nearest):
    with pytest.raises(UsageError, match=f"did you mean '{nearest}'"):
        source(given)
