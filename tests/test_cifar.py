"""Tests of metacanary.cifar."""

import re

import fake_archives
import numpy as np
import pytest

from metacanary import cifar, data

ARRAYS = fake_archives.make_arrays(seed=3, num_classes=10)
CIFAR100 = data.SOURCES["cifar100"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_read_gives_what_was_written(tmp_path, name):
    getattr(fake_archives, f"write_{name}")(tmp_path / "tiny.tar.gz", ARRAYS)
    found = getattr(cifar, f"read_{name}")(data.SOURCES[name], [tmp_path / "tiny.tar.gz"])
    for name in data.ARRAYS:
        np.testing.assert_array_equal(found[name], ARRAYS[name])


def test_read_takes_the_fine_label_and_the_planes_in_order(tmp_path):
    """A row by hand: coarse label 7, fine label 42, a red plane of 1, a green one of 2, a blue one of 3."""
    row = bytes([7, 42]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024
    fake_archives.write_tar(tmp_path / "a.tar.gz", {"train.bin": row, "test.bin": row}, "cifar-100-binary")
    found = cifar.read_cifar100(CIFAR100, [tmp_path / "a.tar.gz"])
    assert found["train_labels"].tolist() == [42]
    assert np.unique(found["train_images"].reshape(-1, 3), axis=0).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        # Classes 3 and 4, and later ones, differ: the first is named.
        ([*CIFAR100.class_names[:3], *CIFAR100.class_names[:2:-1]], "class 3 is 'worm' in NAMES, expected 'bear'"),
        (CIFAR100.class_names[:-1], "class 99 is '' in NAMES, expected 'worm'"),
        ([*CIFAR100.class_names, "zebra"], "class 100 is 'zebra' in NAMES, expected ''"),
        ([], "class 0 is '' in NAMES, expected 'apple'"),
        (["äpple"], "class 0 is 'äpple' in NAMES, expected 'apple'"),
    ],
)
def test_read_cifar100_refuses_other_fine_names(tmp_path, names, message):
    path = tmp_path / "a.tar.gz"
    fake_archives.write_cifar100(path, ARRAYS, names)
    expected = f"{str(path)!r}: {message.replace('NAMES', 'fine_label_names.txt')}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        cifar.read_cifar100(CIFAR100, [path])


def test_read_cifar100_takes_an_archive_without_names(tmp_path):
    fake_archives.write_cifar100(tmp_path / "a.tar.gz", ARRAYS, None)
    found = cifar.read_cifar100(CIFAR100, [tmp_path / "a.tar.gz"])
    np.testing.assert_array_equal(found["test_labels"], ARRAYS["test_labels"])


@pytest.mark.parametrize(
    "files", [{}, {"train.bin": b"", "test_batch.bin": b""}, {"train.bin": b"12", "test.bin": b""}]
)
def test_read_refuses_another_layout(tmp_path, files):
    fake_archives.write_tar(tmp_path / "a.tar.gz", files, "folder")
    for read in (cifar.read_cifar10, cifar.read_cifar100):
        with pytest.raises(ValueError, match=r"a\.tar\.gz' is no archive in the CIFAR binary layout"):
            read(data.SOURCES["cifar10"], [tmp_path / "a.tar.gz"])


def test_read_cifar10_refuses_cifar100(tmp_path):
    fake_archives.write_cifar100(tmp_path / "a.tar.gz", ARRAYS)
    with pytest.raises(ValueError, match=r"CIFAR binary layout.*data_batch_1"):
        cifar.read_cifar10(data.SOURCES["cifar10"], [tmp_path / "a.tar.gz"])
