"""Exported weights as safetensors, which contain tensors and no code."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from bdkd.errors import RunError, first_line
from bdkd.export.facts import DIGEST, FACTS, Digest, Exported, FileFormat, corrupt, digest_of_bytes
from bdkd.runs.weights import mismatched_keys


def _encode(network: nn.Module, facts: str, input_shape: tuple[int, ...]) -> bytes:
    from safetensors.torch import save

    state = network.state_dict()
    tensors = {key: value.detach().clone().contiguous() for key, value in state.items()}
    metadata = {"format": "pt", FACTS: facts, DIGEST: _digest_of_tensors(tensors)(facts)}
    return save(tensors, metadata)


def _decode(path: Path, content: bytes) -> tuple[dict[str, str], Digest]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")  # of the header, which load has checked
        metadata = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise corrupt(path, first_line(error)) from error
    return metadata, _digest_of_tensors(tensors)


def _check(path: Path, file: BinaryIO) -> None:
    """Check that the header fits into the file. safetensors checks the rest."""
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= os.fstat(file.fileno()).st_size - 8:
        raise corrupt(path, f"its header would have {length:,} bytes")


def _open(exported: Exported, network: nn.Module, device: torch.device) -> nn.Module:
    from safetensors.torch import load

    tensors = load(exported.content)
    if mismatch := mismatched_keys(network, tensors):
        raise RunError(f"{exported.path} does not match {exported.facts.model}: {mismatch}")
    network.load_state_dict(tensors)
    return network.to(device).eval()


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> Digest:
    hashed = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key]
        hashed.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        hashed.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest_of_bytes(hashed.digest())


# The size limit allows 4 billion weights.
SAFETENSORS = FileFormat(".safetensors", 2**34, _encode, _check, _decode, _open)
