"""Characters drawn with the DejaVu fonts of matplotlib, and the shipped Japanese manifest.

The characters are letters, because every machine that runs the tests has fonts for them.
"""

import os
import pwd
import shutil
import string
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from photo_folders import open_source
from PIL import Image, ImageFont

from bdkd.cli import main
from bdkd.data.glyphs import manifest as manifests
from bdkd.data.glyphs import render
from bdkd.data.glyphs.manifest import find_fonts, jis_level_1, read_manifest
from bdkd.data.glyphs.render import glyph_images
from bdkd.errors import RunError, UsageError

DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
LETTERS = string.ascii_letters
# (file, lineage, split): two test faces of another design than the training faces
FACES = [
    ("DejaVuSans.ttf", "sans", "train"), ("DejaVuSans-Bold.ttf", "sans", "train"),
    ("DejaVuSansMono.ttf", "mono", "val"), ("DejaVuSerif.ttf", "serif", "test"),
    ("DejaVuSerif-Bold.ttf", "serif", "test"),
]  # fmt: skip
WITHOUT_VAL = [face for face in FACES if face[2] != "val"]
LOOKS_THE_SAME = 0.9  # see copies()


def write_manifest(path: Path, faces=FACES, characters=LETTERS, **options: str) -> str:
    lines = [f'characters = "{characters}"', *(f'{k} = "{v}"' for k, v in options.items())]
    for file, lineage, split, *more in faces:
        lines += ["[[face]]", f'name = "{Path(file).stem}"', f'file = "{file}"',
                  f'lineage = "{lineage}"', f'split = "{split}"', *more]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Use an empty cache, and return the folder of bdkd in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bdkd"


@pytest.fixture
def manifest(tmp_path) -> str:
    return write_manifest(tmp_path / "faces.toml")


@pytest.fixture
def fonts(tmp_path) -> Path:
    """Font files that a test may replace."""
    (tmp_path / "fonts").mkdir()
    for file, *_ in FACES:
        shutil.copy(DEJAVU / file, tmp_path / "fonts")
    return tmp_path / "fonts"


@pytest.fixture
def draws(monkeypatch) -> list[str]:
    """Return a list to which the name of each face is added that is not read from the cache."""
    drawn = []
    draw = render._draw
    monkeypatch.setattr(
        render, "_draw", lambda face, *rest: drawn.append(face.name) or draw(face, *rest)
    )
    return drawn


def glyphs(manifest: str | None, root: Path | None = DEJAVU, **options):
    return open_source("glyphs", root, manifest=manifest, **options)


def same(first, second) -> bool:
    return all(
        torch.equal(first.splits[split].pixels, second.splits[split].pixels)
        and torch.equal(first.splits[split].labels, second.splits[split].labels)
        for split in ("train", "val", "test")
    )


def test_each_face_draws_each_character_once(manifest):
    data = glyphs(manifest)
    assert data.info.classes == tuple(LETTERS)
    assert data.info.counts == {"train": 2 * 52, "val": 52, "test": 2 * 52}
    assert (data.info.channels, data.info.image_size) == (1, (32, 32))
    for images in data.splits.values():
        assert (images.labels.bincount() == len(images.labels) // 52).all()
        assert images.pixels.amax(dim=(1, 2, 3)).min() > 128  # ink in every image
        assert images.pixels[:, :, 0, 0].max() < 128  # white ink on black


def test_the_label_is_the_character(manifest):
    """Every image has the ink that Pillow draws for the character with this label. The faces are in
    the order of the manifest."""
    data = glyphs(manifest)
    at = {"train": 0, "val": 0, "test": 0}
    for file, _, split in FACES:
        font = ImageFont.truetype(
            str(DEJAVU / file), round(0.9 * 32), layout_engine=ImageFont.Layout.BASIC
        )
        for letter in LETTERS:
            images = data.splits[split]
            assert data.info.classes[images.labels[at[split]]] == letter
            ink = Image.fromarray(images.pixels[at[split], 0].numpy())
            mask = font.getmask(letter)
            expected = Image.frombytes("L", mask.size, bytes(mask))
            if max(mask.size) < 32:  # not cut at the border
                assert bytes(ink.crop(ink.getbbox()).tobytes()) == bytes(
                    expected.crop(expected.getbbox()).tobytes()
                ), (file, letter)
            at[split] += 1
    assert at == data.info.counts


def test_characters_are_in_the_centre(tmp_path):
    """Pillow's bounding box is centred. It includes the advance and the baseline, so opposite
    margins of a narrow letter differ by a few pixels. On average they differ by less than one."""
    capitals = write_manifest(tmp_path / "m.toml", characters=string.ascii_uppercase)
    for images in glyphs(capitals, image_size=48).splits.values():
        for face in images.pixels[:, 0].split(26):
            for axis in (0, 1):
                inks = [image.amax(dim=axis).nonzero() for image in face]
                differences = [int(ink.min()) - (47 - int(ink.max())) for ink in inks]
                assert max(map(abs, differences)) <= 5
                assert abs(np.mean(differences)) < 1


def test_splits_are_of_different_faces(manifest):
    """No image of one split is in another one."""
    data = glyphs(manifest)
    every = torch.cat([images.pixels for images in data.splits.values()]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)


def test_validation_images_are_from_the_manifest_or_held_out(tmp_path, manifest):
    own = glyphs(manifest, validation=0.4)
    assert own.info.counts == {"train": 104, "val": 52, "test": 104}
    assert torch.equal(own.splits["val"].pixels, glyphs(manifest).splits["val"].pixels)
    held_out = write_manifest(tmp_path / "no-val.toml", WITHOUT_VAL)
    assert glyphs(held_out, validation=0.4).info.counts == {"train": 52, "val": 52, "test": 104}
    assert glyphs(held_out, validation=0.0).info.counts == {"train": 104, "val": 0, "test": 104}


def test_fewer_characters_are_a_part_of_more_and_independent_of_the_seed(manifest):
    sets = [glyphs(manifest, characters=count).info.classes for count in (2, 10, 30, 52)]
    for fewer, more in pairwise(sets):
        assert set(fewer) < set(more)
    assert [len(classes) for classes in sets] == [2, 10, 30, 52]
    for classes in sets:
        assert list(classes) == sorted(classes, key=LETTERS.index)
    assert set(sets[1]) != set(LETTERS[:10])  # chosen at random
    first, other = glyphs(manifest, characters=10), glyphs(manifest, characters=10, seed=7)
    assert first.info == other.info
    assert same(first, other)
    every = glyphs(manifest)  # and an image does not depend on how many characters there are
    position = LETTERS.index(first.info.classes[3])
    assert torch.equal(first.splits["val"].pixels[3], every.splits["val"].pixels[position])
    with pytest.raises(UsageError, match=r"data.characters must be at most 52, .* got 53"):
        glyphs(manifest, characters=53)


@pytest.mark.parametrize("side", [8, 24, 64, 256])
def test_images_have_the_requested_size(manifest, side):
    data = glyphs(manifest, image_size=side, characters=8)
    assert data.info.image_size == (side, side)
    assert data.splits["test"].pixels.shape == (16, 1, side, side)


def test_larger_images_are_refused(manifest):
    with pytest.raises(UsageError, match="image_size must be at most 256 for glyphs, got 257"):
        glyphs(manifest, image_size=257)


def test_digests_cover_the_pixels(tmp_path, manifest):
    def digests(manifest=manifest, **options):
        return glyphs(manifest, **options).info.digests

    first = digests()
    assert digests(seed=3) == digests(validation=0.3) == first
    assert digests(crop=2, label_noise=0.5, train_images=60) == first
    for other in (digests(image_size=24), digests(characters=30)):
        assert other["train"] != first["train"]
        assert other["test"] != first["test"]
    fewer = digests(write_manifest(tmp_path / "fewer.toml", FACES[1:]))
    assert (fewer["train"] != first["train"], fewer["test"] == first["test"]) == (True, True)
    no_val = digests(write_manifest(tmp_path / "no-val.toml", WITHOUT_VAL))
    assert (no_val["train"] != first["train"], no_val["test"] == first["test"]) == (True, True)


# The cache


def test_a_second_load_draws_nothing(manifest, draws, cache):
    first = glyphs(manifest)
    assert len(draws) == len(list(cache.iterdir())) == len(FACES)
    assert same(glyphs(manifest), first)
    assert len(draws) == len(FACES)
    glyphs(manifest, image_size=24)
    glyphs(manifest, characters=10)
    assert len(draws) == 3 * len(FACES)


@pytest.mark.parametrize("harm", [
    "truncated", "empty", "text", "one array", "other pixels", "other shape", "no digest",
    "compressed", "objects", "huge",
])  # fmt: skip
def test_images_are_drawn_again_if_the_cache_is_damaged(harm, manifest, draws, cache):
    first = glyphs(manifest)
    for file in cache.iterdir():
        content = file.read_bytes()
        with np.load(file) as found:
            images, digest = found["images"], found["digest"]
        with file.open("wb") as stream:
            if harm == "truncated":
                stream.write(content[: len(content) // 2])
            elif harm == "text":
                stream.write(b"no cache")
            elif harm == "one array":
                np.save(stream, images)
            elif harm == "other pixels":
                np.savez(stream, images=255 - images, digest=digest)
            elif harm == "other shape":
                np.savez(stream, images=images[:-1], digest=render._digest(images[:-1]))
            elif harm == "no digest":
                np.savez(stream, images=images)
            elif harm == "compressed":
                np.savez_compressed(stream, images=images, digest=digest)
            elif harm == "objects":
                np.savez(stream, images=np.array([{}], object), digest=digest)
            elif harm == "huge":  # a header that declares 10^17 bytes
                header = b"(52, 32, 32), }" + 8 * b" "
                assert header in content
                stream.write(content.replace(header, b"(99999999999999999,), }"))
    assert same(glyphs(manifest), first)
    assert len(draws) == 2 * len(FACES)
    assert same(glyphs(manifest), first)  # the cache was repaired
    assert len(draws) == 2 * len(FACES)


@pytest.mark.parametrize("place", ["a file", "read-only", "no home"])
def test_without_a_cache_each_run_draws_again(place, manifest, draws, tmp_path, monkeypatch):
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)

        def unknown(*_):
            raise KeyError("no such user")

        monkeypatch.setattr(pwd, "getpwuid", unknown)
        monkeypatch.setattr(pwd, "getpwnam", unknown)
        monkeypatch.chdir(tmp_path)
    else:
        (tmp_path / "file").touch()
        # No folder can be created in /proc, not even by root, who may ignore permissions.
        nowhere = {"a file": tmp_path / "file", "read-only": "/proc/bdkd"}[place]
        monkeypatch.setenv("XDG_CACHE_HOME", str(nowhere))
    assert same(glyphs(manifest), glyphs(manifest))
    assert len(draws) == 2 * len(FACES)
    assert not (tmp_path / "~").exists()
    assert manifests.font_folders()[-1] == Path("/usr/share/fonts")


def test_a_full_disk_leaves_no_partial_cache(manifest, draws, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    glyphs(manifest)
    assert list(cache.iterdir()) == []


def test_a_changed_font_is_not_taken_from_the_cache(manifest, fonts, draws):
    first = glyphs(manifest, fonts)
    shutil.copy(DEJAVU / "DejaVuSans-Oblique.ttf", fonts / "DejaVuSans.ttf")
    os.utime(fonts / "DejaVuSans.ttf", (0, 0))
    changed = glyphs(manifest, fonts)
    assert draws[len(FACES) :] == ["DejaVuSans"]
    assert not same(changed, first)
    assert changed.info.digests["train"] != first.info.digests["train"]
    assert changed.info.digests["test"] == first.info.digests["test"]


def test_another_version_of_pillow_draws_again(manifest, draws, monkeypatch):
    glyphs(manifest)
    monkeypatch.setattr("PIL.__version__", "99.0")
    glyphs(manifest)
    assert len(draws) == 2 * len(FACES)


def test_concurrent_runs_write_a_valid_cache(manifest, cache):
    import multiprocessing

    with ThreadPoolExecutor(2) as pool:  # each waits for a process
        context = multiprocessing.get_context("fork")

        def in_a_process(_):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=lambda: send.send(glyphs(manifest).info.digests), daemon=True
            )
            process.start()
            found = receive.recv()
            process.join()
            return found

        found = list(pool.map(in_a_process, range(2)))
    assert found == [glyphs(manifest).info.digests] * 2
    assert len(list(cache.iterdir())) == len(FACES)  # and no temporary files


# Fonts


def test_missing_fonts_are_listed_with_their_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(manifests, "font_folders", lambda: [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(RunError) as raised:
        glyphs(None, None)
    message = str(raised.value)
    assert message.startswith("no font files ipag.ttf, ipam.ttf, Mplus1-Light.otf, ")
    assert f" in {tmp_path}/a, {tmp_path}/b: apt install --no-install-recommends fonts-" in message
    packages = message.split("recommends ")[1].split(" ")
    assert packages == sorted({face.package for face in read_manifest(None).face})
    with pytest.raises(RunError, match=rf"in {tmp_path}: put them there, or leave out data.root"):
        glyphs(None, tmp_path)


def test_a_missing_font_without_a_package_names_the_folder(tmp_path, fonts, monkeypatch):
    manifest = write_manifest(tmp_path / "m.toml", [*FACES, ("Mine.ttf", "mine", "train")])
    with pytest.raises(RunError) as raised:
        glyphs(manifest, fonts)
    assert str(raised.value) == f"no font files Mine.ttf in {fonts}: put them there"
    monkeypatch.setattr(manifests, "font_folders", lambda: [fonts])
    with pytest.raises(RunError, match=r"put them there, or pass their folder with --data.root$"):
        glyphs(manifest, None)


def test_fonts_are_found_at_every_level_and_through_links(manifest, fonts, tmp_path):
    (tmp_path / "root" / "truetype").mkdir(parents=True)
    (tmp_path / "root" / "truetype" / "dejavu").symlink_to(fonts)
    for name in ("a", "b", "c"):  # links in cycles make 2^40 paths
        (fonts / name).symlink_to(tmp_path / "root")
    os.mkfifo(tmp_path / "root" / "DejaVuSans.ttf")  # not a font, and never read
    (tmp_path / "root" / "DejaVuSerif.ttf").symlink_to("nowhere")
    assert glyphs(manifest, tmp_path / "root").info.counts["train"] == 104


def test_fonts_of_a_user_and_of_the_system_are_found(tmp_path, monkeypatch, manifest, fonts):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    (tmp_path / ".local" / "share").mkdir(parents=True)
    fonts.rename(tmp_path / ".local" / "share" / "fonts")
    found = find_fonts(read_manifest(manifest).face)
    assert {path.parent for path in found.values()} == {tmp_path / ".local" / "share" / "fonts"}
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "elsewhere"))
    assert manifests.font_folders()[0] == tmp_path / "elsewhere" / "fonts"


def test_a_font_without_a_character_is_named(tmp_path):
    manifest = write_manifest(tmp_path / "m.toml", characters="ab字か")
    with pytest.raises(RunError) as raised:
        glyphs(manifest)
    assert str(raised.value) == (
        f"the font {DEJAVU}/DejaVuSans.ttf (face 0) does not draw 2 of the 4 characters (字か): "
        "leave them out with 'without' in the manifest, or remove the face 'DejaVuSans'"
    )
    manifest = write_manifest(tmp_path / "m.toml", characters="ab字か", without="か字")
    assert glyphs(manifest).info.classes == ("a", "b")
    manifest = write_manifest(tmp_path / "m.toml", characters="ab ")  # a space has no ink
    with pytest.raises(RunError, match=r"does not draw 1 of the 3 characters \( \)"):
        glyphs(manifest)


@pytest.mark.parametrize("harm", ["empty", "text", "cut", "a number that is too large"])
def test_a_damaged_font_is_named(harm, manifest, fonts, tmp_path, cache):
    path = fonts / "DejaVuSans.ttf"
    face = 0
    if harm == "a number that is too large":
        face = 9
        faces = [(*FACES[0], "index = 9"), *FACES[1:]]
        write_manifest(Path(manifest), faces)
    else:
        content = {"empty": b"", "text": b"no font", "cut": path.read_bytes()[:2000]}[harm]
        path.write_bytes(content)
    with pytest.raises(RunError) as raised:
        glyphs(manifest, fonts)
    message = str(raised.value)
    assert message.startswith(f"cannot read the font {path} (face {face}): ")
    assert message.endswith("; install it again")
    assert not cache.exists()


# The manifest

TWO = [FACES[0], FACES[3]]


@pytest.mark.parametrize(("text", "words"), [
    ("", "missing required field `characters`"),
    ("characters = 'ab'", "missing required field `face`"),
    ("characters = 5\nface = []", "Expected `str`, got `int`"),
    ("characters = 'ab'\nface = []", "at least one face must have split = 'train', got none"),
    ("characters = 'ab'\nface = []\nfaces = []", "unknown field `faces`"),
    ("characters = 'ab", "is not a manifest of glyphs: "),
    ({"faces": [(*FACES[0][:2], "valid"), FACES[3]]}, "'valid'"),
    ({"faces": [FACES[0]]}, "at least one face must have split = 'test', got none"),
    ({"faces": [FACES[3], FACES[2]]}, "at least one face must have split = 'train', got none"),
    ({"faces": [*TWO, ("a/b.ttf", "x", "train")]},
     "file must be the name of a font file without a folder, got 'a/b.ttf'"),
    ({"faces": [*TWO, ("", "x", "train")]}, "without a folder, got ''"),
    ({"faces": [*TWO, ("..", "x", "train")]}, "no font files .."),
    ({"faces": [*TWO, (*FACES[1], "index = -1")]}, "index must be from 0 to 65535, got -1"),
    ({"faces": [*TWO, (*FACES[1], "index = 99999999999")]}, "index must be from 0 to 65535, got"),
    ({"faces": [*TWO, (*FACES[1], "weight = 5")]}, "unknown field `weight` - at `$.face[2]`"),
    ({"faces": [*TWO, FACES[0]]},
     "every face must be listed once, got the face 0 of DejaVuSans.ttf twice"),
    ({"faces": [*TWO, ("DejaVuSans.ttf", "other", "test")]}, "every face must be listed once"),
    ({"faces": [*TWO, ("DejaVuSans-Bold.ttf", "sans", "test")]},
     "the lineage 'sans' has faces in train and in test: one design must be in one split"),
    ({"characters": "a"}, "characters must be at least two different characters, got 1"),
    ({"characters": ""}, "characters must be at least two different characters, got 0"),
    ({"characters": "abca"}, "must be at least two different characters, got 'a' twice"),
    ({"characters": "ab", "without": "b"}, "at least two different characters, got 1"),
])  # fmt: skip
def test_a_manifest_that_is_not_valid_says_why(text, words, tmp_path):
    path = tmp_path / "m.toml"
    if isinstance(text, str):
        path.write_text(text)
    else:
        write_manifest(path, **{"faces": TWO, **text})
    with pytest.raises((UsageError, RunError)) as raised:
        glyphs(str(path))
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    for path, words in (
        (tmp_path / "none.toml", "No such file or directory"), (tmp_path, "Is a directory"),
    ):  # fmt: skip
        with pytest.raises(RunError, match=f"cannot read the manifest {path}: {words}"):
            glyphs(str(path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="pipe: it is not a regular file"):
        glyphs(str(tmp_path / "pipe"))
    (tmp_path / "large").write_bytes(b"#" * 1_000_001)
    with pytest.raises(RunError, match="at most 1,000,000 bytes is needed"):
        glyphs(str(tmp_path / "large"))


def test_a_long_manifest_is_read_in_linear_time(tmp_path):
    """The manifest has 200,000 characters. An earlier version compared each pair."""
    letters = "".join(map(chr, range(0x4E00, 0x4E00 + 20_000)))
    path = write_manifest(tmp_path / "m.toml", characters=letters * 10, without=letters[1:] * 5)
    with pytest.raises(UsageError, match=f"got '{letters[0]}' twice"):
        read_manifest(path)


# Leaks between splits


def normalised(image: np.ndarray) -> np.ndarray:
    """The ink at one size, with a mean of 0 and a norm of 1."""
    rows, columns = np.nonzero(image > 64)
    ink = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scaled = np.asarray(Image.fromarray(ink).resize((32, 32), Image.Resampling.BILINEAR), float)
    scaled = scaled.ravel() - scaled.mean()
    return scaled / max(np.linalg.norm(scaled), 1e-9)


def copies(manifest: str | None, characters: str, root: Path | None) -> list[tuple[str, str]]:
    """Return the pairs of faces of different splits that draw most characters equally or scaled.

    The median correlation of two faces is about 0.95 for a scaled copy. Between the faces of
    different splits of the shipped manifest it is at most 0.63.
    """
    faces = read_manifest(manifest).face
    paths = find_fonts(faces, root)
    drawn = {
        face: np.stack([normalised(i) for i in glyph_images(face, paths[face], characters, 64)])
        for face in faces
    }
    return [
        (first.name, second.name)
        for first, second in combinations(faces, 2)
        if first.split != second.split
        and np.median((drawn[first] * drawn[second]).sum(1)) > LOOKS_THE_SAME
    ]


def scaled_copy(source: Path, target: Path) -> None:
    """Write a font with the same outlines, which are drawn at four fifths of the size."""
    font = TTFont(source)
    font["head"].unitsPerEm = round(font["head"].unitsPerEm * 1.25)
    font.save(target)


UNLIKE = "MWmwijlrtf"  # the letters that DejaVu Sans and its monospaced face draw differently


def test_a_copied_font_in_two_splits_is_found_and_refused(tmp_path, fonts, manifest):
    assert copies(manifest, UNLIKE, fonts) == []
    shutil.copy(fonts / "DejaVuSans.ttf", fonts / "Other.ttf")
    leaking = write_manifest(tmp_path / "m.toml", [*FACES, ("Other.ttf", "other", "test")])
    assert copies(leaking, UNLIKE, fonts) == [("DejaVuSans", "Other")]
    with pytest.raises(RunError) as raised:
        glyphs(leaking, fonts)
    assert str(raised.value) == (
        "the faces 'DejaVuSans' (train) and 'Other' (test) draw 52 of 52 characters equally: give "
        "them one lineage and one split in the manifest"
    )
    within = write_manifest(tmp_path / "m.toml", [*FACES, ("Other.ttf", "sans", "train")])
    assert glyphs(within, fonts).info.counts["train"] == 3 * 52


def test_a_scaled_font_in_two_splits_is_found(tmp_path, fonts):
    """copies() finds it. The source does not, because the images are not equal."""
    scaled_copy(fonts / "DejaVuSans.ttf", fonts / "Scaled.ttf")
    leaking = write_manifest(tmp_path / "m.toml", [*FACES, ("Scaled.ttf", "other", "test")])
    assert copies(leaking, UNLIKE, fonts) == [("DejaVuSans", "Scaled")]


# The shipped manifest


def test_the_shipped_manifest_has_the_kanji_of_level_1_and_nineteen_faces():
    kanji = jis_level_1()
    assert len(kanji) == len(set(kanji)) == 2965
    assert (kanji[0], kanji[-1]) == ("亜", "腕")
    assert all("\u4e00" <= letter <= "\u9fff" for letter in kanji)
    shipped = read_manifest(None)
    assert len(shipped.alphabet()) == 2964
    assert [len(shipped.of_split(split)) for split in ("train", "val", "test")] == [14, 1, 4]
    for face in shipped.face:
        assert face.package.startswith("fonts-")
    lineages = {
        split: {face.lineage for face in shipped.of_split(split)}
        for split in ("train", "val", "test")
    }
    for first, second in combinations(lineages.values(), 2):
        assert not first & second
    # all files of a font family are in one split
    families = [
        ("ipa", "takao"), ("mplus", "m+"), ("ume", "ume"), ("konatu", "komatuna"),
        ("klee", "klee"), ("seto", "seto"), ("yusei", "yusei"),
    ]  # fmt: skip
    for names in families:
        members = [face for face in shipped.face if face.file.lower().startswith(names)]
        assert len({face.split for face in members}) == 1


def test_the_shipped_faces_of_different_splits_are_not_copies(tmp_path):
    """The fonts may be missing. test_a_copied_font_in_two_splits_is_found_and_refused runs the same
    check on every machine."""
    try:
        data = glyphs(None, None, characters=60)
    except RunError as error:
        assert "apt install" in str(error)  # noqa: PT017
        return
    assert data.info.counts == {"train": 14 * 60, "val": 60, "test": 4 * 60}
    every = torch.cat([images.pixels for images in data.splits.values()]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)
    assert copies(None, "".join(data.info.classes), None) == []


# The command line


def test_the_documented_packages_and_manifest_are_valid(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "reference" / "data-sources.md").read_text("utf-8")
    command = text.split("apt install --no-install-recommends ")[1].split("```")[0]
    packages = {face.package for face in read_manifest(None).face}
    assert command.replace("\\", " ").split() == sorted(packages)
    example = text.split("lists the characters and the faces:")[1].split("```")[1]
    (tmp_path / "m.toml").write_text(example.removeprefix("toml"))
    assert glyphs(str(tmp_path / "m.toml"), validation=0.0).info.counts == {
        "train": 25, "val": 0, "test": 25
    }  # fmt: skip


def test_a_small_run_is_trained_and_resumed(tmp_path, manifest, capsys):
    run = str(tmp_path / "run")
    main([
        "train", "kanji-500", "--data.manifest", manifest, "--data.root", str(DEJAVU),
        "--data.characters", "20", "--train.batch-size", "8", "--teacher", "resnet8",
        "--max-steps", "3", "--run-dir", run,
    ])  # fmt: skip
    main(["train", "--resume", "--run-dir", run, "--max-steps", "5"])
    capsys.readouterr()
    text = (tmp_path / "run" / "config.toml").read_text()
    assert f'manifest = "{manifest}"' in text
    # The run cannot be resumed with other images.
    write_manifest(Path(manifest), FACES[1:])
    with pytest.raises(SystemExit):
        main(["train", "--resume", "--run-dir", run, "--max-steps", "6"])
    assert "data" in capsys.readouterr().err


def test_data_list_names_the_packages_of_missing_fonts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(manifests, "font_folders", lambda: [tmp_path])
    main(["data", "list", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    [at] = [i for i, line in enumerate(lines) if line.startswith("glyphs: ")]
    assert "not ready: no font files ipag.ttf, " in lines[at + 1]
    assert "apt install --no-install-recommends fonts-" in lines[at + 1]


def test_a_missing_pillow_is_an_error_that_names_the_extra(manifest, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(RunError, match=r"need Pillow: pip install 'bdkd\[imagenet\]'"):
        glyphs(manifest)
