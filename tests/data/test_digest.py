"""The identity of a data set. A run compares it before it resumes."""

import hashlib
import os

import numpy as np
import pytest
import torch
from fake_sets import cifar_files, tiny_imagenet_files, write_files
from PIL import Image

from bdkd.data import create_source
from bdkd.data.digest import digest_names, digest_pixels
from bdkd.registry import SOURCES

CPU = torch.device("cpu")


def identity(source, root=None, seed=0, **options):
    config = SOURCES.configure(source, root=None if root is None else str(root), **options)
    info = create_source(config, seed, CPU, torch.channels_last).info
    assert set(info.digests) == set(info.files) == {"train", "test"}
    assert all(len(digest) == 64 for digest in info.digests.values())
    assert info.identity() == {
        "source": source, "classes": list(info.classes),
        "images": dict(info.files), "digests": dict(info.digests),
    }  # fmt: skip
    return dict(info.digests), dict(info.files)


def make_folders(root, classes=("cat", "dog"), order=range(6)):
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in order:
                Image.new("RGB", (40, 40), (90 * label, 9 * i, 0)).save(
                    root / split / name / f"{i}.jpg"
                )
    return root


def in_folders(source, root, **options):
    more = {"loader": "pillow", "workers": 0} if source == "imagenet" else {}
    return identity(source, root, image_size=32, **more, **options)


@pytest.mark.parametrize("source", ["folder", "imagenet"])
def test_folders_have_the_identity_of_their_class_and_file_names(source, tmp_path):
    root = make_folders(tmp_path / "a")
    known = in_folders(source, root)
    assert known[1] == {"train": 12, "test": 12}
    # The path, the order of creation, the seed and the options of the recipe do not matter.
    other = make_folders(tmp_path / "deep" / "b", ("dog", "cat"), range(5, -1, -1))
    assert in_folders(source, other) == known
    assert in_folders(source, root, seed=3, validation=0.4, label_noise=0.5) == known
    assert in_folders(source, root, train_images=4, validation=0.0) == known
    # A renamed class has another label, so it makes another data set.
    (other / "train" / "cat").rename(other / "train" / "zebra")
    (other / "val" / "cat").rename(other / "val" / "zebra")
    renamed = in_folders(source, other)
    assert renamed[1] == known[1]
    assert renamed[0]["train"] != known[0]["train"]
    assert renamed[0]["test"] != known[0]["test"]
    # Moving a file from one class to another changes the digest of its split only.
    (root / "train" / "cat" / "0.jpg").rename(root / "train" / "dog" / "6.jpg")
    moved = in_folders(source, root)
    assert moved[0]["train"] != known[0]["train"]
    assert moved[0]["test"] == known[0]["test"]


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet"])
def test_a_downloaded_set_has_the_same_identity_at_any_path(name, tmp_path):
    files = cifar_files(name) if name == "cifar10" else tiny_imagenet_files()
    write_files(tmp_path / "a", files)
    write_files(tmp_path / "b", files)
    known = identity(name, tmp_path / "a")
    folder = tmp_path / "b" / next(iter(files)).split("/")[0]
    assert identity(name, folder, seed=5, validation=0.3, pixel_noise=0.1) == known
    assert sum(known[1].values()) == {"cifar10": 120, "tiny-imagenet": 30}[name]


def test_sets_in_memory_have_the_identity_of_their_pixels_and_labels(tmp_path):
    known = identity("digits")
    assert known[1] == {"train": 1438, "test": 359}
    assert identity("digits", seed=1, validation=0.0, label_noise=0.1, pixel_noise=0.2) == known
    write_files(tmp_path, cifar_files("cifar10"))
    before = identity("cifar10", tmp_path)[0]
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    content = bytearray(batch.read_bytes())
    content[len(content) // 2] ^= 1  # of a pixel
    batch.write_bytes(content)
    after = identity("cifar10", tmp_path)[0]
    assert after["train"] != before["train"]
    assert after["test"] == before["test"]
    options = {"images": 200, "classes": 5, "image_size": 16}
    made = identity("synthetic", **options)
    assert identity("synthetic", seed=4, **options) == made
    assert made[1] == {"train": 200, "test": 40}
    assert made[0]["train"] != made[0]["test"]
    for change in (
        {"images": 200, "classes": 4},
        {"images": 205, "classes": 5},
        {"image_size": 24},
    ):
        assert identity("synthetic", **options | change)[0]["train"] != made[0]["train"]


def test_pixel_digests_cover_shape_pixels_and_labels():
    """The order of the images matters, and the memory format does not. 2,500 images are hashed in
    parts."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2500, 3, 4, 2), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (2500,), generator=generator)
    content = b"(2500, 3, 4, 2)" + pixels.numpy().tobytes() + labels.numpy().astype("<i8").tobytes()
    known = digest_pixels(pixels, labels)
    assert known == (hashlib.sha256(content).hexdigest(), 2500)
    assert digest_pixels(pixels.contiguous(memory_format=torch.channels_last), labels) == known
    for place in (0, 999, 1000, 2499):
        changed, relabelled = pixels.clone(), labels.clone()
        changed[place, 2, 3, 1] += 1
        relabelled[place] += 1
        assert digest_pixels(changed, labels) != known
        assert digest_pixels(pixels, relabelled) != known
    assert digest_pixels(pixels.view(2500, 3, 2, 4), labels) != known
    assert digest_pixels(pixels.flip(0), labels) != known


def test_excluded_images_are_not_part_of_the_identity(tmp_path):
    root = make_folders(tmp_path / "a")
    (tmp_path / "list.txt").write_text("train/cat/3.jpg\n")
    left = in_folders("imagenet", root, exclude=str(tmp_path / "list.txt"))
    (root / "train" / "cat" / "3.jpg").unlink()
    assert in_folders("imagenet", root) == left


def test_no_two_lists_of_names_have_the_same_digest():
    """Names whose concatenated bytes are equal have different digests. The order of a listing does
    not matter."""
    one = np.zeros(1, np.int64)
    lists = [("ab", "c", b"d"), ("a", "bc", b"d"), ("a", "b", b"cd"), ("", "abc", b"d")]
    lists += [("x", "bc", b"d"), ("a", "y", b"d"), ("a", "bc", b"z")]  # one name differs
    found = {digest_names([a], one, [b], one, [c]) for a, b, c in lists}
    assert len(found) == 7
    labels, names = np.array([0, 1, 1]), [b"x", b"y", os.fsencode("\udcff")]
    folders = ["f", "g"]
    forth = digest_names(["a", "b"], labels, folders, labels, names)
    back = digest_names(["a", "b"], labels[::-1], folders, labels[::-1], names[::-1])
    assert forth == back
    assert forth.images == 3
