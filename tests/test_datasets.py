"""Image data sets from every form that they come in, decoded alike; the cache; what is damaged or missing."""

import io
import json
import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest
import scipy.io
from array_record.python import array_record_module
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from examples import datasets

rng = np.random.default_rng(0)
SPLITS = {  # images and labels
    split: (rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n, np.int32))
    for split, n in (("train", 10), ("test", 3))
}


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """The user's cache folder, apart from the real one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "excitation_optax"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write_tfds(folder, name="cifar10", version="3.0.2", shards=2, splits=SPLITS):
    """As TensorFlow Datasets prepares it: PNG images in Example protocol buffers, in several files."""
    place = folder / name / version
    place.mkdir(parents=True)
    for split, (images, labels) in splits.items():
        for shard in range(shards):
            path = place / f"{name}-{split}.array_record-{shard:05}-of-{shards:05}"
            writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for image, label in list(zip(images, labels, strict=True))[shard::shards]:
                encoded = io.BytesIO()
                Image.fromarray(image).save(encoded, "PNG")
                example = tf_example_pb2.Example()
                example.features.feature["image"].bytes_list.value.append(encoded.getvalue())
                example.features.feature["label"].int64_list.value.append(int(label))
                writer.write(example.SerializeToString())
            writer.close()
    (place / "dataset_info.json").write_text(json.dumps({"description": "Tiny images.\nMore of it."}))
    return place


def batches(name):
    """The files of CIFAR's makers: rows of red, then green, then blue."""
    rows = lambda images: images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    (train, train_labels), (test, test_labels) = SPLITS.values()
    if name == "cifar100":
        fine = lambda images, labels: {b"data": rows(images), b"fine_labels": labels.tolist(), b"coarse_labels": []}
        return {"train": fine(train, train_labels), "test": fine(test, test_labels)}
    files = {
        f"data_batch_{i}": {
            b"data": rows(train[2 * i - 2 : 2 * i]),
            b"labels": train_labels[2 * i - 2 : 2 * i].tolist(),
        }
        for i in range(1, 6)
    }
    return files | {"test_batch": {b"data": rows(test), b"labels": test_labels.tolist()}}


def write_archive(folder, name):
    """Returns the archive, as `cifar-10-python.tar.gz`."""
    inner = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
    path = folder / {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}[name]
    with tarfile.open(path, "w:gz") as archive:
        for file, batch in batches(name).items():
            content = pickle.dumps(batch, protocol=2)  # as Python 2 wrote them
            member = tarfile.TarInfo(f"{inner}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_mat(folder):
    for split, (images, labels) in SPLITS.items():
        y = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        scipy.io.savemat(folder / f"{split}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": y})


def assert_whole(data):
    for split, (images, labels) in SPLITS.items():
        np.testing.assert_array_equal(getattr(data, f"{split}_images"), images)
        np.testing.assert_array_equal(getattr(data, f"{split}_labels"), labels)
    assert (data.train_images.dtype, data.train_labels.dtype) == (np.uint8, np.int32)
    assert data.input_dim == 32 * 32 * 3


def test_as_tensorflow_datasets_prepares_it(folder):
    place = write_tfds(folder, shards=1)
    write_tfds(folder, version="3.0.10", splits={"train": SPLITS["test"], "test": SPLITS["train"]})
    data = datasets.load_images("cifar10", folder)  # 3.0.10 is newer than 3.0.2
    np.testing.assert_array_equal(data.train_labels, np.concatenate([SPLITS["test"][1][i::2] for i in range(2)]))
    (folder / "cifar10" / "3.0.10").rename(folder / "aside")
    data = datasets.load_images("cifar10", folder)
    assert_whole(data)
    assert (data.description, data.state, data.num_classes) == (f"cifar10 3.0.2, from {place}", "Tiny images.", 10)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_as_its_makers_publish_it(folder, name):
    """The archive, its folder beside it, or its folder itself; in all forms the same numbers."""
    archive = write_archive(folder, name)
    data = datasets.load_images(name, folder)
    assert_whole(data)
    assert data.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    assert (data.description, data.state) == (f"{name}, from {archive}", "as published by its makers")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    archive.unlink()
    assert datasets.load_images(name, folder).fingerprint == data.fingerprint
    (inner,) = (path for path in folder.iterdir() if path.is_dir())
    assert datasets.load_images(name, inner).fingerprint == data.fingerprint


def test_house_numbers_as_their_makers_publish_them(folder):
    write_mat(folder)
    data = datasets.load_images("svhn_cropped", folder)
    assert_whole(data)
    assert data.num_classes == 10


def test_a_pickle_that_would_run_code_is_refused(folder):
    class Evil:
        def __reduce__(self):
            return os.system, ("echo evil",)

    for file, batch in batches("cifar10").items():
        (folder / file).write_bytes(pickle.dumps(batch | {b"batch_label": Evil()}))
    with pytest.raises(ValueError, match=r"data_batch_1 is damaged .*posix\.system, which no array needs"):
        datasets.load_images("cifar10", folder)


# The cache.


def cached(folder, user_cache, monkeypatch, capsys):
    """Loads twice, the second time from the cache alone, which it returns."""
    place = write_tfds(folder, shards=1)
    assert_whole(datasets.load_images("cifar10", folder))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # nothing is decoded
        again = datasets.load_images("cifar10", folder)
    assert_whole(again)
    assert again.description == f"cifar10 3.0.2, from {place}"
    assert capsys.readouterr().err == ""
    assert [path.name for path in folder.iterdir()] == ["cifar10"]
    (cache,) = user_cache.glob("*")
    return cache


def flip_a_pixel(content):
    """In the middle of the images, where the zip's own checksum notices."""
    return content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]


@pytest.mark.parametrize("damage", [flip_a_pixel, lambda c: c[:-100], lambda c: b"", lambda c: b"\0" * len(c)])
def test_a_damaged_cache_is_made_again(folder, user_cache, monkeypatch, capsys, damage):
    cache = cached(folder, user_cache, monkeypatch, capsys)
    sound = cache.read_bytes()
    cache.write_bytes(damage(sound))
    assert_whole(datasets.load_images("cifar10", folder))
    assert f"{cache} is damaged" in capsys.readouterr().err
    assert len(cache.read_bytes()) == len(sound)
    assert_whole(datasets.load_images("cifar10", folder))
    assert capsys.readouterr().err == ""


def test_other_files_than_those_of_the_cache_are_decoded(folder, user_cache, monkeypatch, capsys):
    cached(folder, user_cache, monkeypatch, capsys)
    for path in (folder / "cifar10" / "3.0.2").iterdir():
        path.unlink()
    (folder / "cifar10" / "3.0.2").rmdir()
    write_tfds(folder, shards=1, splits={"train": SPLITS["test"], "test": SPLITS["train"]})
    np.testing.assert_array_equal(datasets.load_images("cifar10", folder).train_labels, SPLITS["test"][1])


def test_without_a_place_for_the_cache_the_data_is_decoded_each_time(folder, user_cache, capsys):
    write_mat(folder)
    user_cache.parent.mkdir()
    user_cache.touch()  # a file, and no folder
    assert_whole(datasets.load_images("svhn_cropped", folder))
    assert "svhn_cropped: not cached, and so decoded each time" in capsys.readouterr().err


# Damaged or missing.


@pytest.mark.parametrize("damage", [b"", b"{", b"\0\0", b"[]", b'{"description": 3}'])
def test_a_damaged_description_is_named(folder, damage):
    info = write_tfds(folder) / "dataset_info.json"
    info.write_bytes(damage)
    with pytest.raises(ValueError, match=r"dataset_info\.json is damaged .*Download or prepare it again"):
        datasets.load_images("cifar10", folder)


def test_damaged_data_is_named(folder):
    place = write_tfds(folder)
    shard = place / "cifar10-test.array_record-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"cifar10-test.array_record-00001-of-00002 is damaged"):
        datasets.load_images("cifar10", folder)
    shard.unlink()
    with pytest.raises(ValueError, match=r"3\.0\.2 lacks files of a split; it has \['cifar10-test.*00000-of-00002'\]"):
        datasets.load_images("cifar10", folder)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("damage", [lambda c: c[: len(c) // 2], lambda c: b""])
def test_a_damaged_archive_is_named(folder, name, damage):
    archive = write_archive(folder, name)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match=rf"{archive} is damaged"):
        datasets.load_images(name, folder)


def test_damaged_house_numbers_are_named(folder):
    write_mat(folder)
    (folder / "test_32x32.mat").write_bytes(b"no mat")
    with pytest.raises(ValueError, match=r"test_32x32\.mat is damaged"):
        datasets.load_images("svhn_cropped", folder)


@pytest.mark.parametrize("name", datasets.NUM_CLASSES)
def test_missing_data_says_what_to_do(folder, name):
    with pytest.raises(
        FileNotFoundError, match=rf"{name} is not in {folder}\. Download .* --data-dir; or prepare.*{name}"
    ):
        datasets.load_images(name, folder)


TFDS = pathlib.Path(os.environ.get("TFDS_DATA_DIR", pathlib.Path.home() / "tensorflow_datasets"))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not (TFDS / "cifar10").is_dir(), reason="no prepared CIFAR-10 in TFDS_DATA_DIR")
def test_cifar10_real():
    data = datasets.load_images("cifar10", TFDS)
    assert (data.train_images.shape, data.test_images.shape) == ((50_000, 32, 32, 3), (10_000, 32, 32, 3))
    np.testing.assert_array_equal(np.bincount(data.train_labels), [5000] * 10)
    assert datasets.load_images("cifar10", TFDS).fingerprint == data.fingerprint
