"""The components of a run before its first step, and the recipes that are refused."""

import dataclasses
from functools import cache

import pytest
import torch
from small_runs import components_of, same, tiny_recipe

from bdkd.config import Recipe
from bdkd.device import choose_device
from bdkd.distributed.context import DistributedContext
from bdkd.engine.components import Components
from bdkd.engine.state import TrainingState, snapshot
from bdkd.errors import RunError, UsageError
from bdkd.registry import OBJECTIVES
from bdkd.runs.checkpoint import save_checkpoint
from bdkd.runs.folder import RunFolder


def with_network(recipe: Recipe, name: str, **changes) -> Recipe:
    network = dataclasses.replace(recipe.networks[name], **changes)
    return dataclasses.replace(recipe, networks={**recipe.networks, name: network})


@cache
def images() -> int:
    return components_of(tiny_recipe()).source.info.counts["train"]


def test_the_initial_weights_depend_only_on_the_seed():
    torch.manual_seed(1)
    first = components_of(tiny_recipe()).networks.state_dict()
    torch.manual_seed(2)
    assert same(dict(components_of(tiny_recipe()).networks.state_dict()), dict(first))
    other = components_of(tiny_recipe(seed=1)).networks.state_dict()
    assert not torch.equal(other["members.teacher.conv.weight"],
                           first["members.teacher.conv.weight"])  # fmt: skip


def test_the_order_of_the_images_depends_on_the_seed():
    orders = [
        next(components_of(tiny_recipe(seed=seed)).source.train_batches(0, 0, 24, 1))
        .views[0]
        .mean((1, 2, 3))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_and_weights_have_the_layout_of_the_recipe(channels_last):
    """The images have three channels, because images of one channel have both layouts at once."""
    components = components_of(tiny_recipe(train={"channels_last": channels_last}))
    [view] = next(components.source.train_batches(0, 0, 4, 1)).views
    weight = components.networks.members["student"].stages[0][0].conv1.weight
    for tensor in (view, weight):
        assert tensor.shape[1] > 1
        assert tensor.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_options_of_a_network_apply_only_to_it():
    recipe = with_network(tiny_recipe(), "teacher", options={"width": 2.0})
    members = components_of(recipe).networks.members
    assert members["teacher"].conv.out_channels == 2 * members["student"].conv.out_channels
    for option in ("num_classes", "in_channels"):
        with pytest.raises(UsageError, match=f"networks.teacher.options must not contain {option}"):
            components_of(with_network(tiny_recipe(), "teacher", options={option: 3}))


def test_the_recipe_sets_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            components_of(tiny_recipe(threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_batch_may_be_all_training_images_and_no_more():
    components = components_of(tiny_recipe(train={"batch_size": images()}))
    assert len(next(components.source.train_batches(0, 0, images(), 1)).target) == images()
    with pytest.raises(UsageError, match=rf"at most the {images()} training images, got"):
        components_of(tiny_recipe(train={"batch_size": images() + 1}))


# --- initial weights ------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Return the path of a checkpoint of the tiny recipe with another seed."""
    components = components_of(tiny_recipe(seed=3))
    state = TrainingState(components)
    path = tmp_path / "saved.pt"
    save_checkpoint(path, "", snapshot(state.state_dict()))
    return path


def weights_of(components: Components, name: str) -> dict[str, torch.Tensor]:
    return dict(components.networks.members[name].state_dict())


def test_a_network_starts_from_its_weights_and_the_others_do_not_change(saved):
    components = components_of(with_network(tiny_recipe(), "student", weights=str(saved)))
    assert same(
        weights_of(components, "student"), weights_of(components_of(tiny_recipe(seed=3)), "student")
    )
    assert same(
        weights_of(components, "teacher"), weights_of(components_of(tiny_recipe()), "teacher")
    )


def test_weights_of_a_run_are_those_of_its_selected_checkpoint(saved, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open_for_training("no")
    folder.write_config(tiny_recipe(seed=3))
    saved.rename(folder.step_path(2))
    folder.close()
    components = components_of(with_network(tiny_recipe(), "student", weights=str(folder.path)))
    assert same(
        weights_of(components, "student"), weights_of(components_of(tiny_recipe(seed=3)), "student")
    )


def test_a_resumed_run_does_not_read_initial_weights(tmp_path):
    recipe = with_network(tiny_recipe(), "student", weights=str(tmp_path / "gone.pt"))
    components = components_of(recipe, begins=False)
    assert same(
        weights_of(components, "student"), weights_of(components_of(tiny_recipe()), "student")
    )
    with pytest.raises(RunError, match=r"gone\.pt"):
        components_of(recipe)


def test_a_frozen_teacher_of_classes_in_another_order_is_refused(saved):
    state = torch.load(saved, weights_only=True)["state"]
    state["data"]["classes"] = state["data"]["classes"][::-1]
    save_checkpoint(saved, "", state)
    trains = with_network(tiny_recipe(), "teacher", weights=str(saved))
    components_of(trains)  # accepted, because this teacher learns the labels of the data set
    with pytest.raises(RunError, match=r"networks.teacher.weights: .* trained on other classes"):
        components_of(with_network(trains, "teacher", frozen=True))


def test_a_frozen_teacher_of_the_same_classes_is_accepted(saved):
    components = components_of(
        with_network(tiny_recipe(), "teacher", weights=str(saved), frozen=True)
    )
    assert components.networks.frozen == {"teacher"}
    assert not components.networks.members["teacher"].training
    assert same(
        weights_of(components, "teacher"), weights_of(components_of(tiny_recipe(seed=3)), "teacher")
    )


# --- devices and ranks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cpu0", "mps", "meta", ""])
def test_a_device_that_does_not_exist_is_refused_by_name(name):
    with pytest.raises(UsageError, match=f"device must be auto, cpu, cuda or cuda:N, got '{name}'"):
        choose_device(name)


def on_a_machine(monkeypatch, gpus: int) -> list[torch.device]:
    """Simulate a machine with some GPUs, and return a list of the devices that are made current."""
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
def test_every_rank_needs_an_image_of_every_micro_batch(world, batch_size, accumulate, fits):
    recipe = tiny_recipe(train={"batch_size": batch_size, "accumulate": accumulate})
    if fits:
        components_of(recipe, context=DistributedContext(0, world))
        return
    with pytest.raises(UsageError, match=f"at least {world * accumulate} .one image for each"):
        components_of(recipe, context=DistributedContext(0, world))


def test_sync_batch_norm_is_refused_on_cpus_and_ignored_in_one_process():
    recipe = tiny_recipe(distributed={"sync_batch_norm": True})
    with pytest.raises(UsageError, match="sync_batch_norm must be false on a CPU"):
        components_of(recipe, context=DistributedContext(0, 2))
    alone = components_of(recipe)
    assert not any(isinstance(m, torch.nn.SyncBatchNorm) for m in alone.networks.modules())


def test_networks_are_sharded_only_by_option_and_on_several_ranks():
    marked = with_network(tiny_recipe(), "teacher", shard=True)
    assert components_of(marked).sharded == []  # one process shards nothing
    assert components_of(tiny_recipe(), context=DistributedContext(0, 2)).sharded == []


def test_switokd_refuses_accumulation_and_compiled_steps():
    switokd = OBJECTIVES.configure("switokd")
    for train, said in (
        ({"accumulate": 2}, "train.accumulate must be 1 with the objective 'switokd'.*, got 2"),
        ({"compile": True}, "train.compile must be false with the objective 'switokd'"),
    ):
        with pytest.raises(UsageError, match=said):
            components_of(tiny_recipe(objective=switokd, train=train))
    components_of(tiny_recipe(objective=switokd))
