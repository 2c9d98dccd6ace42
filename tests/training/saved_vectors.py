"""Read the tensors of a checkpoint as a few long vectors, so that tests can compare checkpoints.

This module needs only torch and no code of bdkd, so it reads the checkpoints of commit 0b69d99 and
of every later commit.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST = 1000  # maximum number of elements; longer vectors keep evenly spaced elements


def read_state(path: Path) -> dict[str, Any]:
    """Return the training state in a checkpoint file."""
    return torch.load(path, map_location="cpu", weights_only=True)["state"]


def vectors(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a training state, concatenated by kind.

    Keys are ``NETWORK.parameters`` and ``NETWORK.statistics`` (batch norm's running mean and
    variance) of every network and every average, and ``moments.KIND`` of the optimizer. Integer
    tensors are left out.
    """
    found: dict[str, list[Tensor]] = {}
    weights = {key.removeprefix("members."): value for key, value in state["networks"].items()}
    for name, average in state["ema"].items():
        weights |= {f"{name}.{key}": value for key, value in average.items()}
    for key in sorted(weights):
        kind = "statistics" if ".running_" in key else "parameters"
        found.setdefault(f"{key.split('.')[0]}.{kind}", []).append(weights[key])
    moments = state["optimizer"]["state"]
    for index in sorted(moments):
        for kind, value in moments[index].items():
            found.setdefault(f"moments.{kind}", []).append(torch.as_tensor(value))
    floating = {
        key: [value.flatten().float() for value in values if value.is_floating_point()]
        for key, values in found.items()
    }
    return {key: _thinned(torch.cat(values)) for key, values in floating.items() if values}


def _thinned(vector: Tensor) -> Tensor:
    return vector[:: -(-len(vector) // LONGEST)].clone()
