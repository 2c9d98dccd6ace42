"""Fold the temperature of temperature scaling into the last layer of a network.

The logits ``W x + b`` divided by ``T`` are ``(W / T) x + b / T``. The softmax of the new logits is
better calibrated without further steps, and the predictions do not change.
"""

import copy

import torch
from torch import Tensor, nn

from bdkd.errors import RunError
from bdkd.evaluation.temperature import HIGHEST, LOWEST
from bdkd.models.key_names import head_keys

TOLERANCE = 1e-4  # relative to the largest logit


def check_fit(temperature: float | None, name: str) -> float:
    """Return a temperature that was fitted on the validation images. Raise ``RunError`` if the fit
    has no minimum."""
    without = "export it without --temperature"
    if temperature is None:
        raise RunError(
            f"no temperature fits {name}: its validation logits are not finite; {without}"
        )
    reasons = {
        LOWEST: "which happens if the network classifies every validation image correctly",
        HIGHEST: "which happens if the network is worse than chance",
    }
    if temperature in reasons:
        raise RunError(
            f"no temperature fits {name}: the fit ended at its bound {temperature:g}, "
            f"{reasons[temperature]}; hold out more images (data.validation), or {without}"
        )
    return temperature


@torch.no_grad()  # not inference_mode(), whose tensors torch.export refuses
def fold_temperature(
    network: nn.Module, temperature: float, images: Tensor, name: str
) -> nn.Module:
    """Return a copy of a network whose logits are divided by a temperature.

    Args:
        network: must be in evaluation mode.
        images: (B, C, H, W), to check the logits of the copy.
        name: name of the network, for messages.

    Raises:
        RunError: the network does not end with a linear layer, or the weights of this layer are
            also used elsewhere.
    """
    folded = copy.deepcopy(network)
    keys = head_keys(folded)
    for key, value in folded.state_dict().items():
        if key in keys and value.is_floating_point():
            value.div_(temperature)
    expected = network(images) / temperature
    error = (folded(images) - expected).abs().max().item()
    if not error <= TOLERANCE * expected.abs().max().item():  # also refuses NaN
        layer = ", ".join(sorted({key.rpartition(".")[0] for key in keys})) or "no linear layer"
        raise RunError(
            f"the temperature cannot be folded into {name}: its logits are not the output of one "
            f"linear layer (found: {layer}); export it without --temperature"
        )
    return folded
