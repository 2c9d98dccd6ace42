"""Pinned results of seeds and saved runs. If a value here changes, the runs of users change.

The values are those of commit 0b69d99. If a test fails, a run that was started before the change no
longer continues as it would have, or a seed in a paper gives another run. Change the code, or
describe the change in the changelog and raise the format of checkpoints.

All values that are pinned as integers are computed with integers, or with random numbers of the CPU
generators of torch and numpy, which are the same on every machine.
"""

import dataclasses
import itertools
import zlib
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from small_runs import components_of, trainer_of
from torch.utils._python_dispatch import TorchDispatchMode

from bdkd.config import load_recipe, shipped_recipes
from bdkd.data import InMemoryConfig, SourceContext
from bdkd.data.base import Shard, epoch_order, mix_seed
from bdkd.data.imagenet.counter_rng import uniform_draws
from bdkd.data.in_memory import Images, InMemory
from bdkd.engine.components import Components
from bdkd.engine.state import TrainingState
from bdkd.evaluation.predict import Evaluator
from bdkd.registry import SOURCES


def small_setup(recipe_name: str = "digits", *, model: str | None = None, options=None, **train):
    """Return the components of a shipped recipe on 120 synthetic images."""
    recipe = load_recipe(recipe_name)
    if model is not None:
        recipe = dataclasses.replace(
            recipe,
            networks={
                name: dataclasses.replace(network, model=model, options=options or {})
                for name, network in recipe.networks.items()
            },
        )
    data = SOURCES.configure("synthetic", image_size=32, images=120, classes=10)
    recipe = dataclasses.replace(
        recipe,
        data=data,
        device="cpu",
        train=dataclasses.replace(recipe.train, batch_size=12, precision="fp32", **train),
    )
    return components_of(recipe)


def state_of(components: Components) -> TrainingState:
    return TrainingState(components)


# --- the optimizer's groups -----------------------------------------------------------------------

# Moments are saved by the position of their parameter. With another order, another group or another
# network in between, they would be loaded into other parameters.
RESNET8 = (
    "conv stages.0.0.conv1 stages.0.0.conv2 stages.1.0.conv1 stages.1.0.conv2 "
    "stages.1.0.downsample.0 stages.2.0.conv1 stages.2.0.conv2 stages.2.0.downsample.0 classifier"
)
RESNET8_NORMS = (
    "bn stages.0.0.bn1 stages.0.0.bn2 stages.1.0.bn1 stages.1.0.bn2 stages.1.0.downsample.1 "
    "stages.2.0.bn1 stages.2.0.bn2 stages.2.0.downsample.1"
)


def named_groups(components: Components) -> list[tuple[str, float, float, list[str]]]:
    """Return the network, weight decay, peak rate and parameter names of each group."""
    names = {id(p): name for name, p in components.networks.named_parameters()}
    return [
        (
            group["network"], group["weight_decay"], group["peak_rate"],
            [names[id(p)].removeprefix(f"members.{group['network']}.") for p in group["params"]],
        )
        for group in state_of(components).optimizer.param_groups
    ]  # fmt: skip


def test_the_parameter_groups_of_digits():
    """The teacher comes first; norms and biases have no weight decay."""
    components = small_setup(model="resnet8")
    decayed = [f"{layer}.weight" for layer in RESNET8.split()]
    not_decayed = [
        f"{norm}.{kind}" for norm in RESNET8_NORMS.split() for kind in ("weight", "bias")
    ]
    assert named_groups(components) == [
        (name, decay, 0.1, names)
        for name in ("teacher", "student")
        for decay, names in ((5e-4, decayed), (0.0, [*not_decayed, "classifier.bias"]))
    ]


# Network, weight decay, peak rate, number of parameters and CRC-32 of their names, by recipe.
GROUPS: dict[str, list[tuple]] = {
    "cifar10-wrn16-8-wrn16-1": [
        ("teacher", 5e-4, 0.05, 44, 1862361014),
        ("student", 5e-4, 0.05, 43, 676108372),
    ],
    "cifar100-resnet32x4-shufflenetv2": [
        ("teacher", 5e-4, 0.05, 104, 119051339),
        ("student", 5e-4, 0.01, 170, 25458345),
    ],
    "cifar100-wrn16-2-mobilenetv2": [
        ("teacher", 5e-4, 0.05, 44, 1862361014),
        ("student", 5e-4, 0.01, 161, 1453411573),
    ],
    "cifar100-wrn16-8-resnet20": [
        ("teacher", 5e-4, 0.05, 44, 1862361014),
        ("student", 5e-4, 0.05, 65, 2510300908),
    ],
    "cifar100-wrn40-2-wrn16-2": [
        ("teacher", 5e-4, 0.05, 116, 3818850355),
        ("student", 5e-4, 0.05, 44, 1862361014),
    ],
    "digits-hard": [
        ("teacher", 5e-4, 0.1, 17, 1730186263),
        ("teacher", 0.0, 0.1, 27, 3920076775),
        ("student", 5e-4, 0.1, 10, 1556234414),
        ("student", 0.0, 0.1, 19, 2452048697),
    ],
    "fashion": [
        ("teacher", 5e-4, 0.1, 17, 1730186263),
        ("teacher", 0.0, 0.1, 27, 3920076775),
        ("student", 5e-4, 0.1, 22, 2746667688),
        ("student", 0.0, 0.1, 43, 1719295676),
    ],
    "fashion-5k": [
        ("teacher", 5e-4, 0.1, 16, 1142190146),
        ("teacher", 0.0, 0.1, 27, 3920076775),
        ("student", 5e-4, 0.1, 10, 1556234414),
        ("student", 0.0, 0.1, 19, 2452048697),
    ],
    "imagenet-r34-r18": [
        ("teacher", 1e-4, 0.2, 110, 3896119696),
        ("student", 1e-4, 0.2, 62, 2155032544),
    ],
    "imagenet-r50-mbv1": [
        ("teacher", 1e-4, 0.2, 161, 176612079),
        ("student", 1e-4, 0.2, 83, 783530407),
    ],
    "imagenet-smoke": [
        ("teacher", 1e-4, 0.02, 21, 3447914975),
        ("teacher", 0.0, 0.02, 41, 1454203181),
        ("student", 1e-4, 0.02, 28, 1073460568),
        ("student", 0.0, 0.02, 55, 1196068455),
    ],
    "images": [
        ("teacher", 0.05, 0.001, 54, 192200641),
        ("teacher", 0.0, 0.001, 107, 2021971067),
        ("student", 0.05, 0.001, 53, 3106482237),
        ("student", 0.0, 0.001, 105, 724193399),
    ],
    "kanji-1000": [
        ("teacher", 5e-4, 0.1, 17, 1730186263),
        ("teacher", 0.0, 0.1, 27, 3920076775),
        ("student", 5e-4, 0.1, 22, 2746667688),
        ("student", 0.0, 0.1, 43, 1719295676),
    ],
    "kanji-500": [
        ("teacher", 5e-4, 0.1, 10, 1556234414),
        ("teacher", 0.0, 0.1, 19, 2452048697),
        ("student", 5e-4, 0.1, 10, 1556234414),
        ("student", 0.0, 0.1, 19, 2452048697),
    ],
    "tiny-imagenet-wrn16-2-resnet20": [
        ("teacher", 5e-4, 0.05, 44, 1862361014),
        ("student", 5e-4, 0.05, 65, 2510300908),
    ],
}


@pytest.mark.parametrize("recipe", sorted({*shipped_recipes()} - {"digits"}))
def test_the_parameter_groups_of_every_recipe(recipe):
    """A recipe with ``decay_norms`` has one group per network, in the order of its definition."""
    groups = named_groups(small_setup(recipe))
    came = [(*facts, len(names), zlib.crc32(" ".join(names).encode())) for *facts, names in groups]
    assert came == GROUPS[recipe], groups


# --- seeds ----------------------------------------------------------------------------------------


def test_the_order_of_images_in_an_epoch():
    """A resumed run finds its position from the seed, the epoch and the number of images seen."""
    orders = {
        (seed, epoch): epoch_order(seed, epoch, 50_000)[:5].tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (7, 239))
    }
    assert orders == {
        (0, 0): [27647, 16044, 35316, 18769, 21554],
        (0, 1): [46996, 1416, 27644, 44399, 23533],
        (1, 0): [20150, 38049, 40000, 45690, 28818],
        (7, 239): [5846, 4030, 3816, 11327, 10275],
    }


def test_mixed_seeds():
    assert mix_seed(0) == 3527577169254209511
    assert mix_seed(0, 1) == 7805851153417077868
    assert mix_seed(3, 2, 1, 640) == 5692139764811212732


def coded_source(seed: int, **augmentation) -> InMemory:
    """Return a source of 64 images of 4x4 pixels. The pixels of an image all differ, so every crop
    can be recognised."""
    pixels = torch.arange(64 * 16).view(64, 1, 4, 4) * 37 % 251
    images = Images(pixels.to(torch.uint8), torch.arange(64) % 8)
    return InMemory(
        {"train": images, "val": images, "test": images}, tuple("01234567"),
        InMemoryConfig("coded", **augmentation),
        SourceContext(seed, torch.device("cpu"), torch.contiguous_format),
    )  # fmt: skip


def fingerprint(source: InMemory, view: torch.Tensor) -> int:
    """Return the CRC-32 of a view's pixels as they were before normalisation."""
    pixels = (view.double() * source.std + source.mean).round().to(torch.int64)
    return zlib.crc32(pixels.numpy().astype("<i8").tobytes())


AUGMENTED = {"crop": 1, "flip": True, "cutout": 2}

# By (seed, epoch, images before the batch, rank, ranks): the labels, and CRC-32 of both views.
BATCHES = {
    (0, 0, 0, 0, 1): ([7, 0, 4, 0, 6, 7, 5, 4], 3848031783, 1303957081),
    (0, 0, 8, 0, 1): ([3, 0, 1, 7, 6, 2, 1, 6], 2416177657, 141513802),
    (0, 1, 0, 0, 1): ([4, 1, 2, 4, 5, 2, 1, 1], 2164417503, 1328271395),
    (1, 0, 0, 0, 1): ([6, 3, 2, 1, 2, 2, 3, 5], 3317996757, 1112849474),
    (0, 0, 0, 0, 2): ([7, 0, 4, 0], 605435780, 766928935),
    (0, 0, 0, 1, 2): ([6, 7, 5, 4], 3038079484, 3832332469),
    (0, 0, 0, 1, 3): ([4, 0, 6], 3333556927, 1416214762),
}


@pytest.mark.parametrize("place", BATCHES)
def test_the_images_of_a_batch_and_their_augmentation(place):
    """The batch has crop, flip and cutout in both views. Ranks share the same random draws."""
    seed, epoch, start, rank, ranks = place
    source = coded_source(seed, **AUGMENTED)
    batch = next(source.train_batches(epoch, start, 8, 2, Shard(rank, ranks)))
    came = (batch.target.tolist(), *(fingerprint(source, view) for view in batch.views))
    assert came == BATCHES[place]


def test_each_augmentation_alone():
    """Crop draws first, then flip, then cutout. An augmentation that is off draws nothing."""
    came = {}
    for name, value in AUGMENTED.items():
        source = coded_source(0, **{name: value})
        came[name] = fingerprint(source, next(source.train_batches(0, 0, 8, 1)).views[0])
    assert came == {"crop": 142220393, "flip": 1123405862, "cutout": 1361474562}


def test_the_splits_and_wrong_labels_of_digits():
    """They belong to the data set, so they are the same for every seed and method."""
    recipe = load_recipe("digits-hard")
    found = {}
    for seed in (0, 1):
        source = components_of(dataclasses.replace(recipe, seed=seed, device="cpu")).source
        found[seed] = {
            split: (len(images.labels), zlib.crc32(bytes(images.labels.tolist())))
            for split, images in source.splits.items()
        }
    assert found[0] == found[1]
    assert found[0] == {
        "train": (320, 3726400916), "val": (216, 2505123652), "test": (359, 299757479),
    }  # fmt: skip


def test_the_random_numbers_of_imagenet():
    """The uniform numbers of an image depend on seed, epoch, purpose and index. Here they are in
    units of 2**-53."""
    came = uniform_draws(3, 5, (1, 0), np.array([0, 1281166]), 2) * 2.0**53
    assert came.astype(int).tolist() == [
        [7004992633159119, 380619840838874],
        [8099946143763077, 4307621834031153],
    ]


# Two weights of the first convolution and of the last bias, of the teacher, then of the student.
WEIGHTS = {
    0: [-0.027732, 0.212011, -0.05328, 0.00643, -0.037892, 0.0076, 0.112691, 0.02919],
    1: [-0.162198, -0.012732, -0.029523, 0.054029, 0.085195, 0.110202, -0.123323, -0.045279],
}


@pytest.mark.parametrize("seed", WEIGHTS)
def test_the_initial_weights_of_a_seed(seed):
    """The weights of the teacher are drawn before those of the student. The values are rounded,
    because the last bits of a logarithm or cosine may differ between libraries."""
    recipe = dataclasses.replace(load_recipe("digits"), seed=seed, device="cpu")
    members = components_of(recipe).networks.members
    came = [
        value
        for name in ("teacher", "student")
        for parameter in (members[name].conv.weight, members[name].classifier.bias)
        for value in parameter.flatten()[:2].tolist()
    ]
    assert came == pytest.approx(WEIGHTS[seed], abs=1e-5)


# --- the order of a step --------------------------------------------------------------------------


class RandomOperators(TorchDispatchMode):
    """Records where random numbers are drawn: the network that is called, or ``data``."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.seen = "data", []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.nondeterministic_seeded in function.tags:
            self.seen.append(self.place)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def watch(self, networks):
        """Record draws, and track which network is being called."""
        with ExitStack() as hooks:
            for name, network in networks.items():

                def enters(*_, name=name):
                    self.place = name

                def leaves(*_):
                    self.place = "data"

                hooks.callback(network.register_forward_pre_hook(enters).remove)
                hooks.callback(network.register_forward_hook(leaves).remove)
            with self:
                yield self


def first_batch(components: Components):
    views = components.objective.views
    return next(components.source.train_batches(0, 0, components.recipe.train.batch_size, views))


def test_networks_are_called_in_the_recipes_order_for_each_micro_batch():
    """The statistics of batch norm and dropout depend on this order."""
    components = small_setup(model="resnet8", options={"width": 0.1}, accumulate=2)
    order = []
    for name, network in components.networks.members.items():
        network.register_forward_hook(lambda *_, name=name: order.append(name))
    state = state_of(components)
    state.networks.train()
    trainer_of(state, components.objective).train_step(first_batch(components))
    assert order == ["teacher", "student", "teacher", "student"]


def test_the_order_of_random_draws_in_a_step():
    """The order of an epoch and the augmentation use separate generators. Dropout draws from the
    generator that a checkpoint saves, one network after the other."""
    components = small_setup(model="wrn_10_1", options={"dropout": 0.3}, accumulate=2)
    data = dataclasses.replace(components.recipe.data, crop=1, flip=True, cutout=2)
    components.source.config = data
    state = state_of(components)
    state.networks.train()
    before = torch.get_rng_state()
    with RandomOperators().watch(components.networks.members) as record:
        batch = first_batch(components)
        assert torch.equal(torch.get_rng_state(), before)
        trainer_of(state, components.objective).train_step(batch)
    # The data, then the networks of each micro-batch. The number of draws does not matter.
    order = [place for place, _ in itertools.groupby(record.seen)]
    assert order == ["data", "teacher", "student", "teacher", "student"]


def test_a_step_without_dropout_keeps_the_random_state():
    """A step without dropout and an evaluation leave the saved random state unchanged."""
    components = small_setup(model="resnet8", options={"width": 0.1}, ema_decay=0.9)
    state = state_of(components)
    state.networks.train()
    before = torch.get_rng_state()
    trainer_of(state, components.objective).train_step(first_batch(components))
    Evaluator(state.evaluated_networks(), components.source, 12, "fp32").evaluate("val")
    assert torch.equal(torch.get_rng_state(), before)
