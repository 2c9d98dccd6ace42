"""Write and read the files of ``bdkd export``: one network, and the facts that its user needs.

Files may come from strangers, so they are read as data and never as code:

- ONNX is run by onnxruntime, after :mod:`bdkd.training.onnx_trust` has checked the whole model.
- safetensors holds tensors only.
- A ``.pt2`` is a zip file in which ``torch.export.load`` unpickles members. It is accepted only if
  it equals, byte for byte, the program that this bdkd and this torch make of the network that it
  names. torch then loads that program, with the weights of the file.

Sizes are checked before anything is loaded.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import tomllib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from bdkd.config import NetworkConfig, ObjectiveConfig, Recipe
from bdkd.data.base import Normalisation
from bdkd.errors import RunError
from bdkd.training.archive import ArchiveError, check_stored_zip
from bdkd.training.checkpoint import first_line, mismatched_keys, open_regular
from bdkd.training.onnx_trust import refusal
from bdkd.training.state import EMA_SUFFIX

Format = Literal["onnx", "export", "safetensors"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "export": ".pt2", "safetensors": ".safetensors"}

# The largest files that are read. protobuf's limit for ONNX; for the others, 4 billion weights.
MAX_BYTES: dict[Format, int] = {"onnx": 2**31 - 1, "export": 2**34, "safetensors": 2**34}
MAX_FACTS_BYTES = 2**24  # 21,841 class names take 1 MB
MAX_RECIPE_CHARACTERS, MAX_DOTS = 2**16, 1000  # of a line; recipes have about 2,000 characters
MAX_PIXELS = 2**28  # of one image, all channels

VERSION = 1
FACTS, DIGEST = "bdkd", "bdkd_sha256"  # keys of a file's metadata
_WEIGHTS = "archive/data/weights/weight_"  # members of a .pt2 that hold one tensor each
_EXTRA = "archive/extra/"
# The writer's own hash of the archive
_UNCOMPARED = {_EXTRA + FACTS, _EXTRA + DIGEST, "archive/.data/serialization_id"}


@dataclass(frozen=True)
class Facts:
    """What goes with the weights of an exported network."""

    version: int  # of these facts' layout
    network: str
    """Its name in the run; a student's average is ``NAME_ema``."""
    model: str
    role: str
    parameters: int
    method: str
    seed: int
    step: int
    recipe: str  # TOML
    classes: tuple[str, ...]
    channels: int
    image_size: tuple[int, int]  # height, width in pixels
    normalisation: Normalisation | None
    measured_on: str  # test, val, or nothing
    images: int  # that it was measured on
    metrics: dict[str, float | None]
    versions: dict[str, str]  # of bdkd and torch, and the commit where it is known

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return (self.channels, *self.image_size)


class Exported(NamedTuple):
    """A file of ours, read but not yet run."""

    path: Path
    format: Format
    content: bytes
    facts: Facts


class Function(nn.Module):
    """A network that is a function of images ``(B, C, H, W)`` and has no modes."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        return self.function(images)


def alone(recipe: Recipe, network: str) -> Recipe:
    """A recipe with one of its networks, as a student without a teacher: the others need not be
    built, nor their weights be there, to run this one on the recipe's data.

    Raises:
        RunError: the recipe has no such network.
    """
    config = recipe.networks.get(network.removesuffix(EMA_SUFFIX))
    if config is None:
        raise RunError(f"a file of {network!r} says a recipe that has no such network")
    options = built_without_weights(config)
    student = NetworkConfig(model=config.model, role="student", options=options)
    return dataclasses.replace(
        recipe,
        networks={network.removesuffix(EMA_SUFFIX): student},
        objective=ObjectiveConfig(name="independent"),
    )


# Options of timm.create_model that load or download weights; checkpoint_path unpickles a file.
_WEIGHT_OPTIONS = {
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir",
}  # fmt: skip


def built_without_weights(config: NetworkConfig) -> dict[str, bool | int | float | str]:
    """Return a network's options without those that load or download other weights."""
    return {key: value for key, value in config.options.items() if key not in _WEIGHT_OPTIONS}


def is_exported(path: Path) -> bool:
    """Return whether a path has the suffix of an exported file. The content is not checked."""
    return path.suffix in SUFFIXES.values()


def encode(kind: Format, network: nn.Module, facts: Facts) -> bytes:
    """The file of a network in evaluation mode on the CPU.

    Raises:
        RunError: a package is missing, or the network cannot be written in this format.
    """
    text = msgspec.json.encode(facts).decode()
    try:
        return _ENCODE[kind](network, text, facts.input_shape)
    except RunError:
        raise
    except Exception as error:  # the exporters raise whatever their inside raises
        raise RunError(
            f"cannot export {facts.network} ({facts.model}) to {kind}: {first_line(error)} "
            "(--debug shows where)"
        ) from error


def read_exported(path: Path) -> Exported:
    """Read a file and its facts.

    Raises:
        RunError: the file is missing, too large, corrupt, changed since it was written, or was not
            written by ``bdkd export``.
    """
    kind = next(kind for kind, suffix in SUFFIXES.items() if suffix == path.suffix)
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            limit = min(MAX_BYTES[kind], memory_limit())
            if status.st_size > limit:
                raise RunError(
                    f"cannot read {path}: it has {status.st_size:,} bytes, and at most {limit:,} "
                    f"bytes of a {path.suffix} file are read on this machine"
                )
            _CHECK_BEFORE_READING[kind](path, file)
            file.seek(0)
            content = file.read(limit + 1)
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RunError(f"cannot read {path}: {reason}") from error
    return decode(path, kind, content)


def decode(path: Path, kind: Format, content: bytes) -> Exported:
    """Return what :func:`read_exported` returns, from the content of a file.

    Args:
        path: names the file in messages.
    """
    metadata, digest = _DECODE[kind](path, content)
    if FACTS not in metadata or DIGEST not in metadata:
        raise RunError(
            f"{path} was not written by bdkd export: it has no recipe and no description of its "
            "images"
        )
    if len(metadata[FACTS]) > MAX_FACTS_BYTES:
        raise _corrupt(path, f"its facts have {len(metadata[FACTS]):,} characters")
    if metadata[DIGEST] != digest(metadata[FACTS]):
        raise RunError(f"{path} was damaged or changed since bdkd export wrote it: export it again")
    try:
        facts = msgspec.json.decode(metadata[FACTS], type=Facts)
        _check_recipe(facts.recipe)
    except ValueError as error:  # of msgspec, and of tomllib
        raise RunError(
            f"{path} was written by another version of bdkd: export it again ({first_line(error)})"
        ) from error
    except RecursionError as error:
        raise _corrupt(path, "its facts are nested too deeply") from error
    if facts.version != VERSION:
        raise RunError(
            f"{path} has facts of version {facts.version}, this bdkd reads {VERSION}: export it "
            "again"
        )
    if min(facts.input_shape) < 1 or math.prod(facts.input_shape) > MAX_PIXELS:
        raise _corrupt(path, f"its images have the shape {facts.input_shape}")
    return Exported(path, kind, content, facts)


def _check_recipe(recipe: str) -> None:
    """Check that a recipe's text can be parsed in little memory.

    Raises:
        ValueError: the text is no TOML, or too long.
        RecursionError: it is nested too deeply.
    """
    # tomllib needs memory of the square of the number of parts of a dotted key: 40 GB for 100,000.
    dots = max((line.count(".") for line in recipe.splitlines()), default=0)
    if len(recipe) > MAX_RECIPE_CHARACTERS or dots > MAX_DOTS:
        raise ValueError(f"a recipe of {len(recipe):,} characters, {dots:,} dots in a line")
    tomllib.loads(recipe)


def open_network(exported: Exported, network: nn.Module, device: torch.device) -> nn.Module:
    """The network in a file, as a function of images on ``device``.

    Args:
        network: built as the file's recipe says, with any weights.

    Raises:
        RunError: the file holds something else than that network.
    """
    return _OPEN[exported.format](exported, network, device)


# --- safetensors ---------------------------------------------------------------------------------


def _encode_safetensors(network: nn.Module, facts: str, input_shape: tuple[int, ...]) -> bytes:
    from safetensors.torch import save

    tensors = {key: value.detach().clone() for key, value in network.state_dict().items()}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    metadata = {"format": "pt", FACTS: facts, DIGEST: _digest_of_tensors(tensors)(facts)}
    return save(tensors, metadata)


def _decode_safetensors(path: Path, content: bytes) -> tuple[dict[str, str], "Digest"]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")  # of the header, which load has checked
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _corrupt(path, first_line(error)) from error
    return metadata, _digest_of_tensors(tensors)


def _check_safetensors(path: Path, file: BinaryIO) -> None:
    """Check that the header fits into the file. The library checks the rest."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= os.fstat(file.fileno()).st_size - 8:
        raise _corrupt(path, f"its header would have {length:,} bytes")


def _open_safetensors(exported: Exported, network: nn.Module, device: torch.device) -> nn.Module:
    from safetensors.torch import load

    tensors = load(exported.content)
    mismatch = mismatched_keys(network, tensors)
    if mismatch:
        raise RunError(f"{exported.path} is no {exported.facts.model}: {mismatch}")
    network.load_state_dict(tensors)
    return network.to(device).eval()


# --- torch.export --------------------------------------------------------------------------------


def _encode_program(network: nn.Module, facts: str, input_shape: tuple[int, ...]) -> bytes:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        network, (torch.zeros(2, *input_shape),), dynamic_shapes=({0: batch},)
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of the machine that it was written on

    def save(extra: dict[str, str]) -> bytes:
        file = io.BytesIO()
        torch.export.save(program, file, extra_files=extra)
        return file.getvalue()

    with zipfile.ZipFile(io.BytesIO(save({}))) as archive:
        digest = _digest_of_weights(archive)(facts)
    return save({FACTS: facts, DIGEST: digest})


def _decode_program(path: Path, content: bytes) -> tuple[dict[str, str], "Digest"]:
    try:
        check_stored_zip(io.BytesIO(content))
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            metadata = {
                key: archive.read(_EXTRA + key).decode()
                for key in (FACTS, DIGEST)
                if _EXTRA + key in archive.namelist()
            }
            return metadata, _digest_of_weights(archive)
    except (ArchiveError, UnicodeDecodeError) as error:
        raise _corrupt(path, first_line(error)) from error


def _check_program(path: Path, file: BinaryIO) -> None:
    try:
        check_stored_zip(file)
    except ArchiveError as error:
        raise _corrupt(path, str(error)) from error


def _open_program(exported: Exported, network: nn.Module, device: torch.device) -> nn.Module:
    facts = exported.facts
    plain = network.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    ours = encode("export", plain.eval(), facts)
    difference = _difference(ours, exported.content)
    if difference and facts.versions.get("torch") != torch.__version__:
        raise RunError(
            f"{exported.path} was written by torch {facts.versions.get('torch')}, this is "
            f"{torch.__version__}: export it again, or evaluate it there"
        )
    if difference:
        raise RunError(
            f"{exported.path} holds another program than this bdkd makes of {facts.model} "
            f"({difference}), and a stranger's program could run code, so it is not loaded: "
            "export it again"
        )
    program = torch.export.load(io.BytesIO(_with_weights(ours, exported.content)))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    graph = program.module()
    return Function(lambda images: graph(images))


def _difference(ours: bytes, theirs: bytes) -> str:
    """The first member in which two programs differ by more than the values of weights; or
    nothing."""
    with zipfile.ZipFile(io.BytesIO(ours)) as a, zipfile.ZipFile(io.BytesIO(theirs)) as b:
        names = [sorted(archive.namelist()) for archive in (a, b)]
        if names[0] != names[1]:  # sorted lists: a name that stands there twice counts twice
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
    """Our archive with the weights of theirs: torch never reads a stranger's archive, in which its
    reader of zip files might find other members than Python's has shown us."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(ours)) as a,
        zipfile.ZipFile(io.BytesIO(theirs)) as b,
        zipfile.ZipFile(file, "w") as merged,
    ):
        for name in a.namelist():
            merged.writestr(name, (b if name.startswith(_WEIGHTS) else a).read(name))
    return file.getvalue()


# --- ONNX ----------------------------------------------------------------------------------------


def _encode_onnx(network: nn.Module, facts: str, input_shape: tuple[int, ...]) -> bytes:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its own inside
        program = torch.onnx.export(
            network,
            (torch.zeros(2, *input_shape),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # with stack traces: paths of the machine it was written on
    if model.ByteSize() >= 2**31:
        raise RunError("ONNX files end at 2 GiB: use --to safetensors or export")
    for key, value in ((FACTS, facts), (DIGEST, _digest_of_bytes(_without_metadata(model))(facts))):
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()


def _decode_onnx(path: Path, content: bytes) -> tuple[dict[str, str], "Digest"]:
    model = _parse_onnx(path, content)
    # protobuf raises for text that is not UTF-8, or returns bytes, depending on its version.
    with contextlib.suppress(UnicodeDecodeError):
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if all(isinstance(text, str) for entry in metadata.items() for text in entry):
            return metadata, _digest_of_bytes(_without_metadata(model))
    raise _corrupt(path, "its metadata is not text")


def _parse_onnx(path: Path, content: bytes):
    """Return the ``onnx.ModelProto`` in a file.

    Raises:
        RunError: the file is corrupt, nested too deeply (protobuf's limit is 100 messages), or
            refused by :func:`~bdkd.training.onnx_trust.refusal`.
    """
    onnx = _require("onnx")
    decode_error = import_module("google.protobuf.message").DecodeError
    try:
        model = onnx.ModelProto.FromString(content)
    except (decode_error, RecursionError) as error:
        raise _corrupt(path, first_line(error)) from error
    model.DiscardUnknownFields()
    try:
        reason = refusal(model)
    except UnicodeDecodeError as error:
        raise _corrupt(path, first_line(error)) from error
    if reason is not None:
        raise RunError(f"{path} is refused: {reason}")
    return model


def _open_onnx(exported: Exported, network: nn.Module, device: torch.device) -> nn.Module:
    runtime = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors arrive as exceptions
    # The bytes of some valid ONNX files are also a file in onnxruntime's own format, which nothing
    # here has checked. onnxruntime would guess the format.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # A small file can ask for huge tensors, for example with ConstantOfShape. Exceeding max_mem is
    # an error of the run, where exceeding the machine's memory would kill the process.
    memory = runtime.OrtMemoryInfo(
        "Cpu", runtime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, runtime.OrtMemType.DEFAULT
    )
    arena = runtime.OrtArenaCfg(memory_limit(), -1, -1, -1)
    runtime.create_and_register_allocator(memory, arena)
    options.add_session_config_entry("session.use_env_allocators", "1")
    available = runtime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
    providers = [p for p in (*wanted, "CPUExecutionProvider") if p in available]
    # Without the metadata: with ORT_LOAD_CONFIG_FROM_MODEL=1, onnxruntime takes options from there.
    checked = _without_metadata(_parse_onnx(exported.path, exported.content))
    try:
        session = runtime.InferenceSession(
            checked, options, providers=providers,
            disabled_optimizers=["ConstantFolding"],  # its tensors are made outside of the arena
        )  # fmt: skip
    except Exception as error:  # onnxruntime has one type for each of its codes, below Exception
        raise RunError(f"onnxruntime cannot run {exported.path}: {first_line(error)}") from error

    def logits(images: Tensor) -> Tensor:
        pixels = images.float().contiguous().cpu().numpy()
        try:
            [result] = session.run(["logits"], {"images": pixels})
        except Exception as error:
            raise RunError(
                f"onnxruntime cannot run {exported.path}: {first_line(error)}"
            ) from error
        return torch.from_numpy(result).to(images.device)

    return Function(logits)


def _without_metadata(model) -> bytes:
    """Remove ``metadata_props`` from a model, and return the rest as bytes."""
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


# --- what they share -----------------------------------------------------------------------------

Digest = Callable[[str], str]
"""SHA-256 of a file's weights together with its facts: damage shows, a forger's hand does not."""


def _digest_of_bytes(content: bytes) -> Digest:
    return lambda facts: hashlib.sha256(facts.encode() + content).hexdigest()


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> Digest:
    hashed = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key]
        hashed.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return _digest_of_bytes(hashed.digest())


def _digest_of_weights(archive: zipfile.ZipFile) -> Digest:
    hashed = hashlib.sha256()
    for name in sorted(archive.namelist()):
        if name.startswith(_WEIGHTS):
            hashed.update(name.encode() + archive.read(name))
    return _digest_of_bytes(hashed.digest())


def _require(package: str):
    try:
        return import_module(package)
    except ImportError as error:
        raise RunError(f"ONNX files need {package}: pip install 'bdkd[export]'") from error


def _corrupt(path: Path, reason: str) -> RunError:
    return RunError(f"cannot read {path}: it is corrupt or cut off ({reason}); export it again")


def memory_limit() -> int:
    """Return half of the memory, in bytes, of this machine or of its control group (cgroup v2): the
    most that a file, or the tensors of an ONNX model, may take."""
    limit = 2**40
    if hasattr(os, "sysconf"):
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return limit // 2


_ENCODE = {
    "onnx": _encode_onnx, "export": _encode_program, "safetensors": _encode_safetensors,
}  # fmt: skip
_DECODE = {
    "onnx": _decode_onnx, "export": _decode_program, "safetensors": _decode_safetensors,
}  # fmt: skip
_CHECK_BEFORE_READING: dict[Format, Callable[[Path, BinaryIO], None]] = {
    "onnx": lambda path, file: None, "export": _check_program, "safetensors": _check_safetensors,
}  # fmt: skip
_OPEN = {
    "onnx": _open_onnx, "export": _open_program, "safetensors": _open_safetensors,
}  # fmt: skip
