"""Write tiny data sets in the formats of the original files."""

import io
import pickle
import struct
import tarfile
from pathlib import Path
from typing import ClassVar

import numpy as np


class Python2Pickler(pickle._Pickler):
    """Writes protocol 2 as Python 2 did, with byte strings instead of text. The original files have
    this format."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(b"T" + struct.pack("<I", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(value) -> bytes:
    stream = io.BytesIO()
    Python2Pickler(stream, protocol=2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_files(source: str, per_file: int = 20) -> dict[str, bytes]:
    """Return the names and contents of the files of a small CIFAR. Files have ``per_file`` images
    in CIFAR-10, and ``per_file`` images of each class in CIFAR-100."""
    rng = np.random.default_rng(0)
    if source == "cifar10":
        folder, meta, key, count = "cifar-10-batches-py", "batches.meta", b"label_names", 10
        images = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    else:
        folder, meta, key, count = "cifar-100-python", "meta", b"fine_label_names", 100
        images = ["train", "test"]
    files = {}
    for name in images:
        rows = per_file * (count if source == "cifar100" else 1)
        labels = [int(label) for label in rng.permutation(rows) % count]
        content = {
            b"batch_label": name.encode(),
            b"data": rng.integers(0, 256, (rows, 3072), dtype=np.uint8),
            b"filenames": [f"{i}.png".encode() for i in range(rows)],
        }
        if source == "cifar10":
            content[b"labels"] = labels
        else:
            content |= {b"fine_labels": labels, b"coarse_labels": [i // 5 for i in labels]}
        files[f"{folder}/{name}"] = python2_pickle(content)
    names = [f"class {i}".encode() for i in range(count)]
    files[f"{folder}/{meta}"] = python2_pickle({key: names})
    files[f"{folder}/readme.html"] = b"<html>"
    return files


def write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def tar_gz(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def tiny_imagenet_files(classes: int = 3, train: int = 6, val: int = 4) -> dict[str, bytes]:
    """Return files with images of one colour per class, one of them grey. The classes are not
    sorted by their names."""
    from PIL import Image

    def jpeg(colour, mode="RGB") -> bytes:
        stream = io.BytesIO()
        Image.new(mode, (64, 64), colour).save(stream, "JPEG")
        return stream.getvalue()

    wnids = [f"n0{9 - label}" for label in range(classes)]
    files, annotations = {}, []
    for label, wnid in enumerate(wnids):
        colour = tuple(200 if channel == label else 20 for channel in range(3))
        for i in range(train):
            grey = label == 0 and i == 0
            content = jpeg(90, "L") if grey else jpeg(colour)
            files[f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG"] = content
        files[f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt"] = b""
        for i in range(val):
            name = f"val_{label + i * classes}.JPEG"
            files[f"tiny-imagenet-200/val/images/{name}"] = jpeg(colour)
            annotations.append(f"{name}\t{wnid}\t0\t0\t62\t62\n")
    files["tiny-imagenet-200/val/val_annotations.txt"] = "".join(annotations).encode()
    files["tiny-imagenet-200/wnids.txt"] = "\n".join(wnids).encode()
    words = [f"{wnid}\tthing {wnid}, object\n" for wnid in [*wnids, "n12345"]]
    files["tiny-imagenet-200/words.txt"] = "".join(words).encode()
    return files
