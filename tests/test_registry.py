"""Tests of metacanary.registry: the code path of every data set, and its pins."""

import dataclasses
import functools
import hashlib
import re
import shutil

import fake_archives
import numpy as np
import pytest
from tensorflow_datasets.core.download import checksums

from metacanary import data, registry

DOWNLOADED = ("cifar10", "cifar100", "mnist", "fashion_mnist", "cinic10")


def fake(name, folder):
    """Writes small archives in the layout of a data set, and returns their paths and arrays, and its fetch function."""
    files, fetch = [folder / archive.file_name for archive in data.SOURCES[name].archives], None
    if name == "cinic10":
        pngs, arrays = fake_archives.cinic_files(data.SOURCES[name].class_names)
        fake_archives.write_tar(files[0], pngs)
        fetch = functools.partial(registry.fetch_archives, layout="cinic10", images_per_folder=3)
    elif name.endswith("mnist"):
        arrays = fake_archives.make_arrays(shape=(28, 28, 1))
        fake_archives.write_idx(files[0].parent, arrays)
    else:
        arrays = fake_archives.make_arrays(num_classes=len(data.SOURCES[name].class_names))
        getattr(fake_archives, f"write_{name}")(files[0], arrays)
    return files, arrays, fetch


@pytest.mark.parametrize("name", DOWNLOADED)
def test_load_downloads_and_reads_each_layout(tmp_path, monkeypatch, name):
    files, arrays, fetch = fake(name, tmp_path / "server")
    with fake_archives.serving(tmp_path / "server") as url:
        stock = zip(data.SOURCES[name].archives, files, strict=True)
        archives = [  # each by the algorithm that the entry pins it by
            fake_archives.pinned(archive, path, url + archive.file_name, *archive.checksums) for archive, path in stock
        ]
        entry = fake_archives.registered(name, arrays, archives, fetch)
        monkeypatch.setitem(data.SOURCES, "tiny", entry)
        found = data.load("tiny", tmp_path / "data")
    for array in data.ARRAYS:
        np.testing.assert_array_equal(getattr(found, array), arrays[array])
    assert found.class_names == data.SOURCES[name].class_names
    assert found.provenance["archives"] == [dataclasses.asdict(archive) for archive in archives]
    # What was downloaded lies where archives are put by hand: with it there, nothing is asked.
    for folder in ("tiny", "tensorflow_datasets"):
        shutil.rmtree(tmp_path / "data" / folder)
    np.testing.assert_array_equal(data.load("tiny", tmp_path / "data").train_images, arrays["train_images"])


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_pins_are_those_of_tensorflow_datasets(name):
    stock = checksums.get_all_url_infos()
    for archive in data.SOURCES[name].archives:
        assert (archive.size_bytes, archive.sha256) == (stock[archive.url].size, stock[archive.url].checksum)
        assert archive.file_name.rpartition("/")[2] == stock[archive.url].filename


def test_every_entry_is_pinned():
    """By digests of its arrays or by checksums of all its archives."""
    for name, source in data.SOURCES.items():
        assert source.name == name
        assert source.digests or (source.archives and all(archive.checksums for archive in source.archives)), name
        assert all(archive.url.startswith("http") or not archive.checksums for archive in source.archives)


def test_pins_are_well_formed():
    for source in data.SOURCES.values():
        pins = [("sha256", digest) for digest in source.digests.values()]
        pins += [pin for archive in source.archives for pin in archive.checksums.items()]
        for algorithm, pin in pins:
            assert re.fullmatch("[0-9a-f]+", pin), (source.name, pin)
            assert len(pin) == 2 * hashlib.new(algorithm).digest_size, (source.name, pin)


def test_no_two_data_sets_share_a_pin():
    """But for CIFAR-10's labels, which its JPEG generation has too: an entry made from another has its own pins."""
    pins = [pin for source in data.SOURCES.values() for pin in source.digests.values()]
    pins += [pin for source in data.SOURCES.values() for a in source.archives for pin in a.checksums.values()]
    labels = [data.SOURCES["cifar10"].digests[name] for name in ("train_labels", "test_labels")]
    assert sorted(pins) == sorted([*set(pins), *labels])


def test_no_two_archives_have_one_place():
    names = [archive.file_name for source in data.SOURCES.values() for archive in source.archives]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "shape", "num_train", "num_test", "num_classes"),
    [
        ("digits", (8, 8, 1), 1437, 360, 10),
        ("cifar10", (32, 32, 3), 50_000, 10_000, 10),
        ("cifar10_jpeg75", (32, 32, 3), 50_000, 10_000, 10),
        ("cifar100", (32, 32, 3), 50_000, 10_000, 100),
        ("mnist", (28, 28, 1), 60_000, 10_000, 10),
        ("fashion_mnist", (28, 28, 1), 60_000, 10_000, 10),
        # 9,000 images per class in each of three splits, 2,000 of them CIFAR-10's; two splits are for training.
        ("cinic10", (32, 32, 3), 2 * 10 * 7_000, 10 * 7_000, 10),
    ],
)
def test_counts(name, shape, num_train, num_test, num_classes):
    source = data.SOURCES[name]
    assert (source.image_shape, source.num_train, source.num_test) == (shape, num_train, num_test)
    assert len(set(source.class_names)) == num_classes
    assert source.description
    assert source.licence


def test_an_archive_of_another_set_of_the_layout_is_refused(tmp_path, monkeypatch):
    """Fashion-MNIST's files under MNIST's names."""
    files, arrays, _ = fake("fashion_mnist", tmp_path / "server")
    archives = [
        fake_archives.pinned(archive, path) for archive, path in zip(data.SOURCES["mnist"].archives, files, strict=True)
    ]
    monkeypatch.setitem(data.SOURCES, "tiny", fake_archives.registered("mnist", arrays, archives))
    manual = tmp_path / "data/downloads/manual/mnist"
    other = fake_archives.make_arrays(seed=1, shape=(28, 28, 1))
    fake_archives.write_idx(manual, other)
    with pytest.raises(ValueError, match=rf"{manual}/train-images-idx3-ubyte.gz has .*: it is another archive"):
        data.load("tiny", tmp_path / "data")
