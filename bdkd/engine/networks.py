"""Combine K networks in one module, so that they are compiled, wrapped and saved together."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdkd._torch_compat import ignore_in_ddp
from bdkd.config import DistributedConfig, NetworkConfig, Recipe
from bdkd.distributed.context import DistributedContext, by_dtype, copy_flat, flatten
from bdkd.engine.ranges import named_range
from bdkd.models import create_model
from bdkd.models.registry import default_options

RunAll = Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]


def run_sequentially(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """Run the calls one after the other, and return their results."""
    return [call() for call in calls]


class Networks(nn.Module):
    """The networks of a recipe as one module, whose forward pass returns the logits of each.

    Args:
        members: the networks by name.
        frozen: names of networks that never train. They stay in evaluation mode, and autograd does
            not record their operations.
    """

    def __init__(
        self, members: Mapping[str, nn.Module], frozen: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.members = nn.ModuleDict(members)
        self.frozen = frozen
        for name in frozen:
            self.members[name].requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Networks":
        super().train(mode)
        for name in self.frozen:
            self.members[name].eval()
        return self

    def trained(self) -> dict[str, nn.Module]:
        """Return the networks that train, by name."""
        return {n: network for n, network in self.members.items() if n not in self.frozen}

    def forward(
        self, views: tuple[Tensor, ...], run_all: RunAll = run_sequentially
    ) -> dict[str, Tensor]:
        """Return the logits ``(B, C)`` of each network by name.

        Args:
            views: one batch of images ``(B, C, H, W)``, or one batch for each network.
            run_all: runs the forward passes, for example on several CUDA streams.
        """
        inputs = views if len(views) > 1 else views * len(self.members)
        calls = [
            partial(self._logits, name, images)
            for name, images in zip(self.members, inputs, strict=True)
        ]
        return dict(zip(self.members, run_all(calls), strict=True))

    def _logits(self, name: str, images: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and name not in self.frozen
        with named_range(f"{name} forward"), torch.set_grad_enabled(trains):
            return self.members[name](images)


def with_model_options(recipe: Recipe) -> Recipe:
    """Return a recipe with a value for each option of its models. Models of timm and torchvision
    keep only the options that the recipe sets."""
    networks = {
        name: dataclasses.replace(
            network, options={**default_options(network.model), **network.options}
        )
        for name, network in recipe.networks.items()
    }
    return dataclasses.replace(recipe, networks=networks)


def build_networks(
    configs: Mapping[str, NetworkConfig], frozen: frozenset[str], num_classes: int, channels: int
) -> Networks:
    """Build networks with random weights.

    Args:
        configs: the networks of a recipe by name.
        frozen: names of networks that never train.

    Raises:
        ValueError: a model or one of its options does not exist.
    """
    for name, config in configs.items():
        for option in ("num_classes", "in_channels"):
            if option in config.options:
                raise ValueError(
                    f"networks.{name}.options must not contain {option}: the data set determines "
                    "it for all networks; remove it"
                )
    members = {}
    for name, config in configs.items():
        try:
            members[name] = create_model(config.model, num_classes, channels, **config.options)
        except ValueError as error:
            raise ValueError(f"networks.{name}: {error}") from error
    return Networks(members, frozen)


def parallelize(
    networks: Networks,
    sharded: Sequence[str],
    context: DistributedContext,
    config: DistributedConfig,
    device: torch.device,
    ddp: bool = True,
) -> nn.Module:
    """Prepare networks for several ranks, in place: synchronized batch norm, FSDP, then DDP.

    One DDP wraps all networks, because separate wrappers can issue collectives in different orders.
    It averages the gradients over the ranks during the backward pass. FSDP averages the gradients
    of the sharded networks. Each rank has its own running statistics, and the statistics of rank 0
    are saved and evaluated. The autograd graph must be the same in each step.

    Args:
        sharded: names of networks whose weights are sharded across the ranks.
        ddp: whether to wrap the networks in DDP. DDP waits for a gradient of each network, so it
            does not support paused networks. Without DDP, call
            :meth:`DistributedContext.average_gradients` after the backward pass.

    Returns:
        The module to call in a training step.
    """
    if not context.is_distributed:
        return networks
    if config.sync_batch_norm:
        nn.SyncBatchNorm.convert_sync_batchnorm(networks, context.group)
    if sharded:
        from bdkd.distributed.fsdp import shard

        for name in sharded:
            shard(networks.members[name], context, device)
    if not ddp:
        return networks
    ignored = [
        f"members.{name}.{key}" for name in sharded for key in networks.members[name].state_dict()
    ]
    ignore_in_ddp(networks, ignored)
    with warnings.catch_warnings():
        # The replacement of this argument does not exist in torch 2.8.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        model = DistributedDataParallel(
            networks, process_group=context.group, broadcast_buffers=False,
            gradient_as_bucket_view=True, static_graph=True,
        )  # fmt: skip
    if config.compress == "bf16":
        model.register_comm_hook(context.group, average_in_bf16)
    return model


def average_in_bf16(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients over the ranks in bf16. The hook of torch does not support
    gloo."""
    rounded = (bucket.buffer() / group.size()).bfloat16()
    work = dist.all_reduce(rounded, group=group, async_op=True)
    assert work is not None

    def copy_back(done: torch.futures.Future) -> Tensor:
        return bucket.buffer().copy_(done.value()[0])

    return work.get_future().then(copy_back)


class SavedBuffers:
    """A copy of the buffers of networks (the running statistics of batch norm).

    The copy is one flat tensor for each dtype, so that hundreds of buffers need only a few kernel
    launches.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self.groups = by_dtype(buffers)
        self.saved = [flatten(group) for group in self.groups]

    @torch.no_grad()
    def restore(self, where: Tensor) -> None:
        """Restore the copy if the 0-dim condition is true, without reading it on the host."""
        for group, saved in zip(self.groups, self.saved, strict=True):
            # torch.where instead of a weighted sum, because 0 * NaN is NaN.
            copy_flat(group, torch.where(where, saved, flatten(group)))
