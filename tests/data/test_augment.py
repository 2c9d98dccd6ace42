"""Crop, flip and cutout of a batch, compared to slicing one image at a time."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from bdkd.data import Shard, create_source
from bdkd.data.in_memory import Draws, InMemoryConfig, crop_and_flip, cut_out, draw
from bdkd.errors import UsageError

CPU = torch.device("cpu")
NUMPY_MODE = {"zero": "constant", "reflect": "reflect", "edge": "edge"}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("padding", NUMPY_MODE)
def test_crop_and_flip_are_padding_slicing_and_mirroring(padding):
    pixels = torch.randint(0, 256, (5, 6, 9, 3), dtype=torch.uint8, generator=generator())
    chosen = torch.arange(60) % 5
    config = InMemoryConfig("made", crop=4, crop_padding=padding, flip=True)
    draws = draw(config, 60, 6, 9, generator())
    got = crop_and_flip(pixels, chosen, draws, padding)
    assert got.dtype == torch.uint8
    for image, index, down, right, mirrored in zip(got, chosen, *draws[:3], strict=True):
        padded = np.pad(pixels[index].numpy(), ((4, 4), (4, 4), (0, 0)), mode=NUMPY_MODE[padding])
        expected = padded[4 + down : 10 + down, 4 + right : 13 + right]
        expected = expected[:, ::-1] if mirrored else expected
        assert np.array_equal(image.numpy(), expected)
    assert len(set(zip(draws.down.tolist(), draws.right.tolist(), strict=True))) > 40
    assert draws.down.abs().max() == draws.right.abs().max() == 4
    assert 15 < draws.mirrored.sum() < 45


def test_cutout_sets_one_square_that_the_border_may_clip():
    draws = draw(InMemoryConfig("made", cutout=4), 400, 8, 10, generator())
    images = cut_out(torch.ones(400, 3, 8, 10), draws, 4)
    sizes = set()
    for image in images:
        assert torch.equal(image, image[:1].expand(3, -1, -1))
        rows, columns = (image[0] == 0).nonzero(as_tuple=True)
        height, width = (int(side.max() - side.min()) + 1 for side in (rows, columns))
        assert len(rows) == height * width  # a full rectangle
        sizes.add((height, width))
    assert (4, 4) in sizes
    assert max(sizes) == (4, 4)
    assert min(sizes) == (2, 2)  # a hole centred in the corner
    whole = Draws(*torch.zeros(5, 1, dtype=torch.int64))
    assert (cut_out(torch.ones(1, 1, 4, 4), whole, 4) == 0).all()


def test_crops_holes_and_flips_are_uniform_and_independent():
    """Height and width differ and the side of the hole is even, so that all draws have different
    ranges."""
    draws = draw(InMemoryConfig("made", crop=3, flip=True, cutout=4), 20_000, 8, 10, generator())
    centres = draws.hole_top + 2, draws.hole_left + 2
    ranges = range(-3, 4), range(-3, 4), (0, 1), range(8), range(10)
    parts = [part.numpy() for part in (*draws[:3], *centres)]
    for values, possible in zip(parts, ranges, strict=True):
        counts = [(values == value).sum() for value in possible]
        assert sum(counts) == 20_000
        assert chisquare(counts).pvalue > 1e-3, counts
    # The draws of an image and those of the next image are uncorrelated.
    shifted = np.corrcoef([part[1:] for part in parts], [part[:-1] for part in parts])
    assert np.abs(shifted - np.eye(10)).max() < 0.03


def test_disabled_augmentations_draw_no_random_numbers():
    state = generator()
    draws = draw(InMemoryConfig("made"), 7, 8, 8, state)
    assert torch.equal(state.get_state(), generator().get_state())
    assert all((part == 0).all() for part in draws)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_what_one_rank_sees(world):
    options = InMemoryConfig("digits", crop=2, flip=True, cutout=3)
    source = create_source(options, 5, CPU, torch.channels_last)
    whole = list(source.train_batches(2, 64, 64, 2))
    parts = [list(source.train_batches(2, 64, 64, 2, Shard(r, world))) for r in range(world)]
    for i, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[i].target for part in parts]), batch.target)
        for view in range(2):
            assert torch.equal(
                torch.cat([part[i].views[view] for part in parts]), batch.views[view]
            )


@pytest.mark.parametrize("options", [{"crop": 7}, {"cutout": 16}])
def test_the_largest_augmentation_that_fits_the_images_is_accepted(options):
    create_source(InMemoryConfig("digits", **options), 0, CPU, torch.channels_last)


@pytest.mark.parametrize("options", [{"crop": 8}, {"cutout": 17}])
def test_augmentation_larger_than_the_images_is_refused(options):
    with pytest.raises(UsageError, match=r"8x8"):
        create_source(InMemoryConfig("digits", **options), 0, CPU, torch.channels_last)
