"""Tests of metacanary.cinic."""

import fake_archives
import numpy as np
import pytest

from metacanary import cinic, data

SOURCE = data.SOURCES["cinic10"]
NAMES = SOURCE.class_names


def read(path, images_per_folder=3):
    return cinic.read(SOURCE, [path], images_per_folder=images_per_folder)


@pytest.fixture
def files():
    """The files of a small archive: two images of ImageNet and one of CIFAR-10 in each folder."""
    return fake_archives.cinic_files(NAMES)[0]


@pytest.mark.parametrize("folder", ["", "CINIC-10", "."])
def test_read_leaves_out_cifar_and_keeps_the_order(tmp_path, folder):
    files, arrays = fake_archives.cinic_files(NAMES)
    fake_archives.write_tar(tmp_path / "a.tar.gz", files, folder)
    found = read(tmp_path / "a.tar.gz")
    for name in data.ARRAYS:
        np.testing.assert_array_equal(found[name], arrays[name])
    assert found["train_labels"].tolist() == 2 * [label for label in range(10) for _ in range(2)]
    # What the fake has of CIFAR-10 is black.
    assert min(found["train_images"].max(axis=(1, 2, 3)).min(), found["test_images"].max(axis=(1, 2, 3)).min()) > 0


@pytest.mark.parametrize("name", ["cifar10-train-3.png", "cifar-10-test-12.png"])
def test_read_leaves_out_both_spellings(tmp_path, files, name):
    files["train/cat/" + name] = files.pop("train/cat/cifar10-train-0.png")
    fake_archives.write_tar(tmp_path / "a.tar.gz", files)
    assert len(read(tmp_path / "a.tar.gz")["train_labels"]) == 40


def test_read_takes_no_notice_of_other_files(tmp_path, files):
    extra = {"README.md": b"x", "train/synsets.txt": b"x", "train/cat/Thumbs.db": b"x", "images/cat/n01_1.png": b"x"}
    fake_archives.write_tar(tmp_path / "a.tar.gz", files | extra)
    assert len(read(tmp_path / "a.tar.gz")["train_labels"]) == 40


@pytest.mark.parametrize("name", ["CIFAR10-train-3.png", "0001.png", "my-cifar10-train-1.png", "n02_3.png.png"])
def test_read_refuses_images_of_unknown_origin(tmp_path, files, name):
    """One that cannot be told apart by its name might be CIFAR-10's."""
    files[f"valid/dog/{name}"] = files.pop("valid/dog/cifar10-train-0.png")
    fake_archives.write_tar(tmp_path / "a.tar.gz", files)
    with pytest.raises(ValueError, match=f"valid/dog/{name}' is named neither as ImageNet's images nor as CIFAR-10's"):
        read(tmp_path / "a.tar.gz")


def test_read_refuses_missing_and_additional_files(tmp_path, files):
    fake_archives.write_tar(
        tmp_path / "more.tar.gz", files | {"test/ship/n01_99.png": files["test/ship/n08690373_0.png"]}
    )
    with pytest.raises(ValueError, match="test/ship has 4 PNG files, expected 3"):
        read(tmp_path / "more.tar.gz")
    del files["test/ship/cifar10-test-0.png"]
    fake_archives.write_tar(tmp_path / "less.tar.gz", files)
    with pytest.raises(ValueError, match="test/ship has 2 PNG files, expected 3"):
        read(tmp_path / "less.tar.gz")
    with pytest.raises(ValueError, match="train/airplane has 3 PNG files, expected 9000"):
        read(tmp_path / "less.tar.gz", images_per_folder=9000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "no PNG file"),
        (fake_archives.png(np.zeros((64, 64, 3), np.uint8)), r"shape \(64, 64, 3\), expected \(32, 32, 3\)"),
    ],
)
def test_read_refuses_what_is_no_image_of_the_size(tmp_path, files, content, message):
    files["train/frog/n06690373_1.png"] = content
    fake_archives.write_tar(tmp_path / "a.tar.gz", files)
    with pytest.raises(ValueError, match=rf"a\.tar\.gz' is no archive of CINIC-10.*frog/n06690373_1.png' .*{message}"):
        read(tmp_path / "a.tar.gz")


def test_read_makes_grey_images_coloured(tmp_path, files):
    files["test/airplane/n00690373_0.png"] = fake_archives.png(np.full((32, 32), 7, np.uint8))
    fake_archives.write_tar(tmp_path / "a.tar.gz", files)
    assert np.unique(read(tmp_path / "a.tar.gz")["test_images"][0]).tolist() == [7]


def test_read_refuses_a_cut_archive(tmp_path, files):
    path = tmp_path / "a.tar.gz"
    fake_archives.write_tar(path, files)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="is no archive of CINIC-10"):
        read(path)
