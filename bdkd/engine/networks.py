"""K networks as one module, so that they are evaluated, compiled, wrapped and saved as one."""

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
    """Return the results of the calls, made one after the other."""
    return [call() for call in calls]


class Networks(nn.Module):
    """The networks of a recipe by name. The forward pass returns the logits of each.

    Args:
        frozen: names of networks that never train. They stay in evaluation mode, and autograd
            records nothing of them.
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
        """Return logits ``(B, C)`` by network. Several views are one for each network."""
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
    """Return a recipe with a value for every option of its models. Models of timm and torchvision
    have only the options that were given."""
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

    Raises:
        ValueError: a model or one of its options does not exist.
    """
    for name, config in configs.items():
        for option in ("num_classes", "in_channels"):
            if option in config.options:
                raise ValueError(
                    f"networks.{name}.options must not hold {option}: the data set says it, the "
                    "same for every network"
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
    """Prepare networks for several ranks, in place: synchronised batch norm, FSDP, then DDP.

    One DDP wraps all networks, because separate wrappers can issue collectives in different orders.
    It averages the gradients over the ranks during the backward pass. FSDP averages those of the
    sharded networks. Running statistics belong to each rank; those of rank 0 are saved and
    evaluated. The graph must be the same in every step.

    Args:
        sharded: names of networks whose weights are distributed over the ranks.
        ddp: DDP waits for a gradient of every network. Without it, call
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
    """Average a bucket of gradients over the ranks in bf16. torch's own hook rejects gloo."""
    rounded = (bucket.buffer() / group.size()).bfloat16()
    work = dist.all_reduce(rounded, group=group, async_op=True)
    assert work is not None

    def copy_back(done: torch.futures.Future) -> Tensor:
        return bucket.buffer().copy_(done.value()[0])

    return work.get_future().then(copy_back)


class SavedBuffers:
    """A copy of the buffers of networks (the running statistics of batch norm).

    One flat tensor for each dtype, so that hundreds of buffers need a handful of launches.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self.groups = by_dtype(buffers)
        self.saved = [flatten(group) for group in self.groups]

    @torch.no_grad()
    def restore(self, where: Tensor) -> None:
        """Restore the copy if the 0-dim condition is true, without reading it on the host."""
        for group, saved in zip(self.groups, self.saved, strict=True):
            # A selection, not a blend: 0 * NaN would carry the NaN over.
            copy_flat(group, torch.where(where, saved, flatten(group)))
