"""Zip files that torch wrote pass. Every other kind of zip file is refused before it is loaded."""

import io
import struct
import zipfile

import pytest
import torch

from bdkd.runs.archive import ArchiveError, check_stored_zip


def saved() -> bytes:
    """A state dict as ``torch.save`` writes it."""
    file = io.BytesIO()
    torch.save({"weight": torch.arange(3000.0), "bias": torch.ones(4)}, file)
    return file.getvalue()


def zipped(members: dict[str, bytes], **options) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def refused(content: bytes) -> str:
    with pytest.raises(ArchiveError) as error:
        check_stored_zip(io.BytesIO(content))
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


def test_files_of_torch_pass(tmp_path):
    check_stored_zip(io.BytesIO(saved()))
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "modèle.pt2", extra_files={"facts": "{}"})
    torch.save({}, tmp_path / "empty.pt")
    for path in tmp_path.iterdir():
        with open(path, "rb") as file:
            check_stored_zip(file)


def test_a_flipped_bit_of_a_tensor_is_found():
    content = bytearray(saved())
    begin = content.index(torch.arange(3000.0).numpy().tobytes())
    for offset in (begin, begin + 5999, begin + 11_999):  # first, middle and last byte
        content[offset] ^= 1
        assert "CRC-32 for file 'archive/data/" in refused(bytes(content))
        content[offset] ^= 1
    check_stored_zip(io.BytesIO(content))


@pytest.mark.parametrize("kept", [0, 10, 21, 22, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(kept):
    content = saved()
    refused(content[: kept if isinstance(kept, int) else int(kept * len(content))])


def test_other_zip_files_are_refused():
    assert "compressed" in refused(zipped({"a": b"0" * 10**6}, compression=zipfile.ZIP_DEFLATED))
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a", b"2")
    assert " twice" in refused(file.getvalue())
    assert " twice" in refused(zipped({"data.pkl": b"1", "DATA.pkl": b"2"}))
    assert "not begin as a zip" in refused(b"#!/bin/sh\n" + saved())
    assert "bytes after its end" in refused(saved() + b"more")
    assert "end is missing" in refused(saved()[:-10])
    for text in (b"", b"not a zip file " * 100, b"PK\5\6", b"\0" * 4096):
        refused(text)


def patched(content: bytes, offset: int, value: bytes) -> bytes:
    return content[:offset] + value + content[offset + len(value) :]


def test_headers_that_contradict_each_other_are_refused():
    content = zipped({"first": b"1" * 50, "second": b"2" * 50})
    directory = content.index(b"PK\1\2")
    second = content.index(b"PK\1\2", directory + 4)
    end = content.index(b"PK\5\6")
    # Offsets in a directory entry: flags 8, method 10, sizes 20 and 24, header 42, name 46.
    assert "encrypted" in refused(patched(content, directory + 8, struct.pack("<H", 1)))
    assert "compressed" in refused(patched(content, directory + 10, struct.pack("<H", 8)))
    assert "compressed" in refused(patched(content, directory + 24, struct.pack("<L", 10**9)))
    huge = struct.pack("<2L", 10**9, 10**9)
    assert "more than the file" in refused(patched(content, directory + 20, huge))
    assert "overlap" in refused(patched(content, second + 42, struct.pack("<L", 0)))
    assert "header of 'second'" in refused(patched(content, second + 42, struct.pack("<L", 100)))
    assert "differ" in refused(patched(content, directory + 46, b"F"))
    assert "NUL" in refused(patched(content, directory + 47, b"\0"))
    assert "members" in refused(patched(content, end + 8, struct.pack("<2H", 1, 1)))
    assert "several parts" in refused(patched(content, end + 8, struct.pack("<H", 1)))
    assert "directory" in refused(patched(content, end + 16, struct.pack("<L", 0)))


def test_wrong_64_bit_sizes_are_refused():
    content = saved()
    locator, record = content.index(b"PK\6\7"), content.index(b"PK\6\6")
    assert "misplaced" in refused(patched(content, locator + 8, struct.pack("<Q", 0)))
    assert "damaged" in refused(patched(content, record, b"PK\0\0"))
    for field in range(24, 56, 8):
        refused(patched(content, record + field, struct.pack("<Q", 2**63)))
    # A directory entry with wrong 64-bit sizes in its extra field
    content = zipped({"member": b"1" * 50})
    entry, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    extra = struct.pack("<2H2Q", 1, 16, 2**62, 2**62)
    lying = bytearray(content[entry:end] + extra)
    lying[20:28] = b"\xff" * 8
    lying[30:32] = struct.pack("<H", len(extra))
    ending = bytearray(content[end:])
    ending[12:16] = struct.pack("<L", len(lying))
    assert "more than the file" in refused(content[:entry] + bytes(lying) + bytes(ending))


def test_a_zip_bomb_of_overlapping_members_is_refused():
    """Many directory entries refer to one member, so that 200 kB would be read as 400 MB (D.
    Fifield, "A better zip bomb", 2019)."""
    content = zipped({"0000": b"\0" * 100_000})
    entry, end = content.index(b"PK\1\2"), content.index(b"PK\5\6")
    entries = [patched(content[entry:end], 46, b"%04d" % index) for index in range(4000)]
    ending = bytearray(content[end:])
    ending[8:16] = struct.pack("<2HL", 4000, 4000, sum(map(len, entries)))
    message = refused(content[:entry] + b"".join(entries) + bytes(ending))
    assert "400,000,000 bytes, more than the file" in message


def test_a_too_large_directory_is_refused(monkeypatch):
    monkeypatch.setattr("bdkd.runs.archive.MAX_DIRECTORY_BYTES", 100)
    assert "more than 100" in refused(zipped({f"member{index}": b"" for index in range(9)}))


def test_any_damage_is_an_archive_error_or_harmless():
    """Change one byte at any place: the file is refused, or its members read the same."""
    content = zipped({"first": b"1" * 20, "second": b"2" * 20})
    members = {"first": b"1" * 20, "second": b"2" * 20}
    for offset in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            changed = patched(content, offset, bytes([content[offset] ^ flip]))
            try:
                check_stored_zip(io.BytesIO(changed))
            except ArchiveError:
                continue
            with zipfile.ZipFile(io.BytesIO(changed)) as archive:
                assert {name: archive.read(name) for name in archive.namelist()} == members
