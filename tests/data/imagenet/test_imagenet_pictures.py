"""All loaders decode a file to the same pixels, or raise an error that names the file."""

import warnings

import numpy as np
import pytest
import torch
from odd_images import GREY16, RGB16, SIDE, readable, refused
from PIL import Image

from bdkd.data.decode import read_images
from bdkd.data.imagenet.dali import Dali
from bdkd.data.imagenet.index import WHOLE_FILE, Item
from bdkd.data.imagenet.loader import Request
from bdkd.data.imagenet.pillow import Pillow
from bdkd.data.images.check import examine
from bdkd.errors import RunError

# For crops of 28 pixels, images of 32 pixels are not resized, so decoded pixels are compared.
SQUARE = 28
READABLE, REFUSED = readable(), refused()


def item(path):
    return Item(str(path), "", 0, WHOLE_FILE)


@pytest.fixture(scope="module")
def loaders():
    zero, one, cpu = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1), torch.device("cpu")
    return {make.__name__: make(0, cpu, torch.float32, zero, one) for make in (Dali, Pillow)}


def picture(loader, path):
    """Return the pixels ``(3, 28, 28)`` of the central square."""
    request = Request([item(path)], SQUARE, None, 1.0, False)
    (pixels,) = list(loader.batches(iter([request]), 1, False))
    return pixels[0].round().int()


@pytest.mark.parametrize("name", READABLE)
def test_all_loaders_and_the_check_read_the_same_picture(name, loaders, tmp_path):
    path = tmp_path / "0.jpg"  # the suffix does not matter
    path.write_bytes(READABLE[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = read_images([path], SIDE)[0, :, 2:30, 2:30].int()
        ((kind, reason),) = examine([item(path)])
        found = {key: picture(loader, path) for key, loader in loaders.items()}
    assert not reason, kind
    assert torch.equal(found["Pillow"], folder)
    assert (found["Dali"] - folder).abs().max() <= 2
    assert folder.float().std() > 20  # neither white nor black


@pytest.mark.parametrize("name", REFUSED)
def test_all_loaders_and_the_check_refuse_the_same_files(name, loaders, tmp_path):
    path = tmp_path / "0.jpg"
    path.write_bytes(REFUSED[name])
    with pytest.raises(RunError, match=r"cannot read the image .*0\.jpg: .*replace or") as one:
        read_images([path], SIDE)
    messages = [str(one.value), examine([item(path)])[0][1]]
    for loader in loaders.values():
        with pytest.raises(
            RunError, match=r"cannot decode the image .*0.jpg: .*data\.exclude"
        ) as e:
            picture(loader, path)
        messages.append(str(e.value))
    assert all(message and "\n" not in message for message in messages)
    if name.startswith(("tiff", "pfm")) and "cut" not in name:
        assert all("no standard conversion to 8 bits: convert" in m for m in messages), messages
    if "bomb" in name:
        assert all("pixels" in m for m in messages), messages


@pytest.mark.parametrize("name", ["png grey 16", "png rgb 16", "pgm 16", "tiff grey 16",
                                  "png grey alpha 16", "jpeg 2000 grey 16"])  # fmt: skip
def test_16_bit_values_keep_their_upper_8_bits(name, tmp_path):
    (tmp_path / "0.png").write_bytes(READABLE[name])
    pixels = read_images([tmp_path / "0.png"], SIDE)[0].permute(1, 2, 0).numpy()
    wide = RGB16 if "rgb" in name else np.dstack([GREY16] * 3)
    assert np.array_equal(pixels, wide >> 8)


def test_images_of_other_sizes_are_resized_by_pillow(tmp_path):
    """The filter is the default of Pillow's ``resize``, also if only one side differs."""
    rng, paths = np.random.default_rng(0), []
    for number, (height, width) in enumerate([(24, 16), (16, 24), (16, 16), (40, 31), (5, 7)] * 4):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    found = read_images(paths, 16)
    assert found.shape == (20, 3, 16, 16)
    for path, pixels in zip(paths, found, strict=True):
        with Image.open(path) as image:
            expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("make", [Dali, Pillow])
def test_loaders_return_normalised_float32_or_raw_pixels(make, tmp_path):
    """The image is a PNG, whose pixels are exact. float16 would differ by up to 1e-3."""
    (tmp_path / "0.png").write_bytes(READABLE["png"])
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((120.0, 110.0, 90.0), (50.0, 60.0, 70.0))
    )
    loader = make(0, torch.device("cpu"), torch.float32, mean, std)
    request = Request([item(tmp_path / "0.png")], SQUARE, None, 1.0, False)
    pixels = read_images([tmp_path / "0.png"], SIDE)[:, :, 2:30, 2:30]
    (found,) = list(loader.batches(iter([request]), 1, False))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (pixels - mean) / std, rtol=0, atol=1e-5)
    (found,) = list(loader.batches(iter([request]), 1, True))
    assert torch.equal(found, pixels)
