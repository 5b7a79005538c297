"""Image data sets that fit in memory: TensorFlow Datasets' preparation, or the archives that their makers publish.

TensorFlow is not needed. Decoded data is cached in the user's cache folder.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "svhn_cropped": 10}
ARCHIVES = {
    "cifar10": ("cifar-10-python.tar.gz, or its folder cifar-10-batches-py", "https://www.cs.toronto.edu/~kriz/"),
    "cifar100": ("cifar-100-python.tar.gz, or its folder cifar-100-python", "https://www.cs.toronto.edu/~kriz/"),
    "svhn_cropped": ("train_32x32.mat and test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"),
}
# The folder in the archive, the archive, its files (the last is the test set), and their key of the labels.
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
CIFAR = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz", BATCHES, b"labels"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz", ["train", "test"], b"fine_labels"),
}
PUBLISHED = "as published by its makers"


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images as they are stored, `[N, H, W, channels]` uint8, and labels `[N]` int32, for training and test."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    description: str  # a line that says what this is and where it came from
    state: str = ""  # what is special about this copy of the data, for the results

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits made of every image and label."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    @property
    def input_dim(self) -> int:
        """The values of one image."""
        return int(np.prod(self.train_images.shape[1:]))


def load_digits() -> ImageData:
    """Scikit-learn's handwritten digits: 1,797 images of 8x8. A fixed fifth of them is the test set."""
    import sklearn.datasets  # imported late: it takes a second
    import sklearn.model_selection

    digits: Any = sklearn.datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, digits.target.astype(np.int32), test_size=0.2, random_state=0, stratify=digits.target
    )
    return ImageData(train_images, train_labels, test_images, test_labels, 10, "digits, from scikit-learn")


def load_images(name: str, data_dir: pathlib.Path | None = None) -> ImageData:
    """CIFAR-10, CIFAR-100 or SVHN (cropped), from whatever form of it is in a folder.

    The folder holds `NAME/VERSION/`, prepared by TensorFlow Datasets as array_record, or the files of `ARCHIVES`; by
    default it is `$TFDS_DATA_DIR`, otherwise `~/tensorflow_datasets`.

    Raises:
      FileNotFoundError: if the data set is not there.
      ValueError: if a file is damaged.
    """
    folder = pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    if found := _find(name, folder):
        paths, read = found
        return _cached(name, folder, paths, read)
    files, address = ARCHIVES[name]
    raise FileNotFoundError(
        f"{name} is not in {folder}. Download {files} from {address} and name its folder with --data-dir; or prepare "
        f"the data with `pip install tensorflow`: python -m examples.reproduce prepare {name}"
        f"{'' if data_dir is None else f' --data-dir {data_dir}'}"
    )


def _find(name: str, folder: pathlib.Path) -> tuple[list[pathlib.Path], Callable[[], ImageData]] | None:
    """The files of a data set, and what reads them: the newest version prepared, or what its makers publish."""
    if versions := {path.parent for path in (folder / name).glob("*.*.*/*.array_record-*-of-*")}:
        version = max(versions, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
        return sorted(version.iterdir()), functools.partial(_read_tfds, name, version)
    if name in CIFAR:
        inner, archive, files, _ = CIFAR[name]
        choices = [[folder / inner / file for file in files], [folder / file for file in files], [folder / archive]]
        read = _read_cifar
    else:
        choices, read = [[folder / "train_32x32.mat", folder / "test_32x32.mat"]], _read_svhn
    paths = next((paths for paths in choices if all(path.is_file() for path in paths)), None)
    return None if paths is None else (paths, functools.partial(read, name, paths))


def _read_tfds(name: str, version: pathlib.Path) -> ImageData:
    train, test = (_read_shards(version, split) for split in ("train", "test"))
    info, state = version / "dataset_info.json", ""
    if info.exists():
        with _naming(info):
            state = json.loads(info.read_bytes()).get("description", "").strip().partition("\n")[0]
    return ImageData(*train, *test, NUM_CLASSES[name], f"{name} {version.name}, from {version}", state)


def _read_shards(version: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    from array_record.python import array_record_module
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    shards = sorted(version.glob(f"*-{split}.array_record-*-of-*"))
    if not shards or len(shards) != int(shards[0].name.rpartition("-of-")[2]):
        raise ValueError(f"{version} lacks files of a split; it has {[s.name for s in shards]}. Prepare it again.")
    images, labels = [], []
    for shard in shards:
        with _naming(shard):
            for record in array_record_module.ArrayRecordReader(str(shard)).read_all():
                feature = tf_example_pb2.Example.FromString(record).features.feature  # pyrefly: ignore
                encoded = io.BytesIO(feature["image"].bytes_list.value[0])
                images.append(np.asarray(Image.open(encoded, formats=("PNG", "JPEG"))))
                labels.append(feature["label"].int64_list.value[0])
    return np.stack(images), np.array(labels, np.int32)


def _read_cifar(name: str, paths: list[pathlib.Path]) -> ImageData:
    """Reads CIFAR's files for Python, or an archive of them. The last one is the test set."""
    inner, archive, files, key = CIFAR[name]
    if paths[0].name == archive:
        with _naming(paths[0]), tarfile.open(paths[0]) as opened:
            members: Any = [opened.extractfile(f"{inner}/{file}") for file in files]
            contents = {paths[0] / file: member.read() for file, member in zip(files, members, strict=True)}
    else:
        contents = {path: path.read_bytes() for path in paths}
    images, labels = [], []
    for path, content in contents.items():
        with _naming(path):
            batch: Any = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
            labels.append(np.array(batch[key], np.int32))
            images.append(batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    train = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
    place = paths[0] if paths[0].name == archive else paths[0].parent
    return ImageData(*train, images[-1], labels[-1], NUM_CLASSES[name], f"{name}, from {place}", PUBLISHED)


class _ArraysOnly(pickle.Unpickler):
    """Reads what holds NumPy arrays and nothing else, since a pickle can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        if module.startswith("numpy") and name in ("ndarray", "dtype", "_reconstruct", "_frombuffer"):
            return super().find_class("numpy" if name in ("ndarray", "dtype") else "numpy._core.multiarray", name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no array needs")


def _read_svhn(name: str, paths: list[pathlib.Path]) -> ImageData:
    """Reads the makers' files for MATLAB. There, the digit 0 has the label 10."""
    import scipy.io

    def read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
        with _naming(path):
            content = scipy.io.loadmat(path)
            return content["X"].transpose(3, 0, 1, 2), content["y"].ravel().astype(np.int32) % 10

    train, test = map(read, paths)
    return ImageData(*train, *test, NUM_CLASSES[name], f"{name}, from {paths[0].parent}", PUBLISHED)


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Turns errors of any kind into a ValueError that names the file."""
    try:
        yield
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error!r:.200}). Download or prepare it again.") from error


def _cached(name: str, folder: pathlib.Path, paths: list[pathlib.Path], read: Callable[[], ImageData]) -> ImageData:
    """The decoded data, from the cache if it was made from these files."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    source = hashlib.sha256(repr(stats).encode()).hexdigest()[:16]
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    user = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = user / "excitation_optax" / f"{name}-{place}-decoded.npz"
    if data := _read_cache(cache, source):
        return data
    data = read()
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, **vars(data), source=source)
        temporary.replace(cache)
    except OSError as error:  # read-only, or full
        print(f"{name}: not cached, and so decoded each time ({error})", file=sys.stderr)
        with contextlib.suppress(OSError):
            temporary.unlink()
    return data


# The errors of reading a damaged .npz file, wherever the damage is.
DAMAGED_NPZ = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError)


def _read_cache(path: pathlib.Path, source: str) -> ImageData | None:
    """None if there is no cache, or it is damaged (zip has checksums), or it was made from other files."""
    try:
        with path.open("rb") as file, np.load(file) as saved:
            fields = {field.name: saved[field.name] for field in dataclasses.fields(ImageData)}
            if saved["source"] == source:
                return ImageData(**{name: a if a.ndim else a.item() for name, a in fields.items()})
    except (FileNotFoundError, NotADirectoryError):
        pass
    except DAMAGED_NPZ as error:
        print(f"{path} is damaged ({error!r:.200}); the data is decoded again", file=sys.stderr)
    return None
