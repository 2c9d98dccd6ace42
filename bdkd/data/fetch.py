"""Download data sets from their original hosts for ``bdkd data fetch``. Training never downloads.

A data set is an archive, which is unpacked, or several compressed files, which stay compressed.
Every file is first verified against a known SHA-256.
"""

import errno
import fcntl
import gzip
import hashlib
import os
import shlex
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from tqdm import tqdm

from bdkd.config import DataConfig, nearest
from bdkd.errors import RunError, UsageError, reason_of
from bdkd.text import expand_user, open_regular

CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without data


@dataclass(frozen=True)
class Archive:
    """A file to download, and the folder that it contains."""

    url: str
    sha256: str
    size: int  # bytes
    unpacked: int  # bytes, approximate
    folder: str  # the only folder in the archive

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def needed(self) -> int:
        """Bytes on the disk."""
        return self.size + self.unpacked

    def sha256_of(self, path: Path) -> str:
        """Return the SHA-256 to compare with ``self.sha256``."""
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class GzipFile:
    """A compressed file to download, which is kept compressed.

    The SHA-256 is that of the uncompressed content, because compressed files can differ although
    their content is the same: Debian's files have no file names in their headers.
    """

    url: str
    sha256: str  # of the content
    size: int  # bytes of the compressed file
    unpacked: int  # bytes of the content

    @property
    def file(self) -> str:
        return self.url.rsplit("/", 1)[1]

    @property
    def needed(self) -> int:
        """Bytes on the disk."""
        return self.size

    def sha256_of(self, path: Path) -> str:
        """Return the SHA-256 of the content, to compare with ``self.sha256``. If the file cannot be
        decompressed, return the SHA-256 of the file itself. At most one byte more than the known
        length is decompressed."""
        with open(path, "rb") as file:
            try:
                with gzip.open(file) as content:
                    return hashlib.sha256(content.read(self.unpacked + 1)).hexdigest()
            except (EOFError, zlib.error, gzip.BadGzipFile):
                file.seek(0)
                return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class FileSet:
    """The files of a data set, and the folder in which they are kept."""

    files: tuple[GzipFile, ...]
    folder: str

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(file.size for file in self.files)


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        170_498_071, 187_000_000, "cifar-10-batches-py",
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        169_001_437, 187_000_000, "cifar-100-python",
    ),
    "tiny-imagenet": Archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        248_100_043, 500_000_000, "tiny-imagenet-200",
    ),
}  # fmt: skip
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
# The SHA-256 are of the unpacked files of Debian's package dataset-fashion-mnist 0.0~git20200523.
FILE_SETS = {
    "fashion-mnist": FileSet((
        GzipFile(
            f"{FASHION_MNIST}/train-images-idx3-ubyte.gz",
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            26_421_880, 47_040_016,
        ),
        GzipFile(
            f"{FASHION_MNIST}/train-labels-idx1-ubyte.gz",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            29_515, 60_008,
        ),
        GzipFile(
            f"{FASHION_MNIST}/t10k-images-idx3-ubyte.gz",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            4_422_102, 7_840_016,
        ),
        GzipFile(
            f"{FASHION_MNIST}/t10k-labels-idx1-ubyte.gz",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            5_148, 10_008,
        ),
    ), "fashion-mnist"),
}  # fmt: skip
DATA_SETS: dict[str, Archive | FileSet] = {**ARCHIVES, **FILE_SETS}


def where_to_get(source: str, root: Path | None = None) -> str:
    """Return the end of an error message: the command that downloads a data set."""
    place = "DIR" if root is None else shlex.quote(str(root))
    return f"bdkd data fetch {source} --to {place} downloads it"


def missing_archive(source: str) -> Callable[[Path], str]:
    """Return the function ``missing`` of a source that :func:`fetch` downloads."""

    def missing(root: Path) -> str:
        archive = ARCHIVES[source]
        if any((root / name).exists() for name in (archive.folder, archive.file)):
            return ""
        return f"no {archive.folder} in {root}: {where_to_get(source, root)}"

    return missing


def required_root(config: DataConfig) -> Path:
    """Return ``data.root`` as a path, or raise ``UsageError`` if it is not set."""
    if config.root is None:
        raise UsageError(
            f"data.root must name the folder of the data set {config.source!r}"
            + (f" ({where_to_get(config.source)})" if config.source in DATA_SETS else "")
        )
    return expand_user(config.root, "data.root")


def fetch(name: str, to: Path, known: Mapping[str, Archive | FileSet] = DATA_SETS) -> Path:
    """Download and verify a data set unless it exists, and return its folder in ``to``.

    An interrupted download is continued, and an archive or file that already exists is used.

    Raises:
        UsageError: the data set is unknown.
        RunError: there is no network or no space, the hash is wrong, or another fetch is running.
    """
    if name not in known:
        raise UsageError(f"unknown data set {name!r}: {nearest(name, list(known))}")
    data_set = known[name]
    try:
        if isinstance(data_set, Archive):
            _fetch_archive(data_set, to)
        else:
            _fetch_files(data_set, to / data_set.folder)
    except OSError as error:  # of the disk: errors of the network are RunErrors already
        reason = reason_of(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; make room, and run this again to continue the download"
        raise RunError(f"cannot write in {to}: {reason}") from error
    return to / data_set.folder


def _fetch_archive(archive: Archive, to: Path) -> None:
    """Create the folder of the archive atomically, and remove the archive."""
    folder, packed = to / archive.folder, to / archive.file
    if folder.exists():
        return
    to.mkdir(parents=True, exist_ok=True)
    if not packed.exists():
        _download(archive, packed)
    _verify(archive, packed, "nothing was unpacked: remove it")
    _unpack(archive, packed, folder)
    packed.unlink()


def _fetch_files(data_set: FileSet, folder: Path) -> None:
    """Download each file that is missing, and verify each file that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in data_set.files:
        path = folder / file.file
        if path.exists():
            _verify(file, path, "remove it")
        else:
            _download(file, path)


def _verify(file: Archive | GzipFile, path: Path, remedy: str) -> None:
    with open_regular(path) as opened:  # raises for a pipe, whose content would never end
        size = os.fstat(opened.fileno()).st_size
    if (found := file.sha256_of(path)) != file.sha256:
        raise RunError(
            f"{path} ({size:,} bytes) is not the known file: its SHA-256 is {found}, not "
            f"{file.sha256}; {remedy}, and run this again"
        )


def _download(archive: Archive | GzipFile, packed: Path) -> None:
    """Start or continue a download. The file gets its final name after it is verified."""
    free, needed = shutil.disk_usage(packed.parent).free, archive.needed
    if free < needed:
        raise RunError(
            f"{packed.parent} has {free / 1e9:.2f} GB free, and {archive.file} needs "
            f"{needed / 1e9:.2f} GB, including the unpacked files: make room, or pass another "
            "folder with --to"
        )
    part = packed.with_name(packed.name + ".part")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError as error:
            raise RunError(
                f"another bdkd data fetch is downloading {packed}: wait until it has ended"
            ) from error
        try:
            if file.tell() < archive.size:
                _append(archive, part, file)
        finally:
            file.flush()
            if not file.tell():  # nothing was received
                part.unlink()
    found = archive.sha256_of(part)
    if found != archive.sha256:
        part.unlink()
        raise RunError(
            f"the file from {archive.url} is not the known file: its SHA-256 is {found}, not "
            f"{archive.sha256}; it was removed. Run this again, or get the file elsewhere and put "
            f"it into {packed.parent}"
        )
    part.rename(packed)


def _append(archive: Archive | GzipFile, part: Path, file: BinaryIO) -> None:
    host = urllib.parse.urlsplit(archive.url).netloc
    have = file.tell()
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        raise RunError(f"{host} answered {error.code} {error.reason} to {archive.url}") from error
    except (OSError, HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        reason = reason_of(reason) if isinstance(reason, Exception) else reason
        raise RunError(
            f"cannot reach {host} ({reason}): is there a network? If "
            f"not, download {archive.url} elsewhere, put it into {part.parent}, and run this again"
        ) from error
    with response:
        if response.status != 206:  # the host does not support ranges
            file.truncate(0)
            have = 0
        if response.length is not None and have + response.length != archive.size:
            raise RunError(
                f"{host} offers {have + response.length:,} bytes as {archive.file}, but the file "
                f"has {archive.size:,} bytes: check whether a proxy or a login page answers instead"
            )
        with tqdm(
            total=archive.size, initial=have, unit="B", unit_scale=True, desc=archive.file,
            disable=not sys.stderr.isatty(), dynamic_ncols=True,
        ) as bar:  # fmt: skip
            failure = "the host closed the connection"
            while have <= archive.size:
                try:
                    content = response.read(CHUNK)
                except (OSError, HTTPException) as error:
                    content, failure = b"", reason_of(error)
                if not content:
                    break
                file.write(content)
                have += len(content)
                bar.update(len(content))
    if have < archive.size:
        raise RunError(
            f"the download of {archive.file} broke off after {have:,} of {archive.size:,} bytes "
            f"({failure}): run this again to continue from there"
        )


def _unpack(archive: Archive, packed: Path, folder: Path) -> None:
    """Unpack the archive into a temporary folder and rename that folder."""
    with tempfile.TemporaryDirectory(prefix=f".{archive.folder}-", dir=packed.parent) as temporary:
        declared = 0
        for name, size, stream in _files(packed):
            declared += size
            if declared > 2 * archive.unpacked:  # checked before writing
                raise RunError(
                    f"{packed} is refused: with {name} it unpacks to more than "
                    f"{2 * archive.unpacked:,} bytes, and {archive.folder} has about "
                    f"{archive.unpacked:,}: remove it and run this again"
                )
            path = PurePosixPath(name)
            # No links are created, so the name determines where the file is written.
            if path.is_absolute() or ".." in path.parts:
                raise RunError(f"{packed} is refused: it would write {name!r} outside its folder")
            target = Path(temporary) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with stream, open(target, "wb") as file:
                shutil.copyfileobj(stream, file)
        inside = Path(temporary) / archive.folder
        if not inside.is_dir():
            raise RunError(f"{packed} holds no folder {archive.folder}: remove it and try again")
        os.rename(inside, folder)


def _files(packed: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Iterate over (name, declared size, content) of every regular file, and refuse links."""
    if zipfile.is_zipfile(packed):
        with zipfile.ZipFile(packed) as unzipped:
            for info in unzipped.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, unzipped.open(info)
        return
    with tarfile.open(packed) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is not None:
                yield member.name, member.size, stream
            elif not member.isdir():
                raise RunError(f"{packed} is refused: {member.name!r} is a link or a device")
