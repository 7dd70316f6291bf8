"""Tests of metacanary.data and metacanary.cifar."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from sklearn import datasets

from metacanary import cifar, data, store

PER_FILE = 4
COUNTS = {"train": 5 * PER_FILE, "test": PER_FILE}


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data_dir that holds the digits."""
    folder = tmp_path_factory.mktemp("data")
    data.load("digits", folder)
    return folder


def make_arrays(seed):
    """Draws images and labels of a tiny data set in CIFAR's shape."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, count in COUNTS.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 10, count, np.uint8)
    return arrays


def write_archive(path, arrays):
    """Writes an archive in the CIFAR-10 binary layout, following its description and not the reader."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, names in {
        "train": [f"data_batch_{n}" for n in (1, 2, 3, 4, 5)],
        "test": ["test_batch"],
    }.items():
        for number, name in enumerate(names):
            content = bytearray()
            for i in range(number * PER_FILE, (number + 1) * PER_FILE):
                content.append(arrays[f"{split}_labels"][i])
                for channel in range(3):
                    content += arrays[f"{split}_images"][i, :, :, channel].tobytes()
            files[f"{name}.bin"] = bytes(content)
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo("cifar-10-batches-bin")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        # Not in their order: the names count.
        for name, content in sorted(files.items(), reverse=True):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tiny_source(arrays, **archive):
    """Describes the data set of `make_arrays` as a source."""
    return dataclasses.replace(
        data.SOURCES["cifar10"],
        name="tiny",
        num_train=COUNTS["train"],
        num_test=COUNTS["test"],
        digests={name: data.sha256(array) for name, array in arrays.items()},
        fetch=functools.partial(data._fetch_cifar, file_name="tiny.tar.gz", **archive),
    )


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A registered data set `tiny` whose archive is put there by hand: (arrays, path of the archive)."""
    arrays = make_arrays(seed=0)
    path = tmp_path / "downloads" / "manual" / "tiny.tar.gz"
    write_archive(path, arrays)
    monkeypatch.setitem(data.SOURCES, "tiny", tiny_source(arrays))
    return arrays, path


@pytest.fixture
def server(tmp_path_factory):
    """A web server with the archive of `make_arrays(0)`: (url, path of the archive)."""
    folder = tmp_path_factory.mktemp("server")
    write_archive(folder / "tiny.tar.gz", make_arrays(seed=0))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}/tiny.tar.gz", folder / "tiny.tar.gz"
        served.shutdown()


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
    arrays = data._fetch_digits(source, data_dir)
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


@pytest.mark.parametrize("name", data.ARRAYS)
def test_verify_refuses_another_value(digits_dir, name):
    arrays = {array: np.array(getattr(data.load("digits", digits_dir), array)) for array in data.ARRAYS}
    data.SOURCES["digits"].verify(arrays, "here")
    arrays[name].flat[-1] += 1
    with pytest.raises(ValueError, match=f"name='digits': {name} of here has sha256"):
        data.SOURCES["digits"].verify(arrays, "here")


def test_verify_counts_and_prefix():
    arrays = make_arrays(seed=0)
    source = tiny_source(arrays)
    prefix = {"train_images[:7]": data.sha256(arrays["train_images"][:7])}
    source = dataclasses.replace(source, digests=prefix)
    source.verify(arrays, "here")
    with pytest.raises(ValueError, match=r"test images of shape \(3, 32, 32, 3\), expected \(4, 32, 32, 3\)"):
        source.verify(arrays | {"test_images": arrays["test_images"][:3]}, "here")
    arrays["train_images"][6] += 1
    with pytest.raises(ValueError, match=r"train_images\[:7\]"):
        source.verify(arrays, "here")


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
import dataclasses, functools, json, sys
from metacanary import data
fetch = functools.partial(data._fetch_cifar, file_name="tiny.tar.gz")
size = {"num_train": 20, "num_test": 4, "digests": {}}
data.SOURCES["tiny"] = dataclasses.replace(data.SOURCES["cifar10"], name="tiny", fetch=fetch, **size)
from metacanary import cifar
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
    with pytest.raises(ValueError, match="name='tiny': train_images of what was fetched has sha256"):
        data.load("tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_load_missing_archive_says_where_to_put_it(tmp_path, tiny):
    tiny[1].unlink()
    with pytest.raises(FileNotFoundError, match=rf"put the archive at '{tiny[1]}'; it cannot be downloaded"):
        data.load("tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()


def other_labels(path):
    arrays = make_arrays(seed=0)
    arrays["test_labels"] = (arrays["test_labels"] + 1) % 10
    write_archive(path, arrays)


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
    write_archive(path, arrays)
    assert_holds(data.load("tiny", tmp_path), arrays)


def test_load_refuses_another_archive_as_cifar10(tmp_path):
    write_archive(tmp_path / "downloads" / "manual" / "cifar-10-binary.tar.gz", make_arrays(seed=0))
    with pytest.raises(ValueError, match="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "cifar10").exists()


def test_cifar10_pin_is_that_of_tensorflow_datasets():
    pinned = data.SOURCES["cifar10"].fetch.keywords
    stock = cifar.checksums.get_all_url_infos()[pinned["url"]]
    assert (stock.size, stock.checksum) == (pinned["size_bytes"], pinned["sha256"])
    assert stock.filename == pinned["file_name"]


def test_load_downloads(tmp_path, server, monkeypatch):
    url, path = server
    arrays, content = make_arrays(seed=0), path.read_bytes()
    archive = {"url": url, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    monkeypatch.setitem(data.SOURCES, "tiny", tiny_source(arrays, **archive))
    assert_holds(data.load("tiny", tmp_path), arrays)
    # The download is kept: with the server gone it serves again.
    path.unlink()
    shutil.rmtree(tmp_path / "tiny")
    shutil.rmtree(tmp_path / "tensorflow_datasets")
    monkeypatch.setattr(cifar, "unreachable", lambda url: pytest.fail("asked although the download is there"))
    assert_holds(data.load("tiny", tmp_path), arrays)


@pytest.mark.parametrize("change", ["content", "missing"])
def test_load_refuses_failed_download(tmp_path, server, monkeypatch, change):
    url, path = server
    archive = {"url": url, "sha256": hashlib.sha256(b"").hexdigest(), "size_bytes": 1}
    monkeypatch.setitem(data.SOURCES, "tiny", tiny_source(make_arrays(seed=0), **archive))
    if change == "missing":
        path.unlink()
    expected = ValueError if change == "content" else FileNotFoundError
    with pytest.raises(expected, match=r"put the archive at '.*/downloads/manual/tiny\.tar\.gz'; fetch it from"):
        data.load("tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()


def test_load_offline_says_what_to_fetch(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/tiny.tar.gz"
    archive = {"url": url, "sha256": "ab" * 32, "size_bytes": 1_234}
    monkeypatch.setitem(data.SOURCES, "tiny", tiny_source(make_arrays(seed=0), **archive))
    start = time.perf_counter()
    with pytest.raises(FileNotFoundError) as error:
        data.load("tiny", tmp_path)
    assert time.perf_counter() - start < 15
    for part in (
        url,
        "ab" * 32,
        "1,234 bytes",
        str(tmp_path / "downloads" / "manual" / "tiny.tar.gz"),
        "refused",
    ):
        assert part in str(error.value)


def test_unreachable_bounds_silence():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.perf_counter()
        failure = cifar.unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout_seconds=0.3)
        assert time.perf_counter() - start < 3
    assert "no answer within 0.3 s" in failure or "timed out" in failure


def test_unreachable_counts_any_answer(server):
    assert cifar.unreachable(server[0]) == ""
    assert cifar.unreachable(server[0] + "/nowhere") == ""


@pytest.mark.slow
def test_load_cifar10_jpeg75(tmp_path, shared):
    """The whole data set in CIFAR-10's size and order: its labels and the time and memory it takes."""
    manual = tmp_path / "downloads" / "manual"
    tool = shared / "tools" / "make_cifar10_archive.py"
    subprocess.run([sys.executable, tool, manual], check=True)
    (manual / "cifar-10-binary.tar.gz").rename(manual / "cifar10-jpeg75-binary.tar.gz")
    found = data.load("cifar10_jpeg75", tmp_path)
    assert np.all(np.bincount(found.train_labels) == 5000)
    with np.load(shared / "data" / "cifar10-lossless-subset.npz", allow_pickle=False) as lossless:
        np.testing.assert_array_equal(found.train_labels, lossless["labels_train_full"])
        np.testing.assert_array_equal(found.test_labels, lossless["labels_test_full"])
    start = time.perf_counter()
    data.load("cifar10_jpeg75", tmp_path)
    assert time.perf_counter() - start < 0.2
