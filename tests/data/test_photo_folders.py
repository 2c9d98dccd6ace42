"""Folders of a user's own images, as the sources ``images`` and ``folder`` read them."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from photo_folders import files_of, jpeg, make_photos, open_source

from bdkd.cli import main
from bdkd.data import notes
from bdkd.errors import RunError, UsageError

BOTH = pytest.mark.parametrize("source", ["images", "folder"])


@pytest.fixture(autouse=True)
def notes_again(monkeypatch):
    """Forget the printed notes, because each note is printed once in a process."""
    monkeypatch.setattr(notes, "_printed", set())


@BOTH
def test_a_flat_folder_is_split_by_class(source, tmp_path):
    root = make_photos(tmp_path / "photos", cat=10, dog=20)
    data = open_source(source, root, validation=0.25)
    assert data.info.classes == ("cat", "dog")
    assert data.info.counts == {"train": 18, "val": 6, "test": 6}
    for split, each in {"train": (6, 12), "val": (2, 4), "test": (2, 4)}.items():
        labels = torch.cat([batch.target for batch in data.eval_batches(split, 64)])
        assert labels.bincount().tolist() == list(each)
    assert open_source(source, root, test_share=0.5).info.counts["test"] == 15


def test_the_held_out_images_are_the_same_for_every_seed(tmp_path):
    """The test images belong to the data set. Other options of the recipe do not change them."""
    root = make_photos(tmp_path / "photos", cat=12, dog=9)
    known = files_of(open_source("images", root), "test")
    assert len(known) == 4
    assert files_of(open_source("images", root, seed=5, validation=0.4), "test") == known
    parts = [files_of(open_source("images", root), split) for split in ("train", "val", "test")]
    assert sorted(itertools.chain(*parts)) == sorted(
        f"{name}/{n:03d}.jpg" for name, count in (("cat", 12), ("dog", 9)) for n in range(count)
    )
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    digests = [open_source(source, place).info.digests["test"]
               for source in ("images", "folder") for place in (root, moved)]  # fmt: skip
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]


@BOTH
@pytest.mark.parametrize("validation", ["val", "validation", "Valid"])
def test_a_val_folder_is_the_validation_split_next_to_test(source, validation, tmp_path):
    for split, count in (("train", 5), (validation, 2), ("test", 3)):
        make_photos(tmp_path / split, cat=count, dog=count)
    data = open_source(source, tmp_path, validation=0.4)
    assert data.info.counts == {"train": 10, "val": 4, "test": 6}
    assert data.info.files == {"train": 14, "test": 6}
    if source == "images":
        assert {name.split("/")[0] for name in files_of(data, "val")} == {validation}
    without = open_source(source, tmp_path, validation=0.4, use_val_split=False)
    assert without.info.counts == {"train": 6, "val": 4, "test": 6}


@BOTH
def test_val_is_the_test_split_if_there_is_no_test(source, tmp_path):
    make_photos(tmp_path / "train", cat=5, dog=5)
    make_photos(tmp_path / "val", cat=3, dog=2)
    assert open_source(source, tmp_path, validation=0.2).info.counts == {
        "train": 8, "val": 2, "test": 5,
    }  # fmt: skip


@BOTH
def test_training_images_alone_are_split(source, tmp_path, capfd):
    """Test images without labels, as in a competition, are not used, and a note names them."""
    make_photos(tmp_path / "train", cat=10, dog=10)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "tset").mkdir()
    (tmp_path / "tset" / "0.jpg").write_bytes(jpeg(0))
    data = open_source(source, tmp_path)
    assert data.info.counts == {"train": 14, "val": 2, "test": 4}
    err = capfd.readouterr().err
    assert f"bdkd: {tmp_path}/test is not used: it holds 1 images and no class folders\n" in err
    assert f"bdkd: {tmp_path} holds folders that are not splits and are not used: tset/\n" in err


def test_classes_may_be_named_like_splits(tmp_path):
    make_photos(tmp_path / "vehicles", train=5, bus=5, car=5)
    assert open_source("images", tmp_path / "vehicles").info.classes == ("bus", "car", "train")


@BOTH
def test_extra_and_hidden_files_do_not_count(source, tmp_path):
    root = make_photos(tmp_path / "photos", cat=6, dog=6)
    known = open_source(source, root).info
    (root / "LICENSE.txt").write_text("free")
    (root / "photos.tar").write_bytes(b"an archive")
    (root / "cat" / ".hidden.jpg").write_bytes(b"")
    (root / "cat" / "notes.txt").write_text("a cat")
    (root / ".git").mkdir()
    assert open_source(source, root).info == known


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_decoded_and_an_epoch_resumes_in_the_middle(workers, tmp_path):
    root = make_photos(tmp_path / "photos", cat=15, dog=15)
    options = {"workers": workers, "image_size": 32, "flip": True}
    whole = list(open_source("images", root, **options).train_batches(2, 0, 4, 1))
    rest = list(open_source("images", root, **options).train_batches(2, 8, 4, 1))
    assert len(whole) == 5
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a.views[0], b.views[0])
        assert torch.equal(a.target, b.target)
    assert whole[0].views[0].shape == (4, 3, 32, 32)


def test_shards_are_found_by_their_names(tmp_path):
    import tarfile
    from io import BytesIO

    def shard(path, count):
        with tarfile.open(path, "w") as tar:
            for i in range(count):
                for name, content in ((f"{i}.jpg", jpeg(i)), (f"{i}.cls", b"%d" % (i % 2))):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))

    for name, count in (("train-0", 8), ("train-1", 8), ("val-0", 4), ("test-0", 6)):
        shard(tmp_path / f"{name}.tar", count)
    assert open_source("images", tmp_path).info.counts == {"train": 16, "val": 4, "test": 6}
    (tmp_path / "flat").mkdir()
    shard(tmp_path / "flat" / "0.tar", 20)
    assert open_source("images", tmp_path / "flat").info.counts["test"] == 4


def nested(root):
    make_photos(root / "animals", cat=4, dog=4)


def two_nested(root):
    make_photos(root / "animals", cat=4, dog=4)
    make_photos(root / "plants", rose=4)


def unpacked_twice(root):
    make_photos(root / "archive" / "train", cat=4, dog=4)
    make_photos(root / "archive" / "test", cat=4, dog=4)


def no_classes(root):
    root.mkdir()
    for number in range(3):
        (root / f"{number}.jpg").write_bytes(jpeg(number))


def flat_splits(root):
    for split in ("train", "test"):
        (root / split).mkdir(parents=True)
        (root / split / "0.jpg").write_bytes(jpeg(0))


def other_class(root):
    make_photos(root / "train", cat=4, dog=4)
    make_photos(root / "test", cat=4, dgo=4)


def missing_class(root):
    make_photos(root / "train", cat=4, dog=4)
    make_photos(root / "test", cat=4)


def two_vals(root):
    for split in ("train", "val", "validation"):
        make_photos(root / split, cat=4, dog=4)


def no_train(root):
    make_photos(root / "test", cat=4, dog=4)


# The function that makes the folder, and the message, with PHOTOS for the folder
WRONG = {
    "no folder": (lambda root: None, "no data set at PHOTOS: data.root must name an existing"),
    "a file": (lambda root: root.write_text("x"),
               "data.root must be a folder, got the file PHOTOS: pass its folder"),
    "one class": (lambda root: make_photos(root, cat=9),
                  "PHOTOS must hold a folder for each of at least 2 classes, got 1: cat (9 "
                  "images)"),
    "3 images": (lambda root: make_photos(root, cat=2, dog=1),
                 "the class cat in PHOTOS holds 2 images: it needs at least 3 (1 to train, 1 for "
                 "validation, 1 to test); add images, or remove the class"),
    "an empty class": (lambda root: make_photos(root, cat=9, dog=0),
                       "the class dog in PHOTOS holds 0 images: it needs at least 3 (.jpg, .jpeg"),
    "few to train": (lambda root: [make_photos(root / "train", cat=4, dog=1),
                                   make_photos(root / "test", cat=4, dog=4)],
                     "the class dog in PHOTOS/train holds 1 image: it needs at least 2 (1 to "
                     "train, 1 for validation)"),
    "nested": (nested, "PHOTOS/animals holds no images but folders (cat, dog), and classes must be "
                       "the direct subfolders of PHOTOS: pass PHOTOS/animals"),
    "two nested": (two_nested, "PHOTOS/animals holds no images but folders (cat, dog)"),
    "unpacked twice": (unpacked_twice, "pass PHOTOS/archive"),
    "no classes": (no_classes, "PHOTOS holds 3 images and no class folders: put the images of each "
                               "class into PHOTOS/<class>/"),
    "flat splits": (flat_splits, "PHOTOS/train holds 1 images and no class folders: put the images "
                                 "of each class into PHOTOS/train/<class>/"),
    "empty": (lambda root: root.mkdir(), "PHOTOS holds no images: put the images of each class"),
    "another class": (other_class, "PHOTOS/train and PHOTOS/test must hold the same classes: "
                                   "PHOTOS/train does not hold dgo"),
    "a missing class": (missing_class, "the class dog in PHOTOS/test holds 0 images: it needs at "
                                       "least 1"),
    "two names": (two_vals, "PHOTOS holds both val and validation: rename or remove one"),
    "no train": (no_train, "PHOTOS holds test/ and no train/ with class folders"),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_an_error_of_one_line_with_a_remedy(source, case, tmp_path):
    make, message = WRONG[case]
    make(tmp_path / "photos")
    with pytest.raises(RunError) as raised:
        open_source(source, tmp_path / "photos")
    text = str(raised.value).replace(str(tmp_path / "photos"), "PHOTOS")
    assert message in text
    assert "\n" not in text


def test_two_images_of_a_class_suffice_without_validation(tmp_path):
    root = make_photos(tmp_path / "photos", cat=2, dog=2)
    assert open_source("images", root, validation=0.0).info.counts == {
        "train": 2, "val": 0, "test": 2,
    }  # fmt: skip


def test_a_class_that_the_exclude_list_empties_is_named(tmp_path):
    root = make_photos(tmp_path / "photos", cat=5, dog=3)
    listed = tmp_path / "bad.txt"
    listed.write_text("dog/000.jpg\ndog/001.jpg\ndog/002.jpg\n")
    with pytest.raises(RunError, match=r"the class dog in .* holds 0 images: it needs at least 2"):
        open_source("images", root, exclude=str(listed))
    listed.write_text("cat/000.jpg\n")
    assert sum(open_source("images", root, exclude=str(listed)).info.counts.values()) == 7


@BOTH
def test_an_image_that_cannot_be_read_is_named(source, tmp_path):
    root = make_photos(tmp_path / "photos", cat=6, dog=6)
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"no image")
    with pytest.raises(RunError, match=r"image .*/00\d.jpg") as raised:
        list(open_source(source, root).train_batches(0, 0, 4, 1))
    assert "\n" not in str(raised.value)


def test_options_of_tables_do_not_apply_to_folders(tmp_path):
    root = make_photos(tmp_path / "photos", cat=6, dog=6)
    with pytest.raises(UsageError, match=r"data\.image_column applies to Hugging Face data sets"):
        open_source("images", root, image_column="image")
    with pytest.raises(UsageError, match=r"data\.root must name the data set 'images'"):
        open_source("images", None)


def check(capfd, *arguments):
    code = 0
    try:
        main(["data", "check", *map(str, arguments), "--workers", "1"])
    except SystemExit as exit_:
        code = exit_.code
    return code, *capfd.readouterr()


def test_a_flat_folder_is_checked(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = make_photos(tmp_path / "photos", cat=6, dog=7)
    code, out, err = check(capfd, root)
    assert code == 0, err
    assert "images 13 images of 2 classes, 6 to 7 in a class" in out
    (root / "cat" / "000.jpg").write_bytes(b"no image")
    make_photos(root, emu=2)
    code, out, err = check(capfd, root)
    assert code == 1
    assert "bad    cat/000.jpg: cannot identify image file" in out
    assert "1 of 15 images cannot be decoded, listed in bad-files.txt" in err
    assert "1 class has fewer than 3 images (1 to train, 1 for validation, 1 to test) (emu)" in err
    shutil.rmtree(root / "emu")
    data = open_source("images", root, exclude="bad-files.txt")
    assert sum(data.info.counts.values()) == 12


def bdkd(*arguments, ranks=1):
    """Run a command as a user does."""
    launcher = ["-m", "bdkd"]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone",
                    "-m", "--", "bdkd"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


SMALL = (
    "--networks.teacher.model", "resnet8", "--train.epochs", "2", "--train.batch-size", "4",
    "--threads", "1", "--log", "--log-every", "1", "--checkpoint.every-steps", "2",
)  # fmt: skip


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        x["step"]: [x[n]["loss"] for n in ("teacher", "student")]
        for x in lines
        if x["split"] == "train"
    }


@pytest.mark.soak  # test_resume.py and test_own_images.py resume in every suite
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_flat_folder_trains_and_resumes_exactly(ranks, tmp_path):
    """The networks support any size, so the image size is that of the photos. The run stores it."""
    root = make_photos(tmp_path / "photos", size=(36, 24), cat=15, dog=15)
    given = ["train", "digits", "--data.source", "images", "--data.root", root, "--data.flip",
             "--data.workers", "0", "--device", "cpu", *SMALL]  # fmt: skip
    bdkd(*given, "--run-dir", tmp_path / "whole", ranks=ranks)
    assert "image_size = 24" in (tmp_path / "whole" / "config.toml").read_text()
    bdkd(*given, "--run-dir", tmp_path / "cut", "--max-steps", "7", ranks=ranks)
    out = bdkd(*given, "--run-dir", tmp_path / "cut", "--max-steps", "10", "--resume", ranks=ranks)
    assert "unlike" not in out, "a size that the run resolved is no change of the recipe"
    whole, cut = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert len(whole) == 10
    assert whole == cut
