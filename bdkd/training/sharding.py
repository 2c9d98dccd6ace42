"""Networks whose weights are shared out among the ranks: FSDP2, for a teacher too large for each.

The optimizer works on each rank's own part as a plain tensor, so that the fused kernels, which skip
a step on the device, serve it too. A checkpoint holds whole tensors, whatever the number of ranks,
as that of a network that is not sharded does.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bdkd.training.distributed import Ranks


def shard(network: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Share out a network's parameters, child by child: one child's weights are whole at a time."""
    assert ranks.group is not None
    mesh = DeviceMesh.from_group(ranks.group, device.type)
    for child in network.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)
    fully_shard(network, mesh=mesh)


class Sharding:
    """The sharded networks' parameters and this rank's parts of them.

    Methods that gather must be called by all ranks.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = frozenset(names)
        self._parts: list[tuple[nn.Parameter, DTensor]] = []

    def own_part(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer updates: this rank's part, a plain tensor in the same memory."""
        if not isinstance(parameter, DTensor):
            return parameter
        part = nn.Parameter(parameter.to_local().detach(), parameter.requires_grad)
        self._parts.append((part, parameter))
        return part

    def take_gradients(self) -> None:
        """Let the parts have their gradients."""
        for part, parameter in self._parts:
            gradient = parameter.grad
            part.grad = gradient.to_local() if isinstance(gradient, DTensor) else None

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def gather_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with whole tensors."""
        return {name: self.whole(value) for name, value in state.items()}

    def share_out_weights(
        self, state: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The reverse, for a module whose state dict is ``like``."""
        return {
            name: _distribute(value, own) if isinstance(own := like.get(name), DTensor) else value
            for name, value in state.items()
        }

    def gather_moments(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The optimizer's state dict with whole tensors."""
        return self._change_moments(optimizer, state, _gather)

    def share_out_moments(
        self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The reverse."""
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
                # AdamW's count of steps has no dimension
                key: value if like is None or not value.ndim else change(value, like)
                for key, value in moments.items()
            }
        return {**state, "state": changed}


def _gather(part: Tensor, like: DTensor) -> Tensor:
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    ).full_tensor()


def _distribute(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's part of a tensor that every rank has whole. No communication."""
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
