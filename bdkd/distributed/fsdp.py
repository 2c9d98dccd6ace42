"""Shard the weights of large teachers across the ranks with FSDP2.

The optimizer updates the part of each rank as a plain tensor, so that the fused kernels, which can
skip a step on the device, also work with sharded networks. A checkpoint contains whole tensors and
does not depend on the number of ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from bdkd.distributed.context import DistributedContext


def shard(network: nn.Module, context: DistributedContext, device: torch.device) -> None:
    """Shard the parameters of a network in place.

    Each child module is sharded separately, so that a rank gathers the weights of only one child at
    a time.
    """
    assert context.group is not None
    # FSDP rejects parameters in the channels-last layout.
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    mesh = DeviceMesh.from_group(context.group, device.type)
    for child in network.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(network, mesh=mesh)
    if hasattr(network, "forward_features"):
        register_fsdp_forward_method(network, "forward_features")


class Sharding:
    """The parameters of sharded networks, and the parts of them that this rank updates.

    All ranks must call the ``gather`` methods.

    Args:
        names: names of the sharded networks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self._parts: list[tuple[nn.Parameter, DTensor]] = []

    def local_part(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return this rank's part of a parameter as a plain tensor that shares its memory."""
        if not isinstance(parameter, DTensor):
            return parameter
        part = nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
        self._parts.append((part, parameter))
        return part

    def set_local_gradients(self) -> None:
        """Set the gradient of each local part."""
        for part, parameter in self._parts:
            gradient = parameter.grad
            part.grad = gradient.to_local() if isinstance(gradient, DTensor) else None

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return the whole tensor if the tensor is sharded, or else the tensor itself."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def gather_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a module's state dict with whole tensors."""
        return {name: self.full_tensor(value) for name, value in state.items()}

    def distribute_weights(
        self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return a state dict whose tensors are sharded like those of the state dict ``like``."""
        return {
            name: _distribute(value, own) if isinstance(own := like.get(name), DTensor) else value
            for name, value in state.items()
        }

    def gather_moments(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return an optimizer's state dict with whole tensors."""
        return self._change_moments(optimizer, state, _gather)

    def distribute_moments(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return an optimizer's state dict with this rank's parts, from one with whole tensors."""
        return self._change_moments(
            optimizer, state, lambda value, like: _distribute(value, like).to_local()
        )

    def _change_moments(
        self,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        change: Callable[[Tensor, DTensor], Tensor],
    ) -> dict[str, Any]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        of_part = {id(part): parameter for part, parameter in self._parts}
        changed = {}
        for index, moments in state["state"].items():
            like = of_part.get(id(parameters[index]))
            changed[index] = {
                # a 0-dim value, such as the step count of AdamW, is not sharded
                key: value if like is None or not value.ndim else change(value, like)
                for key, value in moments.items()
            }
        return {**state, "state": changed}


def _gather(part: Tensor, like: DTensor) -> Tensor:
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _distribute(whole: Tensor, like: DTensor) -> DTensor:
    """Return a sharded tensor from the whole tensor, which each rank has. The ranks do not
    communicate."""
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
