"""The suites by name.

A suite returns functions that make its cases, so that the number of cases is known before the first
case is made. It imports its packages when it is called. With ``quick``, it returns each kind of
case once, at a small size for CI.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from harness import Clock, DeviceClock, MakeCase, WallClock

from bdkd.extras import TRAINER_PACKAGES


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    cache: int = 32 * 2**20  # bytes of the last-level cache
    quick: bool = False


def loss_cpu(settings: Settings) -> list[MakeCase]:
    from losses import MODES, Size, cases

    if settings.quick:
        small = [Size(8, 10), Size(8, 10, "bf16", 1.0)]
        one = dict.fromkeys(("both", "forward", "kd", "ce", "heads"), small[-1:])
        return [
            *cases({"both": small[:1]}, "cpu", settings.cache),
            *cases(one, "cpu", settings.cache, ()),
        ]
    shapes = ((128, 100), (1024, 1000), (256, 21841), (64, 128256))
    both = [Size(*shape) for shape in shapes]
    both += [Size(1024, 1000, "bf16"), Size(64, 128256, "bf16"), Size(1024, 1000, "fp32", 1.0)]
    imagenet = [Size(1024, 1000)]
    parts = [Size(1024, 1000), Size(64, 128256)]
    # A fixed number of class pairs over the number of classes, for the pictures.
    sweep = [Size(2**21 // classes, classes) for classes in (10, 100, 1000, 10_000, 100_000)]
    works = {"forward": parts, "kd": parts, "ce": parts, "heads": imagenet}
    return [
        *cases({"both": both}, "cpu", settings.cache),
        *cases({"both": sweep}, "cpu", settings.cache, sweep=True),
        *cases(works, "cpu", settings.cache),
        # On a CPU, the modes of torch.compile do not differ for this loss: they tune matrix
        # products and make CUDA graphs. One case shows this.
        *cases({"kd": [Size(1024, 1000, "bf16")]}, "cpu", settings.cache, MODES),
    ]


def loss_gpu(settings: Settings) -> list[MakeCase]:
    from losses import MODES, Size, cases

    if settings.quick:
        small = [Size(1024, 1000, "bf16")]
        works = dict.fromkeys(("both", "forward", "kd", "ce", "heads"), small)
        return cases(works, "cuda", settings.cache, MODES[:1])
    # Batches of ImageNet, unaligned rows, rows that fit into L2, and rows that do not.
    shapes = ((1024, 1000), (4096, 1000), (4096, 21841), (8192, 32000), (8192, 128256))
    both = {
        (dtype, tau): [Size(*shape, dtype, tau) for shape in shapes]
        for dtype in ("bf16", "fp32")
        for tau in (4.0, 1.0)
    }
    sweep = [Size(2**25 // c, c, "bf16") for c in (10, 100, 1000, 10_000, 32_000, 100_000)]
    parts = [Size(4096, 1000, "bf16"), Size(8192, 32000, "bf16")]
    # The most important cases first, because the GPU time may end before the last case.
    return [
        *cases({"both": both["bf16", 4.0][::2]}, "cuda", settings.cache, MODES),
        *cases({"both": both["bf16", 4.0][1::2]}, "cuda", settings.cache),
        *cases({"kd": parts, "ce": parts, "forward": parts}, "cuda", settings.cache),
        *cases({"both": both["fp32", 4.0]}, "cuda", settings.cache),
        *cases({"both": sweep}, "cuda", settings.cache, sweep=True),
        *cases({"both": both["bf16", 1.0]}, "cuda", settings.cache),
        *cases({"heads": parts[1:], "both": both["fp32", 1.0]}, "cuda", settings.cache),
    ]


def dispatch(settings: Settings) -> list[MakeCase]:
    from suite_dispatch import cases

    return cases(settings.device, settings.quick)


def loader(settings: Settings) -> list[MakeCase]:
    from suite_loader import cases

    return cases(settings.device, settings.quick)


def metrics(settings: Settings) -> list[MakeCase]:
    from suite_metrics import cases

    return cases(settings.quick)


def startup(settings: Settings) -> list[MakeCase]:
    from suite_startup import cases

    return cases(settings.quick)


def step_cpu(settings: Settings) -> list[MakeCase]:
    from suite_step import cases

    return cases("cpu", settings.quick)


def step_gpu(settings: Settings) -> list[MakeCase]:
    from suite_step import cases

    return cases("cuda", settings.quick)


SUITES: dict[str, tuple[str, Callable[[Settings], list[MakeCase]]]] = {
    "loss_cpu": ("the loss on the CPU", loss_cpu),
    "loss_gpu": ("the loss on a GPU", loss_gpu),
    "dispatch": ("what a call costs the host", dispatch),
    "step_cpu": ("the two-network step on the CPU", step_cpu),
    "step_gpu": ("the two-network step on a GPU", step_gpu),
    "loader": ("a batch from the data loader", loader),
    "metrics": ("metrics of a validation set", metrics),
    "startup": ("start-up", startup),
}


# Modules of the extra bdkd[train] that a suite requires.
_TRAINING = ("msgspec", "numpy", "tomli_w", "tqdm")
_NEEDS = {
    "step_cpu": _TRAINING,
    "step_gpu": _TRAINING,
    "loader": _TRAINING,
    "startup": tuple(TRAINER_PACKAGES.values()),
}


def cannot_run(suite: str) -> str | None:
    """Return why a suite cannot run on this machine, or None if it can."""
    if suite.endswith("_gpu") and not torch.cuda.is_available():
        return "this machine has no GPU"
    missing = [module for module in _NEEDS.get(suite, ()) if find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def device_of(suite: str) -> str:
    if suite in ("dispatch", "loader") and torch.cuda.is_available():  # the device of training
        return "cuda"
    return "cuda" if suite.endswith("_gpu") else "cpu"


def clock_of(suite: str, quick: bool) -> Clock:
    on_gpu = device_of(suite) == "cuda"
    if suite == "loader":
        # Samples are long, because loaders prefetch batches while other contenders run. Wall time
        # on a GPU too, because half of the work is on the host.
        if on_gpu:
            return WallClock(shortest=0.5, settle=torch.cuda.synchronize)
        return WallClock() if quick else WallClock(shortest=1.0)
    if suite == "dispatch" and on_gpu:
        return WallClock(settle=torch.cuda.synchronize)
    return DeviceClock() if on_gpu else WallClock()
