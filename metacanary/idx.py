"""The idx files of MNIST and Fashion-MNIST, compressed by gzip (http://yann.lecun.com/exdb/mnist)."""

import gzip
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metacanary.source import ARRAYS, Arrays, Source

_UINT8 = 8  # the type of the values, third byte of a file


def read(source: Source, paths: Sequence[Path]) -> Arrays:
    """Reads a data set of four idx files.

    Args:
      source: The data set.
      paths: Of the training images, the training labels, the test images, the test labels.

    Returns:
      The four arrays; images as uint8 [n, height, width, 1].

    Raises:
      ValueError: If a file is damaged or no idx file of bytes, of three dimensions for images and one for labels.
    """
    arrays = {}
    for name, path in zip(ARRAYS, paths, strict=True):
        is_images = name.endswith("images")
        array = _read(path, num_dimensions=3 if is_images else 1)
        arrays[name] = array[..., None] if is_images else array
    return arrays


def _read(path: Path, num_dimensions: int) -> np.ndarray:
    """Reads an idx file: two zeros, type, number of dimensions, their big-endian sizes, then the values."""
    header = 4 + 4 * num_dimensions
    try:
        content = gzip.decompress(path.read_bytes())
        if content[:4] != bytes([0, 0, _UINT8, num_dimensions]):
            raise ValueError(f"it begins with {content[:4]!r}, expected bytes in {num_dimensions} dimension(s)")
        shape = tuple(int(size) for size in np.frombuffer(content[4:header], ">u4"))
        return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no idx file compressed by gzip: {error}") from error
