"""Hugging Face data sets and Parquet files as ``data.root`` of the source ``images``."""

import io
import os
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from photo_folders import jpeg, make_photos, open_source
from PIL import Image

from bdkd.cli import main
from bdkd.data import notes
from bdkd.data.images import hub
from bdkd.errors import RunError, UsageError

NAMES = ["cat", "dog"]
CAT_OR_DOG = datasets.ClassLabel(names=NAMES)
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use a new cache of ``datasets`` for each test."""
    monkeypatch.setattr(notes, "_printed", set())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(count=20, first=0, label=None, image=None, kind=CAT_OR_DOG, **more):
    """Return a data set whose image ``i`` is ``jpeg(first + i)``, with the classes in turn."""
    columns = {
        "image": image or [{"bytes": jpeg(first + i), "path": None} for i in range(count)],
        "label": label or [i % 2 for i in range(count)],
    }
    kinds = {"image": datasets.Image(), "label": kind, **more}
    for name in more:
        columns[name] = columns["image" if isinstance(more[name], datasets.Image) else "label"]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def saved(root, shards=1, **splits):
    datasets.DatasetDict(**splits).save_to_disk(root, num_shards=dict.fromkeys(splits, shards))
    return root


def evaluated(source, split):
    batches = list(source.eval_batches(split, 64))
    return torch.cat([b.views[0] for b in batches]), torch.cat([b.target for b in batches])


def test_the_images_of_a_saved_set_are_those_of_its_rows(tmp_path):
    """Every image of every shard is read from its position in the Arrow file, with its label."""
    root = saved(tmp_path / "set", shards=3, train=made(20), test=made(7, first=100))
    by_files = make_photos(tmp_path / "files" / "test", cat=0, dog=0)
    for i in range(7):
        (by_files / NAMES[i % 2] / f"{i}.jpg").write_bytes(jpeg(100 + i))
    make_photos(tmp_path / "files" / "train", cat=4, dog=4)
    source = open_source("images", root)
    assert source.info.classes == ("cat", "dog")
    assert source.info.counts == {"train": 18, "val": 2, "test": 7}
    pixels, labels = evaluated(source, "test")
    assert labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    known, of_files = evaluated(open_source("images", tmp_path / "files"), "test")
    for label in range(2):
        assert torch.equal(pixels[labels == label], known[of_files == label])
    index = source.splits["train"]
    contents = {index.identity(i): index.item(i).read() for i in range(len(index))}
    assert all(content == jpeg(int(name.split("#")[1])) for name, content in contents.items())


@pytest.mark.parametrize("kind", ["hf folder", "folder", "hf file", "file", "saved", "hf saved"])
def test_every_storage_format_is_the_same_data_set(kind, tmp_path):
    """A single split is divided in three. Order, crops and digests do not depend on the format."""
    set_ = made(30)
    (tmp_path / "parquet").mkdir()
    file = tmp_path / "parquet" / "train-00000-of-00001.parquet"
    set_.to_parquet(file)
    set_.save_to_disk(tmp_path / "saved", num_shards=2)
    place = {"folder": file.parent, "file": file, "saved": tmp_path / "saved"}[kind.split()[-1]]
    source = open_source("images", f"hf:{place}" if " " in kind else place)
    assert source.info.counts == {"train": 22, "val": 2, "test": 6}
    reference = open_source("images", tmp_path / "saved")
    assert source.info.digests == reference.info.digests
    a, b = (next(s.train_batches(1, 4, 4, 1)) for s in (source, reference))
    assert torch.equal(a.views[0], b.views[0])
    assert torch.equal(a.target, b.target)


@pytest.mark.parametrize("loader", ["dali", "pillow"])
def test_both_loaders_read_the_rows(loader, tmp_path):
    """DALI and Pillow resize a little differently; the images of two rows differ much more."""
    root = saved(tmp_path / "set", train=made(12), test=made(6, 30))
    reference, _ = evaluated(open_source("images", root, image_size=32), "test")
    source = open_source("images", root, image_size=32, loader=loader, workers=2)
    pixels, _ = evaluated(source, "test")
    distances = torch.cdist(pixels.flatten(1), reference.flatten(1))
    assert torch.equal(distances.argmin(1), torch.arange(6))
    assert len(list(source.train_batches(0, 0, 4, 1))) == 2


def test_a_changed_parquet_file_is_read_again(tmp_path):
    file = tmp_path / "photos.parquet"
    made(20).to_parquet(file)
    first = open_source("images", file).info
    made(24, first=50).to_parquet(file)
    second = open_source("images", file).info
    assert sum(second.counts.values()) == 24
    assert first.digests != second.digests


def test_parquet_files_of_pandas_are_read(tmp_path):
    """They have a column of bytes, and class names as text."""
    import pandas

    pandas.DataFrame(
        {"photo": [jpeg(i) for i in range(12)], "label": ["dog", "ant", "cow"] * 4, "id": range(12)}
    ).to_parquet(tmp_path / "photos.parquet")
    source = open_source("images", tmp_path / "photos.parquet")
    assert source.info.classes == ("ant", "cow", "dog")
    index = source.splits["test"]
    for i in range(len(index)):
        row = int(index.identity(i).split("#")[1])
        assert index.item(i).read() == jpeg(row)
        assert index.labels[i] == [2, 0, 1][row % 3]


def test_rows_with_only_a_path_are_files(tmp_path):
    """The builder of ``datasets`` for folders of images makes such rows."""
    root = make_photos(tmp_path / "photos", cat=6, dog=6)
    source = open_source("images", f"hf:{root}")
    assert source.info.classes == ("cat", "dog")
    assert source.info.counts == {"train": 8, "val": 2, "test": 2}
    for split in ("train", "val", "test"):
        index = source.splits[split]
        for i in range(len(index)):
            label, number = divmod(int(index.identity(i).split("#")[1]), 6)
            assert index.item(i).read() == jpeg(1000 * label + number)
            assert index.labels[i] == label
    (root / "cat" / "003.jpg").unlink()
    places = [source.splits[split].item(i) for split in ("train", "val", "test")
              for i in range(len(source.splits[split]))]  # fmt: skip
    [gone] = [item for item in places if not os.path.exists(item.path)]
    with pytest.raises(RunError, match=r"cannot read the image .*003.jpg .*row 3.*No such file"):
        gone.read()


def test_rows_with_bytes_and_rows_with_a_path_may_be_mixed(tmp_path):
    image = [{"bytes": jpeg(i), "path": None} if i % 3 else {"bytes": None, "path": f"{i}.jpg"}
             for i in range(12)]  # fmt: skip
    image[5] = None
    (root := tmp_path / "set").mkdir()
    for split, rows in (("train", image[:5] + image[6:]), ("test", image)):
        columns = {"image": pyarrow.array(rows, IMAGE), "label": [i % 2 for i in range(len(rows))]}
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, root / f"{split}.parquet")
    with pytest.raises(RunError, match=r"row 5 of the split test of .* has no image"):
        open_source("images", root)
    (root / "test.parquet").unlink()
    index = open_source("images", root, image_size=32).splits["train"]
    for i in range(len(index)):
        row = int(index.identity(i).split("#")[1])
        row += row >= 5
        item = index.item(i)
        assert item.read() == jpeg(row) if row % 3 else item.path == f"{row}.jpg"


def test_images_at_addresses_are_refused(tmp_path):
    image = [{"bytes": None, "path": "https://example.org/y.jpg"}] * 12
    columns = {"image": pyarrow.array(image, IMAGE), "label": [i % 2 for i in range(12)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    with pytest.raises(RunError, match=r"row 0 of the split train of .* is at https://example.org"):
        open_source("images", tmp_path)


def test_known_splits_are_used_and_others_are_named(tmp_path, capfd):
    root = saved(tmp_path / "a", train=made(20), validation=made(6, 30), test=made(4, 40),
                 extra=made(4, 60))  # fmt: skip
    source = open_source("images", root)
    assert source.info.counts == {"train": 20, "val": 6, "test": 4}
    assert "holds more splits, which are not used: extra" in capfd.readouterr().err
    root = saved(tmp_path / "b", train=made(20), validation=made(6, 30),
                 test=made(4, 40, label=[-1] * 4))  # fmt: skip
    assert open_source("images", root).info.counts == {"train": 18, "val": 2, "test": 6}
    said = f"bdkd: the split test of {root} is not used: its images have no labels\n"
    assert capfd.readouterr().err == said
    root = saved(tmp_path / "c", train=made(20), test=made(4, 40, label=[0, -1, 1, 1]))
    with pytest.raises(RunError, match=r"1 of 4 images of the split test of .* have no label in"):
        open_source("images", root)


def test_classes_without_images_are_left_out_and_named(tmp_path, capfd):
    kind = datasets.ClassLabel(names=["ant", "bee", "cat", "dog"])
    made(20, label=[1, 3] * 10, kind=kind).save_to_disk(tmp_path / "set")
    assert open_source("images", tmp_path / "set").info.classes == ("bee", "dog")
    assert "2 of the 4 classes of" in (err := capfd.readouterr().err)
    assert "have no images and are left out: ant, cat" in err


WRONG = {
    "no image column": (lambda: made().remove_columns("image"), {}, RunError,
                        "has no column of images, only label: name one with data.image_column"),
    "no label column": (lambda: made().remove_columns("label"), {}, RunError,
                        "has no column of labels, only image: name one with data.label_column"),
    "two image columns": (lambda: made(mask=datasets.Image()), {}, UsageError,
                          "has several columns of images: choose one of image, mask with "
                          "data.image_column"),
    "two label columns": (lambda: made(coarse=CAT_OR_DOG), {}, UsageError,
                          "several columns of labels: choose one of label, coarse with"),
    "an unknown column": (made, {"image_column": "imgae"}, UsageError,
                          "has no column 'imgae' (data.image_column): did you mean 'image'?"),
    "a column of another type": (made, {"label_column": "image"}, UsageError,
                                 "data.label_column must name a column of labels, but 'image'"),
    "an image is missing": (lambda: made(image=[None] * 20), {}, RunError,
                            "row 0 of the split train of ROOT has no image"),
    "no labels": (lambda: made(label=[0, -1] * 10), {}, RunError,
                  "10 of 20 images of the split train of ROOT have no label in the column label"),
    "one class": (lambda: made(label=[0] * 20), {}, RunError, "at least 2 classes"),
    "few images": (lambda: made(3), {}, RunError,
                   "the class cat in ROOT holds 2 images: it needs at least 3"),
    "a format": (made, {"format": "webdataset"}, RunError, "holds no webdataset files"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_data_set_is_an_error_of_one_line_with_a_remedy(case, tmp_path):
    make, options, kind, message = WRONG[case]
    make().save_to_disk(tmp_path / "set")
    with pytest.raises(kind) as raised:
        open_source("images", tmp_path / "set", **options)
    assert message in str(raised.value).replace(str(tmp_path / "set"), "ROOT")
    assert "\n" not in str(raised.value)


def test_a_column_is_chosen(tmp_path):
    made(mask=datasets.Image(), coarse=CAT_OR_DOG).save_to_disk(tmp_path / "set")
    source = open_source("images", tmp_path / "set", image_column="mask", label_column="coarse")
    assert source.info.counts["test"] == 4


def test_a_data_set_that_cannot_be_opened_is_an_error_of_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_text("no parquet")
    for root, message in (
        ("hf:", "no data set at an empty path: hf: needs an existing folder"),
        ("hf:./nowhere", "no data set at ./nowhere"),
        (f"hf:{tmp_path}/nowhere", "nowhere: hf: needs an existing folder"),
        (f"hf:{tmp_path}/empty", "cannot read the data set"),
        (tmp_path / "bad.parquet", "cannot read the data set"),
    ):
        with pytest.raises(RunError) as raised:
            open_source("images", root)
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(UsageError, match=r"data\.format must be auto or hf for hf:x, got 'folder'"):
        open_source("images", "hf:x", format="folder")


def test_without_datasets_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "photos.parquet").write_text("")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for root in (tmp_path / "photos.parquet", "hf:owner/name"):
        with pytest.raises(RunError, match=r"needs the package datasets: pip install 'bdkd\[hf\]'"):
            open_source("images", root)


class Hub:
    """Replaces the client of the Hub, because tests have no network."""

    def __init__(self, error: Exception | None):
        self.error, self.asked = error, 0

    def __call__(self):
        return self

    def dataset_info(self, name, timeout):
        self.asked += 1
        assert timeout <= 10
        if self.error is not None:
            raise self.error


def test_a_set_of_the_hub_without_a_network(tmp_path, monkeypatch, capfd):
    """After one request, an error of one line says how to copy the data. A cached copy is used."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", asked := Hub(OSError("no route to the host")))
    with pytest.raises(RunError) as raised:
        open_source("images", "hf:owner/things")
    assert asked.asked == 1
    assert str(raised.value) == (
        "cannot reach the Hugging Face Hub (no route to the host) and owner/things is not in the "
        "cache: run hf download owner/things --repo-type dataset --local-dir DIR where there is a "
        "network, copy DIR here, and pass hf:DIR"
    )
    assert capfd.readouterr().err == ""
    assert datasets.config.HF_HUB_OFFLINE is False
    # The cached copy of an earlier run
    version = tmp_path / "cache" / "owner___things" / "default" / "0.0.0"
    (tmp_path / "parquet").mkdir()
    made(20).to_parquet(tmp_path / "parquet" / "train.parquet")
    found = datasets.load_dataset(str(tmp_path / "parquet"), cache_dir=tmp_path / "other")
    [folder] = {os.path.dirname(file["filename"]) for file in found["train"].cache_files}
    os.makedirs(version)
    os.rename(folder, version / "0123456789abcdef")
    [arrow] = (version / "0123456789abcdef").glob("*.arrow")
    arrow.rename(arrow.with_name(arrow.name.replace("parquet-", "things-")))
    assert sum(open_source("images", "hf:owner/things").info.counts.values()) == 20


@pytest.mark.parametrize(("error", "message"), [
    ("RepositoryNotFoundError", "no data set 'owner/thigns' on the Hugging Face Hub: check the"),
    ("GatedRepoError", "the data set owner/thigns needs permission: accept its terms at"),
])  # fmt: skip
def test_a_set_that_the_hub_refuses(error, message, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    refused = getattr(errors, error)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(refused.__new__(refused)))
    with pytest.raises(RunError, match=message) as raised:
        open_source("images", "hf:owner/thigns")
    assert "\n" not in str(raised.value)


def test_a_configuration_follows_after_a_colon(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(hub, "_open_hub", lambda *given: opened.append(given) or {"train": made()})
    monkeypatch.setattr(
        hub, "_open_local", lambda *given: opened.append(given) or {"train": made()}
    )
    (tmp_path / "set").mkdir()
    for name, expected in (
        ("owner/name:small", ("owner/name", "small", "hf:...")),
        ("mnist", ("mnist", "", "hf:...")),
        (f"{tmp_path}/set:small", (tmp_path / "set", "small")),
    ):
        hub._open(name, "hf:...")
        assert opened.pop() == expected


def test_a_set_is_checked(tmp_path, capfd):
    image = [{"bytes": jpeg(i) if i != 3 else b"no image", "path": None} for i in range(20)]
    saved(tmp_path / "set", train=made(image=image), test=made(4, 30))
    listed = tmp_path / "bad.txt"
    with pytest.raises(SystemExit):
        main(["data", "check", f"hf:{tmp_path}/set", "--workers", "1", "--to", str(listed)])
    out, err = capfd.readouterr()
    assert "train  20 images of 2 classes" in out
    assert "test   4 images of 2 classes" in out
    assert "bad    train#3: cannot identify image file" in out
    assert "1 of 24 images cannot be decoded" in err
    assert open_source("images", tmp_path / "set", exclude=str(listed)).info.counts == {
        "train": 17, "val": 2, "test": 4,
    }  # fmt: skip
    whole = open_source("images", tmp_path / "set", validation=0.0)
    with pytest.raises(RunError, match=r"cannot decode the image .*arrow \(train, row 3\)"):
        list(whole.eval_batches("train", 4))


def test_a_parquet_file_trains(tmp_path, capfd):
    """The run is also evaluated: it stores the path of the data set and the size of the images."""
    made(30).to_parquet(tmp_path / "photos.parquet")
    run = str(tmp_path / "run")
    given = ["digits", "--data.source", "images", "--data.root", str(tmp_path / "photos.parquet"),
             "--networks.teacher.model", "resnet8", "--train.epochs", "1", "--train.batch-size",
             "4", "--threads", "1", "--log", "--run-dir", run, "--device", "cpu"]  # fmt: skip
    for command in (["train", *given], ["evaluate", run, "--split", "test"]):
        main(command)
        out, err = capfd.readouterr()
        assert "6 test images" in out
        assert "Generating" not in err  # no progress bars of datasets in a pipe


def test_a_large_set_is_not_read_into_memory(tmp_path):
    """Images are read batch by batch, so the bytes stay on disk when the data set is opened."""
    noise = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    Image.fromarray(pixels).save(noise, "BMP")  # 0.8 MB
    made(200, image=[{"bytes": noise.getvalue(), "path": None}] * 200).save_to_disk(
        tmp_path / "set"
    )
    script = (
        "import sys, resource; sys.path.insert(0, sys.argv[2]); import datasets\n"
        "from photo_folders import jpeg, open_source; import pyarrow\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "source = open_source('images', sys.argv[1], image_size=32)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "set"), os.path.dirname(__file__)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 30_000  # KB, of 63 MB
