"""Tests of metacanary.data."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time

import fake_archives
import numpy as np
import pytest
from fake_archives import make_arrays, write_cifar10
from sklearn import datasets

from metacanary import data, registry, store
from metacanary.source import Archive


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data_dir that holds the digits."""
    folder = tmp_path_factory.mktemp("data")
    data.load("digits", folder)
    return folder


def tiny_source(arrays):
    """Describes arrays in CIFAR's shape as a source whose archive is put there by hand."""
    return fake_archives.registered("cifar10", arrays, [Archive(file_name="tiny.tar.gz")])


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A registered data set `tiny` whose archive is put there by hand: (arrays, path of the archive)."""
    arrays = make_arrays(seed=0)
    path = tmp_path / "downloads" / "manual" / "tiny.tar.gz"
    write_cifar10(path, arrays)
    monkeypatch.setitem(data.SOURCES, "tiny", tiny_source(arrays))
    return arrays, path


def assert_holds(dataset, arrays):
    for name in data.ARRAYS:
        np.testing.assert_array_equal(getattr(dataset, name), arrays[name])


def test_load_unknown_name_lists_known(tmp_path):
    with pytest.raises(ValueError, match=r"name='mnits', expected one of digits, cifar10, cifar10_jpeg75"):
        data.load("mnits", tmp_path)
    assert not list(tmp_path.iterdir())


def test_load_digits_matches_scikit_learn(digits_dir):
    digits = data.load("digits", digits_dir)
    assert digits.train_images.shape == (1437, 8, 8, 1)
    assert digits.test_images.shape == (360, 8, 8, 1)
    assert digits.train_images.dtype == np.uint8
    assert digits.train_labels.dtype == np.int32
    original = datasets.load_digits()
    expected = {
        (image.astype(int).tobytes(), label) for image, label in zip(original.images, original.target, strict=True)
    }
    images = np.concatenate([digits.train_images, digits.test_images])[..., 0]
    labels = np.concatenate([digits.train_labels, digits.test_labels])
    # 0..16 to 0..255 is undone without loss.
    found = {
        (np.rint(image / 255 * 16).astype(int).tobytes(), label) for image, label in zip(images, labels, strict=True)
    }
    assert found == expected
    assert images.max() == 255


def test_load_digits_split_is_stratified(digits_dir):
    digits = data.load("digits", digits_dir)
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    assert np.all(np.abs(test - (train + test) / 5) < 1)


def test_load_second_time_is_fast_and_maps(digits_dir):
    start = time.perf_counter()
    digits = data.load("digits", digits_dir)
    assert time.perf_counter() - start < 0.2
    assert isinstance(digits.train_images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        digits.train_images[0] = 0


def test_load_writes_provenance(digits_dir):
    provenance = store.read_json(digits_dir / "digits" / "provenance.json")
    assert provenance == data.load("digits", digits_dir).provenance
    assert provenance["num_train"] == 1437
    assert provenance["versions"].keys() >= {"metacanary", "numpy", "scikit-learn", "tensorflow-datasets"}
    for name in data.ARRAYS:
        array = np.load(digits_dir / "digits" / f"{name}.npy", allow_pickle=False)
        expected = hashlib.sha256(array.astype(np.uint8).tobytes()).hexdigest()
        assert provenance["arrays"][name] == {"shape": list(array.shape), "sha256": expected}


def test_load_bytes_are_the_same_each_time(digits_dir, tmp_path):
    data.load("digits", tmp_path)
    for file in (digits_dir / "digits").iterdir():
        assert file.read_bytes() == (tmp_path / "digits" / file.name).read_bytes()


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def drop_last(path):
    np.save(path, np.load(path)[:-1])


def swap_two(path):
    array = np.load(path)
    array[:2] = array[1::-1]
    np.save(path, array)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *[(name, damage) for name in data.ARRAYS for damage in (cut, empty, drop_last, os.remove)],
        *[(name, swap_two) for name in data.ARRAYS],
    ],
)
def test_load_refuses_damaged_files(digits_dir, tmp_path, name, damage):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    damage(tmp_path / "digits" / f"{name}.npy")
    with pytest.raises(ValueError, match=rf"{name}\.npy.*delete '{tmp_path}/digits'"):
        data.load("digits", tmp_path)


def fetch_darker(source, data_dir):
    """The digits as an edited fetch function would give them."""
    arrays = registry._fetch_digits(source, data_dir)
    return arrays | {"train_images": arrays["train_images"] // 2}


@pytest.mark.parametrize("name", ["train_images", "test_images[:100]"])
def test_load_refuses_what_was_prepared_from_another_source(tmp_path, monkeypatch, name):
    """A fetch function was edited and its pin with it: the folder of before is not the data set of now."""
    array, _, stop = name.rstrip("]").partition("[:")
    before = data.SOURCES["digits"]
    arrays = before.fetch(before, tmp_path)
    pin = {name: data.sha256(arrays[array][: int(stop) if stop else None])}
    monkeypatch.setitem(data.SOURCES, "digits", dataclasses.replace(before, digests=pin))
    data.load("digits", tmp_path)
    monkeypatch.setitem(data.SOURCES, "digits", dataclasses.replace(before, digests={name: "0" * 64}))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} of .* expected 0000.*delete '{tmp_path}/digits'"):
        data.load("digits", tmp_path)


def test_load_notices_an_edited_fetch_function(digits_dir, tmp_path, monkeypatch):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    before = data.SOURCES["digits"]
    changed = fetch_darker(before, tmp_path)
    digests = {name: data.sha256(array) for name, array in changed.items()}
    edited = dataclasses.replace(before, fetch=fetch_darker, digests=digests)
    monkeypatch.setitem(data.SOURCES, "digits", edited)
    with pytest.raises(ValueError, match=f"train_images of .*delete '{tmp_path}/digits'"):
        data.load("digits", tmp_path)
    shutil.rmtree(tmp_path / "digits")
    assert_holds(data.load("digits", tmp_path), changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_test": 361}, r"test images of shape \(360, 8, 8, 1\), expected \(361, 8, 8, 1\)"),
        ({"image_shape": (8, 8, 3)}, r"train images of shape"),
        ({"class_names": tuple("abcdefghij")}, "other class_names"),
    ],
)
def test_load_refuses_what_was_prepared_with_other_counts(digits_dir, monkeypatch, change, message):
    monkeypatch.setitem(data.SOURCES, "digits", dataclasses.replace(data.SOURCES["digits"], **change))
    with pytest.raises(ValueError, match=f"{message}.*delete"):
        data.load("digits", digits_dir)


def test_load_prepares_again_what_was_not_finished(digits_dir, tmp_path):
    shutil.copytree(digits_dir / "digits", tmp_path / "digits")
    (tmp_path / "digits" / "provenance.json").unlink()
    cut(tmp_path / "digits" / "train_images.npy")
    assert_holds(data.load("digits", tmp_path), vars(data.load("digits", digits_dir)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"train_images": np.zeros((2, 8, 8), np.uint8)}, "train_images"),
        ({"test_images": np.zeros((2, 8, 8, 1))}, "test_images has float64"),
        ({"train_labels": np.zeros(3, int)}, "train_labels"),
        ({"test_labels": np.zeros(2)}, "test_labels has float64"),
        ({"test_labels": np.array([0, 2])}, r"test_labels reach 2, expected 0\.\.1"),
    ],
)
def test_dataset_checks_arrays(change, match):
    images, labels = np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1])
    arrays = dict(zip(data.ARRAYS, (images, labels, images, labels), strict=True))
    data.Dataset(name="x", class_names=("a", "b"), **arrays)
    with pytest.raises(ValueError, match=match):
        data.Dataset(name="x", class_names=("a", "b"), **(arrays | change))


def test_load_archive_put_there_by_hand(tmp_path, tiny):
    arrays, _ = tiny
    assert_holds(data.load("tiny", tmp_path), arrays)
    shutil.rmtree(tmp_path / "downloads")
    shutil.rmtree(tmp_path / "tiny")
    assert_holds(data.load("tiny", tmp_path), arrays)  # from the directory that tensorflow-datasets prepared


# Another process that loads `tiny` when it is told to, and prints which heavy packages it imported.
LOAD_TINY = """
import dataclasses, json, sys
from metacanary import data
from metacanary.source import Archive
changed = {"num_train": 20, "num_test": 4, "digests": {}, "archives": (Archive(file_name="tiny.tar.gz"),)}
data.SOURCES["tiny"] = dataclasses.replace(data.SOURCES["cifar10"], name="tiny", **changed)
from metacanary import tfds_builder
print("ready", flush=True)
input()
data.load("tiny", sys.argv[1])
print(json.dumps([name for name in ("tensorflow", "jax", "torch") if name in sys.modules]))
"""


def start_loading(root, folder):
    command = [sys.executable, "-c", LOAD_TINY, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONPATH": str(root)})


def test_load_imports_no_tensorflow(root, tmp_path, tiny):
    """And no jax: a data set is prepared on a login node."""
    with start_loading(root, tmp_path) as process:
        output, _ = process.communicate("go\n", timeout=60)
    assert json.loads(output.splitlines()[-1]) == []
    assert_holds(data.load("tiny", tmp_path), tiny[0])


def test_load_twice_at_once(root, tmp_path, tiny):
    with start_loading(root, tmp_path) as first, start_loading(root, tmp_path) as second:
        for process in (first, second):
            assert process.stdout.readline() == "ready\n"
        for process in (first, second):
            process.stdin.write("go\n")
            process.stdin.flush()
        assert first.wait(timeout=60) == second.wait(timeout=60) == 0
    assert_holds(data.load("tiny", tmp_path), tiny[0])


def test_load_refuses_wrong_prepared_directory(tmp_path, tiny, monkeypatch):
    """One that was copied from elsewhere, or prepared under another name."""
    data.load("tiny", tmp_path)
    shutil.rmtree(tmp_path / "tiny")
    monkeypatch.setitem(data.SOURCES, "tiny", tiny_source(make_arrays(seed=1)))
    prepared = f"{tmp_path}/tensorflow_datasets/tiny/"
    with pytest.raises(
        ValueError, match=rf"name='tiny': train_images of {prepared}.* has sha256 .*; delete '{prepared}"
    ):
        data.load("tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_load_missing_archive_says_where_to_put_it(tmp_path, tiny):
    tiny[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"it cannot be downloaded\. Put\n  the archive\n    at '{tiny[1]}'"):
        data.load("tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()


def other_labels(path):
    arrays = make_arrays(seed=0)
    arrays["test_labels"] = (arrays["test_labels"] + 1) % 10
    write_cifar10(path, arrays)


def not_gzip(path):
    path.write_bytes(b"<html>404</html>")


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def without_files(path):
    with tarfile.open(path, "w:gz"):
        pass


@pytest.mark.parametrize("damage", [cut, empty, not_gzip, flip_byte, other_labels, without_files])
def test_load_refuses_wrong_archive(tmp_path, tiny, damage):
    arrays, path = tiny
    damage(path)
    with pytest.raises(ValueError, match="tiny"):
        data.load("tiny", tmp_path)
    # And once the right archive is there, nothing of the wrong one is left.
    write_cifar10(path, arrays)
    assert_holds(data.load("tiny", tmp_path), arrays)


def test_load_refuses_another_archive_as_cifar10(tmp_path):
    write_cifar10(tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz", make_arrays(seed=0))
    with pytest.raises(ValueError, match="expected 170,052,171: it is another archive"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_load_accepts_a_copied_folder(tmp_path, tiny):
    """Prepared on a machine with internet; here are neither archive nor network."""
    data.load("tiny", tmp_path)
    shutil.copytree(tmp_path / "tiny", tmp_path / "cluster" / "tiny")
    assert_holds(data.load("tiny", tmp_path / "cluster"), tiny[0])
    assert [path.name for path in (tmp_path / "cluster").iterdir()] == ["tiny"]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_load_refuses_a_folder_from_an_archive_of_another_checksum(tmp_path, tiny, monkeypatch, algorithm):
    """Where only the archive is pinned, as for CIFAR-100 and CINIC-10."""
    arrays, path = tiny
    pinned = dataclasses.replace(tiny_source(arrays), digests={})
    archive = fake_archives.pinned(pinned.archives[0], path)
    monkeypatch.setitem(data.SOURCES, "tiny", dataclasses.replace(pinned, archives=(archive,)))
    assert_holds(data.load("tiny", tmp_path), arrays)
    other = dataclasses.replace(archive, **{algorithm: "0" * len(hashlib.new(algorithm).hexdigest())})
    monkeypatch.setitem(data.SOURCES, "tiny", dataclasses.replace(pinned, archives=(other,)))
    with pytest.raises(ValueError, match=rf"archives of other checksums than are pinned now.*delete '{tmp_path}/tiny'"):
        data.load("tiny", tmp_path)


def test_load_takes_no_notice_of_older_extractions(tmp_path, tiny):
    """Where tensorflow-datasets unpacks archives lies another data set, unpacked from a file of the same name."""
    arrays, path = tiny
    other = make_arrays(seed=1)
    for folder in ("extracted/tiny.tar.gz", "extracted/cifar-10-batches-bin", "manual/cifar-10-batches-bin"):
        (tmp_path / "downloads" / folder).mkdir(parents=True)
        rows = fake_archives.cifar_rows(other["test_images"], other["test_labels"])
        (tmp_path / "downloads" / folder / "test_batch.bin").write_bytes(rows)
    assert_holds(data.load("tiny", tmp_path), arrays)
    assert path.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk whose size a function sets, in KiB."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def resize(size):
        command = ["mount", "-t", "tmpfs", "-o", f"{'remount,' if mounted else ''}size={size}k", "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a small disk")
        mounted.append(folder)
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("size", "stage"),
    [(200, "the download"), (900, "the records of train"), (1600, "the records of test"), (2200, "the npy files")],
)
def test_load_says_that_the_disk_is_full(tmp_path, monkeypatch, small_disk, size, stage):
    """In each stage of a data set of 677 kB; array_record and NumPy say it in words of their own."""
    arrays = make_arrays(num_train=200, num_test=20)
    served, folder = tmp_path / "server", small_disk(size)
    write_cifar10(served / "tiny.tar.gz", arrays)
    with fake_archives.serving(served) as url:
        archive = fake_archives.pinned(Archive(file_name="tiny.tar.gz"), served / "tiny.tar.gz", f"{url}tiny.tar.gz")
        monkeypatch.setitem(data.SOURCES, "tiny", fake_archives.registered("cifar10", arrays, [archive]))
        with pytest.raises(OSError, match=rf"name='tiny': no room in '{folder}', which needs .* 1 MB") as error:
            data.load("tiny", folder)
        assert error.value.errno == errno.ENOSPC
        assert not [path for path in folder.rglob("*") if path.is_file() and "tmp" in path.name], stage
        small_disk(8000)
        assert_holds(data.load("tiny", folder), arrays)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("614400 requested and 573312 written"),
        RuntimeError('Failed to finalize writing of split "train": write() failed: No space left on device'),
    ],
)
def test_load_knows_a_full_disk_by_its_names(tmp_path, tiny, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=f"name='tiny': no room in '{tmp_path}'"):
        data.load("tiny", tmp_path)
    monkeypatch.undo()
    monkeypatch.setitem(data.SOURCES, "tiny", tiny_source(tiny[0]))
    assert_holds(data.load("tiny", tmp_path), tiny[0])


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), RuntimeError("something else")])
def test_load_passes_other_errors_on(tmp_path, tiny, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(np, "save", broken)
    with pytest.raises(type(error), match=str(error.args[-1])):
        data.load("tiny", tmp_path)


def test_load_subset_is_of_the_whole(digits_dir):
    whole, subset = data.load("digits", digits_dir), data.load("digits", digits_dir, 205)
    assert subset.name == "digits-train205" == data.subset_name("digits", 205)
    chosen = data.stratified(whole.train_labels, 10, 205)
    np.testing.assert_array_equal(subset.train_images, whole.train_images[chosen])
    np.testing.assert_array_equal(subset.train_labels, whole.train_labels[chosen])
    for name in ("test_images", "test_labels", "class_names"):
        np.testing.assert_array_equal(getattr(subset, name), getattr(whole, name))
    assert np.bincount(subset.train_labels).tolist() == [21] * 5 + [20] * 5
    expected = {"num_train": 205, "of": 1437, "index_sha256": hashlib.sha256(chosen.tobytes()).hexdigest()}
    assert subset.provenance["subset"] == expected
    assert whole.name == "digits" == data.subset_name("digits", None)
    assert "subset" not in whole.provenance
    assert [path.name for path in digits_dir.iterdir()] == ["digits"]


@pytest.mark.parametrize("num_train", [10, 205, 1000, 1390])
def test_load_without_a_subset_is_all_the_rest(digits_dir, num_train):
    """No training image of one is in the other, nor a test image in either: all digits differ."""

    def pixels(images):
        return {image.tobytes() for image in images}

    whole = data.load("digits", digits_dir)
    private, rest = data.load("digits", digits_dir, num_train), data.load("digits", digits_dir, without=num_train)
    parts = [pixels(part) for part in (private.train_images, rest.train_images, whole.test_images)]
    assert [len(part) for part in parts] == [num_train, 1437 - num_train, 360]
    assert len(set.union(*parts)) == 1437 + 360
    np.testing.assert_array_equal(rest.test_images, whole.test_images)
    assert rest.name == f"digits-without{num_train}" == data.subset_name("digits", None, num_train)


def test_load_chooses_among_the_rest(digits_dir):
    rest, few = (data.load("digits", digits_dir, n, without=1000) for n in (None, 105))
    chosen = data.stratified(rest.train_labels, 10, 105)
    np.testing.assert_array_equal(few.train_images, rest.train_images[chosen])
    np.testing.assert_array_equal(few.train_labels, rest.train_labels[chosen])
    assert np.bincount(few.train_labels).tolist() == [11] * 5 + [10] * 5
    assert few.name == "digits-without1000-train105"
    assert few.provenance["subset"]["num_train"] == 105
    index = np.setdiff1d(np.arange(1437), data.stratified(data.load("digits", digits_dir).train_labels, 10, 1000))
    digest = hashlib.sha256(index[chosen].astype("<i8").tobytes()).hexdigest()
    assert few.provenance["subset"]["index_sha256"] == digest


def test_load_refuses_a_rest_of_nothing_or_of_too_few(digits_dir):
    with pytest.raises(ValueError, match=r"without=1437: leaves no image of 'digits', expected less than 1437"):
        data.load("digits", digits_dir, without=1437)
    with pytest.raises(ValueError, match="num_train=400: needs 40 images of class 8, which has 39"):
        data.load("digits", digits_dir, 400, without=1000)


def test_origin_names_whose_images_a_copy_has():
    assert {name: data.origin(name) for name in data.names() if data.origin(name) != name} == {
        "cifar10_jpeg75": "cifar10"
    }


def test_copies_have_the_labels_of_their_origin_in_its_order():
    """So that a subset of one is the same subset of the other; images are chosen by labels alone."""
    for source in data.SOURCES.values():
        if source.copy_of:
            assert source.digests["train_labels"] == data.SOURCES[source.copy_of].digests["train_labels"]


def test_subset_is_the_same_for_ever(digits_dir):
    """A golden number: results name a subset by its size alone, so that another choice would be another data set."""
    provenance = data.load("digits", digits_dir, 200).provenance
    assert provenance["subset"]["index_sha256"] == "a183207fad9c09a9b3258f0959477c0a702b8af56441e9b797fdddbbde72bb20"


@pytest.mark.parametrize("num_chosen", [10, 11, 57, 100])
def test_stratified_takes_each_class_within_one_of_its_share(num_chosen):
    labels = np.random.default_rng(0).integers(0, 10, 300)
    chosen = data.stratified(labels, 10, num_chosen)
    assert len(set(chosen.tolist())) == num_chosen
    assert (np.diff(chosen) > 0).all()
    counts = np.bincount(labels[chosen], minlength=10)
    assert np.abs(counts - num_chosen / 10).max() < 1
    assert counts.tolist() == sorted(counts, reverse=True)  # the first classes have one more


def test_stratified_by_hand():
    labels = np.array([1, 0, 0, 1, 0, 0, 1, 1, 0])  # class 0 at 1 2 4 5 8, class 1 at 0 3 6 7
    # Of five items positions 0, 1, 3 and of four 0, 2.
    assert data.stratified(labels, 2, 5).tolist() == [0, 1, 2, 5, 6]
    assert data.stratified(labels, 2, 8).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert data.stratified(labels, 2, 1).tolist() == [1]
    assert data.stratified(labels, 2, 0).tolist() == []


def test_stratified_refuses_more_than_the_smallest_class_has():
    labels = np.array([0] * 50 + [1] * 3)
    assert len(data.stratified(labels, 2, 7)) == 7
    with pytest.raises(ValueError, match="num_train=8: needs 4 images of class 1, which has 3"):
        data.stratified(labels, 2, 8)


@pytest.fixture(scope="module")
def official_layout(shared, tmp_path_factory):
    """The whole archive in CIFAR-10's layout and order, made of JPEG images."""
    folder, tool = tmp_path_factory.mktemp("archive"), shared / "tools" / "make_cifar10_archive.py"
    if not tool.exists():
        pytest.skip("make_cifar10_archive.py is not there")
    subprocess.run([sys.executable, tool, folder], check=True)
    return folder / "cifar-10-binary.tar.gz"


@pytest.mark.slow
def test_load_cifar10_jpeg75(tmp_path, shared, official_layout):
    """The whole data set in CIFAR-10's size and order: its labels, and the time it takes."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    shutil.copy(official_layout, manual / "cifar10-jpeg75-binary.tar.gz")
    found = data.load("cifar10_jpeg75", tmp_path)
    assert np.all(np.bincount(found.train_labels) == 5000)
    with np.load(shared / "data" / "cifar10-lossless-subset.npz", allow_pickle=False) as lossless:
        np.testing.assert_array_equal(found.train_labels, lossless["labels_train_full"])
        np.testing.assert_array_equal(found.test_labels, lossless["labels_test_full"])
    start = time.perf_counter()
    data.load("cifar10_jpeg75", tmp_path)
    assert time.perf_counter() - start < 0.2
    assert np.bincount(data.load("cifar10_jpeg75", tmp_path, 5000).train_labels).tolist() == [500] * 10


@pytest.mark.slow
def test_load_refuses_the_jpeg_images_as_cifar10(tmp_path, official_layout, monkeypatch):
    """By the archive's checksum, and without it by the digests of the pixels, whose labels are the official ones."""
    manual = tmp_path / "downloads" / "manual"
    manual.mkdir(parents=True)
    shutil.copy(official_layout, manual / "cifar-10-binary.tar.gz")
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz has .* expected 170,052,171: it is another archive"):
        data.load("cifar10", tmp_path)
    unpinned = (Archive(file_name="cifar-10-binary.tar.gz"),)
    monkeypatch.setitem(data.SOURCES, "cifar10", dataclasses.replace(data.SOURCES["cifar10"], archives=unpinned))
    with pytest.raises(ValueError, match=r"name='cifar10': train_images\[:1000\] of .* has sha256"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()
    assert not list((tmp_path / "tensorflow_datasets").rglob("*.array_record*"))
