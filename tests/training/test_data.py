"""Folders of real images become tensors, and everything wrong with a folder is said by name."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from app.images import DecodeLimits, ResizeRule, decode_image
from tests.app.test_images import bmp, png
from tests.training.conftest import CIFAR10
from training.data import ImageSet, load_images, split_validation
from training.errors import DataError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FolderOf = Callable[..., Path]


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)


def put(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def cat() -> Image.Image:
    with Image.open(min((CIFAR10 / "cat").iterdir())) as image:
        return image.convert("RGB")


def test_loads_every_image_with_its_label(photos: ImageSet) -> None:
    assert photos.classes == CLASSES
    assert photos.images.shape == (200, 3, 32, 32)
    assert photos.images.dtype == torch.uint8
    assert photos.labels.dtype == torch.int64
    assert photos.labels.bincount().tolist() == [20] * 10
    assert len(photos) == 200
    ships = photos.images[photos.labels == CLASSES.index("ship")]
    assert torch.equal(ships, torch.stack([pixels(path) for path in sorted((CIFAR10 / "ship").iterdir())]))


def test_train_and_test_sub_folders(tmp_path: Path) -> None:
    for split, take in (("train", slice(12)), ("test", slice(12, None))):
        for name in ("cat", "dog"):
            for path in sorted((CIFAR10 / name).iterdir())[take]:
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                shutil.copy(path, tmp_path / split / name)
    train, test = load_images(tmp_path, "train", 32), load_images(tmp_path, "test", 32)
    assert (len(train), len(test)) == (24, 16)
    assert train.classes == test.classes == ["cat", "dog"]
    together = {image.numpy().tobytes() for image in torch.cat([train.images, test.images])}
    assert len(together) == 40


def test_one_of_the_two_sub_folders_is_missing(tmp_path: Path) -> None:
    shutil.copytree(CIFAR10 / "cat", tmp_path / "train" / "cat")
    shutil.copytree(CIFAR10 / "dog", tmp_path / "train" / "dog")
    assert load_images(tmp_path, "train", 32).classes == ["cat", "dog"]
    with pytest.raises(DataError, match=r"/test is missing beside .*/train"):
        load_images(tmp_path, "test", 32)


def test_classes_that_only_one_of_the_two_has_are_told_before_the_training(tmp_path: Path) -> None:
    for folder in ("train/cat", "train/dog", "test/cat", "test/Dog"):
        shutil.copytree(CIFAR10 / folder.partition("/")[2].lower(), tmp_path / folder)
    with pytest.raises(DataError, match=r"/train and .*/test must hold the same classes; only one of them has 'Dog', 'dog'$"):
        load_images(tmp_path, "train", 32)


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "validation"), ("train", "val")])
def test_what_looks_like_splits_under_other_names_is_no_pair_of_classes(
    folder_of: FolderOf, tmp_path: Path, names: tuple[str, str]
) -> None:
    for name in names:
        shutil.copytree(folder_of("cat", "dog"), tmp_path / "splits" / name)
    with pytest.raises(
        DataError, match=f"holds {' and '.join(sorted(names))}, which look like splits .* call them train and test"
    ):
        load_images(tmp_path / "splits", "train", 32)


def test_a_class_whose_name_is_no_utf8_is_named(folder_of: FolderOf) -> None:
    folder = folder_of("cat", "dog")
    (folder / "dog").rename(folder / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match=r"caf\\xe9 has a name that is not UTF-8"):
        load_images(folder, "train", 32)


def test_what_is_hidden_in_a_class_is_not_learnt(folder_of: FolderOf) -> None:
    folder = folder_of("cat", "dog")
    expected = load_images(folder, "train", 32)
    (folder / "cat" / "._1.png").write_bytes(b"macOS writes these into archives")
    shutil.copytree(folder / "dog", folder / "cat" / ".ipynb_checkpoints")
    assert load_images(folder, "train", 32).fingerprint() == expected.fingerprint()


def test_a_class_may_be_named_train(folder_of: FolderOf) -> None:
    folder = folder_of("cat", "dog")
    (folder / "cat").rename(folder / "train")
    assert load_images(folder, "train", 32).classes == load_images(folder, "test", 32).classes == ["dog", "train"]


def test_a_class_named_train_may_be_a_split(folder_of: FolderOf) -> None:
    """Half of the classes must not be left out unsaid."""
    folder = folder_of("cat", "dog")
    for year in ("2024", "2025"):
        shutil.copytree(CIFAR10 / "truck", folder / "train" / year)
    with pytest.raises(DataError, match=r"/train holds folders, as a split does, and lies beside 'cat', as a class does"):
        load_images(folder, "train", 32)


def test_hidden_folders_do_not_decide_what_train_is(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of("cat", "dog")
    (folder / "cat").rename(folder / "train")
    (folder / "train" / ".cache").mkdir()
    assert load_images(folder, "train", 32).classes == ["dog", "train"]
    shutil.copytree(CIFAR10 / "cat", tmp_path / "train" / "cat")
    shutil.copytree(CIFAR10 / "dog", tmp_path / "train" / "dog")
    (tmp_path / ".cache").mkdir()
    assert load_images(tmp_path, "train", 32).classes == ["cat", "dog"]


def test_linked_folders_are_read_once(folder_of: FolderOf, tmp_path: Path) -> None:
    folder = folder_of("cat", "dog")
    shutil.copytree(CIFAR10 / "truck", tmp_path / "more" / "deep")
    (folder / "cat" / "more").symlink_to(tmp_path / "more")
    (folder / "cat" / "again").symlink_to(tmp_path / "more" / "deep")
    (folder / "cat" / "all").symlink_to("..")
    (folder / "dog" / "other").symlink_to("../cat")
    (folder / "bird").symlink_to(CIFAR10 / "bird")
    data = load_images(folder, "train", 32)
    assert data.classes == ["bird", "cat", "dog"]
    assert data.labels.tolist() == [0] * 20 + [1] * 40 + [2] * 20
    assert len({image.numpy().tobytes() for image in data.images}) == 80


def test_a_folder_that_cannot_be_looked_into(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("cat", "dog")
    monkeypatch.chdir(folder / "cat")
    for _ in range(30):  # deeper than a path can name
        Path("d" * 200).mkdir()
        os.chdir("d" * 200)
    with pytest.raises(DataError, match=r"/cat/d.* cannot be looked into: File name too long"):
        load_images(folder, "train", 32)


def test_what_is_not_read_is_counted(folder_of: FolderOf, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("cat", "dog")
    for name in ("cat/1.heic", "cat/2.heic", "dog/notes"):
        (folder / name).write_bytes(b"")
    assert len(load_images(folder, "train", 32)) == 40
    assert "files passed over, because such are not read: 2 .heic, 1 without suffix" in capsys.readouterr().err


def test_nested_folders_upper_case_and_strangers(folder_of: FolderOf) -> None:
    folder = folder_of("cat", "dog")
    deep = folder / "cat" / "2024" / "march"
    deep.mkdir(parents=True)
    first = min(folder.glob("cat/*.webp"))
    first.rename(deep / "A.WEBP")
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / ".git").mkdir()
    (folder / "README.md").write_text("not a class")
    data = load_images(folder, "train", 32)
    assert data.classes == ["cat", "dog"]
    assert data.labels.bincount().tolist() == [20, 20]


@pytest.mark.parametrize("size", [8, 32, 40])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_any_image_size(folder_of: FolderOf, size: int, resample: str) -> None:
    folder = folder_of("cat", "dog")
    data = load_images(folder, "train", size, resample)
    assert data.images.shape == (40, 3, size, size)
    if size != 32:
        with Image.open(min(folder.glob("cat/*.webp"))) as image:
            expected = np.array(image.convert("RGB").resize((size, size), Image.Resampling[resample.upper()]))
        assert torch.equal(data.images[0], torch.from_numpy(expected).permute(2, 0, 1))


def test_other_shapes_are_cropped_to_the_middle_square(folder_of: FolderOf) -> None:
    folder = folder_of("dog")
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    put(wide, folder / "flag" / "wide.png")
    put(wide.rotate(90, expand=True), folder / "flag" / "tall.png")
    flags = load_images(folder, "train", 32).images[20:]
    assert (flags == torch.tensor([0, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1)).all()


def test_exif_orientation_is_applied(folder_of: FolderOf, cat: Image.Image) -> None:
    folder = folder_of("dog")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90° clockwise to see it upright
    path = put(cat, folder / "turned" / "photo.jpg", exif=exif, quality=95)
    with Image.open(path) as stored:
        upright = np.array(stored.convert("RGB").rotate(-90))
    assert not np.array_equal(upright, np.array(cat))
    assert torch.equal(load_images(folder, "train", 32).images[-1], torch.from_numpy(upright).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "1", "RGB"])
def test_a_picture_is_read_as_the_service_reads_it(folder_of: FolderOf, cat: Image.Image, mode: str) -> None:
    folder = folder_of("dog")
    picture = cat.resize((50, 40))
    options = {}
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    elif mode == "P":
        picture, options = picture.quantize(8), {"transparency": 3}
    elif mode in ("RGBA", "LA"):
        picture = picture.convert(mode)
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    else:
        picture = picture.convert(mode)
    put(picture, folder / "odd" / "image.png", **options)
    assert_read_as_served(folder)


TONES = np.where(np.arange(32)[:, None] < 16, 40_000, np.full((32, 32), 1000))
BITS = (TONES == 1000).astype(np.uint8)
UNFILLED = np.zeros((32, 32, 4), np.uint8)
UNFILLED[..., 2] = 200
FILES = {
    "grey of 16 bits, a tone transparent": png(0, struct.pack(">H", 1000), TONES),
    "RGB of 16 bits, a tone transparent": png(2, struct.pack(">HHH", 1000, 1000, 1000), TONES[..., None].repeat(3, axis=2)),
    "two colours in bytes": bmp(8, 2, b"", BITS),
    "two colours in half bytes": bmp(4, 2, b"", BITS[:, ::2] * 0x11),
    "alpha never filled in": bmp(32, 0, struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000), UNFILLED),
}


@pytest.mark.parametrize("name", FILES)
def test_what_pillow_misreads_is_read_as_the_service_reads_it(folder_of: FolderOf, name: str) -> None:
    folder = folder_of("dog")
    (folder / "odd").mkdir()
    (folder / "odd" / "image.png").write_bytes(FILES[name])
    assert_read_as_served(folder)


TURNED = struct.pack("<HHHIIHHII", 2, 0x0112, 3, 1, 6, 0x8769, 4, 1, 0xFFFF)  # and a directory that is not there
EXIF = {"cut": b"II*\0\x08", "garbage": b"none of this is EXIF", "turned": b"II*\0\x08\0\0\0" + TURNED}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")  # of Pillow, as it opens a JPEG
@pytest.mark.parametrize("exif", EXIF)
@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_odd_exif_is_read_as_the_service_reads_it(folder_of: FolderOf, cat: Image.Image, suffix: str, exif: str) -> None:
    folder = folder_of("dog")
    put(cat.resize((50, 40)), folder / "odd" / f"image.{suffix}", exif=b"Exif\0\0" + EXIF[exif])
    assert_read_as_served(folder)


def assert_read_as_served(folder: Path) -> None:
    """The last image of the last class."""
    data = max(folder.glob("odd/*")).read_bytes()
    served = decode_image(data, ResizeRule(32, "crop", "bilinear"), DecodeLimits(10**6, 10**4)).pixels
    assert torch.equal(load_images(folder, "train", 32).images[-1], torch.from_numpy(served.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "LA"])
def test_every_colour_mode_becomes_rgb(folder_of: FolderOf, cat: Image.Image, mode: str) -> None:
    folder = folder_of("dog")
    converted = cat.convert(mode)
    put(converted, folder / "odd" / ("image.jpg" if mode == "CMYK" else "image.png"))
    image = load_images(folder, "train", 32).images[-1].permute(1, 2, 0).numpy()
    expected = np.array(converted.convert("RGB"))
    if mode == "CMYK":  # a JPEG is not exact
        assert np.abs(image.astype(int) - expected).mean() < 6
    else:
        assert np.array_equal(image, expected)


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder; --data takes a folder with one sub-folder per class"):
        load_images(tmp_path / "nowhere", "train", 32)


def test_no_class_and_one_class(tmp_path: Path, folder_of: FolderOf) -> None:
    with pytest.raises(DataError, match="at least two; found none"):
        load_images(tmp_path, "train", 32)
    with pytest.raises(DataError, match="at least two; found only 'cat'"):
        load_images(folder_of("cat"), "train", 32)


def test_empty_classes_are_named(folder_of: FolderOf) -> None:
    folder = folder_of("cat", "dog")
    (folder / "emu").mkdir()
    (folder / "yak").mkdir()
    (folder / "yak" / "list.txt").write_text("no image")
    with pytest.raises(DataError, match=f"no image in {folder / 'emu'}, {folder / 'yak'}"):
        load_images(folder, "train", 32)


@pytest.mark.parametrize("kind", ["empty", "text", "truncated", "folder"])
def test_unreadable_images_are_named(folder_of: FolderOf, cat: Image.Image, kind: str) -> None:
    folder = folder_of("cat", "dog")
    path = folder / "cat" / "broken.png"
    if kind == "folder":
        path.mkdir()
    else:
        whole = put(cat, path).read_bytes()
        path.write_bytes({"empty": b"", "text": b"hello", "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises(DataError, match=rf"{path} cannot be read as an image \(.*\); remove or replace it"):
        load_images(folder, "train", 32)


def test_whatever_a_decoder_fails_with_the_file_is_named(folder_of: FolderOf, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise struct.error("unpack requires a buffer of 2 bytes")

    folder = folder_of("cat", "dog")
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=rf"{folder}/cat/.*\.webp cannot be read as an image \(unpack requires"):
        load_images(folder, "train", 32)


@pytest.mark.parametrize(("fraction", "held"), [(0.05, 1), (0.1, 2), (0.25, 5), (0.5, 10), (0.001, 1)])
def test_validation_holds_out_the_same_share_of_every_class(photos: ImageSet, fraction: float, held: int) -> None:
    training, validation = split_validation(photos, fraction)
    assert validation.labels.bincount().tolist() == [held] * 10
    assert training.labels.bincount().tolist() == [20 - held] * 10
    assert training.classes == validation.classes == CLASSES


def test_slices_are_disjoint_and_complete(photos: ImageSet) -> None:
    training, validation = split_validation(photos, 0.25)
    sets = [{image.numpy().tobytes() for image in part.images} for part in (training, validation)]
    assert not sets[0] & sets[1]
    assert len(sets[0] | sets[1]) == 200


def test_what_is_held_out_depends_on_the_data_alone(photos: ImageSet) -> None:
    torch.manual_seed(1)
    first = split_validation(photos, 0.25)[1]
    torch.manual_seed(2)
    assert split_validation(photos, 0.25)[1].fingerprint() == first.fingerprint()


def test_a_class_with_one_image_cannot_be_split(photos: ImageSet) -> None:
    one_truck = ImageSet(photos.images[:181], photos.labels[:181], photos.classes)
    with pytest.raises(DataError, match=r"class 'truck' has 1 image\(s\); at least 2 are needed"):
        split_validation(one_truck, 0.05)


def test_fingerprint_is_of_pixels_labels_and_names(photos: ImageSet) -> None:
    assert load_images(CIFAR10, "test", 32).fingerprint() == photos.fingerprint()
    brighter, relabelled = photos.images.clone(), photos.labels.clone()
    brighter[7, 0, 0, 0] ^= 1
    relabelled[7] = 5
    others = [
        ImageSet(brighter, photos.labels, photos.classes),
        ImageSet(photos.images, relabelled, photos.classes),
        ImageSet(photos.images, photos.labels, [*photos.classes[:-1], "lorry"]),
        ImageSet(photos.images[:-1], photos.labels[:-1], photos.classes),
    ]
    assert len({photos.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_the_source_is_the_same_at_any_size_and_another_with_any_other_file(folder_of: FolderOf) -> None:
    folder = folder_of("cat", "dog", "frog")
    before = load_images(folder, "train", 32)
    assert before.source_sha256 == load_images(folder, "train", 40, "bicubic").source_sha256
    sources = {before.source_sha256}
    (folder / "frog").rename(folder / "toad")
    sources.add(load_images(folder, "train", 32).source_sha256)
    cat, dog = min(folder.glob("cat/*")), min(folder.glob("dog/*"))
    data = cat.read_bytes(), dog.read_bytes()
    cat.write_bytes(data[1])
    dog.write_bytes(data[0])  # as many files of each class, and the same files at that
    sources.add(load_images(folder, "train", 32).source_sha256)
    cat.unlink()
    sources.add(load_images(folder, "train", 32).source_sha256)
    assert len(sources) == 4
    assert None not in sources


def test_a_part_has_no_source(photos: ImageSet) -> None:
    assert [part.source_sha256 for part in split_validation(photos, 0.25)] == [None, None]


@pytest.fixture
def torchvision_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: ImageSet) -> None:
    """The 200 images as torchvision stores CIFAR-10, where `load_images` looks for it; torchvision told their checksums."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "torchvision" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)

    def store(name: str, content: dict[str, object]) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data, usedforsecurity=False).hexdigest()

    for attribute, name, take in (
        ("train_list", "data_batch_1", slice(0, None, 2)),
        ("test_list", "test_batch", slice(1, None, 2)),
    ):
        batch = {"data": photos.images[take].flatten(1).numpy(), "labels": photos.labels[take].tolist()}
        monkeypatch.setattr(datasets.CIFAR10, attribute, [[name, store(name, batch)]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": store("batches.meta", {"label_names": CLASSES})}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)


@pytest.mark.usefixtures("torchvision_copy")
def test_without_a_folder_it_is_torchvisions_cifar10(photos: ImageSet) -> None:
    train, test = load_images(None, "train", 32), load_images(None, "test", 32)
    assert train.classes == test.classes == CLASSES
    assert torch.equal(train.images, photos.images[::2])
    assert torch.equal(test.labels, photos.labels[1::2])
    assert train.images.is_contiguous()


@pytest.mark.usefixtures("torchvision_copy")
def test_torchvisions_cifar10_is_brought_to_size_as_a_folder_is(photos: ImageSet) -> None:
    train, folder = load_images(None, "train", 48, "bicubic"), load_images(CIFAR10, "train", 48, "bicubic")
    assert torch.equal(folder.labels, photos.labels)
    assert torch.equal(train.images, folder.images[::2])
    assert train.images.shape == (100, 3, 48, 48)
    assert train.enlarged_from == folder.enlarged_from == 32
    assert train.source_sha256 == load_images(None, "train", 32).source_sha256 != load_images(None, "test", 32).source_sha256
    assert load_images(CIFAR10, "train", 32).enlarged_from is None


@pytest.mark.usefixtures("torchvision_copy")
def test_processes_that_come_at_once_download_it_once(tmp_path: Path, photos: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = tmp_path / "data" / "torchvision"
    archive = Path(shutil.make_archive(str(tmp_path / "cifar"), "gztar", stored))
    shutil.rmtree(stored)
    requests: list[str] = []

    class Source(SimpleHTTPRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            requests.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Source) as server, ThreadPoolExecutor(4) as pool:  # serves the working folder
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        digest = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", digest)
        load_images(None, "train", 32)
        of_one = len(requests)
        shutil.rmtree(stored)
        sets = list(pool.map(lambda _: load_images(None, "train", 32), range(3)))
        server.shutdown()
    assert all(torch.equal(found.images, photos.images[::2]) for found in sets)
    assert len(requests) == 2 * of_one


def test_a_download_that_cannot_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text("a file where the folder should be")
    with pytest.raises(DataError, match=r"CIFAR-10 could not be downloaded to data/torchvision: .* Give a folder with --data"):
        load_images(None, "train", 32)


def test_the_same_images_are_held_out_as_ever() -> None:
    """Others would be some that the released models have learnt."""
    _, held_out = split_validation(load_images(CIFAR10, "train", 32), 0.1)
    assert held_out.fingerprint() == "5ad341810692d9ccaebf8031c5491308a744b4dc6db62f1b04ac710fcf01d2a6"
