"""Check a zip file of ``torch.save`` or ``torch.export.save`` before its contents are loaded.

torch stores members without compression, names each member once and writes no file comment. A file
with those properties cannot inflate to more than its size.

Fields that Python's reader and torch's (miniz) interpret differently are checked too. If a member
has the DOS attribute of a folder, miniz copies nothing and torch returns uninitialised memory.
Python ignores the attribute.
"""

import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

# Fixed parts of zip records (PKWARE's APPNOTE.TXT, sections 4.3.7, 4.3.14 to 4.3.16)
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")

_ENCRYPTED = 0x0001 | 0x0040 | 0x2000  # flag bits of encrypted contents and directories
_FOLDER = 0x10  # DOS attribute
MAX_DIRECTORY_BYTES = 64 * 2**20
"""Python needs about ten times the size of the central directory to list its entries. A checkpoint
with 100,000 tensors has a directory of 8 MiB."""


class ArchiveError(Exception):
    """A zip file that is damaged or that torch did not write. The message is the reason."""


class ForeignArchive(ArchiveError):
    """A file that another program wrote. It may be undamaged."""


def check_stored_zip(file: BinaryIO) -> None:
    """Check that members are stored once, without compression or overlaps, with a valid checksum.

    This reads every byte of every member once, in blocks of 1 MiB. Nothing is decompressed, and
    memory is only allocated for the central directory. The position of ``file`` changes.

    Raises:
        ForeignArchive: the file is not a zip file, or another program wrote it.
        ArchiveError: the file is damaged.
        OSError: the file cannot be read.
    """
    file.seek(0)
    begin = file.read(4)
    if begin == b"\0\0\0\0":
        raise ArchiveError("it begins with zeros")
    if begin and begin != b"PK\3\4"[: len(begin)]:
        raise ForeignArchive("it does not begin as a zip file")
    entries, start = _read_end(file)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if (listed := len(members)) != entries:
                raise ArchiveError(f"its directory lists {listed} members, its end {entries}")
            _check_members(file, members, start)
            for member in members:
                # Reading compares the names in header and directory, and the CRC-32 at the end.
                with archive.open(member) as content:
                    while content.read(2**20):
                        pass
    except (zipfile.BadZipFile, zlib.error, struct.error) as error:
        if isinstance(error.__context__, OSError):  # zipfile hides errors of the disk
            raise error.__context__ from None
        raise ArchiveError(str(error)) from error
    except NotImplementedError as error:
        raise ForeignArchive(f"it cannot be read as a zip file ({error})") from error
    except (EOFError, RuntimeError, ValueError, OverflowError) as error:
        raise ArchiveError(f"it cannot be read as a zip file ({error})") from error


def is_torchscript(path: Path) -> bool:
    """Return whether a file is one of ``torch.jit.save``, whose code is compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _read_end(file: BinaryIO) -> tuple[int, int]:
    """Return the number of members and the offset of the central directory.

    Files with a comment or with bytes before the first member are refused, because readers look for
    their directory in different places.
    """
    end = file.seek(0, 2) - _END.size
    if end < 0:
        raise ArchiveError("its end is missing")
    file.seek(end)
    fields = _END.unpack(file.read(_END.size))
    signature, disk, first_disk, here, entries, length, start, comment = fields
    if signature != b"PK\5\6":
        if zipfile.is_zipfile(file):
            raise ForeignArchive("it has a comment, or bytes after its end")
        raise ArchiveError("its end is missing")
    if comment:
        raise ArchiveError("its end announces a comment that is missing")
    short = (here, entries, length, start)
    locator = end - _END64_LOCATOR.size
    if locator >= 0:
        file.seek(locator)
        signature, disk64, record, disks = _END64_LOCATOR.unpack(file.read(_END64_LOCATOR.size))
        if signature == b"PK\6\7":
            if record != locator - _END64.size or disk64 or disks > 1:
                raise ArchiveError("bytes precede its members, or its directory is misplaced")
            file.seek(record)
            fields = _END64.unpack(file.read(_END64.size))
            signature, rest, _, _, disk, first_disk, here, entries, length, start = fields
            if signature != b"PK\6\6" or rest != _END64.size - 12:
                raise ArchiveError("the record of its 64-bit sizes is damaged")
            long, limits = (here, entries, length, start), (2**16 - 1,) * 2 + (2**32 - 1,) * 2
            for narrow, wide, limit in zip(short, long, limits, strict=True):
                if narrow not in (wide, limit):
                    raise ArchiveError("its 32-bit and 64-bit sizes differ")
            end = record
    if disk or first_disk or here != entries:
        raise ArchiveError("it is a part of a zip file in several parts")
    if start + length != end:
        raise ArchiveError("bytes precede its members, or its directory is misplaced")
    if length > MAX_DIRECTORY_BYTES:
        raise ArchiveError(f"its directory has {length:,} bytes, more than {MAX_DIRECTORY_BYTES:,}")
    return entries, start


def _check_members(file: BinaryIO, members: list[zipfile.ZipInfo], start: int) -> None:
    """Compare the entries of the directory at the offset ``start`` with each other and with the
    headers. No member may extend beyond ``start``."""
    names: set[str] = set()
    for member in members:
        name = member.filename
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ForeignArchive(f"{name!r} is compressed, which torch never does")
        if member.flag_bits & _ENCRYPTED:
            raise ForeignArchive(f"{name!r} is encrypted")
        if member.external_attr & _FOLDER and not name.endswith("/"):
            raise ArchiveError(f"{name!r} is marked as a folder")
        if member.volume:
            raise ArchiveError(f"{name!r} would be on disk {member.volume} of several")
        if member.orig_filename != name:
            raise ArchiveError(f"{name!r} has a name with a NUL in it")
        if name.lower() in names:  # torch's reader ignores case
            raise ArchiveError(f"{name!r} is there twice")
        names.add(name.lower())
    total = sum(member.file_size for member in members)
    if total > start:
        raise ArchiveError(f"its members have {total:,} bytes, more than the file has")
    before, end = "", 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.filename
        if member.header_offset < end:
            raise ArchiveError(f"{before!r} and {name!r} overlap")
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER.size)
        if len(header) != _LOCAL_HEADER.size or header[:4] != b"PK\3\4":
            raise ArchiveError(f"the header of {name!r} is missing")
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        header_length = _LOCAL_HEADER.size + name_length + extra_length
        before, end = name, member.header_offset + header_length + member.file_size
        if end > start:
            raise ArchiveError(f"{name!r} does not end before the directory begins")
