"""Image data sets, small enough to live in memory."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import sklearn.datasets
import sklearn.model_selection
import tensorflow_datasets as tfds
import tqdm


@dataclasses.dataclass(frozen=True)
class ImageData:
    """Images as they are stored, `[N, H, W, 3]` or `[N, H, W, 1]` uint8, and labels `[N]` int32, for training and test.

    `mean` and `std` are of the training images, per channel: `(images - mean) / std` is what a model is given.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int

    @property
    def input_dim(self) -> int:
        return int(np.prod(self.train_images.shape[1:]))

    @property
    def mean(self) -> np.ndarray:
        return np.mean(self.train_images, axis=(0, 1, 2), dtype=np.float64).astype(np.float32)

    @property
    def std(self) -> np.ndarray:
        return np.std(self.train_images, axis=(0, 1, 2), dtype=np.float64).astype(np.float32)


def load_digits() -> ImageData:
    """Scikit-learn's handwritten digits: 1,797 images of 8x8, of which a fifth, the same at every call, is for test."""
    digits = sklearn.datasets.load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = sklearn.model_selection.train_test_split(
        images, labels, test_size=0.2, random_state=0, stratify=labels
    )
    return ImageData(train_images, train_labels, test_images, test_labels, num_classes=10)


def load_tfds(name: str, data_dir: pathlib.Path | None = None) -> ImageData:
    """A data set that TensorFlow Datasets has prepared, in array_record form; needs no TensorFlow.

    Args:
      name: such as "cifar10".
      data_dir: where the prepared data is; else `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.

    Raises:
      FileNotFoundError: if it is not there.
    """
    builder_kwargs = {"file_format": "array_record"}
    try:
        builder = tfds.builder(name, data_dir=data_dir, **builder_kwargs)
        train, test = (builder.as_data_source(split) for split in ("train", "test"))
    except Exception as error:
        raise FileNotFoundError(name) from error
    return train, test
