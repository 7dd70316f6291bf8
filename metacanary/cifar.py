"""The binary layouts of CIFAR-10 and CIFAR-100 (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import itertools
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metacanary.source import Arrays, Source

_CIFAR10 = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
_CIFAR100 = {"train": ["train.bin"], "test": ["test.bin"]}
_FINE_NAMES = "fine_label_names.txt"
_IMAGE_BYTES = 3 * 32 * 32


def read_cifar10(source: Source, paths: Sequence[Path]) -> Arrays:
    """Reads an archive of CIFAR-10's layout: per image one byte of label, then channels, rows, columns.

    Args:
      source: The data set.
      paths: The one archive.

    Returns:
      The four arrays, in the archive's order.

    Raises:
      ValueError: If the archive is damaged or has another layout.
    """
    return _read(paths[0], _CIFAR10, num_label_bytes=1)[0]


def read_cifar100(source: Source, paths: Sequence[Path]) -> Arrays:
    """Reads an archive of CIFAR-100's layout, with its 100 fine labels: a byte of coarse label precedes the fine one.

    Args:
      source: The data set; its class names are those of the fine labels.
      paths: The one archive.

    Returns:
      The four arrays, in the archive's order.

    Raises:
      ValueError: If the archive is damaged or has another layout, or if it holds names of the fine labels and these
        are not the source's, in order.
    """
    arrays, content = _read(paths[0], _CIFAR100, num_label_bytes=2)
    if _FINE_NAMES in content:
        stored = content[_FINE_NAMES].decode(errors="replace").split()
        for label, (found, expected) in enumerate(itertools.zip_longest(stored, source.class_names, fillvalue="")):
            if found != expected:
                raise ValueError(
                    f"{os.fspath(paths[0])!r}: class {label} is {found!r} in {_FINE_NAMES}, expected {expected!r}"
                )
    return arrays


def _read(path: Path, files: dict[str, list[str]], *, num_label_bytes: int) -> tuple[Arrays, dict[str, bytes]]:
    """Reads an archive: its arrays, of which the last of the label bytes is the label, and all of its files by name."""
    arrays: Arrays = {}
    try:
        with tarfile.open(path) as tar:
            # In one pass: going back in a compressed archive means starting over.
            content = {Path(member.name).name: _content(tar, member) for member in tar}
        for split, names in files.items():
            stored = np.frombuffer(b"".join(content[name] for name in names), np.uint8)
            rows = stored.reshape(-1, num_label_bytes + _IMAGE_BYTES)
            arrays[f"{split}_labels"] = rows[:, num_label_bytes - 1]
            arrays[f"{split}_images"] = rows[:, num_label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    except (tarfile.TarError, zlib.error, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no archive in the CIFAR binary layout: {error!r}") from error
    return arrays, content


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Reads a member of an archive; of anything but a file, nothing."""
    file = tar.extractfile(member) if member.isfile() else None
    return file.read() if file else b""
