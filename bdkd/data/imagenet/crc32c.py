"""CRC-32C (Castagnoli, RFC 3720, appendix B.4), the checksum of TFRecords, in NumPy.

A byte at a time is for headers. Long contents are cut into blocks, whose checksums are taken side
by side and then folded in pairs: the register after A and B is that after A, moved on over as many
zero bytes as B has, xor that after B alone. That takes less time than decoding the image does
(``bench/data_imagenet.py --index``), and needs no compiled package.
"""

from functools import cache

import numpy as np

ONES = 0xFFFFFFFF
BLOCK = 32  # bytes


def _byte_table() -> np.ndarray:
    """The register after each byte, ``(256,)`` uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1)
    return table


BYTES = _byte_table()
_LISTED = BYTES.tolist()  # plain integers, for one byte at a time


def masked(crc: int) -> int:
    """As a TFRecord stores it."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & ONES


def crc32c(content: bytes) -> int:
    """Of anything short."""
    register = ONES
    for byte in content:
        register = _LISTED[(register ^ byte) & 255] ^ (register >> 8)
    return register ^ ONES


def crc32c_long(content: bytes) -> int:
    """Of anything from four bytes on: the first four take the register's initial ones."""
    blocks = 1 << max(0, (len(content) - 1) // BLOCK).bit_length()
    padded = np.zeros((blocks, BLOCK), np.uint8)  # zeros in front leave the register at zero
    whole = padded.reshape(-1)[blocks * BLOCK - len(content) :]
    whole[:] = np.frombuffer(content, np.uint8)
    whole[:4] ^= 255
    registers = np.zeros(blocks, np.uint32)
    # as indices at once: table[bytes] would convert them at every place
    for table, column in zip(_followed(), padded.T.astype(np.intp), strict=True):
        registers ^= table[column]
    level = 0
    while len(registers) > 1:
        registers = _moved(registers[::2], level) ^ registers[1::2]
        level += 1
    return int(registers[0]) ^ ONES


@cache
def _followed() -> list[np.ndarray]:
    """For each place in a block, the register after its byte and the zeros behind it."""
    tables = [BYTES]
    for _ in range(BLOCK - 1):
        tables.insert(0, _over_zero(tables[0]))
    return tables


def _over_zero(registers: np.ndarray) -> np.ndarray:
    return BYTES[registers & 255] ^ (registers >> 8)


def _moved(registers: np.ndarray, level: int) -> np.ndarray:
    """Registers moved on over ``BLOCK * 2**level`` zero bytes: a linear map, by its four bytes."""
    by_byte = _maps(level)
    moved = by_byte[0][registers & 255]
    for place in (1, 2, 3):
        moved ^= by_byte[place][(registers >> (8 * place)) & 255]
    return moved


@cache
def _maps(level: int) -> list[np.ndarray]:
    maps = [np.arange(256, dtype=np.uint32) << (8 * place) for place in range(4)]
    for _ in range(1 if level else BLOCK):
        maps = [_moved(_moved(m, level - 1), level - 1) if level else _over_zero(m) for m in maps]
    return maps
