"""Tests of metacanary.idx."""

import gzip

import fake_archives
import numpy as np
import pytest

from metacanary import data, idx

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
SOURCE = data.SOURCES["mnist"]


@pytest.fixture
def written(tmp_path):
    """Four files and what they hold; images are no squares, so that rows and columns cannot be taken for each other."""
    arrays = fake_archives.make_arrays(shape=(28, 20, 1))
    fake_archives.write_idx(tmp_path, arrays)
    return [tmp_path / f"{name}.gz" for name in NAMES], arrays


def test_read_gives_what_was_written(written):
    paths, arrays = written
    found = idx.read(SOURCE, paths)
    for name in data.ARRAYS:
        np.testing.assert_array_equal(found[name], arrays[name])


def test_read_by_hand(tmp_path, written):
    """Two images of 2x3 pixels, byte by byte as the format is described."""
    paths, _ = written
    header = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3])
    paths[0].write_bytes(gzip.compress(header + bytes(range(12))))
    found = idx.read(SOURCE, paths)["train_images"]
    assert found.tolist() == [[[[0], [1], [2]], [[3], [4], [5]]], [[[6], [7], [8]], [[9], [10], [11]]]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "cannot reshape"),
        (lambda content: content + b"0", "cannot reshape"),
        (lambda content: b"\0\0\x09\x03" + content[4:], "expected bytes in 3 dimension"),
        (lambda content: b"\0\0\x08\x01" + content[4:], "expected bytes in 3 dimension"),
        (lambda content: b"", "expected bytes in 3 dimension"),
    ],
)
def test_read_refuses_what_is_no_idx_file(written, damage, message):
    paths, _ = written
    paths[0].write_bytes(gzip.compress(damage(gzip.decompress(paths[0].read_bytes()))))
    with pytest.raises(ValueError, match=rf"{paths[0]}' is no idx file compressed by gzip: .*{message}"):
        idx.read(SOURCE, paths)


@pytest.mark.parametrize("keep", [0, 5, 100, -4])
def test_read_refuses_a_cut_file(written, keep):
    paths, _ = written
    paths[2].write_bytes(paths[2].read_bytes()[:keep] if keep else b"<html>")
    with pytest.raises(ValueError, match=rf"{paths[2]}' is no idx file compressed by gzip"):
        idx.read(SOURCE, paths)


def test_read_refuses_labels_as_images(written):
    paths, _ = written
    with pytest.raises(ValueError, match="expected bytes in 3 dimension"):
        idx.read(SOURCE, [paths[1], paths[0], paths[2], paths[3]])
