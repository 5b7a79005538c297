"""Image data sets that fit in memory."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np
import tqdm


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images as they are stored, `[N, H, W, channels]` uint8, and labels `[N]` int32, for training and test."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    description: str  # a line that says what this is and where it came from
    state: str = ""  # what its maker says of it

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits made of every image and label."""
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    @property
    def input_dim(self) -> int:
        """The values of one image."""
        return int(np.prod(self.train_images.shape[1:]))


def load_digits() -> ImageData:
    """Scikit-learn's handwritten digits: 1,797 images of 8x8, of which a fifth, always the same, is for test."""
    import sklearn.datasets  # imported late: it takes a second
    import sklearn.model_selection

    digits: Any = sklearn.datasets.load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, digits.target.astype(np.int32), test_size=0.2, random_state=0, stratify=digits.target
    )
    return ImageData(train_images, train_labels, test_images, test_labels, 10, "digits, from scikit-learn")


def load_tfds(name: str, data_dir: pathlib.Path | None = None) -> ImageData:
    """An image data set that TensorFlow Datasets has prepared as array_record. Reading it needs no TensorFlow.

    Args:
      name: such as "cifar10".
      data_dir: the folder of prepared data; by default `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      FileNotFoundError: if the data set is not there in this form, with what to run to put it there.
    """
    import tensorflow_datasets as tfds  # imported late: it takes seconds

    builder: Any = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        sources = {split: builder.as_data_source(split) for split in ("train", "test")}
    except (AssertionError, KeyError) as error:
        raise FileNotFoundError(
            f"{name} is not prepared as array_record in {builder.data_dir}. Name the folder that holds it with "
            "--data-dir; or, with a network and `pip install tensorflow`, put it there: python -m examples.reproduce "
            f"prepare {name}{'' if data_dir is None else f' --data-dir {data_dir}'}"
        ) from error

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        records = tqdm.tqdm(sources[split], desc=f"decoding {name} {split}", leave=False, mininterval=0.5)
        images, labels = zip(*((record["image"], record["label"]) for record in records), strict=True)
        return np.stack(images), np.asarray(labels, np.int32)

    description = f"{name} {builder.version}, from {builder.data_dir}"
    num_classes = builder.info.features["label"].num_classes
    return ImageData(*read("train"), *read("test"), num_classes, description, _state(pathlib.Path(builder.data_dir)))


def _state(folder: pathlib.Path) -> str:
    """The first line of what stands beside the prepared data about it: TFDS itself keeps to its own description."""
    path = folder / "dataset_info.json"
    text = json.loads(path.read_text()).get("description", "") if path.exists() else ""
    return text.strip().partition("\n")[0]
