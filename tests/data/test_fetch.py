"""Downloads from a local server: complete, resumed, wrong and hostile files, and no network."""

import dataclasses
import errno
import fcntl
import gzip
import hashlib
import io
import os
import re
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from fake_sets import cifar_files, tar_gz, tiny_imagenet_files

from bdkd.cli import data as command
from bdkd.data import create_source
from bdkd.data import fetch as fetching
from bdkd.data.fetch import ARCHIVES, DATA_SETS, FILE_SETS, Archive, FileSet, GzipFile, fetch
from bdkd.errors import RunError, UsageError
from bdkd.registry import SOURCES


class Host:
    """A web server on this machine.

    ``ranges``: whether it can continue downloads. ``breaks_after``: it closes the next connection
    after this number of bytes. ``claims``: a wrong length that it announces.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges, self.breaks_after, self.claims = True, None, None
        self.announces_no_length = False
        self.asked: list[str | None] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                host.asked.append(self.headers.get("Range"))
                content = host.files.get(self.path)
                if content is None:
                    return self.send_error(404)
                start = 0
                if host.ranges and (found := re.match(r"bytes=(\d+)-", self.headers["Range"])):
                    start = int(found[1])
                self.send_response(206 if host.ranges else 200)
                length = len(content) - start if host.claims is None else host.claims
                if not host.announces_no_length:
                    self.send_header("Content-Length", str(length))
                self.end_headers()
                end = len(content) if host.breaks_after is None else start + host.breaks_after
                host.breaks_after = None
                self.wfile.write(content[start:end])

            def log_message(self, *_):
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def archive(self, file: str, content: bytes, folder: str) -> Archive:
        """Serve a file, and return its entry in a table of archives."""
        self.files[f"/{file}"] = content
        return Archive(
            f"http://127.0.0.1:{self.server.server_port}/{file}",
            hashlib.sha256(content).hexdigest(), len(content), 10 * len(content), folder,
        )  # fmt: skip


@pytest.fixture
def host(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    host = Host()
    yield host
    host.server.shutdown()
    host.server.server_close()


CIFAR = tar_gz(cifar_files("cifar10"))


@pytest.fixture
def table(host):
    return {"cifar10": host.archive("cifar-10-python.tar.gz", CIFAR, "cifar-10-batches-py")}


def hidden(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_fetched_set_can_be_trained_on_and_is_not_fetched_again(tmp_path, host, table):
    to = tmp_path / "new" / "data"
    assert fetch("cifar10", to, table) == to / "cifar-10-batches-py"
    assert hidden(to) == ["cifar-10-batches-py"]  # no archive, no leftovers
    config = SOURCES.configure("cifar10", root=str(to))
    source = create_source(config, 0, torch.device("cpu"), torch.channels_last)
    assert source.info.counts["test"] == 20
    fetch("cifar10", to, table)
    assert len(host.asked) == 1


def test_tiny_imagenet_is_unzipped(tmp_path, host):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.mkdir("tiny-imagenet-200")
        for name, content in tiny_imagenet_files().items():
            archive.writestr(name, content)
    known = host.archive("tiny-imagenet-200.zip", stream.getvalue(), "tiny-imagenet-200")
    fetch("tiny-imagenet", tmp_path, {"tiny-imagenet": known})
    config = SOURCES.configure("tiny-imagenet", root=str(tmp_path), validation=0.2)
    source = create_source(config, 0, torch.device("cpu"), torch.channels_last)
    assert source.info.counts["test"] == 12


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_continues_where_it_stopped(tmp_path, host, table, ranges):
    host.breaks_after = 1000
    with pytest.raises(RunError, match=r"broke off after 1,000 of .* run this again to continue"):
        fetch("cifar10", tmp_path, table)
    assert hidden(tmp_path) == ["cifar-10-python.tar.gz.part"]
    host.ranges = ranges
    assert fetch("cifar10", tmp_path, table).is_dir()
    assert host.asked == ["bytes=0-", "bytes=1000-"]


def test_a_download_with_a_wrong_hash_is_removed(tmp_path, host, table):
    host.files["/cifar-10-python.tar.gz"] = CIFAR[:-1] + b"x"
    with pytest.raises(RunError, match="is not the known file: its SHA-256 is"):
        fetch("cifar10", tmp_path, table)
    assert hidden(tmp_path) == []


def test_a_login_page_instead_of_the_file_is_reported(tmp_path, host, table):
    host.files["/cifar-10-python.tar.gz"] = b"<html>log in first</html>"
    host.ranges = False
    with pytest.raises(RunError, match=r"offers 25 bytes .*: check whether a proxy"):
        fetch("cifar10", tmp_path, table)
    assert hidden(tmp_path) == []


def test_an_existing_archive_is_verified_and_used_without_a_network(tmp_path, host, table):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(CIFAR)
    assert fetch("cifar10", tmp_path, table).is_dir()
    assert host.asked == []
    other = tmp_path / "other"
    other.mkdir()
    (other / "cifar-10-python.tar.gz").write_bytes(CIFAR[:-1])
    with pytest.raises(RunError, match=r"is not the known file.*nothing was unpacked: remove it"):
        fetch("cifar10", other, table)
    assert hidden(other) == ["cifar-10-python.tar.gz"]  # a user's file is not removed


def test_without_a_network_the_error_says_what_to_do(tmp_path, host, table):
    host.server.shutdown()
    host.server.server_close()
    with pytest.raises(
        RunError, match=r"cannot reach 127.0.0.1:\d+ .*is there a network\?.*put it"
    ):
        fetch("cifar10", tmp_path, table)
    assert hidden(tmp_path) == []


def test_a_file_that_the_host_no_longer_has(tmp_path, host, table):
    host.files.clear()
    with pytest.raises(RunError, match="answered 404 Not Found to http://127"):
        fetch("cifar10", tmp_path, table)


def test_a_full_disk_is_seen_before_and_during_the_download(tmp_path, host, table, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fetching.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(RunError, match=r"GB free, and .* needs .* make room"):
            fetch("cifar10", tmp_path, table)
        assert host.asked == []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fetching.shutil, "copyfileobj", full)
        with pytest.raises(RunError, match=r"cannot write in .*No space left on device; make room"):
            fetch("cifar10", tmp_path, table)
    assert hidden(tmp_path) == ["cifar-10-python.tar.gz"]  # the download is kept, no partial folder
    assert fetch("cifar10", tmp_path, table).is_dir()
    assert len(host.asked) == 1


@pytest.mark.parametrize("missing", [0, 1])
def test_the_archive_and_what_it_unpacks_to_must_fit(tmp_path, table, monkeypatch, missing):
    needed = 11 * len(CIFAR)  # the archive, and the unpacked size in its entry
    usage = SimpleNamespace(free=needed - missing)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: usage)
    if missing:
        with pytest.raises(RunError, match="make room"):
            fetch("cifar10", tmp_path, table)
    else:
        assert fetch("cifar10", tmp_path, table).is_dir()


def test_a_complete_download_that_was_not_renamed_is_used(tmp_path, host, table):
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(CIFAR)
    assert fetch("cifar10", tmp_path, table).is_dir()
    assert host.asked == []
    assert hidden(tmp_path) == ["cifar-10-batches-py"]


def test_a_host_that_sends_more_than_the_archive_is_not_read_to_its_end(tmp_path, host, table):
    """The host announces no length and sends 20 chunks too much. At most one of them is kept."""
    host.files["/cifar-10-python.tar.gz"] = CIFAR + bytes(20 * fetching.CHUNK)
    host.announces_no_length = True
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        sha256 = Archive.sha256_of
        patch.setattr(
            Archive, "sha256_of", lambda self, p: kept.append(p.stat().st_size) or sha256(self, p)
        )
        with pytest.raises(RunError, match="is not the known file"):
            fetch("cifar10", tmp_path, table)
    assert kept[0] <= len(CIFAR) + fetching.CHUNK
    assert hidden(tmp_path) == []


def zip_of_zeros(folder: str, count: int) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{folder}/zeros", bytes(count))
    return stream.getvalue()


@pytest.mark.parametrize("unpacked", [40_000, 40_001])
def test_an_archive_may_unpack_to_twice_what_its_entry_says(tmp_path, host, unpacked):
    known = host.archive("set.zip", zip_of_zeros("set", unpacked), "set")
    known = dataclasses.replace(known, unpacked=20_000)
    if unpacked == 40_000:
        assert (fetch("set", tmp_path, {"set": known}) / "zeros").stat().st_size == unpacked
    else:
        with pytest.raises(RunError, match="unpacks to more than 40,000 bytes"):
            fetch("set", tmp_path, {"set": known})


def test_a_folder_that_cannot_be_made(tmp_path, table):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write in .*file"):
        fetch("cifar10", tmp_path / "file" / "data", table)


def test_two_fetches_do_not_write_the_same_archive(tmp_path, host, table):
    with open(tmp_path / "cifar-10-python.tar.gz.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another bdkd data fetch is downloading"):
            fetch("cifar10", tmp_path, table)
    assert host.asked == []


def hostile_tar(**changes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-py/ok")
        for key, value in changes.items():
            setattr(member, key, value)
        tar.addfile(member, io.BytesIO(b""))
    return stream.getvalue()


def hostile_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("cifar-10-batches-py/../../planted", b"x")
    return stream.getvalue()


def bomb_tar() -> bytes:
    member = tarfile.TarInfo("cifar-10-batches-py/zeros")
    member.size = 1 << 40
    return gzip.compress(member.tobuf() + bytes(1 << 20))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (hostile_tar(name="../planted"), "outside its folder"),
        (hostile_tar(name="/tmp/planted"), "outside its folder"),
        (hostile_tar(type=tarfile.SYMTYPE, linkname="/etc"), "a link or a device"),
        (hostile_tar(type=tarfile.LNKTYPE, linkname="../x"), "a link or a device"),
        (hostile_tar(type=tarfile.CHRTYPE), "a link or a device"),
        (hostile_tar(name="another/file"), "holds no folder cifar-10-batches-py"),
        (hostile_zip(), "outside its folder"),
        (bomb_tar(), r"unpacks to more than [\d,]+ bytes"),
        (zip_of_zeros("cifar-10-batches-py", 1 << 20), r"unpacks to more than [\d,]+ bytes"),
    ],
    ids=["..", "absolute", "symlink", "hard link", "device", "folder", "zip", "bomb", "zip bomb"],
)
def test_an_archive_cannot_write_elsewhere(tmp_path, host, content, message):
    to = tmp_path / "to"
    known = host.archive("cifar-10-python.tar.gz", content, "cifar-10-batches-py")
    with pytest.raises(RunError, match=message):
        fetch("cifar10", to, {"cifar10": known})
    assert hidden(to) == ["cifar-10-python.tar.gz"]
    assert hidden(tmp_path) == ["to"]


def test_the_fetch_command_downloads_and_prints_how_to_train(tmp_path, table, monkeypatch, capsys):
    monkeypatch.setattr(fetching.fetch, "__defaults__", (table,))
    command.run(["fetch", "cifar10", "--to", str(tmp_path)])
    options = f"--data.source cifar10 --data.root {tmp_path}"
    assert f"train with {options}" in capsys.readouterr().out
    with pytest.raises(UsageError, match="unknown data set 'cifar1': did you mean 'cifar10'"):
        command.run(["fetch", "cifar1", "--to", str(tmp_path)])
    with pytest.raises(UsageError, match="unknown action 'fletch': did you mean 'fetch'"):
        command.run(["fletch"])
    command.run([])
    assert "fetch" in capsys.readouterr().out


CONTENTS = {"images.gz": bytes(range(256)) * 90, "labels.gz": b"labels" * 500}


@pytest.fixture
def files(host) -> dict[str, FileSet]:
    """Return a table with a data set of two files that the host serves."""
    known = []
    for name, content in CONTENTS.items():
        packed = host.files[f"/{name}"] = gzip.compress(content)
        url = f"http://127.0.0.1:{host.server.server_port}/{name}"
        sha256 = hashlib.sha256(content).hexdigest()
        known.append(GzipFile(url, sha256, len(packed), len(content)))
    return {"clothes": FileSet(tuple(known), "clothes")}


def test_files_are_kept_as_they_are_and_not_fetched_again(tmp_path, host, files):
    to = tmp_path / "new" / "data"
    assert fetch("clothes", to, files) == to / "clothes"
    assert hidden(to) == ["clothes"]
    assert hidden(to / "clothes") == ["images.gz", "labels.gz"]
    for name in CONTENTS:
        assert (to / "clothes" / name).read_bytes() == host.files[f"/{name}"]
    fetch("clothes", to, files)
    assert host.asked == ["bytes=0-"] * 2


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_of_files_continues_where_it_stopped(tmp_path, host, files, ranges):
    host.breaks_after = 100
    with pytest.raises(RunError, match=r"of images.gz broke off after 100 of .* run this again"):
        fetch("clothes", tmp_path, files)
    assert hidden(tmp_path / "clothes") == ["images.gz.part"]
    host.ranges = ranges
    del host.files["/labels.gz"]
    with pytest.raises(RunError, match=r"answered 404 Not Found to http://127.*labels.gz"):
        fetch("clothes", tmp_path, files)
    assert hidden(tmp_path / "clothes") == ["images.gz"]  # complete, and kept
    host.files["/labels.gz"] = gzip.compress(CONTENTS["labels.gz"])
    fetch("clothes", tmp_path, files)
    assert host.asked == ["bytes=0-", "bytes=100-", "bytes=0-", "bytes=0-"]
    assert hidden(tmp_path / "clothes") == ["images.gz", "labels.gz"]


def test_a_file_with_another_compression_is_accepted(tmp_path, host, files):
    """Debian's packages have such files, without a file name in the header."""
    (tmp_path / "clothes").mkdir()
    for name, content in CONTENTS.items():
        (tmp_path / "clothes" / name).write_bytes(gzip.compress(content, 1))
    fetch("clothes", tmp_path, files)
    assert host.asked == []


@pytest.mark.parametrize("content", [
    gzip.compress(b"other" * 600), gzip.compress(CONTENTS["labels.gz"])[:-9], b"<html>", b"",
    gzip.compress(CONTENTS["labels.gz"] + b"x"), gzip.compress(bytes(1 << 26)),
], ids=["other", "cut", "login page", "empty", "longer", "bomb"])  # fmt: skip
def test_a_wrong_file_of_a_user_is_refused_and_kept(tmp_path, host, files, content):
    (tmp_path / "clothes").mkdir()
    file = tmp_path / "clothes" / "labels.gz"
    file.write_bytes(content)
    with pytest.raises(RunError) as raised:
        fetch("clothes", tmp_path, files)
    message = str(raised.value)
    assert f"{file} ({len(content):,} bytes) is not the known file: its SHA-256 is " in message
    assert message.endswith("; remove it, and run this again")
    assert file.read_bytes() == content


def test_no_more_is_unpacked_than_the_known_size(tmp_path, files, monkeypatch):
    (tmp_path / "clothes").mkdir()
    (tmp_path / "clothes" / "images.gz").write_bytes(gzip.compress(bytes(1 << 26)))
    asked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(
        gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or read(self, size)
    )
    with pytest.raises(RunError, match="is not the known file"):
        fetch("clothes", tmp_path, files)
    assert asked == [len(CONTENTS["images.gz"]) + 1]


@pytest.mark.parametrize("content", ["other", "damaged"])
def test_a_wrong_file_from_the_host_is_removed(tmp_path, host, files, content):
    packed = bytearray(host.files["/images.gz"])
    packed[-5 if content == "other" else 200] ^= 255  # the checksum, or the compressed data
    host.files["/images.gz"] = bytes(packed)
    with pytest.raises(RunError, match=r"from http.*images.gz is not the known file: its SHA-256"):
        fetch("clothes", tmp_path, files)
    assert hidden(tmp_path / "clothes") == []


def test_two_fetches_do_not_write_the_same_file(tmp_path, host, files):
    (tmp_path / "clothes").mkdir()
    with open(tmp_path / "clothes" / "images.gz.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(RunError, match=r"another bdkd data fetch is downloading .*images.gz"):
            fetch("clothes", tmp_path, files)
    assert host.asked == []


def test_errors_say_where_to_put_files_that_cannot_be_fetched(tmp_path, host, files, monkeypatch):
    usage = SimpleNamespace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(fetching.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(RunError, match=r"GB free, and images.gz needs .* make room"):
            fetch("clothes", tmp_path, files)
    host.server.shutdown()
    host.server.server_close()
    with pytest.raises(RunError, match=rf"put it into {tmp_path}/clothes, and run this again"):
        fetch("clothes", tmp_path, files)
    (tmp_path / "clothes").rmdir()
    (tmp_path / "clothes").touch()
    with pytest.raises(RunError, match=rf"cannot write in {tmp_path}: File exists"):
        fetch("clothes", tmp_path, files)


def test_a_pipe_instead_of_a_file_is_refused_and_not_read(tmp_path, files):
    (tmp_path / "clothes").mkdir()
    os.mkfifo(tmp_path / "clothes" / "images.gz")
    with pytest.raises(RunError, match=r"images.gz: it is not a regular file"):
        fetch("clothes", tmp_path, files)


def test_the_help_names_every_known_set(capsys):
    with pytest.raises(SystemExit):
        command.run(["fetch", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, known in DATA_SETS.items():
        assert f"{name} ({known.size / 1e9:.1g} GB)" in text


def test_fashion_mnist_is_four_files_that_its_source_reads():
    from bdkd.data.fashion_mnist import PARTS, SOURCE, _names

    known = FILE_SETS[SOURCE]
    assert [file.file for file in known.files] == [
        f"{name}.gz" for split in PARTS for name in _names(split)
    ]
    assert known.folder == SOURCE
    assert known.size == 30_878_645
    for file in known.files:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
    assert [file.unpacked for file in known.files] == [
        16 + 60_000 * 784, 8 + 60_000, 16 + 10_000 * 784, 8 + 10_000
    ]  # fmt: skip


def test_the_table_of_archives_is_complete():
    for archive in ARCHIVES.values():
        assert re.fullmatch(r"[0-9a-f]{64}", archive.sha256)
        assert archive.size > 100_000_000
        assert archive.file.startswith(archive.folder.split("-batches")[0])
