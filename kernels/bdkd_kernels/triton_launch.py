"""Which kernel, and in what shape, serves a number of classes.

Chosen from the compiled code, for sm_90, bf16, temperature 4 (``bench/compiled.py`` prints it):
registers decide how many programs a multiprocessor holds, issue slots a class pair whether it can
keep up with its memory (docs/triton-kernel.md). ``bench/autotune.py`` prints this table anew from
measurements on a GPU.
"""

from dataclasses import dataclass
from functools import lru_cache

# Up to this many classes both rows stay in registers; beyond, a row is read in blocks, twice.
# 32 class pairs a thread take up to 254 registers: at 4096 classes two programs fit on a
# multiprocessor and hide each other's loads, at 8192 one.
TILE_CLASSES = 4096


@dataclass(frozen=True)
class Tile:
    """Rows in registers: (rows, block) class pairs a program."""

    rows: int
    block: int  # classes, padded to a power of two
    beside: int  # neighbouring classes that the threads of a row take at a time
    warps: int
    registers: int = 255  # a thread, at most, on NVIDIA

    @property
    def chunk(self) -> int:
        """Classes a block where a row is read again (masked classes, tied maxima)."""
        return min(self.block, 32 * self.warps)


@dataclass(frozen=True)
class Loop:
    """One row a program, in blocks of (outer, lanes, inner) class pairs.

    A lane takes ``inner`` neighbouring classes in one access, ``outer`` times a block.
    """

    warps: int
    inner: int
    outer: int = 1
    prefetch: int = 0  # blocks that are loaded into registers ahead of their arithmetic
    shifted: bool = False  # align the accesses of rows that are not aligned; see `choose`
    stages: int = 1  # without prefetch: Triton's pipeline through shared memory
    lanes: int = 0  # 0: one a thread
    registers: int = 0  # a thread, at most, on NVIDIA; 0: the compiler's choice

    def __post_init__(self) -> None:
        if not self.lanes:
            object.__setattr__(self, "lanes", 32 * self.warps)

    @property
    def block(self) -> int:
        return self.outer * self.lanes * self.inner


def block_of(classes: int) -> int:
    """The next power of two."""
    return 1 << (classes - 1).bit_length()


@lru_cache(maxsize=256)
def choose(
    classes: int,
    itemsize: int,
    vector: int,
    shifted: bool = False,
    tile_classes: int = TILE_CLASSES,
) -> Tile | Loop:
    """Return the launch for rows of ``classes``.

    Args:
        itemsize: Bytes of a logit, the larger of both networks'.
        vector: How many neighbouring logits one access may take.
        shifted: Whether each row of all tensors has the same distance to an address that 16
            divides, so that the same classes can be loaded and stored 16 bytes at a time.
    """
    if classes == 1:
        return Tile(128, 1, 1, 4)
    block = max(16, block_of(classes))
    if classes <= tile_classes:
        # Every thread of a row computes the row's own values: so they are few, with 32 pairs each,
        # and less where these would spill. To 1024 classes a program is one warp, and no value
        # crosses it.
        pairs = 32 if block > 128 or (block == 128 and vector > 2) else 16
        if block <= 32 and vector == 1:
            pairs = 8
        threads = block // pairs  # of a row
        if threads < 32:
            return Tile(32 // threads, block, threads * vector, 1)
        return Tile(1, block, block, threads // 32)
    # A row of both networks waits in L2 for its second sweep: few rows at a time where they are
    # long. 132 multiprocessors with one row each of 65536 bf16 classes hold 35 MB. Copies of single
    # logits, as in rows that are not aligned, cost more slots than their latency.
    warps = 8 if classes <= 16384 else 16
    if vector * itemsize == 16:
        return Loop(warps, vector, stages=3)
    if shifted:
        return Loop(warps, 16 // itemsize, prefetch=1, shifted=True)
    return Loop(warps, 1, outer=8)


def variants(classes: int, itemsize: int, vector: int) -> dict[str, Tile | Loop]:
    """Return the launches that race for the table, by name (``bench/gpu/smoke.py``)."""
    inner, shifted = 16 // itemsize, vector * itemsize != 16
    block = max(16, block_of(classes))
    found: list[Tile | Loop] = []
    if 512 < classes <= TILE_CLASSES:
        found += [Tile(1, block, block, block // pairs // 32) for pairs in (32, 16, 8)]
        found += [Tile(1, block, block, block // 16 // 32, registers=128)]
        found += [Loop(warps, inner, prefetch=prefetch, shifted=shifted)
                  for warps in (1, 2) for prefetch in (0, 1, 2)]  # fmt: skip
    elif classes > TILE_CLASSES:
        found += [Loop(8, inner, stages=1 if shifted else 3, shifted=shifted)]
        for warps, outer, prefetch, registers in (
            (8, 1, 1, 0), (8, 1, 2, 0), (8, 1, 3, 0), (8, 2, 1, 0), (8, 1, 1, 80), (8, 1, 2, 80),
            (4, 1, 2, 0), (4, 1, 3, 0), (16, 1, 2, 0), (16, 1, 3, 0), (16, 1, 2, 64),
        ):  # fmt: skip
            found += [Loop(warps, inner, outer, prefetch, shifted, registers=registers)]
    return {_name(launch): launch for launch in found}


def _name(launch: Tile | Loop) -> str:
    bounded = launch.registers not in (0, 255)
    end = f", {launch.registers} registers" if bounded else ""
    if isinstance(launch, Tile):
        return f"tile, {launch.rows * launch.block // launch.warps // 32} pairs a thread{end}"
    if launch.stages > 1:
        return f"{launch.warps} warps, {launch.stages} stages"
    return f"{launch.warps} warps x {launch.outer}, {launch.prefetch} ahead{end}"
