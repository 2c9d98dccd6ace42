"""``bdkd data check``, and training without the files that it lists."""

import shutil

import numpy as np
import pytest
from imagenet_trees import encoded, labelled, wnid
from PIL import Image

from bdkd.cli import main
from bdkd.data.images.check import Report


def run(capfd, *arguments):
    code = 0
    try:
        main(["data", "check", *map(str, arguments), "--workers", "1"])
    except SystemExit as exit_:
        code = exit_.code
    return code, *capfd.readouterr()


def test_a_good_set_is_counted_and_writes_no_list(tree, tmp_path, capfd):
    code, out, err = run(capfd, tree, "--to", tmp_path / "bad.txt")
    assert code == 0, err
    assert "train  120 images of 5 classes, 24 to 24 in a class" in out
    assert "val    25 images of 5 classes" in out
    assert "145 JPEG RGB" in out
    assert not err  # no progress bar in a pipe
    assert not (tmp_path / "bad.txt").exists()


def test_bad_files_are_listed_and_left_out(tree, tmp_path, capfd):
    root, listed = shutil.copytree(tree, tmp_path / "copy"), tmp_path / "bad.txt"
    files = [file for file, _ in labelled(root, "train")]
    files[3].write_bytes(files[3].read_bytes()[:2000])
    files[30].write_text("a text\n")
    files[70].write_bytes(b"")  # a task has 32 images
    files[119].write_bytes(b"")
    with Image.open(files[31]) as image:
        files[31].write_bytes(encoded(image.convert("F"), "TIFF"))
        files[33].write_bytes(encoded(image, "GIF"))
        files[32].write_bytes(encoded(image.convert("CMYK"), "JPEG"))
    labelled(root, "val")[2][0].write_bytes(b"")
    (root / "train" / wnid(9)).mkdir()
    code, out, err = run(capfd, root, "--to", listed)
    assert code == 1
    assert "1 JPEG CMYK" in out
    assert "1 GIF P" in out
    assert err.count("\n") == 1
    assert "6 of 145 images cannot be decoded" in err
    assert f"1 class has fewer than 2 training images or none in val ({wnid(9)})" in err
    lines = listed.read_text().splitlines()
    bad = [*(files[i] for i in (3, 30, 31, 70, 119)), labelled(root, "val")[2][0]]
    assert lines[0].startswith("# bdkd data check")
    assert [line.split("\t")[0] for line in lines[1:]] == [str(f.relative_to(root)) for f in bad]
    assert "truncated" in lines[1]
    assert "of mode F has no standard conversion to 8 bits" in lines[3]

    (root / "train" / wnid(9)).rmdir()
    main(["train", "imagenet-smoke", "--data.root", str(root), "--data.exclude", str(listed),
          "--max-steps", "1", "--train.batch-size", "8", "--data.image-size", "32", "--log",
          "--data.mixup", "0.2", "--threads", "1", "--run-dir", str(tmp_path / "run")])  # fmt: skip
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_class_lacks_images_below_two_in_train_and_below_one_in_val():
    counts = {"train": np.array([2, 1, 2, 9]), "val": np.array([1, 1, 0, 9])}
    report = Report(("ant", "bee", "cow", "dog"), counts)
    assert report.lacking == ["bee", "cow"]
    assert report.images == 25


def test_a_list_that_cannot_be_written_is_an_error(tree, tmp_path, capfd):
    root = shutil.copytree(tree, tmp_path / "copy")
    labelled(root, "val")[0][0].write_bytes(b"")
    code, _, err = run(capfd, root, "--to", tmp_path / "none" / "bad.txt")
    assert code == 1
    assert "cannot write" in err


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_less_than_one_worker_is_refused(tree, workers, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["data", "check", str(tree), "--workers", workers])
    assert exit_.value.code == 2
    assert "--workers must be at least 1" in capsys.readouterr().err
