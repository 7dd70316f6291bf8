"""Data sets prepared and read through tensorflow-datasets without TensorFlow.

The stock builders call TensorFlow to unpack archives, to read their files and to encode PNG; here tarfile, NumPy and
Pillow do. Identifiers, order, labels and pixels of the CIFAR data sets are the stock builders'; those of MNIST have no
identifiers, without which records, which are stored shuffled, cannot be put back in order.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tqdm import tqdm

from metacanary import archives
from metacanary.source import Arrays, Source

# Reads the archives of a source; a ValueError says what is wrong with them.
Reader = Callable[[Source, Sequence[Path]], Arrays]

_SPLITS = ("train", "test")


class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The builder of tensorflow-datasets for one source.

    It is no stock builder: those of its name hold the same images, those of MNIST in records without an id.
    """

    VERSION = tfds.core.Version("3.0.2")  # of the stock CIFAR builders

    def __init__(self, *, source: Source, reader: Reader, root: Path) -> None:
        self.name = source.name
        self._source, self._reader, self._root = source, reader, root
        super().__init__(file_format="array_record", data_dir=root / "tensorflow_datasets")

    def _info(self) -> tfds.core.DatasetInfo:
        """Says what a record holds."""
        source = self._source
        features = {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=source.image_shape),
            "label": tfds.features.ClassLabel(names=list(source.class_names)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=source.description,
            features=tfds.features.FeaturesDict(features),
            homepage=source.url,
            license=source.licence,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        """Obtains the archives, verifies what they hold, and hands out its examples."""
        paths = archives.obtain(self._source, self._root)
        arrays = self._reader(self._source, paths)
        # Before anything is prepared: tensorflow-datasets would keep a wrong data set for good.
        self._source.verify(arrays, " and ".join(map(os.fspath, paths)))
        return {split: self._generate_examples(split, arrays) for split in _SPLITS}

    def _generate_examples(self, split: str, arrays: Arrays) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the examples of a split with the stock builders' keys."""
        for index, image in enumerate(arrays[f"{split}_images"]):
            png = io.BytesIO()
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(png, "png")
            label = int(arrays[f"{split}_labels"][index])
            yield index, {"id": f"{split}_{index:05d}", "image": png.getvalue(), "label": label}


def fetch(source: Source, data_dir: Path, reader: Reader) -> Arrays:
    """Prepares a data set under `<data_dir>/tensorflow_datasets` and reads it.

    Args:
      source: The data set.
      data_dir: The folder of all data sets.
      reader: What reads its archives.

    Returns:
      The four arrays, in the archives' order.

    Raises:
      ValueError: If an archive is damaged or is another one, or what was prepared before is another data set.
      FileNotFoundError: If an archive is missing and cannot be downloaded; the message says what to put where.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # a log file would get a line for each step of the bar
    builder = Builder(source=source, reader=reader, root=data_dir)
    try:
        builder.download_and_prepare(download_dir=data_dir / "downloads")
    except OSError:
        if not builder.data_path.exists():  # if it does, another process was faster
            raise
        builder = Builder(source=source, reader=reader, root=data_dir)
    records = builder.as_data_source()
    prepared: Arrays = {}
    for split in _SPLITS:
        prepared |= _read_records(records[split], split, source)
    try:
        source.verify(prepared, os.fspath(builder.data_path))
    except ValueError as error:
        raise ValueError(f"{error}; delete {os.fspath(builder.data_path)!r} to prepare it anew") from error
    return prepared


def _read_records(records: Sequence[Mapping[str, Any]], split: str, source: Source) -> Arrays:
    """Reads a prepared split, and puts its records, which are stored shuffled, back in order by their id."""
    images = np.empty((len(records), *source.image_shape), np.uint8)
    labels = np.empty(len(records), np.uint8)
    for record in tqdm(records, desc=f"Reading {source.name} {split}", disable=None):
        index = int(record["id"].decode().removeprefix(f"{split}_"))
        images[index], labels[index] = record["image"], record["label"]
    return {f"{split}_images": images, f"{split}_labels": labels}
