"""Measure the host time of a call, with small batches in warm caches.

On a GPU, this is the time from call to return, launches included. The device takes less time than
the host. It is synchronized once per sample.
"""

import functools
from collections.abc import Callable

import torch
from bdkd_kernels import bdkd_loss
from harness import Case, Contender, MakeCase
from losses import Race, Size, ours, plain
from torch import Tensor

TEMPERATURE = 4.0
_reference = ours(TEMPERATURE, "reference")


def cases(device: str, quick: bool) -> list[MakeCase]:
    small = [Size(8, 10), Size(128, 100), Size(1024, 1000, "bf16")]
    sizes = small[:1] if quick else small if device == "cuda" else small[:2]
    return [functools.partial(_case, size, device) for size in sizes]


def _case(size: Size, device: str) -> Case:
    torch.compiler.reset()
    race = Race(size, "both", device, cache=0)
    found = [
        Contender("bdkd_loss, no gradients", _no_gradients(race), "ours"),
        Contender("bdkd_loss", _forward(race), "ours", note="computes both gradients; no backward"),
        Contender("bdkd_loss, backward", race.step(ours(TEMPERATURE)), "ours"),
        Contender("bdkd_loss_and_grad", race.at_once, "ours", note="into given tensors"),
        Contender("autograd alone, backward", race.step(_nothing), "limit",
                  note="two functions that pass a stored gradient on, and one addition"),
        Contender("eager, backward", race.step(_eager), note="no statistics of the samples"),
        Contender("torch.compile, backward",
                  race.step(torch.compile(_eager, fullgraph=True, dynamic=False)),
                  note="no statistics of the samples"),
        Contender("eager reference, backward", race.step(_reference)),
        Contender("torch.compile of it, backward",
                  race.step(torch.compile(_reference, fullgraph=True, dynamic=False))),
    ]  # fmt: skip
    return Case(
        f"host: {size}", {"rows": size.rows, "classes": size.classes, "dtype": size.dtype},
        tuple(found), len(race.inputs), forget=race.forget, memory=False, device=device,
    )  # fmt: skip


def _no_gradients(race: Race) -> Callable[[int], object]:
    sets = [(x.student.detach(), x.teacher.detach(), x.labels) for x in race.inputs]

    def call(i: int) -> object:
        return bdkd_loss(*sets[i], temperature=TEMPERATURE)

    return call


def _forward(race: Race) -> Callable[[int], object]:
    def call(i: int) -> object:
        s, t, y, _ = race.inputs[i]
        return bdkd_loss(s, t, y, temperature=TEMPERATURE)

    return call


def _eager(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return plain(s, t, y, TEMPERATURE)


class _HandOver(torch.autograd.Function):
    """A minimal autograd function in Python."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        ctx.gradient = torch.empty_like(logits)
        return torch.empty((), device=logits.device)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradient, ctx.gradient = ctx.gradient, None
        return gradient


def _nothing(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return _HandOver.apply(s) + _HandOver.apply(t)
