"""Download data sets from their original hosts for ``bdkd data fetch``. Training never downloads.

Archives are verified against a known SHA-256 before they are unpacked.
"""

import errno
import fcntl
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from tqdm import tqdm

from bdkd.config import DataConfig, nearest
from bdkd.errors import RunError, UsageError, reason_of
from bdkd.text import expand_user

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
            + (f" ({where_to_get(config.source)})" if config.source in ARCHIVES else "")
        )
    return expand_user(config.root, "data.root")


def fetch(name: str, to: Path, archives: Mapping[str, Archive] = ARCHIVES) -> Path:
    """Download, verify and unpack a data set unless it exists, and return its folder in ``to``.

    An interrupted download is continued, and an archive that already exists in ``to`` is used. The
    folder is created atomically. Then the archive is removed.

    Raises:
        UsageError: the data set is unknown.
        RunError: there is no network or no space, the hash is wrong, or another fetch is running.
    """
    if name not in archives:
        raise UsageError(f"unknown data set {name!r}: {nearest(name, list(archives))}")
    archive = archives[name]
    folder, packed = to / archive.folder, to / archive.file
    if folder.exists():
        return folder
    try:
        to.mkdir(parents=True, exist_ok=True)
        if not packed.exists():
            _download(archive, packed)
        _unpack(archive, packed, folder)
        packed.unlink()
    except OSError as error:  # not of the network, whose errors are RunErrors here
        reason = reason_of(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; make room and run it again to continue the download"
        raise RunError(f"cannot write in {to}: {reason}") from error
    return folder


def _download(archive: Archive, packed: Path) -> None:
    """Start or continue a download. The file gets its final name after it is verified."""
    free, needed = shutil.disk_usage(packed.parent).free, archive.size + archive.unpacked
    if free < needed:
        raise RunError(
            f"{packed.parent} has {free / 1e9:.2f} GB free, and {archive.file} with its unpacked "
            f"files needs {needed / 1e9:.2f} GB: make room, or pass another folder with --to"
        )
    part = packed.with_name(packed.name + ".part")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends
        except BlockingIOError as error:
            raise RunError(f"another bdkd data fetch is downloading {packed}: wait") from error
        try:
            if file.tell() < archive.size:
                _append(archive, part, file)
        finally:
            file.flush()
            if not file.tell():  # nothing was received
                part.unlink()
    found = _sha256(part)
    if found != archive.sha256:
        part.unlink()
        raise RunError(
            f"the file from {archive.url} is not the known file: its SHA-256 is {found}, not "
            f"{archive.sha256}; it was removed. Run this again, or get the file elsewhere and put "
            f"it into {packed.parent}"
        )
    part.rename(packed)


def _append(archive: Archive, part: Path, file: BinaryIO) -> None:
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
                f"{host} offers {have + response.length:,} bytes as {archive.file}, which has "
                f"{archive.size:,}: something else answers in its place; is there a proxy or a "
                "login page?"
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
            f"({failure}): run it again to continue from there"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack(archive: Archive, packed: Path, folder: Path) -> None:
    """Verify the archive, unpack it into a temporary folder and rename that folder."""
    if (found := _sha256(packed)) != archive.sha256:
        raise RunError(
            f"{packed} ({packed.stat().st_size:,} bytes) is not the known file: its SHA-256 is "
            f"{found}, not {archive.sha256}; nothing was unpacked: remove it, and run this again"
        )
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
