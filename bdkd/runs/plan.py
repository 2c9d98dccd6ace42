"""Describe the plan of a run for ``--dry-run``."""

from bdkd.engine.components import Components
from bdkd.engine.cost import costs
from bdkd.engine.optim import optimizer_entry


def plan(components: Components, images_per_second: float | None = None) -> str:
    """Return the data, networks, operations and steps, and estimate memory and, at
    ``images_per_second`` (default: 1,000), hours, as text."""
    recipe, info = components.recipe, components.source.info
    t, o, s = recipe.train, recipe.optimizer, recipe.schedule
    steps = info.counts["train"] // t.batch_size
    total = steps * t.epochs
    height, width = info.image_size
    counts = ", ".join(f"{n:,} {split}" for split, n in info.counts.items())
    lines = [
        f"recipe     {recipe.name}, objective {recipe.objective.name}, seed {recipe.seed}, "
        f"on {components.device}",
        f"data       {info.source}: {counts} images of {info.channels}x{height}x{width}, "
        f"{info.num_classes} classes",
    ]
    micro_batch = t.batch_size // t.accumulate
    moments = optimizer_entry(o).moments(o)
    memory = operations = 0
    for name, cost in costs(components).items():
        config, frozen = recipe.networks[name], name in components.networks.frozen
        averaged = t.ema_decay is not None and config.role == "student"
        copies = 1 if frozen else 1 + 1 + moments + averaged  # weights, gradients, moments, average
        kept = cost.kept * micro_batch
        memory += 4 * cost.parameters * copies + kept
        operations += cost.step
        lines.append(
            f"network    {name} ({config.role}{', frozen' * frozen}): {config.model}, "
            f"{cost.parameters:,} parameters, {_flops(cost.forward)} per image forward, "
            f"{mebibytes(kept)} of activations"
        )
    stop = "" if recipe.max_steps is None else f", stopping after {min(total, recipe.max_steps):,}"
    images = t.batch_size * min(total, recipe.max_steps or total)
    rate = images_per_second or 1000.0
    lines += [
        f"operations {_flops(operations)} per image forward and backward, "
        f"{_flops(operations * t.batch_size)} per step (convolutions and matrix products; a "
        "multiply-add counts as 2)",
        f"steps      {steps:,} per epoch, {t.epochs} epochs, {total:,} in all{stop}; batch "
        f"{t.batch_size} in {t.accumulate} part{'s' * (t.accumulate > 1)}, {t.precision}",
        f"time       {images / rate / 3600:,.2f} hours at {rate:,.0f} images/s, without the "
        "evaluations",
        f"optimizer  {o.name}, peak learning rate {o.learning_rate}, {s.name} schedule, "
        f"warm-up {s.warmup:g} {s.unit}",
        f"memory     about {mebibytes(memory)}: weights, gradients, optimizer state, and "
        f"activations kept for the backward pass in {t.precision}",
        f"folder     {recipe.run_dir}",
    ]
    return "\n".join(lines)


def _flops(count: int) -> str:
    units = {1e12: "TFLOP", 1e9: "GFLOP", 1e6: "MFLOP"}
    size = next((size for size in units if count >= size), 1e3)
    return f"{count / size:,.3g} {units.get(size, 'kFLOP')}"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
