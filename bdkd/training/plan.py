"""What a run would do, said before it does it."""

import copy

import torch
from torch import Tensor, nn

from bdkd.training.setup import Setup


def plan(setup: Setup) -> str:
    """Data, networks, steps and an estimate of memory, as lines of text."""
    recipe, info = setup.recipe, setup.source.info
    t, o, s = recipe.train, recipe.optimizer, recipe.schedule
    steps = info.counts["train"] // t.batch_size
    total = steps * t.epochs
    height, width = info.image_size
    counts = ", ".join(f"{n:,} {split}" for split, n in info.counts.items())
    lines = [
        f"recipe     {recipe.name}, method {recipe.objective.name}, seed {recipe.seed}, "
        f"on {setup.device}",
        f"data       {info.source}: {counts} images of {info.channels}x{height}x{width}, "
        f"{info.num_classes} classes",
    ]
    micro_batch = t.batch_size // t.accumulate
    copies = 1 + 1 + {"sgd": int(o.momentum > 0), "adamw": 2}[o.name]  # weights, gradients, moments
    memory = 0
    for name, config in recipe.networks.items():
        network = setup.networks.members[name]
        parameters = sum(p.numel() for p in network.parameters())
        averaged = t.ema_decay is not None and config.role == "student"
        frozen = name in setup.networks.frozen
        kept = activation_bytes(network, (micro_batch, info.channels, height, width))
        memory += 4 * parameters * (1 if frozen else copies + averaged) + kept
        lines.append(
            f"network    {name} ({config.role}{', frozen' * frozen}): {config.model}, "
            f"{parameters:,} parameters, {mebibytes(kept)} of activations"
        )
    stop = "" if recipe.max_steps is None else f", stopping after {min(total, recipe.max_steps):,}"
    lines += [
        f"steps      {steps:,} an epoch, {t.epochs} epochs, {total:,} in all{stop}; batch "
        f"{t.batch_size} in {t.accumulate} part{'s' * (t.accumulate > 1)}, {t.precision}",
        f"optimizer  {o.name}, peak learning rate {o.learning_rate}, {s.name} schedule, "
        f"warm-up {s.warmup:g} {s.unit}",
        f"memory     about {mebibytes(memory)}: weights, gradients, optimizer state, and "
        "activations kept for the backward pass in float32",
        f"folder     {recipe.run_dir}",
    ]
    return "\n".join(lines)


def activation_bytes(network: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes that autograd keeps of one forward pass in float32, parameters left out; computed on
    the meta device, so nothing is allocated. A frozen network keeps none."""
    network = copy.deepcopy(network).to("meta")
    parameters = {id(p) for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in parameters:
            kept[id(tensor)] = tensor.numel() * tensor.element_size()
            alive.append(tensor)  # an id is unique only while its tensor lives
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(torch.empty(shape, device="meta"))
    return sum(kept.values())


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
