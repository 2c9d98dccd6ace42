"""The images in ImageNet's splits, and the options and layouts that are refused."""

import os
import shutil
import tomllib

import pytest
import tomli_w
import torch
from imagenet_sources import imagenet
from imagenet_trees import labelled, wnid

from bdkd.config import load_recipe, parse_recipe, to_toml
from bdkd.data.imagenet import dali
from bdkd.data.imagenet.loader import processors
from bdkd.data.imagenet.pillow import Pillow
from bdkd.data.in_memory import Images, InMemoryConfig
from bdkd.data.splits import make_splits
from bdkd.errors import RunError, UsageError


def test_splits_do_not_overlap_and_come_from_their_folders(tree):
    source = imagenet(tree)
    names = {split: {index.identity(i) for i in range(len(index))}
             for split, index in source.splits.items()}  # fmt: skip
    assert {split: len(found) for split, found in names.items()} == {
        "train": 110, "val": 10, "test": 25,
    }  # fmt: skip
    assert not names["train"] & names["val"]
    assert names["train"] | names["val"] == {
        str(file.relative_to(tree)) for file, _ in labelled(tree, "train")
    }
    assert imagenet(tree, validation=0.0).info.counts["train"] == 120
    assert imagenet(tree, train_images=50).info.counts["train"] == 50
    noisy, clean = imagenet(tree, label_noise=0.2).splits["train"], source.splits["train"]
    assert (noisy.labels != clean.labels).sum() == 22


def test_wrong_layouts_are_errors_of_one_line(copy, tree, tars, tmp_path):
    def refused(match, root=copy, **options):
        with pytest.raises(RunError, match=match) as raised:
            imagenet(root, **options)
        assert "\n" not in str(raised.value)

    refused("no data set at .*nowhere", root=tmp_path / "nowhere")
    refused("no archives train", format="webdataset")
    refused(r"data\.format = webdataset", root=tars)
    refused(
        r"no archives train.*tar files.*data\.format = webdataset", root=tars, format="tfrecord"
    )
    (copy / "train" / wnid(9)).mkdir()
    refused(f"the class {wnid(9)} in .* holds 0 images")
    (copy / "train" / wnid(9)).rmdir()
    (copy / "val" / wnid(7)).mkdir()
    refused(f"does not have: {wnid(7)}")
    for folder in list((copy / "val").iterdir()):
        for file in list(folder.iterdir()):
            file.rename(copy / "val" / file.name)
        folder.rmdir()
    refused(r"val is flat.*LOC_val_solution\.csv.*mkdir -p")
    shutil.rmtree(copy / "val")
    refused(r"no folder .*val: data\.root must hold")


def as_toml(source: str, key: str, value: object) -> str:
    """Return a recipe with one option of a data source."""
    tables = tomllib.loads(to_toml(load_recipe("digits")))
    tables["data"] = {"source": source, key: value}
    return tomli_w.dumps(tables)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("crop", 4), ("crop_padding", "edge"), ("cutout", 8), ("pixel_noise", 0.1),
    ],
)  # fmt: skip
def test_options_of_other_sources_are_refused(key, value):
    text = as_toml("imagenet", key, value)
    expected = rf"data\.{key} is an option of .*digits.*: remove it for the data source 'imagenet'"
    with pytest.raises(UsageError, match=expected):
        parse_recipe(text, "a recipe")


def test_too_few_training_images_are_refused(tree):
    with pytest.raises(UsageError, match=r"data\.train_images must be between 5"):
        imagenet(tree, train_images=3)


@pytest.mark.parametrize(("key", "value"), [
    ("format", "webdataset"), ("loader", "pillow"), ("workers", 0), ("exclude", "bad.txt"),
    ("smallest_crop", 0.5), ("progressive", ((0, 32),)), ("rand_augment", (1, 5)),
    ("erasing", 0.1), ("mixup", 0.2), ("cutmix", 1.0),
])  # fmt: skip
def test_options_of_imagenet_are_refused_for_other_sources(key, value):
    expected = (
        rf"data\.{key} is an option of imagenet, images: remove it for the data source 'synthetic'"
    )
    with pytest.raises(UsageError, match=expected):
        parse_recipe(as_toml("synthetic", key, value), "a recipe")


def test_a_list_of_another_data_set_is_refused(tree, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("train/n9/no.JPEG\tbad\n")
    with pytest.raises(UsageError, match="names no image of"):
        imagenet(tree, exclude=str(listed))
    with pytest.raises(RunError, match=r"cannot read data\.exclude"):
        imagenet(tree, exclude=str(tmp_path / "none.txt"))
    listed.write_text("# 0 of 145 images\n")
    assert imagenet(tree, exclude=str(listed)).info.counts["train"] == 110


def test_a_list_that_leaves_a_class_without_images_is_refused(tree, tmp_path):
    names = [str(file.relative_to(tree)) for file, label in labelled(tree, "train") if label == 2]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(names[:-1]))
    with pytest.raises(RunError, match=f"the class {wnid(2)} in .* holds 1 images"):
        imagenet(tree, exclude=str(listed))


def test_an_empty_validation_folder_is_refused(copy):
    for file, _ in labelled(copy, "val"):
        file.unlink()
    with pytest.raises(RunError, match=r"val holds no images: the test split needs some"):
        imagenet(copy)


def test_dali_is_used_if_it_is_installed(tree, monkeypatch):
    assert isinstance(imagenet(tree, loader="auto").training, dali.Dali)
    # Another package's "nvidia" has no "dali" in it.
    monkeypatch.setattr(
        "bdkd.data.imagenet.assemble.find_spec", lambda name: name == "nvidia" or None
    )
    assert isinstance(imagenet(tree, loader="auto").training, Pillow)


def test_subsets_and_wrong_labels_equal_those_of_sets_in_memory(tree):
    """The held-out images, the subset and the wrong labels equal those of ``data.splits``."""
    options = {"validation": 0.25, "train_images": 50, "label_noise": 0.3}
    source = imagenet(tree, **options)
    labels = torch.tensor([label for _, label in labelled(tree, "train")])
    numbers = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    expected = make_splits(
        InMemoryConfig("made", **options),
        Images(numbers, labels),
        Images(numbers[:1], labels[:1]),
        255,
    )
    names = [str(file.relative_to(tree)) for file, _ in labelled(tree, "train")]
    for split in ("train", "val"):
        index, (chosen, wanted) = source.splits[split], expected[split]
        found = [index.identity(i) for i in range(len(index))]
        assert found == [names[i] for i in chosen.flatten()]
        assert index.labels.tolist() == wanted.tolist()


@pytest.mark.parametrize("count", [5, 110])
def test_a_subset_may_have_one_image_per_class_or_all_training_images(tree, count):
    assert imagenet(tree, train_images=count).info.counts["train"] == count


def test_ranks_share_the_processors_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    for ranks, each in (("1", 12), ("5", 2), ("100", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert processors() == each
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert processors() == 12
