"""Compute the floating-point operations and memory of a training step from its shapes.

The networks run on the meta device, so no memory is allocated.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bdkd.data import InMemory
from bdkd.device import AUTOCAST, process_memory
from bdkd.engine.components import Components
from bdkd.engine.networks import build_networks
from bdkd.engine.optim import optimizer_entry


@dataclass(frozen=True)
class Cost:
    """The cost of one network.

    ``torch.utils.flop_counter`` counts the FLOPs of convolutions and matrix products. A
    multiplication and an addition are two FLOPs.
    """

    parameters: int
    forward: int  # FLOPs per image of the forward pass
    step: int  # FLOPs per image, forward and backward; a frozen network has no backward pass
    kept: int  # bytes per image that autograd keeps for the backward pass
    largest: int  # bytes per image of the largest output of a layer


def costs(components: Components, image_size: tuple[int, int] | None = None) -> dict[str, Cost]:
    """Return the cost of each network of a run, by name.

    Args:
        image_size: height and width in pixels. Default: the size of the images in the data set.
    """
    recipe, info = components.recipe, components.source.info
    # Build new networks, because those of a run may be sharded, or have SyncBatchNorm layers that
    # only run on a GPU.
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
    """Return the cost of a network, and move the network to the meta device.

    Args:
        shape: shape of an image ``(C, H, W)``.
        trains: whether the network trains.
        dtype: dtype of the activations. Autocast does not support the meta device, so the whole
            network is converted to this dtype. The activations that it keeps are the same as under
            autocast, except for normalisations that autocast computes in float32.
    """
    parameters = sum(p.numel() for p in network.parameters())
    network = network.to("meta", dtype).train(trains)
    # Use at least 2 images, because batch norm refuses a single value. The difference between two
    # batches excludes tensors that do not depend on the images, such as the transposed weights of a
    # linear layer.
    images, more = (torch.empty(n, *shape, device="meta", dtype=dtype) for n in (2, 4))
    kept = _bytes_kept(network, more, trains) - _bytes_kept(network, images, trains)
    largest = 0

    def measure(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    for module in network.modules():
        module.register_forward_hook(measure)
    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward},
    )
    with counter, torch.set_grad_enabled(trains):
        logits = network(images)
        forward = counter.get_total_flops()
        if trains:
            logits.sum().backward()
    return Cost(
        parameters,
        forward // len(images),
        counter.get_total_flops() // len(images),
        kept // len(images),
        largest // len(images),
    )


def _bytes_kept(network: nn.Module, images: Tensor, trains: bool) -> int:
    """Return the bytes that autograd keeps from a forward pass, without the parameters."""
    own = {id(p) for p in network.parameters()}
    kept: dict[int, Tensor] = {}  # keep the tensors, because ids are unique only among live objects

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[id(tensor)] = tensor
        return tensor

    with (
        torch.set_grad_enabled(trains),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        network(images)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


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
    """Return the FLOPs of a convolution's backward pass.

    Each of the two gradients takes as many FLOPs as the forward pass. torch's count for the weight
    gradient of a grouped convolution is too large by the number of groups. For a step of
    MobileNetV1, the total would be 3.5 times too large.
    """
    once = 2 * math.prod(images if transposed else grad_out) * math.prod(weight[1:])
    return once * sum(output_mask[:2])


@dataclass(frozen=True)
class Memory:
    """The estimated peak memory of a run on one rank, in bytes."""

    process: int  # Python, torch and other code; 0 on a GPU
    data: int  # images, if the data source keeps them in memory
    weights: int
    gradients: (
        int  # gradients, state of the optimizer, averages of students, casts to low precision
    )
    activations: int  # kept for the backward pass of a micro-batch
    workspace: int  # the batch and the temporary memory of operators

    @property
    def total(self) -> int:
        return self.process + self.data + self.weights + self.to_come

    @property
    def to_come(self) -> int:
        """Memory that a run allocates after it has built the data set and the networks."""
        return self.gradients + self.activations + self.workspace


# In addition to the kept activations, several temporary tensors exist at the same time: the
# workspace of a convolution, an input and its gradient, and the gradient of a shortcut. Their
# number is in units of the largest activation. It was fitted to the measured peaks of seven pairs
# of networks on a CPU (tests/training/test_memory.py).
HELD_IN_TRAINING, HELD_IN_EVALUATION = 4, 3
# Code and tables that torch and oneDNN load in the first step on a CPU
FIRST_STEP = 28 * 2**20


def estimate_memory(components: Components, each: Mapping[str, Cost], ranks: int = 1) -> Memory:
    """Estimate the peak memory of a run on one rank.

    Args:
        components: a data set and networks that were built but not trained.
        each: the result of :func:`costs`.
        ranks: number of ranks that share a batch.
    """
    recipe, info, source = components.recipe, components.source.info, components.source
    train, trained = recipe.train, components.networks.trained()
    moments = optimizer_entry(recipe.optimizer).moments(recipe.optimizer)
    on_gpu = components.device.type == "cuda"
    images = math.ceil(train.batch_size / ranks)
    micro_batch = math.ceil(images / train.accumulate)
    weights = gradients = kept = 0
    for name, cost in each.items():
        config, values = recipe.networks[name], cost.parameters
        share = ranks if config.shard else 1
        weights += 4 * values // share
        if train.precision != "fp32":
            gradients += 2 * values  # autocast caches the weights in low precision
        if name in trained:
            averaged = train.ema_decay is not None and config.role == "student"
            gradients += 4 * values * (1 + moments + averaged) // share
            kept += cost.kept * micro_batch
    largest = max(cost.largest for cost in each.values())
    batch = 2 * components.objective.views * images * 4 * info.channels * math.prod(info.image_size)
    # An evaluation keeps no activations, but its batch is not divided into micro-batches.
    evaluation = HELD_IN_EVALUATION * largest * images - kept
    workspace = max(HELD_IN_TRAINING * largest * micro_batch, evaluation) + batch
    data = 0
    if isinstance(source, InMemory):
        data = sum(x.nbytes for images in source.splits.values() for x in images)
    process = 0 if on_gpu else max(0, process_memory() - data - weights)
    return Memory(
        process, data, weights, gradients, kept, workspace + (0 if on_gpu else FIRST_STEP)
    )
