"""Small images in every encoding that was found in data sets, and in some others."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

SIDE = 32
Y, X = np.mgrid[:SIDE, :SIDE]
RGB = np.stack([X * 8, Y * 8, (X + Y) * 4], -1).astype(np.uint8)
ALPHA = (X * 7 + Y * 11).astype(np.uint8)
GREY16 = (X * 2111 + Y * 977).clip(0, 65535).astype(np.uint16)
RGB16 = np.stack([GREY16, GREY16[::-1], 65535 - GREY16], -1)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content)) + kind + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )  # fmt: skip


def png(
    depth: int, colour: int, rows: list[bytes], extra: bytes = b"", interlace: int = 0
) -> bytes:
    """Return a PNG of a kind that Pillow does not write."""
    header = struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")
    )  # fmt: skip


def rows(pixels: np.ndarray) -> list[bytes]:
    return [row.astype(">u2" if pixels.dtype == np.uint16 else ">u1").tobytes() for row in pixels]


def packed(bits: int) -> list[bytes]:
    """Return rows of values with fewer than 8 bits."""
    bit = ((X + Y) % (1 << bits))[..., None] >> np.arange(bits)[::-1] & 1
    return [row.tobytes() for row in np.packbits(bit.reshape(SIDE, -1).astype(np.uint8), 1)]


def adam7(pixels: np.ndarray) -> list[bytes]:
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
              (1, 0, 2, 1))  # fmt: skip
    return [row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx]]


def bmp16() -> bytes:
    """Return a BMP with five bits per channel."""
    red, green, blue = (RGB[::-1, :, c].astype(np.uint16) >> 3 for c in range(3))
    pixels = (red << 10 | green << 5 | blue).astype("<u2").tobytes()
    header = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 16, 0, len(pixels), 1, 1, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + header + pixels


def without_marker(content: bytes, dropped: int) -> bytes:
    """Return a JPEG without the segments of one marker."""
    position, kept = 2, content[:2]
    while content[position + 1] != 0xDA:
        length = 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if content[position + 1] != dropped:
            kept += content[position : position + length]
        position += length
    return kept + content[position:]


def readable() -> dict[str, bytes]:
    """Return images that can be decoded to 8-bit RGB, by name."""
    colour, alpha = Image.fromarray(RGB), Image.fromarray(ALPHA)
    grey, rgba = colour.convert("L"), Image.fromarray(np.dstack([RGB, ALPHA]))
    grey_alpha = Image.merge("LA", [grey, alpha])
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    grey16 = Image.fromarray(GREY16)
    turned = Image.Exif()
    turned[0x112] = 6
    more = {"save_all": True, "append_images": [colour.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]}
    cmyk = encode(colour.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe") + 11
    found = {
        "jpeg": encode(colour, "JPEG"), "jpeg grey": encode(grey, "JPEG"),
        "jpeg progressive": encode(colour, "JPEG", progressive=True),
        "jpeg 4:4:4": encode(colour, "JPEG", subsampling=0),
        "jpeg rgb": encode(colour, "JPEG", keep_rgb=True),
        "jpeg cmyk": cmyk, "jpeg cmyk without Adobe's marker": without_marker(cmyk, 0xEE),
        "jpeg ycck": cmyk[:adobe] + b"\2" + cmyk[adobe + 1 :],
        "jpeg turned": encode(colour, "JPEG", exif=turned),
        "jpeg mpo": encode(colour, "MPO", **more),
        "jpeg with a tail": encode(colour, "JPEG") + b"garbage" * 9,
        "jpeg with a damaged marker": encode(colour, "JPEG").replace(b"\xff\xc4", b"\0\xc4", 1),
        "jpeg with a fill byte": encode(colour, "JPEG").replace(b"\xff\xc4", b"\xff\xff\xc4", 1),
        "png": encode(colour, "PNG"), "png 1": encode(grey.convert("1"), "PNG"),
        "png grey": encode(grey, "PNG"), "png grey alpha": encode(grey_alpha, "PNG"),
        "png rgba": encode(rgba, "PNG"), "png palette": encode(palette, "PNG"),
        "png palette, one transparent": encode(palette, "PNG", transparency=5),
        "png palette, half transparent": encode(palette, "PNG", transparency=bytes(range(64))),
        "png grey transparent": encode(grey, "PNG", transparency=100),
        "png rgb transparent": encode(colour, "PNG", transparency=(8, 0, 4)),
        "png turned": encode(colour, "PNG", exif=turned),
        "png animated": encode(colour, "PNG", **more),
        "png grey 16": encode(grey16, "PNG"), "png rgb 16": png(16, 2, rows(RGB16)),
        "png grey 16 transparent": png(16, 0, rows(GREY16), chunk(b"tRNS", b"\0\0")),
        "png grey alpha 16": png(16, 4, rows(np.dstack([GREY16, GREY16.T]))),
        "png rgba 16": png(16, 6, rows(np.dstack([RGB16, GREY16.T]))),
        "png interlaced": png(8, 2, adam7(RGB), interlace=1),
        "png gamma": png(8, 2, rows(RGB), chunk(b"gAMA", struct.pack(">I", 100_000))),
        "png cut at its end": encode(colour, "PNG")[:-12],
        "png with a tail": encode(colour, "PNG") + b"garbage" * 9,
        "webp": encode(colour, "WEBP"), "webp lossless": encode(colour, "WEBP", lossless=True),
        "webp rgba": encode(rgba, "WEBP"), "webp turned": encode(colour, "WEBP", exif=turned),
        "webp rgba lossless": encode(rgba, "WEBP", lossless=True),
        "webp animated": encode(colour, "WEBP", **more), "gif": encode(colour, "GIF"),
        "gif animated": encode(colour, "GIF", **more), "jpeg 2000": encode(colour, "JPEG2000"),
        "jpeg 2000 grey 16": encode(grey16, "JPEG2000"), "bmp 16": bmp16(),
        "bmp 1": encode(grey.convert("1"), "BMP"), "bmp palette": encode(palette, "BMP"),
        "bmp": encode(colour, "BMP"), "bmp rgba": encode(rgba, "BMP"),
        "ppm": encode(colour, "PPM"), "pgm": encode(grey, "PPM"),
        "pgm 16": b"P5 32 32 65535\n" + b"".join(rows(GREY16)),
        "ppm 16": b"P6 32 32 65535\n" + b"".join(rows(RGB16)),
        "pgm as text": b"P2 32 32 255\n" + b" ".join(b"%d" % v for v in RGB[..., 0].flatten()),
        "tiff 1": encode(grey.convert("1"), "TIFF"), "tiff grey alpha": encode(grey_alpha, "TIFF"),
        "tiff palette": encode(palette, "TIFF"), "tiff rgba": encode(rgba, "TIFF"),
        "tiff": encode(colour, "TIFF"), "tiff grey 16": encode(grey16, "TIFF"),
        "tiff cmyk": encode(colour.convert("CMYK"), "TIFF"),
        "tiff ycbcr": encode(colour.convert("YCbCr"), "TIFF"),
        "tiff lab": encode(colour.convert("LAB"), "TIFF"),
        "tiff turned": encode(colour, "TIFF", tiffinfo={0x112: 6}),
    }  # fmt: skip
    for bits in (1, 2, 4):
        colours = bytes((k * 37 + 13) % 256 for k in range(3 << bits))
        found[f"png grey {bits}"] = png(bits, 0, packed(bits))
        found[f"png palette {bits}"] = png(bits, 3, packed(bits), chunk(b"PLTE", colours))
    return found


def refused() -> dict[str, bytes]:
    """Return files that are not images, are damaged, or have no standard conversion to 8 bits, by
    name."""
    colour = Image.fromarray(RGB)
    white_is_0 = encode(Image.fromarray(GREY16), "TIFF", tiffinfo={262: 0})
    found = {
        "tiff float": encode(Image.fromarray(GREY16.astype(np.float32)), "TIFF"),
        "tiff 32": encode(Image.fromarray(GREY16.astype(np.int32)), "TIFF"),
        "tiff grey 16, white is 0": white_is_0,
        "pfm": encode(Image.fromarray(GREY16.astype(np.float32)), "PPM"),
        "eps": encode(colour, "EPS"), "a text": b"this is a text\n" * 40, "nothing": b"",
        "a bomb": png(8, 2, []).replace(
            chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)),
            chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)),
        ),
    }  # fmt: skip
    whole = encode(colour, "PNG")
    middle = len(whole) // 2
    found["a png with another byte"] = (
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    )
    # The checksum of the pixels, in front of the last chunk of 12 bytes.
    found["a png with another checksum"] = whole[:-14] + bytes([whole[-14] ^ 1]) + whole[-13:]
    jpeg = encode(colour, "JPEG")
    frame = jpeg.index(b"\xff\xc0") + 5
    found["a jpeg bomb"] = jpeg[:frame] + b"\xff\xff\xff\xff" + jpeg[frame + 4 :]
    found["a jpeg of 12 bits"] = jpeg[: frame - 1] + b"\x0c" + jpeg[frame:]
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        whole = encode(colour, kind)
        for share in (0.3, 0.6):
            found[f"{kind} cut at {share}"] = whole[: int(share * len(whole))]
    return found
