"""K networks as one module: evaluated, compiled, wrapped and saved as one."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bdkd.config import DistributedConfig, NetworkConfig, OptimizerConfig
from bdkd.models import create_model
from bdkd.training import apex_optimizers
from bdkd.training.distributed import Ranks, copy_flat, flatten
from bdkd.training.profile import named_range

RunAll = Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]


def in_turn(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """What the calls return, one after the other."""
    return [call() for call in calls]


class Networks(nn.Module):
    """The networks of a recipe by name; a forward pass gives the logits of each.

    Args:
        frozen: names of networks that never train: they stay in evaluation mode, and no graph of
            them is kept.
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
        """The networks that train, by name."""
        return {n: network for n, network in self.members.items() if n not in self.frozen}

    def forward(self, views: tuple[Tensor, ...], run: RunAll = in_turn) -> dict[str, Tensor]:
        """Logits ``(B, C)`` by network, each from its own view where there is more than one."""
        inputs = views if len(views) > 1 else views * len(self.members)
        calls = [
            partial(self._logits, name, images)
            for name, images in zip(self.members, inputs, strict=True)
        ]
        return dict(zip(self.members, run(calls), strict=True))

    def _logits(self, name: str, images: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and name not in self.frozen
        with named_range(f"{name} forward"), torch.set_grad_enabled(trains):
            return self.members[name](images)


def build_networks(
    configs: Mapping[str, NetworkConfig],
    frozen: frozenset[str],
    num_classes: int,
    channels: int,
) -> Networks:
    """Fresh networks as configured. ``ValueError`` names an unknown model or option."""
    for name, config in configs.items():
        for option in ("num_classes", "in_channels"):
            if option in config.options:
                raise ValueError(
                    f"networks.{name}.options must not hold {option}: the data set says it, the "
                    "same for every network"
                )
    return Networks(
        {
            name: create_model(config.model, num_classes, channels, **config.options)
            for name, config in configs.items()
        },
        frozen,
    )


def on_all_ranks(
    networks: Networks, sharded: Iterable[str], ranks: Ranks, config: DistributedConfig
) -> nn.Module:
    """All networks under one DDP, so that there is one order of collectives: the gradients become
    their means over the ranks during the backward pass. The sharded ones see to theirs themselves.

    Running statistics are each rank's own and no rank's training sees them: the first rank's are
    saved, and evaluated everywhere. The graph is taken to be the same in every step.
    """
    if ranks.alone:
        return networks
    ignored = [
        f"members.{name}.{key}" for name in sharded for key in networks.members[name].state_dict()
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(networks, ignored)
    with warnings.catch_warnings():
        # deprecated for a name that torch 2.8 does not have
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        model = DistributedDataParallel(
            networks, process_group=ranks.group, broadcast_buffers=False,
            gradient_as_bucket_view=True, static_graph=True,
        )  # fmt: skip
    if config.compress == "bf16":
        model.register_comm_hook(ranks.group, average_in_bf16)
    return model


def average_in_bf16(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """The mean over the ranks of a bucket of gradients, rounded to bf16 on its way. torch's own
    hook refuses gloo."""
    rounded = (bucket.buffer() / group.size()).bfloat16()
    work = dist.all_reduce(rounded, group=group, async_op=True)
    assert work is not None

    def rounded_back(done: torch.futures.Future) -> Tensor:
        return bucket.buffer().copy_(done.value()[0])

    return work.get_future().then(rounded_back)


def unsharded(parameter: nn.Parameter) -> nn.Parameter:
    """All of a parameter, which every rank updates."""
    return parameter


def build_optimizer(
    networks: Networks,
    configs: Mapping[str, NetworkConfig],
    config: OptimizerConfig,
    own_part: Callable[[nn.Parameter], nn.Parameter],
) -> torch.optim.Optimizer:
    """One optimizer; two parameter groups a network that trains, with weight decay and without.

    Each group carries its network's name and peak learning rate. Fused, because the fused kernels
    skip a step on the device itself (``found_inf``), without asking the host.

    Args:
        own_part: what of a sharded parameter this rank updates.
    """
    groups = []
    for name, network in networks.trained().items():
        peak_rate = configs[name].learning_rate or config.learning_rate
        least = 0 if config.decay_norms else 2  # norms and biases have one dimension
        own = [own_part(p) for p in network.parameters()]
        decayed = [p for p in own if p.ndim >= least]
        not_decayed = [p for p in own if p.ndim < least]
        for parameters, decay in ((decayed, config.weight_decay), (not_decayed, 0.0)):
            if not parameters:
                continue
            groups.append(
                {
                    "params": parameters,
                    "weight_decay": decay,
                    "network": name,
                    "peak_rate": peak_rate,
                }
            )
    if config.name in apex_optimizers.CLASSES:
        return apex_optimizers.build(config, groups)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, config.learning_rate, config.betas, fused=True)
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(
        groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True
    )
    if config.momentum:
        # The fused kernel leaves new momentum uninitialised if the very first step is skipped.
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


class SavedBuffers:
    """A copy of all buffers of some networks (batch norm's running statistics), to go back to.

    One flat tensor a dtype: a handful of launches for hundreds of buffers.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in buffers:
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self.groups = list(by_dtype.values())
        self.saved = [flatten(group) for group in self.groups]

    @torch.no_grad()
    def restore(self, where: Tensor) -> None:
        """Put the copy back where the 0-dim condition holds; it is never read on the host."""
        for group, saved in zip(self.groups, self.saved, strict=True):
            # A selection, not a blend: 0 * NaN would carry the NaN over.
            copy_flat(group, torch.where(where, saved, flatten(group)))
