"""Data sets: fetched and verified once, then mapped into memory.

`load` prepares a data set on first use under `<data_dir>/<name>/` as raw npy files, with `provenance.json` as
the last file written; later calls map these files. A data set is one entry of `SOURCES`.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import metacanary
from metacanary import store

Arrays = dict[str, np.ndarray]

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_SMALL_BYTES = 16 * 2**20  # arrays below are digested at every load, in a hundredth of a second or so


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """A labelled set of images, split into train and test.

    Attributes:
      name: The name it was loaded by.
      train_images: uint8 [train, height, width, channels], in the order of the source, read-only.
      train_labels: int32 [train], indices into `class_names`.
      test_images: uint8 [test, height, width, channels].
      test_labels: int32 [test].
      class_names: The names of the classes.
      provenance: What stands in provenance.json: source, licence, shapes and digests, versions.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.ndim != 4 or images.dtype != np.uint8:
                raise ValueError(f"{split}_images has {images.dtype}{images.shape}, expected uint8 [n, h, w, c]")
            if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
                raise ValueError(f"{split}_labels has {labels.dtype}{labels.shape}, expected int [{len(images)}]")
            if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
                raise ValueError(f"{split}_labels reach {labels.max()}, expected 0..{len(self.class_names) - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set comes from and how it is known to be the right one.

    Attributes:
      name: The name to load it by.
      description: One line.
      licence: The terms it is given under.
      url: Its home page.
      class_names: The names of the classes.
      image_shape: Height, width, channels.
      num_train: Number of training images.
      num_test: Number of test images.
      digests: SHA-256 of the raw uint8 bytes of arrays, by name; "train_images[:1000]" is of the first 1,000.
      fetch: Called with the source and `data_dir`, returns the four arrays in the order of the source.
    """

    name: str
    description: str
    licence: str
    url: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    digests: Mapping[str, str]
    fetch: Callable[["Source", Path], Arrays]

    def verify(self, arrays: Mapping[str, np.ndarray], where: str, known: Mapping[str, str] | None = None) -> None:
        """Raises a ValueError naming `where` if arrays are not this data set; `known` saves digesting whole arrays."""
        for split, count in (("train", self.num_train), ("test", self.num_test)):
            shape = arrays[f"{split}_images"].shape
            if shape != (count, *self.image_shape):
                raise ValueError(
                    f"name={self.name!r}: {where} holds {split} images of shape {shape}, "
                    f"expected {(count, *self.image_shape)}"
                )
        for pinned, expected in self.digests.items():
            array, _, stop = pinned.rstrip("]").partition("[:")
            found = (known or {}).get(pinned) or sha256(arrays[array][: int(stop) if stop else None])
            if found != expected:
                raise ValueError(
                    f"name={self.name!r}: {pinned} of {where} has sha256 {found}, expected {expected}: "
                    "it is another data set or a damaged one"
                )


def names() -> tuple[str, ...]:
    """Returns the names that `load` knows."""
    return tuple(SOURCES)


def load(name: str, data_dir: store.PathLike) -> Dataset:
    """Loads a data set, and prepares it first if it is not yet there.

    Args:
      name: One of `names()`.
      data_dir: The folder of all data sets; `<data_dir>/downloads/manual` is where to put archives by hand.

    Returns:
      The data set, its arrays mapped from disk.

    Raises:
      ValueError: If the name is unknown, or what was found on disk or fetched is not the data set.
      FileNotFoundError: If it cannot be fetched; the message says what to put where.

    Guarantees:
      Counts, shapes and digests of the source hold for what is prepared. Two processes may prepare it at
      once. A prepared file that was cut short, has other labels or, below 16 MB, other pixels is refused; so
      is what was prepared by an entry of `SOURCES` with other counts, digests or class names.
    """
    if name not in SOURCES:
        raise ValueError(f"name={name!r}, expected one of {', '.join(names())}")
    folder = Path(data_dir) / name
    if not (folder / "provenance.json").exists():
        _prepare(SOURCES[name], Path(data_dir))
    provenance = store.read_json(folder / "provenance.json")
    arrays = {array: _read(folder / f"{array}.npy", provenance["arrays"][array]) for array in ARRAYS}
    _require_same_source(SOURCES[name], provenance, arrays, folder)
    return Dataset(name=name, **arrays, class_names=tuple(provenance["class_names"]), provenance=provenance)


def sha256(array: np.ndarray) -> str:
    """Digests the raw bytes of an array of images or labels as uint8, in C order."""
    return hashlib.sha256(np.ascontiguousarray(array, np.uint8).data).hexdigest()


def _prepare(source: Source, data_dir: Path) -> None:
    """Fetches and verifies a data set and writes its files, the finished marker last."""
    arrays = source.fetch(source, data_dir)
    source.verify(arrays, "what was fetched")
    folder = data_dir / source.name
    for name in ARRAYS:
        array = np.ascontiguousarray(arrays[name], np.uint8 if name.endswith("images") else np.int32)
        with store.atomic(folder / f"{name}.npy") as file:
            np.save(file, array, allow_pickle=False)
    versions = {package: importlib.metadata.version(package) for package in ("numpy", "scikit-learn")}
    versions |= {"tensorflow-datasets": importlib.metadata.version("tensorflow-datasets")}
    described = ("name", "description", "licence", "url", "class_names", "num_train", "num_test")
    store.write_json(
        folder / "provenance.json",
        {field: getattr(source, field) for field in described}
        | {"versions": versions | {"metacanary": metacanary.__version__}}
        | {"arrays": {a: {"shape": arrays[a].shape, "sha256": sha256(arrays[a])} for a in ARRAYS}},
    )


def _require_same_source(source: Source, provenance: Mapping[str, Any], arrays: Arrays, folder: Path) -> None:
    """Holds what was prepared, by the digests that were recorded, against the pins as they are now."""
    remedy = f"it was prepared from another version of its source: delete {os.fspath(folder)!r}"
    if tuple(provenance["class_names"]) != source.class_names:
        raise ValueError(f"{os.fspath(folder)!r} has other class_names than {source.name!r} has now; {remedy}")
    try:
        recorded = {name: provenance["arrays"][name]["sha256"] for name in ARRAYS}
        source.verify(arrays, os.fspath(folder), recorded)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error


def _read(path: Path, expected: Mapping[str, Any]) -> np.ndarray:
    """Maps an array, after checking its size, and its digest if it is small."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is damaged ({error}): delete {os.fspath(path.parent)!r}") from error
    if list(array.shape) != expected["shape"] or (array.nbytes < _SMALL_BYTES and sha256(array) != expected["sha256"]):
        raise ValueError(f"{os.fspath(path)!r} is not what provenance.json says: delete {os.fspath(path.parent)!r}")
    return array


def _fetch_digits(source: Source, data_dir: Path) -> Arrays:
    """Takes scikit-learn's digits; of the images sorted by class, every fifth is a test image."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    is_test = np.zeros(len(images), bool)
    is_test[np.argsort(digits.target, kind="stable")[::5]] = True
    return {
        "train_images": images[~is_test],
        "train_labels": digits.target[~is_test],
        "test_images": images[is_test],
        "test_labels": digits.target[is_test],
    }


def _fetch_cifar(source: Source, data_dir: Path, **archive: Any) -> Arrays:
    """Takes a data set in the CIFAR-10 binary layout through tensorflow-datasets."""
    from metacanary import cifar  # a second of imports that only the first use needs

    return cifar.fetch(source, data_dir, cifar.Archive(**archive))


_DIGITS = Source(
    name="digits",
    description="1,797 handwritten digits of 8x8 pixels, embedded in scikit-learn",
    licence="CC BY 4.0",
    url="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    class_names=tuple("0123456789"),
    image_shape=(8, 8, 1),
    num_train=1437,
    num_test=360,
    digests={
        "train_images": "0f6c613b7ad2343df851ec1230c6ee15eb5ad29be01fa67639b3ffe54ca95b13",
        "train_labels": "970cadb89f4956ed733d1a7ac5d4b2a4d50b094c268f69917fccec48910cfeaf",
        "test_images": "f8da3231f745dc76e21dcafa7258f107bdbb5603cbb47ac1807f3c667b241b70",
        "test_labels": "28beeed8f5e51f11d7ddbd7a14a006d30684c0abbb11aaeba722dfe30c55514b",
    },
    fetch=_fetch_digits,
)

_CIFAR10 = Source(
    name="cifar10",
    description="60,000 colour photographs of 32x32 pixels",
    licence="none stated; cite Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    url="https://www.cs.toronto.edu/~kriz/cifar.html",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    image_shape=(32, 32, 3),
    num_train=50_000,
    num_test=10_000,
    digests={
        "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        "train_images[:1000]": "133c5674fd1c56ceeeb944ddcdc368da2593ce5b67acfa216ab83f98a084f388",
        "test_images[:1000]": "da362006b99671213d1a5d856cab2bedf64d40bad4501630ee60f4ceb2d3ec7f",
    },
    fetch=functools.partial(
        _fetch_cifar,
        file_name="cifar-10-binary.tar.gz",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        size_bytes=170_052_171,
    ),
)

# The same labels and order, for where the official archive cannot be had; never called cifar10, since the
# pixels differ.
_CIFAR10_JPEG75 = dataclasses.replace(
    _CIFAR10,
    name="cifar10_jpeg75",
    description="CIFAR-10 after one JPEG generation of quality 75 (30 dB), in the official layout and order",
    digests={
        "train_labels": _CIFAR10.digests["train_labels"],
        "test_labels": _CIFAR10.digests["test_labels"],
        "train_images": "5aaf8a2cf2e577ff4dbb15e4f368840fab5aca1812bcc69682005f8dc661d466",
        "test_images": "b7018a062865e9348a704e72416eb53c816b43cc8ac42ab43276a2b967508ab6",
    },
    fetch=functools.partial(_fetch_cifar, file_name="cifar10-jpeg75-binary.tar.gz"),
)

SOURCES: dict[str, Source] = {source.name: source for source in (_DIGITS, _CIFAR10, _CIFAR10_JPEG75)}
