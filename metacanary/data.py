"""Data sets: fetched and verified once, then mapped into memory.

`load` prepares a data set on first use under `<data_dir>/<name>/` as raw npy files, with `provenance.json` as
the last file written; later calls map these files. A data set is one entry of `registry.SOURCES`.
"""

import dataclasses
import errno
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import metacanary
from metacanary import store
from metacanary.registry import SOURCES
from metacanary.source import ARRAYS, Arrays, Source, sha256

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


def names() -> tuple[str, ...]:
    """Returns the names that `load` knows."""
    return tuple(SOURCES)


def load(name: str, data_dir: store.PathLike, num_train: int | None = None, *, without: int | None = None) -> Dataset:
    """Loads a data set, and prepares it first if it is not yet there.

    Args:
      name: One of `names()`.
      data_dir: The folder of all data sets; `<data_dir>/downloads/manual` is where to put archives by hand.
      num_train: Training images to keep, of `stratified`; None for all.
      without: Leaves out the training images of the subset of this size, before others are chosen; None for none.

    Returns:
      The data set, its arrays mapped from disk; a subset under its `subset_name`, its training images in memory.

    Raises:
      ValueError: If the name is unknown, what was found on disk or fetched is not the data set, or it has too few
        images.
      FileNotFoundError: If it cannot be fetched; the message says what to put where.
      OSError: If there is no room or no permission to write it.

    Guarantees:
      Counts, shapes and digests of the source hold for what is prepared. Two processes may prepare it at
      once; a folder that was prepared elsewhere and copied is taken as it is. A prepared file that was cut short, has
      other labels or, below 16 MB, other pixels is refused; so is what was prepared by an entry of `SOURCES` with other
      counts, digests, checksums of archives or class names. `without=n` has no training image, by its place in the
      source, in common with `num_train=n` of the same data set, and neither has one with the test images.
    """
    if name not in SOURCES:
        raise ValueError(f"name={name!r}, expected one of {', '.join(names())}")
    folder = Path(data_dir) / name
    if not (folder / "provenance.json").exists():
        _prepare(SOURCES[name], Path(data_dir))
    provenance = store.read_json(folder / "provenance.json")
    arrays = {array: _read(folder / f"{array}.npy", provenance["arrays"][array]) for array in ARRAYS}
    _require_same_source(SOURCES[name], provenance, arrays, folder)
    whole = Dataset(name=name, **arrays, class_names=tuple(provenance["class_names"]), provenance=provenance)
    return whole if num_train is None and without is None else _subset(whole, num_train, without)


def origin(name: str) -> str:
    """Names the data set whose images a data set has: itself, or what it is an altered copy of."""
    return SOURCES[name].copy_of or name


def subset_name(name: str, num_train: int | None, without: int | None = None) -> str:
    """Names a subset as paths and tables do, cifar10-train5000; None stands for the whole data set."""
    rest = name if without is None else f"{name}-without{without}"
    return rest if num_train is None else f"{rest}-train{num_train}"


def stratified(labels: np.ndarray, num_classes: int, num_chosen: int) -> np.ndarray:
    """Chooses as many items of every class, the same ones always.

    Of a class with N items, n of which are chosen, those at positions floor(i N / n), i = 0..n-1, in the given
    order: evenly spread, so that a source sorted by something else gives no sorted subset. If `num_chosen` is no
    multiple of `num_classes`, the first classes give one item more.

    Args:
      labels: int [N], in 0..num_classes-1.
      num_classes: Number of classes, k.
      num_chosen: Number of items to choose, n.

    Returns:
      intp [n], ascending indices into `labels`; of each class floor(n / k) or ceil(n / k).

    Raises:
      ValueError: If a class has too few items.
    """
    each, rest = divmod(num_chosen, num_classes)
    chosen = []
    for label in range(num_classes):
        members, wanted = np.flatnonzero(labels == label), each + (label < rest)
        if wanted > len(members):
            raise ValueError(
                f"num_train={num_chosen}: needs {wanted} images of class {label}, which has {len(members)}; "
                "expected a number of which every class has its share"
            )
        chosen.append(members[np.arange(wanted) * len(members) // max(wanted, 1)])
    return np.sort(np.concatenate(chosen))


def _subset(whole: Dataset, num_train: int | None, without: int | None) -> Dataset:
    """Keeps a stratified choice of the training images, in their order, and all test images."""
    labels, num_classes = whole.train_labels, len(whole.class_names)
    chosen = np.arange(len(labels))
    if without is not None:
        if without >= len(labels):
            raise ValueError(f"without={without}: leaves no image of {whole.name!r}, expected less than {len(labels)}")
        chosen = np.setdiff1d(chosen, stratified(labels, num_classes, without))
    if num_train is not None:
        chosen = chosen[stratified(labels[chosen], num_classes, num_train)]
    index_sha256 = hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
    described = {"num_train": len(chosen), "of": len(labels), "index_sha256": index_sha256}
    return dataclasses.replace(
        whole,
        name=subset_name(whole.name, num_train, without),
        train_images=whole.train_images[chosen],
        train_labels=whole.train_labels[chosen],
        provenance={**whole.provenance, "subset": described},
    )


def _prepare(source: Source, data_dir: Path) -> None:
    """Fetches and verifies a data set and writes its files, the finished marker last."""
    try:
        _fetch_and_write(source, data_dir)
    except (OSError, RuntimeError) as error:
        if not _is_full_disk(error):
            raise
        images = math.prod(source.image_shape) * (source.num_train + source.num_test)
        raise OSError(
            errno.ENOSPC,
            f"name={source.name!r}: no room in {os.fspath(data_dir.absolute())!r}, which needs the archives' size and "
            f"about {2 * images / 1e6:,.0f} MB beside it; make room and call again",
        ) from error


def _is_full_disk(error: OSError | RuntimeError) -> bool:
    """Whether an error says that a disk or a quota is full: Python's by its number, others by their words.

    array_record raises a RuntimeError, NumPy an OSError without a number.
    """
    words = ("No space left", "quota exceeded", "requested and")
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in words)


def _fetch_and_write(source: Source, data_dir: Path) -> None:
    """What `_prepare` does, on a disk with room."""
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
        | {"archives": [dataclasses.asdict(archive) for archive in source.archives]}
        | {"versions": versions | {"metacanary": metacanary.__version__}}
        | {"arrays": {a: {"shape": arrays[a].shape, "sha256": sha256(arrays[a])} for a in ARRAYS}},
    )


def _require_same_source(source: Source, provenance: Mapping[str, Any], arrays: Arrays, folder: Path) -> None:
    """Holds what was prepared, by the digests that were recorded, against the pins as they are now."""
    remedy = f"it was prepared from another version of its source: delete {os.fspath(folder)!r}"
    archives = [(archive["sha256"], archive.get("md5", "")) for archive in provenance.get("archives", ())]
    if archives and archives != [(archive.sha256, archive.md5) for archive in source.archives]:
        raise ValueError(f"{os.fspath(folder)!r} is from archives of other checksums than are pinned now; {remedy}")
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
