"""Data sets in the CIFAR-10 binary layout, prepared by tensorflow-datasets without TensorFlow.

The stock builder calls TensorFlow to unpack the archive, to read its files and to encode PNG; here tarfile,
NumPy and Pillow do. Identifiers, order, labels and pixels are the stock builder's.
"""

import dataclasses
import http.client
import io
import os
import ssl
import sys
import tarfile
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums, download_manager, resource
from tensorflow_datasets.image_classification import cifar as stock
from tqdm import tqdm

from metacanary import data

_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_TIMEOUT_SECONDS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archive:
    """An archive in the CIFAR-10 binary layout.

    Attributes:
      file_name: Its name in `<data_dir>/downloads/manual`.
      url: Where it can be downloaded; empty if it is only ever put there by hand.
      sha256: Its checksum; empty if only its decoded arrays are pinned.
      size_bytes: Its size.
    """

    file_name: str
    url: str = ""
    sha256: str = ""
    size_bytes: int = 0

    def __post_init__(self) -> None:
        if self.url and not (self.sha256 and self.size_bytes):
            raise ValueError(f"url={self.url!r}: expected its sha256 and size_bytes too")


class Builder(stock.Cifar10, skip_registration=True):  # type: ignore[call-arg]
    """The builder of tensorflow-datasets for one archive."""

    def __init__(self, *, source: data.Source, archive: Archive, **kwargs: Any) -> None:
        self.name = source.name
        self._source = source
        self._archive = archive
        super().__init__(file_format="array_record", **kwargs)

    @property
    def url_infos(self) -> dict[str, checksums.UrlInfo]:
        """What tensorflow-datasets holds a download, or an archive put there by hand, against."""
        archive = self._archive
        info = checksums.UrlInfo(archive.size_bytes, archive.sha256, archive.file_name)
        return {archive.url: info} if archive.url else {}

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        """Obtains the archive, verifies it, and hands out its examples."""
        self.info.features["label"].names = list(self._source.class_names)
        path = Path(_obtain(self._source.name, self._archive, dl_manager))
        arrays = _read_archive(path)
        # Before anything is prepared: tensorflow-datasets would keep a wrong data set for good.
        self._source.verify(arrays, os.fspath(path))
        return {split: self._generate_examples(split, arrays) for split in _FILES}

    def _generate_examples(self, split: str, arrays: data.Arrays) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the examples of a split with the stock builder's keys."""
        for index, image in enumerate(arrays[f"{split}_images"]):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            label = int(arrays[f"{split}_labels"][index])
            yield index, {"id": f"{split}_{index:05d}", "image": png.getvalue(), "label": label}


def fetch(source: data.Source, data_dir: Path, archive: Archive) -> data.Arrays:
    """Prepares a data set under `<data_dir>/tensorflow_datasets` and reads it.

    Args:
      source: The data set.
      data_dir: The folder of all data sets.
      archive: Where it comes from.

    Returns:
      The four arrays, in the archive's order.

    Raises:
      ValueError: If the archive is damaged or is another one.
      FileNotFoundError: If there is no archive and no download; the message says what to put where.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()  # a log file would get a line for each step of the bar
    prepared = data_dir / "tensorflow_datasets"
    builder = Builder(source=source, archive=archive, data_dir=prepared)
    try:
        config = tfds.download.DownloadConfig(force_checksums_validation=True)
        builder.download_and_prepare(download_dir=data_dir / "downloads", download_config=config)
    except OSError:
        if not builder.data_path.exists():  # if it does, another process was faster
            raise
        builder = Builder(source=source, archive=archive, data_dir=prepared)
    records = builder.as_data_source()
    arrays: data.Arrays = {}
    for split in _FILES:
        arrays |= _read_records(records[split], split, source)
    return arrays


def _obtain(name: str, archive: Archive, dl_manager: tfds.download.DownloadManager) -> str:
    """Returns the path of the archive; if it has a URL, tensorflow-datasets downloads and checks it."""
    by_hand = Path(dl_manager.download_dir) / "manual" / archive.file_name
    wanted = f"name={name!r}: put the archive at {os.fspath(by_hand.absolute())!r}"
    if not archive.url:
        if not by_hand.exists():
            raise FileNotFoundError(f"{wanted}; it cannot be downloaded")
        return os.fspath(by_hand)
    wanted += f"; fetch it from {archive.url} ({archive.size_bytes:,} bytes, sha256 {archive.sha256})"
    cached = resource.get_dl_fname(archive.url, archive.sha256)
    if not by_hand.exists() and not any(Path(dl_manager.download_dir).rglob(cached)):
        failure = unreachable(archive.url)
        if failure:
            raise FileNotFoundError(f"{wanted}, which cannot be done from here: {failure}")
    try:
        return os.fspath(dl_manager.download(archive.url))
    except download_manager.NonMatchingChecksumError as error:
        raise ValueError(f"{wanted}: {error}") from error
    except (tfds.download.DownloadError, requests.RequestException) as error:
        raise FileNotFoundError(f"{wanted}, which failed from here: {error!r}") from error


def unreachable(url: str, timeout_seconds: float = _TIMEOUT_SECONDS) -> str:
    """Says why a URL does not answer, or nothing if it does.

    tensorflow-datasets tries for minutes, and for ever if the server accepts and stays silent. Any answer
    counts, also one about errors or certificates: these tensorflow-datasets reports at once.
    """
    failure = [f"no answer within {timeout_seconds:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=timeout_seconds):
                failure[0] = ""
        except urllib.error.HTTPError:
            failure[0] = ""
        except (OSError, http.client.HTTPException) as error:
            refused = isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError)
            failure[0] = "" if refused else str(error)

    # A thread of its own, since no timeout bounds the look-up of the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return failure[0]


def _read_archive(path: Path) -> data.Arrays:
    """Reads an archive: per image one byte of label, then channels, rows, columns."""
    arrays: data.Arrays = {}
    try:
        with tarfile.open(path) as tar:
            # In one pass: going back in a compressed archive means starting over.
            content = {Path(member.name).name: _content(tar, member) for member in tar}
        for split, files in _FILES.items():
            rows = np.frombuffer(b"".join(content[name] for name in files), np.uint8).reshape(-1, 3073)
            arrays[f"{split}_labels"] = rows[:, 0]
            arrays[f"{split}_images"] = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except (tarfile.TarError, zlib.error, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no archive in the CIFAR-10 binary layout: {error!r}") from error
    return arrays


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Reads a member of an archive; of anything but a file, nothing."""
    file = tar.extractfile(member) if member.isfile() else None
    return file.read() if file else b""


def _read_records(records: Sequence[Mapping[str, Any]], split: str, source: data.Source) -> data.Arrays:
    """Reads a prepared split, and puts its records, which are stored shuffled, back in order by their id."""
    images = np.empty((len(records), *source.image_shape), np.uint8)
    labels = np.empty(len(records), np.uint8)
    for record in tqdm(records, desc=f"Reading {source.name} {split}", disable=None):
        index = int(record["id"].decode().removeprefix(f"{split}_"))
        images[index], labels[index] = record["image"], record["label"]
    return {f"{split}_images": images, f"{split}_labels": labels}
