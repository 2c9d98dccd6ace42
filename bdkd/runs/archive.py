"""Check a zip file of ``torch.save`` or ``torch.export.save`` before its contents are loaded.

torch stores members without compression, uses each name once and writes no file comment. The
contents of such a file cannot be larger than the file itself.

This module also checks fields that Python's zip reader and torch's zip reader (miniz) interpret
differently. For example, if a member has the DOS attribute of a folder, miniz copies nothing and
torch returns uninitialised memory, while Python ignores the attribute.
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

_ENCRYPTED = 0x0001 | 0x0040 | 0x2000  # flag bits for encrypted contents and directories
_FOLDER = 0x10  # DOS attribute
MAX_DIRECTORY_BYTES = 64 * 2**20
"""Python needs about ten times the size of the central directory to list its entries. A checkpoint
with 100,000 tensors has a directory of 8 MiB."""


class ArchiveError(Exception):
    """A zip file is damaged, or torch did not write it. The message is the reason."""


class ForeignArchive(ArchiveError):
    """Another program wrote the file. The file may be intact."""


def check_stored_zip(file: BinaryIO) -> None:
    """Check that each member is stored once, uncompressed, without overlaps and undamaged.

    This reads all members once, in blocks of 1 MiB, and compares their checksums. It allocates
    memory only for the central directory. The position of ``file`` changes.

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
                # zipfile compares the names in header and directory, and at the end the CRC-32.
                with archive.open(member) as content:
                    while content.read(2**20):
                        pass
    except (zipfile.BadZipFile, zlib.error, struct.error) as error:
        if isinstance(error.__context__, OSError):  # zipfile replaces errors of the disk
            raise error.__context__ from None
        raise ArchiveError(str(error)) from error
    except NotImplementedError as error:
        raise ForeignArchive(f"it cannot be read as a zip file ({error})") from error
    except (EOFError, RuntimeError, ValueError, OverflowError) as error:
        raise ArchiveError(f"it cannot be read as a zip file ({error})") from error


def is_torchscript(path: Path) -> bool:
    """Return whether ``torch.jit.save`` wrote a file. Such a file contains compressed code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return False


def _read_end(file: BinaryIO) -> tuple[int, int]:
    """Return the number of members and the offset of the central directory.

    Raise an error for a file with a comment, or with bytes before the first member. Zip readers
    search for the directory of such a file in different places.
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
        raise ArchiveError("its end record has a comment length, but the comment is missing")
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
    """Compare the entries of the directory with each other and with the headers of the members. No
    member may extend beyond ``start``, the offset of the directory."""
    names: set[str] = set()
    for member in members:
        name = member.filename
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ForeignArchive(f"{name!r} is compressed, but torch never compresses")
        if member.flag_bits & _ENCRYPTED:
            raise ForeignArchive(f"{name!r} is encrypted")
        if member.external_attr & _FOLDER and not name.endswith("/"):
            raise ArchiveError(f"{name!r} is marked as a folder")
        if member.volume:
            raise ArchiveError(f"{name!r} is in part {member.volume} of several zip files")
        if member.orig_filename != name:
            raise ArchiveError(f"the name of {name!r} contains a NUL character")
        if name.lower() in names:  # torch's reader ignores case
            raise ArchiveError(f"it contains {name!r} twice")
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
