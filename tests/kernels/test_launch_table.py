"""For every number of classes, the launch fits the hardware, covers the row, wastes no thread."""

import itertools

import pytest
from bdkd_kernels.triton import launch_table
from bdkd_kernels.triton.launch_table import Loop, Tile

# All small numbers, numbers around powers of two (where blocks are padded), and usual data sets.
CLASSES = [*range(1, 70), *(2**k + d for k in range(7, 13) for d in (-1, 0, 1)), 100, 1000, 5000,
           8192, 12288, 21841, 24576, 24577, 49152, 49153, 100_000, 262_144, 10**6]  # fmt: skip
ALIGNED = [(size, vector) for size in (2, 4, 8) for vector in (1, 2, 4, 8) if size * vector <= 16]
REGISTERS, LANES = 65536, 32  # of a multiprocessor; of a warp


@pytest.mark.parametrize("classes", CLASSES)
def test_every_launch_fits_its_rows_and_the_hardware(classes):
    for (itemsize, vector), shifted in itertools.product(ALIGNED, (False, True)):
        launch = launch_table.choose(classes, itemsize, vector, shifted)
        threads = LANES * launch.warps
        assert launch.warps in (1, 2, 4, 8, 16, 32)
        no_limit = (0, 255)  # the compiler's choice, and the maximum per thread
        assert launch.registers in no_limit or threads * launch.registers <= REGISTERS
        if isinstance(launch, Tile):
            assert classes <= launch_table.TILE_CLASSES
            assert launch.block >= classes
            assert launch.block < 2 * classes or launch.block == 16
            assert launch.block % launch.inner == 0
            assert launch.chunk <= launch.block
            if classes > 512:  # a program is one row
                assert launch.rows == 1
                assert threads * vector <= launch.block
            elif classes > 1:  # one warp, whose threads have few pairs each and are all busy
                pairs = launch.rows * launch.block // threads
                assert 4 <= pairs <= 16
                assert launch.inner // min(vector, pairs) * launch.rows >= threads
                assert launch.rows == max(1, 128 // launch.block)
            continue
        assert isinstance(launch, Loop)
        assert classes > launch_table.TILE_CLASSES
        assert launch.lanes == threads
        assert launch.block == launch.outer * threads * launch.inner
        assert launch.block < classes or launch.prefetch == 0
        # An access loads 16 bytes if the alignment of the rows allows it, otherwise one logit.
        whole = vector * itemsize == 16
        assert launch.inner * itemsize == (16 if whole or shifted else itemsize)
        assert launch.shifted == (shifted and not whole)


def test_rows_longer_than_a_tile_use_the_loop_kernel():
    limit = launch_table.TILE_CLASSES
    assert isinstance(launch_table.choose(limit, 4, 4), Tile)
    assert isinstance(launch_table.choose(limit + 1, 4, 4), Loop)
    assert isinstance(launch_table.choose(513, 4, 4, tile_classes=512), Loop)


@pytest.mark.parametrize("classes", [4100, 12288, 12289, 24576, 24577])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_long_rows_of_both_networks_stay_in_the_l2_cache(classes, itemsize):
    """Rows of up to 96 KB use 8 warps. Longer rows use 16 warps, so fewer rows run at once."""
    launch = launch_table.choose(classes, itemsize, 16 // itemsize)
    assert launch.warps == (8 if 2 * classes * itemsize <= 96 * 1024 else 16)
    assert launch.registers == (0 if itemsize == 8 else 80 if launch.warps == 8 else 64)


def test_blocks_are_the_next_power_of_two():
    for classes in range(1, 300):
        block = launch_table.block_of(classes)
        assert block >= classes
        assert block & (block - 1) == 0
        assert block < 2 * classes
