"""The source ``imagenet``: order, augmentation, and errors about bad files."""

import dataclasses
import multiprocessing
import shutil

import numpy as np
import pytest
import torch
from imagenet_sources import imagenet
from imagenet_trees import encoded, labelled
from PIL import Image
from small_runs import TINY_RUN, components_of

from bdkd.config import load_recipe
from bdkd.data import Shard
from bdkd.data.imagenet import dali
from bdkd.errors import RunError, UsageError

LOADERS = ("dali", "pillow")


def same(batches, others):
    pairs = list(zip(batches, others, strict=True))
    return bool(pairs) and all(
        torch.equal(a.target, b.target)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        for a, b in pairs
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_resumed_in_the_middle_continues_exactly(tree, loader):
    """A new source continues bit for bit, including all random augmentations."""
    options = {"rand_augment": (2, 9), "erasing": 0.5, "mixup": 0.2, "cutmix": 1.0}
    whole = list(imagenet(tree, loader=loader, **options).train_batches(3, 0, 16, 2))
    assert len(whole) == 6  # of 110 images, without the incomplete batch
    again = imagenet(tree, loader=loader, **options)
    assert same(whole[3:], again.train_batches(3, 48, 16, 2))
    assert not same(whole[3:4], list(again.train_batches(4, 48, 16, 2))[:1])
    assert not torch.equal(*whole[0].views)
    other = imagenet(tree, seed=1, loader=loader, **options)
    assert not same(whole[3:4], list(other.train_batches(3, 48, 16, 2))[:1])


@pytest.mark.parametrize("loader", LOADERS)
def test_the_source_does_not_use_the_global_random_state(tree, loader):
    """A resumed epoch starts twice. Otherwise, dropout would then have another random state."""
    before = torch.get_rng_state()
    source = imagenet(tree, loader=loader)
    assert next(source.train_batches(0, 0, 8, 1))
    assert next(source.eval_batches("val", 8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("loader", LOADERS)
def test_an_abandoned_epoch_does_not_affect_the_next(tree, loader):
    source = imagenet(tree, loader=loader)
    first = list(source.train_batches(0, 0, 16, 1))
    for batch in (abandoned := source.train_batches(1, 0, 16, 1)):
        assert len(batch.target) == 16
        break
    evaluated = list(source.eval_batches("test", 10))  # between the batches of an epoch
    abandoned.close()
    assert same(first, source.train_batches(0, 0, 16, 1))
    assert same(evaluated, source.eval_batches("test", 10))


def test_both_loaders_show_the_same_pixels_in_the_same_order(tree):
    """Decoders and filters round differently, so pixels differ by hundredths of a deviation."""
    dali, pillow = (imagenet(tree, loader=loader, image_size=224) for loader in LOADERS)
    pairs = [
        (dali.train_batches(0, 64, 22, 1), pillow.train_batches(0, 64, 22, 1)),
        (dali.eval_batches("test", 8), pillow.eval_batches("test", 8)),
    ]
    for one, other in pairs:
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a.target, b.target)
            assert a.views[0].shape == b.views[0].shape
            assert a.views[0].is_contiguous(memory_format=torch.channels_last)
            assert b.views[0].is_contiguous(memory_format=torch.channels_last)
            difference = (a.views[0] - b.views[0]).abs().flatten(1)
            assert difference.mean(1).max() < 0.02  # 1 of 255 is 0.017
            assert difference.max() < 0.5


@pytest.mark.parametrize("world", [2, 3])
def test_the_parts_of_all_ranks_equal_the_batch_of_one_rank(tree, world):
    options = {"rand_augment": (1, 5), "erasing": 0.3, "mixup": 0.4}
    source = imagenet(tree, **options)
    whole = list(source.train_batches(1, 12, 12, 1))
    parts = [list(source.train_batches(1, 12, 12, 1, Shard(r, world))) for r in range(world)]
    for number, batch in enumerate(whole):
        of_ranks = [part[number] for part in parts]
        assert torch.equal(torch.cat([part.target for part in of_ranks]), batch.target)
        views = torch.cat([part.views[0] for part in of_ranks])
        torch.testing.assert_close(views, batch.views[0], rtol=0, atol=1e-5)
    seen = [b.views[0] for r in range(world)
            for b in source.eval_batches("test", 4, Shard(r, world))]  # fmt: skip
    assert sum(map(len, seen)) == 25
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 25


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_shows_every_image_once_with_the_usual_crop(tree, loader):
    source = imagenet(tree, loader=loader, image_size=224)
    batches = list(source.eval_batches("test", 10))
    assert [len(batch.target) for batch in batches] == [10, 10, 5]
    files = labelled(tree, "val")
    assert torch.cat([b.target for b in batches]).tolist() == [label for _, label in files]
    mean, std = (
        np.array(v) for v in (source.info.normalisation.mean, source.info.normalisation.std)
    )
    with Image.open(files[0][0]) as image:  # 500x375: 256 high, 341 wide
        resized = image.resize((341, 256), Image.Resampling.BILINEAR)
    expected = (np.asarray(resized, np.float64)[16:240, 58:282] - mean) / std
    found = batches[0].views[0][0].permute(1, 2, 0).double().numpy()
    assert np.abs(found - expected).mean() < 0.02


@pytest.mark.parametrize(("format", "fixture"), [("webdataset", "tars"), ("tfrecord", "tfrecords")])
def test_archives_have_the_same_batches_as_folders(tree, format, fixture, request):
    archives = request.getfixturevalue(fixture)
    folders, packed = imagenet(tree), imagenet(archives, format=format)
    assert packed.info.counts == folders.info.counts
    assert same(folders.train_batches(2, 32, 32, 1), packed.train_batches(2, 32, 32, 1))
    assert same(folders.eval_batches("test", 25), packed.eval_batches("test", 25))
    with_dali = imagenet(archives, format=format, loader="dali")
    assert same(
        imagenet(tree, loader="dali").train_batches(2, 64, 32, 1),
        with_dali.train_batches(2, 64, 32, 1),
    )


@pytest.mark.parametrize("loader", LOADERS)
def test_training_resolution_follows_the_epoch_and_evaluation_does_not(tree, loader):
    source = imagenet(tree, loader=loader, progressive=((0, 32), (2, 48)))
    sides = [next(iter(source.train_batches(epoch, 96, 8, 1))).views[0].shape[-1]
             for epoch in range(4)]  # fmt: skip
    assert sides == [32, 32, 48, 48]
    assert next(iter(source.eval_batches("val", 4))).views[0].shape[-1] == 64
    assert imagenet(tree, progressive=((5, 32),)).side(0) == 64


@pytest.mark.parametrize(("precision", "dtype"), [
    ("fp32", torch.float32), ("bf16", torch.bfloat16),
])  # fmt: skip
def test_a_run_decodes_to_the_dtype_of_its_precision(tree, precision, dtype):
    recipe = load_recipe(TINY_RUN[0])
    data = imagenet(tree, loader="pillow").config
    train = dataclasses.replace(recipe.train, precision=precision, batch_size=4)
    components = components_of(dataclasses.replace(recipe, data=data, train=train))
    batch = next(components.source.train_batches(0, 0, 4, 1))
    assert {view.dtype for view in batch.views} == {dtype}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_images_have_the_dtype_of_the_training(tree, loader, dtype):
    wide, narrow = imagenet(tree, loader=loader), imagenet(tree, dtype=dtype, loader=loader)
    a = next(iter(wide.train_batches(0, 96, 8, 1))).views[0]
    b = next(iter(narrow.train_batches(0, 96, 8, 1))).views[0]
    assert b.dtype == dtype
    torch.testing.assert_close(a, b.float(), rtol=2**-8, atol=1e-3)
    assert next(iter(narrow.eval_batches("val", 8))).views[0].dtype == torch.float32


@pytest.mark.parametrize("loader", LOADERS)
def test_images_are_normalised_by_the_means_and_deviations_of_imagenet(copy, loader):
    """The weights of torchvision and timm expect this normalisation."""
    for split in ("train", "val"):
        for file, _ in labelled(copy, split):
            file.write_bytes(encoded(Image.new("RGB", (70, 60), (200, 100, 50)), "PNG"))
    source = imagenet(copy, loader=loader)
    want = [(200 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (50 / 255 - 0.406) / 0.225]
    for batches in (source.train_batches(0, 0, 8, 1), source.eval_batches("test", 8)):
        for channel, value in zip(next(batches).views[0].unbind(1), want, strict=True):
            torch.testing.assert_close(channel, torch.full_like(channel, value), rtol=0, atol=1e-4)


def odd(kind: str, image: Image.Image) -> bytes:
    return {
        "cmyk": lambda: encoded(image.convert("CMYK"), "JPEG"),
        "grey": lambda: encoded(image.convert("L"), "JPEG"),
        "png": lambda: encoded(image, "PNG"),
        "rgba": lambda: encoded(image.convert("RGBA"), "PNG"),
        "progressive": lambda: encoded(image, "JPEG", progressive=True),
        "1x1": lambda: encoded(image.resize((1, 1)), "JPEG"),
        "1x900": lambda: encoded(image.resize((1, 900)), "JPEG"),
    }[kind]()


def test_odd_images_train_and_both_loaders_agree_on_them(copy):
    """Train and val have one image of each kind. test_imagenet_pictures tests decoded pixels."""
    for split in ("train", "val"):
        kinds = ("cmyk", "grey", "png", "rgba", "progressive", "1x1", "1x900")
        for kind, (file, _) in zip(kinds, labelled(copy, split)[3:], strict=False):
            with Image.open(file) as image:
                image.load()
            file.write_bytes(odd(kind, image))
    seen = []
    for loader in LOADERS:
        source = imagenet(copy, loader=loader, validation=0.0)
        training = [b.views[0] for b in source.train_batches(0, 0, 24, 1)]
        seen.append(torch.cat([*training, *(b.views[0] for b in source.eval_batches("test", 25))]))
    assert len(seen[0]) == 145
    assert (seen[0] - seen[1]).abs().flatten(1).mean(1).max() < 0.05


BAD = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "header": lambda whole: whole[:700],
    "text": lambda whole: b"this is a text\n" * 40,
    "empty": lambda whole: b"",
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("split", "kind"), [*(("train", kind) for kind in BAD), ("val", "truncated")]
)
def test_a_bad_file_is_named_in_one_line(copy, loader, kind, split):
    file, _ = labelled(copy, split)[7]
    file.write_bytes(BAD[kind](file.read_bytes()))
    source = imagenet(copy, loader=loader, validation=0.0, smallest_crop=1.0)
    batches = source.train_batches(0, 0, 12, 1)
    with pytest.raises(RunError, match=r"cannot decode the image .*data\.exclude") as raised:
        list(batches if split == "train" else source.eval_batches("test", 12))
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)

    listed = copy.parent / "bad-files.txt"
    listed.write_text(f"# by hand\n{file.relative_to(copy)}\tno image\n")
    left = imagenet(copy, loader=loader, validation=0.0, exclude=str(listed))
    assert sum(left.info.counts.values()) == 144
    assert len(list(left.train_batches(0, 0, 12, 1))) == left.info.counts["train"] // 12
    assert sum(len(b.target) for b in left.eval_batches("test", 12)) == left.info.counts["test"]


def test_an_image_that_only_dali_refuses_is_named(copy, monkeypatch):
    """No such encoding is known. The test passes a GIF to DALI, which bdkd never does."""
    file, _ = labelled(copy, "train")[7]
    with Image.open(file) as image:
        file.write_bytes(encoded(image, "GIF"))
    handed = {str(file): (file.read_bytes(), image.height, image.width)}
    monkeypatch.setattr(
        dali, "prepared", lambda item, known=dali.prepared: handed.get(str(item)) or known(item)
    )
    source = imagenet(copy, loader="dali", validation=0.0)
    with pytest.raises(RunError, match=f"{file}: DALI"):
        list(source.train_batches(0, 0, 12, 1))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_that_vanishes_is_named(copy, loader):
    source = imagenet(copy, loader=loader, validation=0.0)
    file, _ = labelled(copy, "train")[50]
    file.unlink()
    with pytest.raises(RunError, match=f"cannot read the image {file}: No such file"):
        list(source.train_batches(0, 0, 12, 1))


def test_workers_give_the_same_batches_and_end_with_the_epoch(tree, copy):
    before = set(multiprocessing.active_children())
    batches = imagenet(tree, workers=2).train_batches(0, 0, 8, 1)
    first = [next(batches), next(batches)]
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert not set(multiprocessing.active_children()) - before
    alone = imagenet(tree, workers=0).train_batches(0, 0, 8, 1)
    assert same(first, [next(alone), next(alone)])
    assert not set(multiprocessing.active_children()) - before  # decoded in this process
    alone.close()

    file, _ = labelled(copy, "train")[7]
    file.write_text("no image")
    with pytest.raises(RunError, match=f"cannot decode the image {file}"):
        list(imagenet(copy, workers=1, validation=0.0).train_batches(0, 0, 8, 1))
    assert not set(multiprocessing.active_children()) - before


def test_archives_that_are_cut_short_are_named(tree, tars, tfrecords, tmp_path):
    for archives, format, name in (
        (tars, "webdataset", "train-0001.tar"),
        (tfrecords, "tfrecord", "train-00001-of-00003"),
    ):
        root = shutil.copytree(archives, tmp_path / format)
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(RunError, match=name):
            imagenet(root, format=format)


def test_mixing_needs_its_neighbours_on_one_rank(tree):
    source = imagenet(tree, cutmix=1.0)
    with pytest.raises(UsageError, match="even number of images"):
        next(source.train_batches(0, 0, 10, 1, Shard(0, 2)))
    # 14 images of 3 ranks: 0 to 4, 4 to 9, 9 to 14.
    for rank in (1, 2):
        with pytest.raises(UsageError, match="even number of images"):
            next(source.train_batches(0, 0, 14, 1, Shard(rank, 3)))
    next(source.train_batches(0, 0, 14, 1, Shard(0, 3)))
    next(source.train_batches(0, 0, 9, 1))  # the last image has no neighbour
