"""The options of a recipe that ``--data`` sets, and ``bdkd data list``."""

import json
from pathlib import Path

import pytest
from fake_sets import cifar_files, tar_gz, tiny_imagenet_files, write_files
from photo_folders import make_photos, open_source

from bdkd.cli import main
from bdkd.data import data_options, register_source
from bdkd.data.base import DataConfig
from bdkd.data.fetch import FILE_SETS
from bdkd.errors import UsageError
from bdkd.registry import SOURCES


def listed(capsys, *arguments) -> dict[str, dict]:
    main(["data", "list", "--json", *map(str, arguments)])
    rows = json.loads(capsys.readouterr().out)
    assert isinstance(rows, list)
    return {row["name"]: row for row in rows}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_source_is_selected_by_its_name(here):
    for name in ("digits", "cifar10", "synthetic", "images"):
        assert data_options(name) == {"source": name}
    (here / "digits").mkdir()
    with pytest.raises(UsageError, match=r"is a data source and a folder: pass \./digits"):
        data_options("digits")
    (here / "images").mkdir()
    assert data_options("images") == {"source": "images", "root": "images"}
    assert data_options("./digits") == {"source": "images", "root": "./digits"}


def test_paths_and_hub_names_are_read_by_the_source_images(here):
    make_photos(here / "photos", cat=1, dog=1)
    (here / "set.parquet").write_bytes(b"")
    for text in ("photos", "photos/", str(here / "photos"), "set.parquet", "hf:owner/name",
                 "hf:owner/name:config", "hf:./photos"):  # fmt: skip
        assert data_options(text) == {"source": "images", "root": text}


def test_downloaded_sets_are_recognised(here):
    files = cifar_files("cifar10")
    write_files(here / "data", files)
    expected = {"source": "cifar10", "root": "data"}
    assert data_options("data") == expected
    unpacked = "data/cifar-10-batches-py"
    assert data_options(unpacked) == {**expected, "root": unpacked}
    (here / "packed").mkdir()
    (here / "packed" / "cifar-10-python.tar.gz").write_bytes(tar_gz(files))
    assert data_options("packed") == {**expected, "root": "packed"}
    archive = "packed/cifar-10-python.tar.gz"
    assert data_options(archive) == {**expected, "root": archive}
    write_files(here / "tiny", tiny_imagenet_files())
    assert data_options("tiny") == {"source": "tiny-imagenet", "root": "tiny"}
    for text in ("data", unpacked, "packed", archive):
        assert open_source("cifar10", data_options(text)["root"]).info.num_classes == 10
    write_files(here / "data", cifar_files("cifar100"))
    with pytest.raises(UsageError, match=r"several data sets: pass one of .*10-batches-py, .*100-"):
        data_options("data")


def test_fashion_mnist_is_recognised_by_its_files_in_a_folder_of_its_name(here):
    """MNIST has files with the same names, and a folder of this name may hold class folders."""
    folder = here / "data" / "fashion-mnist"
    make_photos(folder, coat=1, dress=1)
    assert data_options("data/fashion-mnist") == {"source": "images", "root": "data/fashion-mnist"}
    for file in FILE_SETS["fashion-mnist"].files:
        (folder / file.file).touch()
    for root in ("data", "data/fashion-mnist"):
        assert data_options(root) == {"source": "fashion-mnist", "root": root}
    folder.rename(here / "data" / "mnist")
    assert data_options("data/mnist") == {"source": "images", "root": "data/mnist"}
    assert data_options("fashion-mnist") == {"source": "fashion-mnist"}
    (here / "fashion-mnist").mkdir()
    with pytest.raises(UsageError, match=r"is a data source and a folder: pass \./fashion-mnist"):
        data_options("fashion-mnist")
    assert data_options("glyphs") == {"source": "glyphs"}


@pytest.mark.parametrize(("text", "words"), [
    ("digist", ["got 'digist'", "did you mean 'digits'?"]),
    ("", ["got ''"]), ("hf:", ["got 'hf:'", "hf:NAME"]),
    ("nowhere/photos", ["got 'nowhere/photos'", "no such path"]),
    ("notes.txt", ["got the file notes.txt", "pass its folder"]),
    ("~nobody-of-this-name/photos", ["--data", "~"]),
])  # fmt: skip
def test_other_values_are_errors_that_list_the_valid_forms(text, words, here):
    (here / "notes.txt").write_text("x")
    with pytest.raises(UsageError) as raised:
        data_options(text)
    assert "\n" not in str(raised.value)
    for word in ["--data must be ", *words]:
        assert word in str(raised.value)


def test_every_source_is_listed_with_what_is_missing(here, capsys, monkeypatch):
    rows = listed(capsys)
    assert set(rows) == {*SOURCES, "hf"}
    assert rows["digits"] == {
        "name": "digits", "reads": "scikit-learn's 1,797 handwritten digits of 8x8 pixels",
        "needs_root": False, "download_bytes": None, "ready": True, "missing": "",
        "command": "bdkd train RECIPE --data.source digits",
    }  # fmt: skip
    cifar = rows["cifar10"]
    assert cifar["download_bytes"] == 170_498_071
    assert (cifar["ready"], cifar["needs_root"]) == (False, True)
    assert "bdkd data fetch cifar10 --to data" in cifar["missing"]
    assert cifar["command"] == "bdkd train RECIPE --data.source cifar10 --data.root data"
    assert rows["images"]["command"] == "bdkd train --data FOLDER"
    assert rows["hf"]["ready"]
    write_files(here / "data", cifar_files("cifar10"))
    assert listed(capsys)["cifar10"]["ready"]
    photos = make_photos(here / "my photos", cat=1, dog=1)
    images = listed(capsys, photos)["images"]
    assert (images["ready"], images["missing"]) == (True, "")
    assert images["command"].endswith(f"--data '{photos}'")
    monkeypatch.setattr("bdkd.data.images.hub.find_spec", lambda name: None)
    assert listed(capsys)["hf"]["missing"] == "datasets is not installed: pip install 'bdkd[hf]'"


def test_fashion_mnist_is_listed_with_the_folder_that_has_it(here, capsys, monkeypatch):
    monkeypatch.setattr("bdkd.data.fashion_mnist.PACKAGE_FOLDER", here / "package")
    row = listed(capsys)["fashion-mnist"]
    assert (row["download_bytes"], row["needs_root"]) == (30_878_645, False)
    assert "bdkd data fetch fashion-mnist --to DIR" in row["missing"]
    command = "bdkd train RECIPE --data.source fashion-mnist"
    for folder, root in (
        (here / "package", ""),
        (here / "data/fashion-mnist", " --data.root data"),
    ):
        folder.mkdir(parents=True)
        for file in FILE_SETS["fashion-mnist"].files:
            (folder / file.file).touch()
        row = listed(capsys)["fashion-mnist"]
        assert (row["ready"], row["command"]) == (True, command + root)


def test_the_list_is_text_without_json(here, capsys):
    main(["data", "list", "elsewhere"])
    out = capsys.readouterr().out
    assert "cifar100: the original Python files: 60,000 images, 100 classes (0.2 GB)\n" in out
    assert "    not ready: no cifar-100-python in elsewhere: bdkd data fetch cifar100" in out


def test_a_source_of_a_plugin_is_listed(registries, here, capsys):
    @register_source("stripes", DataConfig, reads="stripes")
    def stripes(config, context):
        raise AssertionError

    assert listed(capsys)["stripes"]["reads"] == "stripes"
    assert data_options("stripes") == {"source": "stripes"}
