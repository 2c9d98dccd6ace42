"""Exported networks as programs of ``torch.export``.

A ``.pt2`` is a zip file, and ``torch.export.load`` unpickles some of its members. A file is
accepted only if it equals, byte for byte, the program that this bdkd and this torch export for the
same network. torch then loads this program with the weights of the file.
"""

import hashlib
import io
import zipfile
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from torch import nn

from bdkd.errors import RunError, first_line
from bdkd.export import facts as shared
from bdkd.export.facts import DIGEST, FACTS, Digest, Exported, FileFormat, Function, corrupt
from bdkd.runs.archive import ArchiveError, check_stored_zip

_WEIGHTS = "archive/data/weights/weight_"  # prefix of members with one tensor each
_EXTRA = "archive/extra/"
# serialization_id is a hash of the archive.
_UNCOMPARED = {_EXTRA + FACTS, _EXTRA + DIGEST, "archive/.data/serialization_id"}


def _encode(network: nn.Module, facts: str, input_shape: tuple[int, ...]) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    images = torch.zeros(2, *input_shape)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # contains paths of this machine

    def save(extra: dict[str, str]) -> bytes:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files=extra)
        return file.getvalue()

    with zipfile.ZipFile(io.BytesIO(save({}))) as archive:
        digest = _digest_of_weights(archive)(facts)
    return save({FACTS: facts, DIGEST: digest})


def _decode(path: Path, content: bytes) -> tuple[dict[str, str], Digest]:
    try:
        check_stored_zip(io.BytesIO(content))
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            keys = [key for key in (FACTS, DIGEST) if _EXTRA + key in archive.namelist()]
            metadata = {key: archive.read(_EXTRA + key).decode() for key in keys}
            return metadata, _digest_of_weights(archive)
    except (ArchiveError, UnicodeDecodeError) as error:
        raise corrupt(path, first_line(error)) from error


def _check(path: Path, file: BinaryIO) -> None:
    try:
        check_stored_zip(file)
    except ArchiveError as error:
        raise corrupt(path, str(error)) from error


def _open(exported: Exported, network: nn.Module, device: torch.device) -> nn.Module:
    program = torch.export.load(io.BytesIO(checked_program(exported, network)))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    graph = program.module()
    return Function(lambda images: graph(images))


def checked_program(exported: Exported, network: nn.Module) -> bytes:
    """Return a program for ``torch.export.load``: the program that this process exports, with the
    weights of the file.

    Args:
        network: the network of the file's recipe, with any weights.

    Raises:
        RunError: the program in the file differs from the one that this process exports.
    """
    facts = exported.facts
    plain = network.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    ours = _encode(plain.eval(), msgspec.json.encode(facts).decode(), facts.input_shape)
    if difference := _difference(ours, exported.content):
        if (written_by := facts.versions.get("torch")) != torch.__version__:
            raise RunError(
                f"{exported.path} was written by torch {written_by}, and this is torch "
                f"{torch.__version__}: export it again, or evaluate it with torch {written_by}"
            )
        raise RunError(
            f"{exported.path} contains a different program from the one that this bdkd exports for "
            f"{facts.model} ({difference}). It is not loaded, because an unknown program could run "
            "code: export it again"
        )
    return _with_weights(ours, exported.content)


def _difference(ours: bytes, theirs: bytes) -> str:
    """Return the name of the first member of two archives that differs, or an empty string. The
    values of weights are not compared."""
    with zipfile.ZipFile(io.BytesIO(ours)) as a, zipfile.ZipFile(io.BytesIO(theirs)) as b:
        names = [sorted(archive.namelist()) for archive in (a, b)]
        if names[0] != names[1]:  # lists, because a name may occur twice
            return next(iter(set(names[0]) ^ set(names[1])), "a member twice")
        for name in names[0]:
            if name.startswith(_WEIGHTS):
                same = a.getinfo(name).file_size == b.getinfo(name).file_size
            else:
                same = name in _UNCOMPARED or a.read(name) == b.read(name)
            if not same:
                return name
    return ""


def _with_weights(ours: bytes, theirs: bytes) -> bytes:
    """Return the archive ``ours`` with the weights of ``theirs``. torch never reads an untrusted
    archive, because its zip reader could find members that Python's zip reader does not find."""
    file = io.BytesIO()
    with (zipfile.ZipFile(io.BytesIO(ours)) as a, zipfile.ZipFile(io.BytesIO(theirs)) as b,
          zipfile.ZipFile(file, "w") as merged):  # fmt: skip
        for name in a.namelist():
            merged.writestr(name, (b if name.startswith(_WEIGHTS) else a).read(name))
    return file.getvalue()


def _digest_of_weights(archive: zipfile.ZipFile) -> Digest:
    hashed = hashlib.sha256()
    for name in sorted(archive.namelist()):
        if name.startswith(_WEIGHTS):
            hashed.update(name.encode() + archive.read(name))
    return shared.digest_of_bytes(hashed.digest())


# The size limit allows 4 billion weights.
PROGRAM = FileFormat(".pt2", 2**34, _encode, _check, _decode, _open)
