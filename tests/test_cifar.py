"""Tests of metacanary.cifar."""

import fake_archives
import numpy as np
import pytest

from metacanary import cifar, data

ARRAYS = fake_archives.make_arrays(seed=3, num_classes=10)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (fake_archives.write_cifar10, cifar.read_cifar10),
        (fake_archives.write_cifar100, cifar.read_cifar100),
    ],
)
def test_read_gives_what_was_written(tmp_path, write, read):
    write(tmp_path / "tiny.tar.gz", ARRAYS)
    found = read(data.SOURCES["cifar10"], [tmp_path / "tiny.tar.gz"])
    for name in data.ARRAYS:
        np.testing.assert_array_equal(found[name], ARRAYS[name])


def test_read_takes_the_fine_label_and_the_planes_in_order(tmp_path):
    """A row by hand: coarse label 7, fine label 42, a red plane of 1, a green one of 2, a blue one of 3."""
    row = bytes([7, 42]) + bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3]) * 1024
    fake_archives.write_tar(tmp_path / "a.tar.gz", {"train.bin": row, "test.bin": row}, "cifar-100-binary")
    found = cifar.read_cifar100(data.SOURCES["cifar100"], [tmp_path / "a.tar.gz"])
    assert found["train_labels"].tolist() == [42]
    assert np.unique(found["train_images"].reshape(-1, 3), axis=0).tolist() == [[1, 2, 3]]


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
