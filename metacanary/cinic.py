"""CINIC-10 (arXiv 1810.03505) without its CIFAR-10 images, for pretraining a model that is then trained on CIFAR-10.

Its archive holds folders <split>/<class>/ of PNG files. Those from ImageNet are named as there, n02690373_1234.png;
those from CIFAR-10 cifar10-train-123.png or, in its description, cifar-10-train-123.png. These are left out: a model
that was pretrained on them has seen the images that it is tested and audited on.
"""

import io
import os
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from metacanary.source import Arrays, Source

# The validation split is a second training split: no one chooses a model by it here.
_FOLDERS = {"train": ("train", "valid"), "test": ("test",)}
_CIFAR = re.compile(r"cifar-?10-(train|test)-\d+\.png")
_IMAGENET = re.compile(r"n\d+_\d+\.png")


def read(source: Source, paths: Sequence[Path], *, images_per_folder: int) -> Arrays:
    """Reads the archive.

    Args:
      source: The data set; its class names are the names of the folders.
      paths: The one archive.
      images_per_folder: PNG files that each class has in each split, those of CIFAR-10 included.

    Returns:
      The four arrays: splits train and valid are the training images, in the order of split, class and file name.

    Raises:
      ValueError: If the archive is damaged, a folder holds more or fewer files, a file is neither ImageNet's nor
        CIFAR-10's by its name, or an image is no PNG of the source's size.

    Guarantees:
      No image whose name says that it is CIFAR-10's.
    """
    try:
        with tarfile.open(paths[0]) as tar:
            images = _read_folders(tar, source, images_per_folder)
    except (tarfile.TarError, zlib.error, OSError, EOFError, ValueError) as error:
        raise ValueError(f"{os.fspath(paths[0])!r} is no archive of CINIC-10: {error}") from error
    arrays: Arrays = {}
    for split, folders in _FOLDERS.items():
        keys = sorted((folders.index(key[0]), *key[1:], key[0]) for key in images if key[0] in folders)
        found = [images[folder, label, name] for _, label, name, folder in keys]
        arrays[f"{split}_images"] = np.stack(found) if found else np.empty((0, *source.image_shape), np.uint8)
        arrays[f"{split}_labels"] = np.array([label for _, label, _, _ in keys], np.uint8)
    return arrays


def _read_folders(
    tar: tarfile.TarFile, source: Source, images_per_folder: int
) -> dict[tuple[str, int, str], np.ndarray]:
    """Decodes the images that are not CIFAR-10's, by split, label and file name, in one pass through the archive."""
    splits = [folder for folders in _FOLDERS.values() for folder in folders]
    counts = {(split, name): 0 for split in splits for name in source.class_names}
    images = {}
    for member in tar:
        split, class_name, name = ("", "", "", *PurePosixPath(member.name).parts)[-3:]
        if not member.isfile() or (split, class_name) not in counts or not name.endswith(".png"):
            continue
        counts[split, class_name] += 1
        if _CIFAR.fullmatch(name):
            continue
        if not _IMAGENET.fullmatch(name):
            raise ValueError(f"{member.name!r} is named neither as ImageNet's images nor as CIFAR-10's")
        images[split, source.class_names.index(class_name), name] = _decode(tar, member, source.image_shape)
    for (split, class_name), count in counts.items():
        if count != images_per_folder:
            raise ValueError(f"{split}/{class_name} has {count} PNG files, expected {images_per_folder}")
    return images


def _decode(tar: tarfile.TarFile, member: tarfile.TarInfo, shape: tuple[int, int, int]) -> np.ndarray:
    """Decodes an image, a grey one into three equal channels."""
    file = tar.extractfile(member)
    try:
        image = np.asarray(Image.open(io.BytesIO(file.read() if file else b""), formats=["PNG"]).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{member.name!r} is no PNG file") from error
    if image.shape != shape:
        raise ValueError(f"{member.name!r} has shape {image.shape}, expected {shape}")
    return image
