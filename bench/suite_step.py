"""Time a whole training step of two networks, of each network alone, and of more networks.

The step is ``bdkd.trainer.Trainer.train_step`` on one synthetic batch that stays on the device:
forward passes, the loss, backward passes, the check for non-finite values, the optimizer and the
statistics.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from harness import Call, Case, Contender, MakeCase
from losses import plain
from torch import nn
from torch.nn import functional as F

from bdkd.config import (
    NetworkConfig,
    Recipe,
    ScheduleConfig,
    TrainConfig,
)
from bdkd.data import Batch, DataInfo, Split
from bdkd.device import AUTOCAST
from bdkd.distributed.context import SINGLE_PROCESS
from bdkd.engine.compiled import compiled
from bdkd.engine.components import Components
from bdkd.engine.networks import build_networks
from bdkd.engine.optim import SGDConfig
from bdkd.objectives import create_objective
from bdkd.registry import OBJECTIVES
from bdkd.trainer import Trainer

RATE, MOMENTUM, DECAY = 1e-3, 0.9, 5e-4


@dataclass(frozen=True)
class Pair:
    teacher: str
    student: str
    batch: int
    side: int  # of the images, pixels
    classes: int
    precision: str = "fp32"

    def __str__(self) -> str:
        return (
            f"{self.teacher} with {self.student}, {self.batch} x 3 x {self.side} x {self.side}, "
            f"{self.classes} classes, {self.precision}"
        )


def cases(device: str, quick: bool) -> list[MakeCase]:
    if quick:
        pair = Pair("resnet8", "resnet8", 4, 16, 10)
        return [partial(_pair, pair, device, ["compiled"]),
                partial(_cohorts, "resnet8", 4, 16, device)]  # fmt: skip
    if device == "cuda":
        imagenet = ("imagenet_resnet50", "imagenet_mobilenet_v1")
        small = Pair("wrn_16_2", "resnet20", 128, 32, 100, "bf16")
        # A captured step keeps all its activations in memory. ImageNet's networks therefore have
        # one captured way at batch size 256, and none at 512.
        ways = ["overlapped", "overlapped and captured", "compiled"]
        return [
            partial(_pair, Pair(*imagenet, 256, 224, 1000, "bf16"), device, ways),
            partial(_pair, Pair(*imagenet, 512, 224, 1000, "bf16"), device,
                    ["overlapped", "compiled"]),
            partial(_pair, small, device, WAYS),
            partial(_cohorts, "resnet20", 512, 32, device),
        ]  # fmt: skip
    pairs = [Pair("wrn_16_2", "resnet20", 64, 32, 100, precision) for precision in ("fp32", "bf16")]
    return [
        *(partial(_pair, pair, device, ["compiled"]) for pair in pairs),
        partial(_cohorts, "resnet8", 64, 32, device),
    ]


class Run:
    """The ``train_step`` of some networks, optionally compiled, overlapped or captured."""

    def __init__(
        self,
        networks: dict[str, NetworkConfig],
        method: str,
        pair: Pair,
        device: str,
        compiles: bool = False,
        overlaps: bool = False,
        captures: bool = False,
    ) -> None:
        train = TrainConfig(  # longer than any measurement
            epochs=10**6, batch_size=pair.batch, precision=pair.precision,
            overlap=overlaps, cuda_graph=captures,
        )  # fmt: skip
        recipe = Recipe(
            name="bench",
            networks=networks,
            objective=OBJECTIVES.configure(method),
            optimizer=SGDConfig("sgd", learning_rate=RATE, momentum=MOMENTUM, weight_decay=DECAY),
            schedule=ScheduleConfig(name="constant"),
            train=train,
            device=device,
        )
        where = torch.device(device)
        torch.manual_seed(0)
        objective = create_objective(recipe.objective, networks)
        self.networks = build_networks(networks, objective.frozen, pair.classes, 3)
        self.networks.to(where).to(memory_format=torch.channels_last).train()
        images = torch.randn(pair.batch, 3, pair.side, pair.side, device=where)
        labels = torch.randint(pair.classes, (pair.batch,), device=where)
        self.batch = Batch((images.contiguous(memory_format=torch.channels_last),), labels)
        counts: dict[Split, int] = {"train": 100 * pair.batch, "val": 0, "test": 0}
        classes = tuple(map(str, range(pair.classes)))
        info = DataInfo("bench", classes, 3, (pair.side, pair.side), counts)
        source: Any = SimpleNamespace(info=info)
        self.components = Components(
            recipe, SINGLE_PROCESS, where, objective, source, self.networks
        )
        self.trainer = Trainer(self.components)
        if compiles:  # not with train.compile, which prints messages
            self.trainer.forward_backward = compiled(self.trainer.state, objective)

    def step(self, i: int) -> None:
        self.trainer.train_step(self.batch)


WAYS = {
    "compiled": {"compiles": True},
    "overlapped": {"overlaps": True},
    "captured": {"captures": True},
    "overlapped and captured": {"overlaps": True, "captures": True},
    "compiled and captured": {"compiles": True, "captures": True},
}


def _pair(pair: Pair, device: str, ways: Iterable[str]) -> Case:
    teacher, student = (
        NetworkConfig(pair.teacher, "teacher"),
        NetworkConfig(pair.student, "student"),
    )
    networks = {"teacher": teacher, "student": student}
    run = Run(networks, "bdkd", pair, device)
    alone = [
        Run({"student": NetworkConfig(model, "student")}, "independent", pair, device)
        for model in (pair.teacher, pair.student)
    ]
    members = run.networks.members
    loops = [Loop([copy.deepcopy(members[name])], run.batch, pair) for name in members]
    both = Loop([copy.deepcopy(members[name]) for name in ("student", "teacher")], run.batch, pair)
    logits = [torch.randn(pair.batch, pair.classes, device=device, requires_grad=True)
              for _ in range(2)]  # fmt: skip

    def loss_alone(i: int) -> None:
        names = ("student", "teacher")
        for x in logits:
            x.grad = None
        output = run.components.objective(dict(zip(names, logits, strict=True)), run.batch.target,
                                     float(pair.batch), 1.0)  # fmt: skip
        torch.stack(list(output.losses.values())).sum().backward()

    by_step = _one_after_the_other(*(each.step for each in alone))
    by_loop = _one_after_the_other(*(each.step for each in loops))
    bare = "no check for non-finite values, no statistics"
    found = [
        _contender("the pair's step", run.step, "ours", images=pair.batch),
        *(_contender(f"the pair's step, {way}",
                     Run(networks, "bdkd", pair, device, **WAYS[way]).step, "ours",
                     images=pair.batch) for way in ways),
        _contender("teacher's step, then student's", by_step, "ours",
                   "each alone with its cross entropy, by the same step", pair.batch),
        _contender("plain loops, each alone", by_loop, "peer", f"only cross entropy; {bare}",
                   pair.batch),
        _contender("a plain loop of the pair", both.step, "peer",
                   f"BD-KD in eager PyTorch; {bare}", pair.batch),
        _contender("the loss alone", loss_alone, "ours", "forward and backward to the logits"),
    ]  # fmt: skip
    return Case(f"pair: {pair}", {"batch": pair.batch, "precision": pair.precision},
                tuple(found), patience=4.0, device=device)  # fmt: skip


def _cohorts(model: str, batch: int, side: int, device: str) -> Case:
    """Return a case in which all networks have the same model, which shows how the cost grows with
    the number of networks and edges."""
    size = Pair(model, model, batch, side, 100)
    found = []
    for teachers, students in ((1, 1), (1, 2), (2, 1), (2, 2), (0, 3), (1, 4)):
        networks = {f"teacher{i}": NetworkConfig(model, "teacher") for i in range(teachers)}
        networks |= {f"student{i}": NetworkConfig(model, "student") for i in range(students)}
        edges = teachers * students or students * (students - 1)
        who = f"{teachers} teacher{'s' * (teachers != 1)}, " if teachers else "peers: "
        found.append(
            _contender(
                f"{who}{students} student{'s' * (students != 1)}",
                Run(networks, "bdkd", size, device).step, "ours",
                f"{len(networks)} networks, {edges} edge{'s' * (edges != 1)}: expected from the "
                f"number of networks: {len(networks) / 2:g} times the pair",
            )
        )  # fmt: skip
    alone = Run({"student": NetworkConfig(model, "student")}, "independent", size, device)
    found.append(
        _contender("one network alone", alone.step, "ours", "cross entropy; expected: 0.5 times")
    )
    name = f"networks and edges: {model} in every place, {batch} x 3 x {side} x {side}, 100 classes"
    return Case(name, {"batch": batch}, tuple(found), patience=4.0, device=device)


def _contender(name: str, call: Call, kind, note: str = "", images: int | None = None) -> Contender:
    # Not captured as a CUDA graph, because a step reads its learning rate on the host.
    return Contender(name, call, kind, note=note, images=images, capturable=False)


class Loop:
    """A plain training loop: autocast, the loss, backward, and a fused SGD for each network."""

    def __init__(self, networks: list[nn.Module], batch: Batch, pair: Pair) -> None:
        self.networks, self.batch, self.dtype = networks, batch, AUTOCAST[pair.precision]
        self.optimizers = [
            torch.optim.SGD(network.parameters(), RATE, MOMENTUM, weight_decay=DECAY,
                            nesterov=True, fused=True)
            for network in networks
        ]  # fmt: skip

    def step(self, i: int) -> None:
        (images, *_), labels = self.batch
        with torch.autocast(labels.device.type, self.dtype, enabled=self.dtype is not None):
            logits = [network(images) for network in self.networks]
        if len(logits) == 1:
            loss = F.cross_entropy(logits[0].float(), labels)
        else:
            loss = plain(logits[0], logits[1], labels, 1.0)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _one_after_the_other(*calls: Callable[[int], object]) -> Call:
    def run(i: int) -> None:
        for call in calls:
            call(i)

    return run
