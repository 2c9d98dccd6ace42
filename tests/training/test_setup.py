"""What a run is made of before its first step, and what is refused."""

import dataclasses
from functools import cache

import pytest
import torch
from small_runs import TINY_RUN, same

from bdkd.config import Recipe, load_recipe
from bdkd.errors import RunError, UsageError
from bdkd.training.checkpoint import save_checkpoint, snapshot
from bdkd.training.distributed import Ranks
from bdkd.training.run_folder import RunFolder
from bdkd.training.setup import Setup, choose_device
from bdkd.training.state import TrainingState


def tiny(**changes) -> Recipe:
    """The tiny recipe; a change names a section and its new options, or an option at the top."""
    recipe = load_recipe(TINY_RUN[0])
    for key, value in changes.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(recipe, key), **value)
        recipe = dataclasses.replace(recipe, **{key: value})
    return recipe


def with_network(recipe: Recipe, name: str, **changes) -> Recipe:
    network = dataclasses.replace(recipe.networks[name], **changes)
    return dataclasses.replace(recipe, networks={**recipe.networks, name: network})


@cache
def images() -> int:
    return Setup(tiny()).source.info.counts["train"]


def test_the_weights_are_those_of_the_seed_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = Setup(tiny()).networks.state_dict()
    torch.manual_seed(2)
    assert same(dict(Setup(tiny()).networks.state_dict()), dict(first))
    other = Setup(tiny(seed=1)).networks.state_dict()
    assert not torch.equal(other["members.teacher.conv.weight"],
                           first["members.teacher.conv.weight"])  # fmt: skip


def test_the_order_of_the_images_is_that_of_the_seed():
    orders = [
        next(Setup(tiny(seed=seed)).source.train_batches(0, 0, 24, 1)).views[0].mean((1, 2, 3))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_a_run_knows_the_values_that_its_method_used():
    """Options that the recipe leaves open are in the run's config.toml with their values."""
    objective = Setup(tiny()).recipe.objective
    assert tiny().objective.temperature is tiny().objective.gamma is None
    assert (objective.temperature, objective.gamma) == (1.0, 2.0)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_weights_have_the_layout_of_the_recipe(channels_last):
    """Images of one channel have both layouts at once, so these have three."""
    setup = Setup(tiny(train={"channels_last": channels_last}))
    [view] = next(setup.source.train_batches(0, 0, 4, 1)).views
    weight = setup.networks.members["student"].stages[0][0].conv1.weight
    for tensor in (view, weight):
        assert tensor.shape[1] > 1
        assert tensor.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_options_of_a_network_are_its_own():
    recipe = with_network(tiny(), "teacher", options={"width": 2.0})
    members = Setup(recipe).networks.members
    assert members["teacher"].conv.out_channels == 2 * members["student"].conv.out_channels
    for option in ("num_classes", "in_channels"):
        with pytest.raises(UsageError, match=f"networks.teacher.options must not hold {option}"):
            Setup(with_network(tiny(), "teacher", options={option: 3}))


def test_threads_are_those_of_the_recipe():
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            Setup(tiny(threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_batch_may_be_all_training_images_and_no_more():
    setup = Setup(tiny(train={"batch_size": images()}))
    assert len(next(setup.source.train_batches(0, 0, images(), 1)).target) == images()
    with pytest.raises(UsageError, match=rf"at most the {images()} training images, got"):
        Setup(tiny(train={"batch_size": images() + 1}))


# --- initial weights ------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of the tiny recipe with another seed."""
    setup = Setup(tiny(seed=3))
    state = TrainingState(setup.recipe, setup.networks, images(), setup.device,
                          data=setup.source.info.identity())  # fmt: skip
    path = tmp_path / "saved.pt"
    save_checkpoint(path, "", snapshot(state.state_dict()))
    return path


def weights_of(setup: Setup, name: str) -> dict[str, torch.Tensor]:
    return dict(setup.networks.members[name].state_dict())


def test_a_network_begins_with_its_weights_and_the_others_do_not_change(saved):
    setup = Setup(with_network(tiny(), "student", weights=str(saved)))
    assert same(weights_of(setup, "student"), weights_of(Setup(tiny(seed=3)), "student"))
    assert same(weights_of(setup, "teacher"), weights_of(Setup(tiny()), "teacher"))


def test_weights_of_a_run_are_those_of_its_selected_checkpoint(saved, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open_for_training("no")
    folder.write_config(tiny(seed=3))
    saved.rename(folder.step_path(2))
    folder.close()
    setup = Setup(with_network(tiny(), "student", weights=str(folder.path)))
    assert same(weights_of(setup, "student"), weights_of(Setup(tiny(seed=3)), "student"))


def test_a_run_with_a_checkpoint_does_not_read_them(tmp_path):
    recipe = with_network(tiny(), "student", weights=str(tmp_path / "gone.pt"))
    setup = Setup(recipe, initial_weights=False)
    assert same(weights_of(setup, "student"), weights_of(Setup(tiny()), "student"))
    with pytest.raises(RunError, match=r"gone\.pt"):
        Setup(recipe)


def test_a_frozen_teacher_of_classes_in_another_order_is_refused(saved):
    state = torch.load(saved, weights_only=True)["state"]
    state["data"]["classes"] = state["data"]["classes"][::-1]
    save_checkpoint(saved, "", state)
    trains = with_network(tiny(), "teacher", weights=str(saved))
    Setup(trains)  # it learns the labels of this data set
    with pytest.raises(RunError, match=r"networks.teacher.weights: .* trained on other classes"):
        Setup(with_network(trains, "teacher", frozen=True))


def test_a_frozen_teacher_of_the_same_classes_is_accepted(saved):
    setup = Setup(with_network(tiny(), "teacher", weights=str(saved), frozen=True))
    assert setup.networks.frozen == {"teacher"}
    assert not setup.networks.members["teacher"].training
    assert same(weights_of(setup, "teacher"), weights_of(Setup(tiny(seed=3)), "teacher"))


# --- devices and ranks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cpu0", "mps", "meta", ""])
def test_a_device_that_does_not_exist_is_refused_by_name(name):
    with pytest.raises(UsageError, match=f"device must be auto, cpu, cuda or cuda:N, got '{name}'"):
        choose_device(name)


def on_a_machine(monkeypatch, gpus: int) -> list[torch.device]:
    """A machine with so many GPUs; the devices that are made current there."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        torch.cuda, "set_device",
        lambda d: current.append(torch.device("cuda", d) if isinstance(d, int) else d),
    )  # fmt: skip
    return current


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(monkeypatch):
    on_a_machine(monkeypatch, 0)
    assert choose_device("auto", local_rank=1) == choose_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(RunError, match=r"no device cuda.* \(0 GPUs\): use --device cpu"):
            choose_device(name)


def test_each_rank_of_a_machine_has_its_own_gpu_and_makes_it_current(monkeypatch):
    current = on_a_machine(monkeypatch, 2)
    devices = [choose_device(name, rank) for name in ("auto", "cuda") for rank in (0, 1)]
    assert devices == [torch.device("cuda", rank) for rank in (0, 1)] * 2
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert current == [*devices, torch.device("cuda", 1)]
    assert choose_device("cpu", local_rank=1) == torch.device("cpu")
    for name, rank in (("auto", 2), ("cuda", 2)):
        with pytest.raises(RunError, match="no GPU for local rank 2: there are 2"):
            choose_device(name, rank)
    with pytest.raises(RunError, match=r"no device cuda:2 here \(2 GPUs\)"):
        choose_device("cuda:2")


@pytest.mark.parametrize(
    ("world", "batch_size", "accumulate", "fits"),
    [(3, 12, 4, True), (3, 8, 4, False), (3, 11, 1, True), (12, 12, 1, True), (12, 11, 1, False)],
)
def test_every_rank_has_an_image_in_every_part_of_a_batch(world, batch_size, accumulate, fits):
    recipe = tiny(train={"batch_size": batch_size, "accumulate": accumulate})
    if fits:
        Setup(recipe, ranks=Ranks(0, world))
        return
    with pytest.raises(UsageError, match=f"at least {world * accumulate}, an image for each"):
        Setup(recipe, ranks=Ranks(0, world))


def test_batch_norm_over_all_ranks_is_refused_on_cpus_and_alone_there_is_nothing_to_do():
    recipe = tiny(distributed={"sync_batch_norm": True})
    with pytest.raises(UsageError, match="sync_batch_norm must be false on CPUs"):
        Setup(recipe, ranks=Ranks(0, 2))
    alone = Setup(recipe)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in alone.networks.modules())


def test_only_a_network_that_is_marked_is_sharded():
    assert Setup(with_network(tiny(), "teacher", shard=True)).sharded == []  # alone: whole
    assert Setup(tiny(), ranks=Ranks(0, 2)).sharded == []


def test_a_method_that_pauses_networks_takes_whole_batches_and_no_compiled_step():
    switokd = dataclasses.replace(tiny().objective, name="switokd")
    for train, said in (
        ({"accumulate": 2}, "train.accumulate must be 1 with the method 'switokd'.*, got 2"),
        ({"compile": True}, "train.compile must be false with the method 'switokd'"),
    ):
        with pytest.raises(UsageError, match=said):
            Setup(tiny(objective=switokd, train=train))
    Setup(tiny(objective=switokd))
