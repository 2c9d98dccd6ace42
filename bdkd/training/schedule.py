"""The learning rate as a pure function of the step: nothing of it needs saving."""

import math

from bdkd.config import ScheduleConfig


def rate_factor(config: ScheduleConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Share of the peak learning rate for optimizer step ``step`` (from 0)."""
    unit = steps_per_epoch if config.unit == "epochs" else 1
    warmup = config.warmup * unit
    if step + 1 < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "step":
        return config.factor ** sum(step >= milestone * unit for milestone in config.milestones)
    progress = (step - warmup) / max(1.0, total_steps - warmup)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
