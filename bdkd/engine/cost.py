"""The cost of a step by its shapes alone: floating-point operations, and bytes kept for the
backward pass. Computed on the meta device, so that nothing is allocated."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bdkd.device import AUTOCAST
from bdkd.engine.components import Components
from bdkd.engine.networks import build_networks


@dataclass(frozen=True)
class Cost:
    """The cost of one network.

    FLOPs are those of convolutions and matrix products, as ``torch.utils.flop_counter`` counts
    them: a multiplication and an addition are two.
    """

    parameters: int
    forward: int  # FLOPs per image
    step: int  # FLOPs per image, forward and backward; of a frozen network the forward pass alone
    kept: int  # bytes per image that autograd keeps from the forward for the backward pass


def costs(components: Components, image_size: tuple[int, int] | None = None) -> dict[str, Cost]:
    """Return the cost of each network of a run, by name.

    Args:
        image_size: height and width in pixels. Default: those of the data.
    """
    recipe, info = components.recipe, components.source.info
    # Built anew: those of a run may be sharded, or have batch norms that only a GPU computes.
    with torch.device("meta"):
        networks = build_networks(
            recipe.networks, components.objective.frozen, info.num_classes, info.channels
        )
    dtype = AUTOCAST[recipe.train.precision] or torch.float32
    shape = (info.channels, *(image_size or info.image_size))
    return {
        name: cost_of(network, shape, name not in networks.frozen, dtype)
        for name, network in networks.members.items()
    }


def cost_of(
    network: nn.Module, shape: tuple[int, ...], trains: bool, dtype: torch.dtype = torch.float32
) -> Cost:
    """Return the cost of a network for images of ``shape``. Moves the network to the meta device.

    Args:
        dtype: of the activations. Autocast does not reach the meta device, so the whole network
            takes this dtype. It then keeps what autocast keeps, except for normalisations that
            autocast leaves in float32.
    """
    parameters = sum(p.numel() for p in network.parameters())
    network = network.to("meta", dtype).train(trains)
    images = torch.empty(2, *shape, device="meta", dtype=dtype)  # 2: batch norm refuses one value
    own = {id(p) for p in network.parameters()}
    kept: dict[int, Tensor] = {}  # an id is unique only while its tensor lives

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor)] = tensor
        return tensor

    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward},
    )
    with counter, torch.set_grad_enabled(trains):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = network(images)
        forward = counter.get_total_flops()
        if trains:
            logits.sum().backward()
    return Cost(
        parameters,
        forward // len(images),
        counter.get_total_flops() // len(images),
        sum(tensor.numel() * tensor.element_size() for tensor in kept.values()) // len(images),
    )


def _convolution_backward(
    grad_out: Sequence[int],
    images: Sequence[int],
    weight: Sequence[int],
    bias: object,
    stride: object,
    padding: object,
    dilation: object,
    transposed: bool,
    output_padding: object,
    groups: int,
    output_mask: Sequence[bool],
    **_: object,
) -> int:
    """Return the FLOPs of a convolution's backward pass: each of the two gradients takes as many as
    the forward pass. torch's own count of a grouped weight gradient is too large by the number of
    groups, which makes a step of MobileNetV1 3.5 times too large."""
    once = 2 * math.prod(images if transposed else grad_out) * math.prod(weight[1:])
    return once * sum(output_mask[:2])
