"""How order and augmentation depend on seed, epoch, batch, view and rank.

The pixels of each image encode its number and their own position. Tests decode the order and the
augmentation from a batch, so they need no second implementation of either.
"""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fake_sets import cifar_files, tiny_imagenet_files, write_files
from scipy.stats import chisquare

from bdkd.data import InMemoryConfig, Shard, SourceContext, create_source
from bdkd.data.digest import Digest
from bdkd.data.imagenet.index import Index, names_array
from bdkd.data.imagenet.source import ImageNet
from bdkd.data.in_memory import Images, InMemory
from bdkd.registry import SOURCES

CPU = torch.device("cpu")
COUNT = 240  # images, divisible by the batch sizes 20 and 24
HEIGHT, WIDTH = 7, 9  # odd: the middle pixel stays in the middle when mirrored
SEEDS, EPOCHS, VIEWS = (0, 1), (0, 1, 2), 2


def painted(seed: int, **options) -> InMemory:
    """Return a source whose pixels encode their row in red, their column in green, and the number
    of the image in blue."""
    pixels = torch.empty(COUNT, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    pixels[:, 0] = 20 * torch.arange(HEIGHT)[:, None]
    pixels[:, 1] = 20 * torch.arange(WIDTH)
    pixels[:, 2] = torch.arange(COUNT)[:, None, None]
    images = Images(pixels, torch.arange(COUNT) % 10)
    return InMemory(
        {"train": images, "val": images, "test": images}, tuple("0123456789"),
        InMemoryConfig("painted", **options), SourceContext(seed, CPU, torch.channels_last),
    )  # fmt: skip


class Seen(NamedTuple):
    numbers: np.ndarray  # (B,) numbers of the images
    moves: np.ndarray  # (B, 3) offset of the crop in rows and in columns, and 1 if mirrored


def seen(source: InMemory, view: torch.Tensor) -> Seen:
    mean, std = (
        torch.tensor(part).view(3, 1, 1)
        for part in (source.info.normalisation.mean, source.info.normalisation.std)
    )
    pixels = (view.double() * std + mean).round().long()
    rows, columns, numbers = pixels.unbind(1)
    y, x = HEIGHT // 2, WIDTH // 2
    mirrored = columns[:, y, x + 1] < columns[:, y, x - 1]
    moves = (rows[:, y, x] // 20 - y, columns[:, y, x] // 20 - x, mirrored)
    return Seen(numbers[:, y, x].numpy(), torch.stack(moves, 1).numpy())


@pytest.mark.parametrize(("batch_size", "world"), [(24, 1), (20, 3), (50, 2)])
def test_an_epoch_shows_each_image_of_its_full_batches_once(batch_size, world):
    """24 and 20 divide the 240 images. Batches of 50 leave out 40 images. Three ranks have unequal
    parts of 20 images."""
    source = painted(0)
    assert (source.info.channels, source.info.image_size) == (3, (HEIGHT, WIDTH))
    parts = [
        list(source.train_batches(0, 0, batch_size, 1, Shard(rank, world))) for rank in range(world)
    ]
    assert all(len(part) == COUNT // batch_size for part in parts)
    numbers = []
    for batch in (batch for part in parts for batch in part):
        found = seen(source, batch.views[0])
        assert batch.target.tolist() == (found.numbers % 10).tolist()
        assert not found.moves.any()  # neither cropped nor mirrored
        numbers += found.numbers.tolist()
    assert len(numbers) == COUNT // batch_size * batch_size
    assert len(set(numbers)) == len(numbers)


def test_order_and_augmentation_are_new_in_every_epoch_and_for_every_seed():
    """The second epoch of a seed also differs from the first epoch of the next seed."""
    orders, moves = [], []
    for seed, epoch in product(SEEDS, EPOCHS):
        source = painted(seed, crop=2, crop_padding="edge", flip=True)
        order = []
        for batch in source.train_batches(epoch, 0, 24, VIEWS):
            found = [seen(source, view) for view in batch.views]
            order += found[0].numbers.tolist()
            assert found[1].numbers.tolist() == found[0].numbers.tolist()
            moves += [part.moves for part in found]
        orders.append(tuple(order))
    assert len(set(orders)) == len(SEEDS) * len(EPOCHS)
    # 24 images have 50 ** 24 possible augmentations, so no two batches or views agree by chance.
    assert len({part.tobytes() for part in moves}) == len(moves) == 6 * 10 * VIEWS
    down, right, mirrored = np.concatenate(moves).T
    for values, possible in ((down, range(-2, 3)), (right, range(-2, 3)), (mirrored, (0, 1))):
        counts = [(values == value).sum() for value in possible]
        assert sum(counts) == len(values)
        assert chisquare(counts).pvalue > 1e-3, counts
    # The three draws of an image are uncorrelated, and so are the draws of neighbouring images.
    assert np.abs(np.corrcoef((down, right, mirrored)) - np.eye(3)).max() < 0.1
    assert abs(np.corrcoef(down[1:], down[:-1])[0, 1]) < 0.1


@pytest.mark.parametrize("padding", ["zero", "edge", "reflect"])
@pytest.mark.parametrize(("crop", "flip"), [(2, False), (0, True), (2, True)])
def test_batches_equal_padding_slicing_and_mirroring_by_numpy(padding, crop, flip):
    """NumPy applies the crop and the flip that are decoded from the middle pixel of each image."""
    source = painted(0, crop=crop, crop_padding=padding, flip=flip)
    mean, std = source.info.normalisation.mean, source.info.normalisation.std
    mode = "constant" if padding == "zero" else padding
    pixels = source.splits["train"].pixels.permute(0, 2, 3, 1).numpy()
    view = next(source.train_batches(0, 0, 24, 1)).views[0]
    found = seen(source, view)
    for image, number, (down, right, mirrored) in zip(view, *found, strict=True):
        padded = np.pad(pixels[number], ((2, 2), (2, 2), (0, 0)), mode=mode)
        cut = padded[2 + down :, 2 + right :][:HEIGHT, :WIDTH]
        cut = cut[:, ::-1] if mirrored else cut
        np.testing.assert_allclose(image.permute(1, 2, 0), (cut - mean) / std, atol=1e-5)
    assert bool(found.moves[:, :2].any()) == bool(crop)
    assert 4 < found.moves[:, 2].sum() < 20 if flip else not found.moves[:, 2].any()


def test_every_image_has_one_hole_at_a_uniform_position():
    """Rows are drawn from the height and columns from the width, which differ here."""
    source = painted(0, cutout=1)
    views = [view for batch in source.train_batches(0, 0, 24, VIEWS) for view in batch.views]
    holes = torch.cat(views)[:, 2] == 0  # no blue pixel value equals the mean
    assert (holes.sum((1, 2)) == 1).all()
    counts = holes.sum(0).flatten()
    assert counts.min() > 0
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("world", [2, 7])  # 7 does not divide the 240 images
def test_rank_r_evaluates_every_world_th_image_from_the_r_th(world):
    """The order matters, because the parts are interleaved to the predictions for the split."""
    source = painted(0, crop=2, crop_padding="edge", flip=True)
    # Fewer training images than test images
    source.splits["train"] = Images(*(part[:10] for part in source.splits["train"]))
    for rank in range(world):
        batches = list(source.eval_batches("test", 50, Shard(rank, world)))
        assert {len(batch.target) for batch in batches[:-1]} <= {50}
        found = [seen(source, batch.views[0]) for batch in batches]
        numbers = np.concatenate([part.numbers for part in found])
        assert numbers.tolist() == list(range(rank, COUNT, world))
        assert torch.cat([batch.target for batch in batches]).tolist() == (numbers % 10).tolist()
        assert not any(part.moves.any() for part in found)  # evaluation is not augmented


def test_a_rank_without_images_evaluates_nothing():
    """Two ranks evaluate a split with one image."""
    source = painted(0)
    source.splits["val"] = Images(*(part[:1] for part in source.splits["test"]))
    assert len(list(source.eval_batches("val", 8, Shard(0, 2)))) == 1
    assert list(source.eval_batches("val", 8, Shard(1, 2))) == []


def some_folder(root: Path) -> None:
    from PIL import Image

    for split, label in product(("train", "test"), ("cat", "dog")):
        (root / split / label).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(root / split / label / f"{i}.png")


@pytest.mark.parametrize("name", ["digits", "synthetic", "folder", "cifar10", "tiny-imagenet"])
def test_the_seed_changes_the_order_of_every_source_but_not_its_images(name, tmp_path):
    if name == "folder":
        some_folder(tmp_path)
    elif name in ("cifar10", "tiny-imagenet"):
        write_files(tmp_path, cifar_files(name) if name == "cifar10" else tiny_imagenet_files())
    small = {"images": 40, "classes": 4} if name == "synthetic" else {}
    config = SOURCES.configure(name, root=str(tmp_path), validation=0.0, **small)
    one, other = (create_source(config, seed, CPU, torch.channels_last) for seed in (0, 1))
    assert torch.equal(one.splits["train"].pixels, other.splits["train"].pixels)
    assert torch.equal(one.splits["test"].pixels, other.splits["test"].pixels)
    first, second = (next(source.train_batches(0, 0, 12, 1)) for source in (one, other))
    assert not torch.equal(first.views[0], second.views[0])


# --- sources that decode batch by batch -----------------------------------------------------------


class Painter:
    """A loader that encodes its requests in pixels instead of reading files.

    Red is the number of the image. Green holds its random numbers and the options of the crop.
    Blue, and the pixels for RandAugment, depend only on the position in the batch.
    """

    def __init__(self, *_: object) -> None:
        """Ignore the arguments of a loader."""

    def batches(self, requests, largest, raw):
        for items, side, drawn, smallest_crop, flip in requests:
            images = torch.zeros(len(items), 3, side, side)
            slope = torch.arange(side) / side
            # Equal in every batch and view, because 24 divides the number of images.
            images[:, 2] = slope + 1 + (torch.arange(len(items)) % 24)[:, None, None]
            if raw:
                images[:] = 100 + 80 * slope + images[:, 2:]
            else:
                images[:, 0] = torch.tensor([int(Path(item.path).stem) for item in items])[
                    :, None, None
                ]
                if drawn is not None:
                    images[:, 1, 0, : drawn.shape[1]] = torch.from_numpy(drawn).float()
                    images[:, 1, 1, :2] = torch.tensor([smallest_crop, float(flip)])
            assert len(images) <= largest
            yield images


def decoded(seed: int, **options) -> ImageNet:
    names = names_array([f"{number}.JPEG" for number in range(COUNT)])
    index = Index(Path("/"), ("train",), np.zeros(COUNT, np.int32), names, np.arange(COUNT))
    digest = Digest("0", COUNT)
    return ImageNet(
        {"train": index, "val": index, "test": index}, tuple(map(str, range(COUNT))),
        SOURCES.configure("imagenet", image_size=32, **options),
        SourceContext(seed, CPU, torch.channels_last), Painter,
        digests={"train": digest, "test": digest},
    )  # fmt: skip


@pytest.mark.parametrize(("batch_size", "world"), [(24, 1), (20, 3), (50, 2)])
def test_an_epoch_of_imagenet_shows_each_image_of_its_full_batches_once(batch_size, world):
    source, numbers = decoded(0), []
    for rank in range(world):
        batches = list(source.train_batches(0, 0, batch_size, 1, Shard(rank, world)))
        assert len(batches) == COUNT // batch_size
        for batch in batches:
            assert torch.equal(batch.views[0][:, 0, 0, 0].long(), batch.target)
            # By default, crops have at least 8% of the area and are not mirrored.
            assert (batch.views[0][:, 1, 1, 0] == torch.tensor(0.08)).all()
            assert not batch.views[0][:, 1, 1, 1].any()
            numbers += batch.target.tolist()
    assert len(numbers) == COUNT // batch_size * batch_size
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("world", [1, 7])  # 7 does not divide the 240 images
def test_ranks_of_imagenet_evaluate_every_world_th_image(world):
    source = decoded(0, progressive=((0, 24),))
    for rank in range(world):
        batches = list(source.eval_batches("test", 50, Shard(rank, world)))
        assert torch.cat([b.target for b in batches]).tolist() == list(range(rank, COUNT, world))
        for batch in batches:
            assert torch.equal(batch.views[0][:, 0, 0, 0].long(), batch.target)
            assert batch.views[0].shape[-1] == 32
            assert not batch.views[0][:, 1].any()  # no random numbers


def test_the_crops_of_imagenet_are_new_in_every_epoch_and_for_every_seed_and_view():
    """No random number is used twice, and the options of the crop are those of the recipe."""
    used, orders = [], set()
    for seed, epoch in product(SEEDS, EPOCHS):
        source = decoded(seed, smallest_crop=0.25, flip=True)
        batches = list(source.train_batches(epoch, 0, 48, VIEWS))
        orders.add(tuple(torch.cat([batch.target for batch in batches]).tolist()))
        for view in (view for batch in batches for view in batch.views):
            used.append(view[:, 1, 0, :23].flatten())
            assert (view[:, 1, 1, 0] == 0.25).all()
            assert (view[:, 1, 1, 1] == 1).all()
    numbers = torch.cat(used)
    assert len(orders) == len(SEEDS) * len(EPOCHS)
    # In float32, about one number in a thousand occurs twice by chance.
    assert len(numbers) == 6 * COUNT * VIEWS * 23
    assert len(numbers.unique()) > 0.99 * len(numbers)


@pytest.mark.parametrize(("options", "by_view"), [
    ({"rand_augment": (2, 9)}, True), ({"erasing": 0.5}, True),
    ({"mixup": 0.4}, False), ({"cutmix": 1.0}, False),
])  # fmt: skip
def test_augmentations_of_imagenet_are_new_in_every_epoch_and_for_every_seed(options, by_view):
    """The painter's blue channel is the same in every batch, so two batches with equal blue had the
    same augmentation. All views are mixed in the same way, because they share their labels."""
    found = []
    for seed, epoch in product(SEEDS, EPOCHS):
        for batch in decoded(seed, **options).train_batches(epoch, 0, 48, VIEWS):
            views = [view[:, 2].numpy().tobytes() for view in batch.views]
            found += views if by_view else views[:1]
    assert len(set(found)) == len(found) == 6 * 5 * (VIEWS if by_view else 1)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1}])
@pytest.mark.parametrize("side", [32, 24])
def test_soft_labels_of_imagenet_are_the_shares_of_the_images(options, side):
    """Red is the number of the image, which is also its label. 24 is a progressive resolution."""
    source = decoded(0, progressive=((0, side),), **options)
    shares = []
    for batch in source.train_batches(0, 0, 48, VIEWS):
        for view in batch.views:
            mean = view[:, 0].double().mean((1, 2))
            expected = batch.target.double() @ torch.arange(COUNT).double()
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-3)
        shares.append(batch.target.amax(1))
    assert torch.cat(shares).unique().numel() > COUNT // 3  # each image has its own share


@pytest.mark.parametrize("side", [32, 24])
def test_an_erased_image_of_imagenet_loses_2_to_33_percent_at_every_resolution(side):
    source = decoded(0, erasing=0.5, progressive=((0, side),))
    erased = torch.cat([
        (view[:, 2] == 0).double().mean((1, 2))
        for batch in source.train_batches(0, 0, 48, VIEWS) for view in batch.views
    ])  # fmt: skip
    some = erased[erased > 0]
    assert 0.42 < len(some) / len(erased) < 0.58
    # Rounding to whole pixels adds up to two percent.
    assert some.min() > 0.01
    assert some.max() < 0.36
    assert some.mean().item() == pytest.approx(0.02 / 2 + 1 / 6, abs=0.02)


def test_images_of_imagenet_are_normalised_after_rand_augment():
    """They are normalised by ImageNet's mean and deviation of each channel, as in every published
    recipe. With magnitude 0 most operations change nothing, so the painter's image is the median.
    """
    source = decoded(0, rand_augment=(1, 0))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
    (pixels,) = Painter().batches([([None] * 24, 32, None, 1.0, False)], 24, True)
    found = torch.stack([batch.views[0] for batch in source.train_batches(0, 0, 24, 1)])
    expected = (pixels - mean) / std
    torch.testing.assert_close(found.median(0).values, expected, rtol=0, atol=0.02)
