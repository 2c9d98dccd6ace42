"""Counter-based random numbers, mixing, erasing, and RandAugment compared to Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import beta, ks_2samp, kstest
from sklearn.datasets import load_sample_images

from bdkd.data.imagenet.counter_rng import uniform_draws
from bdkd.data.imagenet.crops import NUM_DRAWS, random_resized_crop, resize_and_center_crop
from bdkd.data.imagenet.mixing import draw_mix, erase, erasing_boxes, mix_images, mix_labels
from bdkd.data.imagenet.options import ImageNetConfig
from bdkd.data.imagenet.rand_augment import OPERATIONS, draw_operations, rand_augment


def test_draws_are_uniform_and_depend_only_on_their_position():
    whole = uniform_draws(0, 1, (0, 0), np.arange(20_000), 5)
    assert whole.min() >= 0
    assert whole.max() < 1
    histogram, _ = np.histogram(whole, 50, (0, 1))
    assert ((histogram - 2000) ** 2 / 2000).sum() < 49 + 5 * np.sqrt(98)  # chi-squared
    assert np.abs(np.corrcoef(whole.T) - np.eye(5)).max() < 0.03
    assert np.abs(np.corrcoef(whole[1:, 0], whole[:-1, 0])[0, 1]) < 0.03
    some = np.array([7, 19_999, 0])
    assert np.array_equal(uniform_draws(0, 1, (0, 0), some, 5), whole[some])
    assert len(np.unique(whole)) == whole.size  # no two images share a number
    # The second epoch of seed 0 is not the first one of seed 1.
    for other in ((1, 1, (0, 0)), (0, 2, (0, 0)), (0, 1, (0, 1)), (0, 1, (1, 0)), (1, 0, (0, 0))):
        assert not np.intersect1d(uniform_draws(*other, np.arange(1000), 5), whole).size


@pytest.mark.parametrize("size", [(375, 500), (1, 1), (1, 900), (900, 1), (224, 224), (3, 2)])
def test_crops_are_inside_the_image(size):
    height, width = size
    shares = []
    for drawn in uniform_draws(0, 0, (0, 0), np.arange(500), NUM_DRAWS):
        w = random_resized_crop(height, width, 64, drawn, 0.08, True)
        assert 0 <= w.top <= w.top + w.height <= height
        assert 0 <= w.left <= w.left + w.width <= width
        assert min(w.height, w.width) >= 1
        shares.append(w.height * w.width / (height * width))
    if size == (375, 500):  # uniform in [0.08, 1], but crops that do not fit are drawn again
        assert 0.07 < min(shares) < 0.12
        assert max(shares) > 0.9
        assert 0.42 < np.mean(shares) < 0.54
    w = resize_and_center_crop(height, width, 64)
    assert 0 <= w.top <= w.top + w.height <= height
    assert 0 <= w.square_top <= w.to_height - 64
    assert 0 <= w.square_left <= w.to_width - 64
    assert w.to_height * w.to_width <= 64 * 73 * 73  # long images do not fill the memory


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("count", [8, 7])
def test_mixed_images_have_the_shares_of_their_soft_labels(mixup, cutmix, count):
    """All pixels of an image are its number, so the mean pixel equals the mean label."""
    config = ImageNetConfig("imagenet", mixup=mixup, cutmix=cutmix)
    drawn = draw_mix(config, 0, 3, 80, count, 32)
    share, cut, box = (torch.from_numpy(part) for part in drawn)
    numbers = torch.arange(count, dtype=torch.float32)
    images = numbers.view(-1, 1, 1, 1).expand(count, 3, 32, 32)
    mixed = mix_images(images, share, cut, box)
    labels = mix_labels(numbers.long(), share, count)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), labels @ numbers, rtol=1e-5, atol=1e-5)
    assert (labels > 0).sum(1).le(2).all()
    if cutmix and not mixup:
        values = mixed.unique()
        assert torch.equal(values, values.round())  # pasted, not blended
    if count % 2:
        assert labels[-1, -1] == 1
    again = draw_mix(config, 0, 3, 80, count, 32)
    assert all(np.array_equal(a, b) for a, b in zip(drawn, again, strict=True))
    for other in ((0, 3, 88), (0, 4, 80), (1, 3, 80), (3, 0, 80), (1, 2, 80)):
        assert not np.array_equal(draw_mix(config, *other, count, 32).share, drawn.share)


def papers_box(share: float, side: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return the box of CutMix's rand_bbox in the code of Yun et al."""
    cut = int(round(side * np.sqrt(1 - share)))  # noqa: RUF046
    y, x = rng.uniform(0, side, 2)
    return tuple(
        int(min(max(round(edge), 0), side))
        for edge in (y - cut / 2, x - cut / 2, y + cut / 2, x + cut / 2)
    )


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.0, 0.3), (0.2, 1.0)])
def test_shares_and_boxes_are_distributed_as_in_the_papers(mixup, cutmix):
    """Mixup's share follows Beta(alpha, alpha), and CutMix's box has the distribution of its
    authors' code. If both are on, each image gets one of them."""
    side, count = 64, 8000
    share, cut, box = draw_mix(
        ImageNetConfig("imagenet", mixup=mixup, cutmix=cutmix), 0, 0, 0, count, side
    )
    assert share.dtype == np.float32
    expected = 0.5 if mixup and cutmix else float(cutmix > 0)
    assert cut.mean() == pytest.approx(expected, abs=0.02)
    if mixup:
        assert kstest(share[~cut].astype(float), beta(mixup, mixup).cdf).pvalue > 1e-3
    if cutmix:
        rng = np.random.default_rng(1)
        shares = rng.beta(cutmix, cutmix, 20_000)
        theirs = np.array([papers_box(one, side, rng) for one in shares])
        ours = box[cut]
        for one, other in zip(ours.T, theirs.T, strict=True):
            assert ks_2samp(one, other).pvalue > 1e-3
        for function in (lambda b: b[2] - b[0], lambda b: b[3] - b[1], lambda b: b[0] - b[1]):
            assert ks_2samp(function(ours.T), function(theirs.T)).pvalue > 1e-3
        pasted = np.prod(ours[:, 2:] - ours[:, :2], axis=1) / side**2
        np.testing.assert_allclose(share[cut], 1 - pasted, rtol=0, atol=1e-6)
    assert abs(np.corrcoef(share[1:], share[:-1])[0, 1]) < 0.05  # images are independent


def test_erasing_has_the_requested_probability_and_area():
    drawn = uniform_draws(0, 0, (2, 0), np.arange(4000), 5)
    box = erasing_boxes(0.25, drawn, 64)
    assert box.min() >= 0
    assert box.max() <= 64
    area = np.prod(box[:, 2:] - box[:, :2], axis=1) / 64**2
    assert (area > 0).mean() == pytest.approx(0.25, abs=0.03)
    assert 0.14 < area[area > 0].mean() < 0.19  # between 0.02 and 1/3
    blank = (erase(torch.ones(50, 3, 64, 64), torch.from_numpy(box[:50])) == 0).float()
    torch.testing.assert_close(blank.mean((1, 2, 3)).double(), torch.from_numpy(area[:50]))
    none = erasing_boxes(0.0, drawn, 64)
    assert (none[:, 0] == none[:, 2]).all()


def test_erased_boxes_are_distributed_as_in_the_paper():
    """In algorithm 1 of Zhong et al., the area is from 2% to a third and the aspect ratio from 0.3
    to its inverse. We draw the logarithm of the aspect ratio, as torchvision and timm do, so that
    no direction is favoured."""
    side, rng = 64, np.random.default_rng(1)
    area = rng.uniform(0.02, 1 / 3, 20_000) * side**2
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3), 20_000))
    height, width = (np.sqrt(area * a).round().clip(1, side) for a in (aspect, 1 / aspect))
    corner = (rng.integers(0, (side - length).astype(int) + 1) for length in (height, width))
    theirs = (*corner, height, width)
    box = erasing_boxes(1.0, uniform_draws(0, 0, (2, 0), np.arange(20_000), 5), side)
    ours = (box[:, 0], box[:, 1], box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])
    for one, other in zip(ours, theirs, strict=True):
        assert ks_2samp(one, other).pvalue > 1e-3
    shares = ours[2] * ours[3] / side**2, theirs[2] * theirs[3] / side**2
    assert ks_2samp(*shares).pvalue > 1e-3
    free = [ours[0] / np.maximum(side - ours[2], 1), ours[1] / np.maximum(side - ours[3], 1)]
    assert abs(np.corrcoef(free)[0, 1]) < 0.03
    # The last row and column are reached.
    assert box[:, 2].max() == box[:, 3].max() == side
    assert np.mean((box[:, 2] == side) / np.mean(box[:, 0] == 0)) == pytest.approx(1, abs=0.2)


def test_erased_pixels_are_the_mean_and_the_others_stay():
    images, box = torch.randn(2, 3, 6, 8), torch.tensor([[1, 2, 4, 8], [3, 3, 3, 5]])
    expected = images.clone()
    expected[0, :, 1:4, 2:8] = 0.0
    assert torch.equal(erase(images, box), expected)


def pillow(name: str, image: Image.Image, strength: float, sign: int) -> Image.Image:
    """Apply Pillow's version of an operation."""
    factor = 1 + 0.9 * strength * sign
    return {
        "identity": lambda: image,
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "solarize": lambda: ImageOps.solarize(image, round(256 * (1 - strength))),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * strength)),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "rotate": lambda: image.rotate(
            30 * strength * sign, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128)
        ),
        "translate_x": lambda: image.transform(
            image.size, Image.Transform.AFFINE,
            (1, 0, 0.45 * strength * sign * image.width, 0, 1, 0),
            Image.Resampling.BILINEAR, fillcolor=(128, 128, 128),
        ),
        "translate_y": lambda: image.transform(
            image.size, Image.Transform.AFFINE,
            (1, 0, 0, 0, 1, 0.45 * strength * sign * image.height),
            Image.Resampling.BILINEAR, fillcolor=(128, 128, 128),
        ),
        "shear_x": lambda: image.transform(
            image.size, Image.Transform.AFFINE,
            (1, 0.3 * strength * sign, -0.15 * strength * sign * image.height, 0, 1, 0),
            Image.Resampling.BILINEAR, fillcolor=(128, 128, 128),
        ),
        "shear_y": lambda: image.transform(
            image.size, Image.Transform.AFFINE,
            (1, 0, 0, 0.3 * strength * sign, 1, -0.15 * strength * sign * image.width),
            Image.Resampling.BILINEAR, fillcolor=(128, 128, 128),
        ),
    }[name]()  # fmt: skip


PHOTOGRAPH = load_sample_images().images[0][100:228, 300:428]
# Operations that move pixels interpolate, so they differ from Pillow's along the border.
MOVING = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def pixels_of(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("magnitude", [2.5, 7.0, 9.0])
def test_operations_equal_pillow(name, sign, magnitude):
    image = Image.fromarray(PHOTOGRAPH)
    pixels = pixels_of(image)
    number = list(OPERATIONS).index(name)
    operations = np.array([[[number, sign]], [[0, 1]]])  # the second image stays as it is
    before = torch.stack((pixels, pixels))
    varied = rand_augment(before, operations, magnitude)
    assert torch.equal(varied[1], pixels)
    assert torch.equal(before[0], pixels)
    difference = (varied[0] - pixels_of(pillow(name, image, magnitude / 10, sign))).abs()
    if name in MOVING:
        assert difference.mean() < 0.8, difference.mean()
        assert (difference > 2).double().mean() < 0.02
    elif name in ("identity", "equalize", "posterize", "solarize"):
        assert not difference.any()
    else:  # Pillow rounds down, in some operations twice
        assert difference.max() < 1.5, difference.max()
    if name != "identity":
        assert (varied[0] - pixels).abs().mean() > 0.2


def test_operations_are_applied_to_each_image_in_order():
    """The result for each image equals two calls with this image alone, one per operation. Other
    images of the batch have no influence, for example by their mean or their darkest pixel."""
    rng, count = np.random.default_rng(0), 3 * len(OPERATIONS)
    scale = torch.from_numpy(rng.uniform(0.3, 1.0, (count, 3, 1, 1))).float()
    pixels = (pixels_of(Image.fromarray(PHOTOGRAPH[::4, ::4])) * scale).round()
    choice = np.stack([rng.permutation(count) % len(OPERATIONS) for _ in range(2)], 1)
    operations = np.stack([choice, rng.choice((-1, 1), (count, 2))], -1)
    varied = rand_augment(pixels, operations, 7.0)
    assert varied.min() >= 0
    assert varied.max() <= 255
    for image, alone, drawn in zip(varied, pixels, operations, strict=True):
        once = rand_augment(alone[None], drawn[None, :1], 7.0)
        twice = rand_augment(once, drawn[None, 1:], 7.0)
        torch.testing.assert_close(image, twice[0], rtol=0, atol=1e-3)


def test_equalize_rounds_fractional_pixels_of_earlier_operations():
    image = Image.fromarray(PHOTOGRAPH.clip(1, 254))
    operations = np.array([[[list(OPERATIONS).index("equalize"), 1]]])
    fractions = torch.rand(pixels_of(image).shape, generator=torch.Generator().manual_seed(0)) - 0.5
    varied = rand_augment((pixels_of(image) + 0.98 * fractions)[None], operations, 5.0)
    assert torch.equal(varied[0], pixels_of(ImageOps.equalize(image)))


def test_equalize_ignores_the_largest_value_even_if_one_pixel_has_it():
    """Pixels with the largest value do not count for the step of the histogram."""
    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[:] = np.arange(255, -1, -1, np.uint8).reshape(16, 16, 1)  # each value once
    pixels[3:9] = 17
    image = Image.fromarray(pixels)
    operations = np.array([[[list(OPERATIONS).index("equalize"), 1]]])
    varied = rand_augment(pixels_of(image)[None], operations, 5.0)
    assert torch.equal(varied[0], pixels_of(ImageOps.equalize(image)))


def test_operations_are_drawn_uniformly():
    operations = draw_operations(uniform_draws(0, 0, (1, 0), np.arange(5000), 4), 2)
    counts = np.bincount(operations[..., 0].ravel(), minlength=len(OPERATIONS))
    assert counts.min() > 600
    assert counts.max() < 830
    assert set(operations[..., 1].ravel()) == {-1, 1}
    assert np.abs(operations[..., 1].mean(0)).max() < 0.05
    # The two operations of an image and their signs are uncorrelated.
    columns = operations.reshape(5000, 4).T
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 0.05
