"""A data set in ImageNet's layouts, made of scikit-learn's two photographs."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

HEIGHT, WIDTH = 375, 500  # the most common size in ImageNet
SIZES = ((HEIGHT, WIDTH), (WIDTH - 80, HEIGHT), (200, 180))


def wnid(label: int) -> str:
    return f"n{label:08d}"


def make_tree(
    root: Path, classes: int, training: int, validation: int, sizes: tuple = SIZES
) -> Path:
    """Write ``training`` and ``validation`` images of each class, with the sizes in turn. They are
    crops and mirror images of two photographs, tinted by class. No two images are equal."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for split, count in (("train", training), ("val", validation)):
        for label in range(classes):
            folder = root / split / wnid(label)
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = sizes[number % len(sizes)]
                whole = photographs[(label + number) % 2]
                top = rng.integers(whole.shape[0] - height + 1)
                left = rng.integers(whole.shape[1] - width + 1)
                pixels = whole[top : top + height, left : left + width].astype(np.int16)
                pixels[..., label % 3] += 20 * label % 256
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                if rng.random() < 0.5:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                image.save(folder / f"{wnid(label)}_{number}.JPEG", quality=90)
    return root


def labelled(root: Path, split: str) -> list[tuple[Path, int]]:
    """Return the files of a split and their labels, in the order of the index."""
    folders = sorted((root / split).iterdir())
    return [(file, label) for label, folder in enumerate(folders)
            for file in sorted(folder.iterdir())]  # fmt: skip


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def make_tars(tree: Path, root: Path, shards: int) -> Path:
    """Write the images of the tree as webdataset shards, in the order of the tree."""
    root.mkdir()
    for split in ("train", "val"):
        files = labelled(tree, split)
        for shard in range(shards):
            first, last = len(files) * shard // shards, len(files) * (shard + 1) // shards
            with tarfile.open(root / f"{split}-{shard:04d}.tar", "w") as tar:
                for number, (file, label) in enumerate(files[first:last]):
                    for name, content in (
                        (f"{number:06d}.cls", str(label).encode()),
                        (f"{number:06d}.jpg", file.read_bytes()),
                        (f"{number:06d}.json", b"{}"),
                    ):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return root


def make_tfrecords(tree: Path, root: Path, shards: int) -> Path:
    """Write the images of the tree as TFRecords, with labels from 1 as in common TFRecords."""
    root.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        files = labelled(tree, split)
        for shard in range(shards):
            first, last = len(files) * shard // shards, len(files) * (shard + 1) // shards
            with open(root / f"{name}-{shard:05d}-of-{shards:05d}", "wb") as file:
                for image, label in files[first:last]:
                    file.write(record(example(image.read_bytes(), label + 1)))
    return root


def record(content: bytes) -> bytes:
    """Return a TFRecord frame."""
    length = struct.pack("<Q", len(content))
    return length + checksum(length) + content + checksum(content)


def checksum(content: bytes) -> bytes:
    """Return the masked CRC-32C of TFRecords, computed byte by byte."""
    register = 0xFFFFFFFF
    for byte in content:
        register = AFTER_BYTE[register & 255 ^ byte] ^ register >> 8
    register ^= 0xFFFFFFFF
    return struct.pack("<I", ((register >> 15 | register << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _after_byte(byte: int) -> int:
    """Return the CRC of a byte by the definition, a division of polynomials bit by bit."""
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


AFTER_BYTE = [_after_byte(byte) for byte in range(256)]


def example(image: bytes, label: int) -> bytes:
    """Return an Example message with the features that are read, and some others."""
    features = [
        ("image/height", _field(3, _field(1, _varint(375)))),
        ("image/encoded", _field(1, _field(1, image))),
        ("image/class/text", _field(1, _field(1, b"a class"))),
        ("image/class/label", _field(3, _field(1, _varint(label)))),
        ("image/score", _field(2, _field(1, struct.pack("<f", 0.5)))),
    ]
    entries = [_field(1, _field(1, name.encode()) + _field(2, value)) for name, value in features]
    return _field(1, b"".join(entries))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])
