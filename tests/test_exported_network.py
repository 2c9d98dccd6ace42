"""Exported files, without a training run: reading a file returns the network that was written, and
a file with any change is refused."""

import dataclasses
import io
import json
import re
import zipfile
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from bdkd.data.base import Normalisation
from bdkd.errors import RunError
from bdkd.export.facts import Facts
from bdkd.export.formats import FORMATS, decode, encode, open_network
from bdkd.export.program_format import _difference

SHAPE = (3, 6, 9)  # not square, so that height and width cannot be exchanged
CPU = torch.device("cpu")
each_format = pytest.mark.parametrize("kind", FORMATS)


class Block(nn.Module):
    """A network with a batch norm, whose first two layers have weights of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.again = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.last = nn.Linear(3 * 3 * 4, 5)

    def forward(self, x):
        x = self.norm(self.again(self.first(x).relu()))
        return self.last(nn.functional.max_pool2d(x, 2).flatten(1))


def a_network(seed: int) -> nn.Module:
    """Return a Block with random weights and random batch norm statistics."""
    torch.manual_seed(seed)
    network = Block()
    for _ in range(3):
        network(3 * torch.randn(8, *SHAPE) + 1)
    return network.eval()


FACTS = Facts(
    version=1, network="student_ema", model="block", role="student", parameters=123,
    method="bdkd", seed=7, step=4321, recipe="name = 'tiny'\n", classes=("z", "a", "m", "é", "b"),
    channels=3, image_size=SHAPE[1:],
    normalisation=Normalisation(mean=(0.1, 1 / 3, 2.0), std=(1.5, 2.5, 3.5), largest=255.0),
    measured_on="val", images=17, metrics={"top1": 1 / 3, "ece": 1e-17, "nll": None},
    versions={"bdkd": "0", "torch": str(torch.__version__)},
)  # fmt: skip


@pytest.fixture(scope="module")
def written() -> dict[str, nn.Module]:
    return {kind: a_network(0) for kind in FORMATS}


@pytest.fixture(scope="module")
def files(written) -> dict[str, bytes]:
    """Return files of networks with the same weights, one in each format."""
    return {kind: encode(kind, network, FACTS) for kind, network in written.items()}


def path_of(kind: str) -> Path:
    return Path(f"model{FORMATS[kind].suffix}")


@each_format
def test_a_file_gives_the_networks_logits_for_any_batch(kind, files):
    """The network that the file is opened with has other weights, and is in training mode."""
    opened = open_network(decode(path_of(kind), kind, files[kind]), a_network(1).train(), CPU)
    network = a_network(0)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for batch in (1, 2, 13):
            images = 3 * torch.randn(batch, *SHAPE, generator=generator)
            logits = opened(images)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, network(images), rtol=1e-5, atol=1e-5)
            # Images may be float64, or not contiguous, such as a slice of a larger tensor.
            wide = torch.stack((images, images), -1)[..., 0]
            torch.testing.assert_close(opened(wide), network(images), rtol=1e-5, atol=1e-5)
    if kind == "onnx":
        images = images.double()
        torch.testing.assert_close(opened(images), network(images.float()), rtol=1e-5, atol=1e-5)


@each_format
def test_facts_round_trip(kind, files):
    facts = decode(path_of(kind), kind, files[kind]).facts
    assert facts == FACTS
    assert facts.input_shape == SHAPE


@each_format
def test_writing_does_not_change_the_network(kind, written, files):
    assert not written[kind].training
    for key, value in a_network(0).state_dict().items():
        assert torch.equal(written[kind].state_dict()[key], value), key


def test_an_onnx_file_contains_its_shapes_and_facts(files):
    session = onnxruntime.InferenceSession(files["onnx"])
    [images] = session.get_inputs()
    assert images.shape == ["batch", *SHAPE]
    facts = json.loads(session.get_modelmeta().custom_metadata_map["bdkd"])
    assert facts["classes"] == list(FACTS.classes)
    assert facts["normalisation"]["mean"] == list(FACTS.normalisation.mean)
    assert facts["metrics"] == FACTS.metrics


# --- changes -------------------------------------------------------------------------------------


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(content: dict[str, bytes]) -> bytes:
    """Return a zip file of these members, with valid checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return file.getvalue()


PROGRAM = "archive/models/model.json"


def edits() -> dict[str, tuple[str, bytes, bytes]]:
    """Return pairs of texts of the same length. Exchanging the two texts of a pair in a file gives
    a valid file of another network, for example with two weights exchanged."""
    return {
        "onnx_operator": ("onnx", b"Relu", b"Tanh"),
        "safetensors_names": ("safetensors", b'"first.weight"', b'"again.weight"'),
        "safetensors_type": ("safetensors", b'"F32"', b'"I32"'),
        "program_operator": ("export", b"aten.relu.default", b"aten.tanh.default"),
        "program_padding": ("export", b'"as_ints": [1, 1]', b'"as_ints": [0, 0]'),
        "program_epsilon": ("export", b'"as_float": 1e-05', b'"as_float": 1e-01'),
    }


@pytest.mark.parametrize("edit", edits())
def test_an_edit_of_the_same_length_is_refused(edit, files):
    kind, old, new = edits()[edit]
    assert len(old) == len(new)

    def exchange(text: bytes) -> bytes:
        assert old in text
        both = re.escape(old) + b"|" + re.escape(new)
        return re.sub(both, lambda found: new if found[0] == old else old, text)

    content = files[kind]
    if kind == "export":
        found = members(content)
        content = archive_of(found | {PROGRAM: exchange(found[PROGRAM])})
    else:
        content = exchange(content)
    with pytest.raises(RunError, match=r"changed since bdkd export wrote it|a different program"):
        open_network(decode(path_of(kind), kind, content), a_network(1), CPU)


def test_exchanged_weights_of_a_program_are_refused(files):
    found = members(files["export"])
    names = [name for name in found if "/weights/weight_" in name]
    assert len(names) > 5
    sizes = {name: len(found[name]) for name in names}
    a, b = next(
        (a, b) for a in names for b in names
        if a < b and sizes[a] == sizes[b] and found[a] != found[b]
    )  # fmt: skip
    changed = archive_of(found | {a: found[b], b: found[a]})
    with pytest.raises(RunError, match="changed since bdkd export wrote it"):
        decode(path_of("export"), "export", changed)
    # A change of the last byte is found too.
    for name in names:
        changed = found[name][:-1] + bytes([found[name][-1] ^ 1])
        with pytest.raises(RunError, match="changed since bdkd export wrote it"):
            decode(path_of("export"), "export", archive_of(found | {name: changed}))


def test_every_member_of_a_program_is_compared(files):
    """Members are compared by content, not only by length. The facts, their checksum and the
    serial id are not compared. The checksum is verified before."""
    found, again = members(files["export"]), encode("export", a_network(1), FACTS)
    assert _difference(again, files["export"]) == ""
    free = {"archive/extra/bdkd", "archive/extra/bdkd_sha256", "archive/.data/serialization_id"}
    assert free < set(found)
    for name, data in found.items():
        if not data:
            continue
        longer = archive_of(found | {name: data + b" "})
        assert _difference(again, longer) == ("" if name in free else name)
        if "/weights/weight_" not in name:
            last = archive_of(found | {name: data[:-1] + bytes([data[-1] ^ 1])})
            assert _difference(again, last) == ("" if name in free else name)
    for name in found:
        missing = {key: data for key, data in found.items() if key != name}
        assert _difference(again, archive_of(missing)) == name
    assert _difference(again, archive_of(found | {"archive/more": b""})) == "archive/more"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"version": 2},
        {"image_size": (0, 9)},
        {"image_size": (6, -9)},
        {"channels": 2**20, "image_size": (2**5, 2**5)},
    ],
)
def test_facts_of_another_version_or_of_no_images_are_refused(change):
    content = encode("safetensors", a_network(0), dataclasses.replace(FACTS, **change))
    with pytest.raises(RunError, match=r"facts of version|have the shape"):
        decode(path_of("safetensors"), "safetensors", content)
