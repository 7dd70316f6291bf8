"""Small archives in the layouts of the data sets, written after their descriptions and not after the readers."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading

import numpy as np
from PIL import Image

from metacanary import data

PER_FILE = 4


def make_arrays(seed=0, *, shape=(32, 32, 3), num_classes=10, num_train=5 * PER_FILE, num_test=PER_FILE):
    """Draws images and labels of a tiny data set."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, count in (("train", num_train), ("test", num_test)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, num_classes, count, np.uint8)
    return arrays


def write_tar(path, files, folder=""):
    """Writes a compressed tar archive of files by name, not in their order, and of their folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        if folder:
            member = tarfile.TarInfo(folder)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name, content in sorted(files.items(), reverse=True):
            member = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def cifar_rows(images, labels, coarse=()):
    """Rows of the binary layout: label bytes, then the red, the green and the blue plane."""
    content = bytearray()
    for i, image in enumerate(images):
        content += bytes([*coarse[i : i + 1], labels[i]])
        for channel in range(3):
            content += image[:, :, channel].tobytes()
    return bytes(content)


def write_cifar10(path, arrays):
    """Writes an archive in the CIFAR-10 binary layout."""
    each = len(arrays["train_labels"]) // 5
    files = {"test_batch.bin": cifar_rows(arrays["test_images"], arrays["test_labels"])}
    for number in range(5):
        part = slice(number * each, (number + 1) * each)
        rows = cifar_rows(arrays["train_images"][part], arrays["train_labels"][part])
        files[f"data_batch_{number + 1}.bin"] = rows
    write_tar(path, files, "cifar-10-batches-bin")


def write_cifar100(path, arrays, fine_names=data.SOURCES["cifar100"].class_names):
    """Writes an archive in the CIFAR-100 binary layout, whose coarse labels differ from the fine ones.

    `fine_names`, a name in each line and an empty last line, is left out if None.
    """
    files = {}
    if fine_names is not None:
        files["fine_label_names.txt"] = "".join(f"{name}\n" for name in [*fine_names, ""]).encode()
    for split in ("train", "test"):
        labels = arrays[f"{split}_labels"]
        files[f"{split}.bin"] = cifar_rows(arrays[f"{split}_images"], labels, coarse=(labels + 1) % 20)
    write_tar(path, files, "cifar-100-binary")


def write_idx(folder, arrays):
    """Writes the four files of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("test", "t10k")):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        content = struct.pack(">iiii", 0x803, *images.shape[:3]) + images.tobytes()
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
        content = struct.pack(">ii", 0x801, len(labels)) + labels.tobytes()
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))


def png(image):
    """An image [h, w, 3] or [h, w] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def cinic_files(class_names, imagenet_per_folder=2, cifar_per_folder=1, seed=0):
    """The PNG files of a small CINIC-10 by name, and the arrays that are to be read from them."""
    rng = np.random.default_rng(seed)
    files, images, labels = {}, {"train": [], "test": []}, {"train": [], "test": []}
    for folder, split in (("train", "train"), ("valid", "train"), ("test", "test")):
        for label, class_name in enumerate(class_names):
            for number in range(imagenet_per_folder):
                image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                files[f"{folder}/{class_name}/n0{label}690373_{number}.png"] = png(image)
                images[split].append(image)
                labels[split].append(label)
            for number in range(cifar_per_folder):
                origin = "test" if folder == "test" else "train"
                files[f"{folder}/{class_name}/cifar10-{origin}-{number}.png"] = png(np.zeros((32, 32, 3), np.uint8))
    arrays = {f"{split}_images": np.stack(images[split]) for split in images}
    return files, arrays | {f"{split}_labels": np.array(labels[split], np.uint8) for split in labels}


def registered(name, arrays, archives, fetch=None, **changes):
    """The entry of the registry of a name, with other counts, digests and archives; called tiny."""
    entry = data.SOURCES[name]
    return dataclasses.replace(
        entry,
        name="tiny",
        num_train=len(arrays["train_labels"]),
        num_test=len(arrays["test_labels"]),
        digests={array: data.sha256(values) for array, values in arrays.items()},
        archives=tuple(archives),
        fetch=fetch or entry.fetch,
        **changes,
    )


def pinned(archive, path, url="", algorithm="sha256"):
    """The archive of an entry with the size and one checksum of a file, by SHA-256 or MD5."""
    content = path.read_bytes()
    pins = {"sha256": "", "md5": "", algorithm: hashlib.new(algorithm, content).hexdigest()}
    return dataclasses.replace(archive, url=url, size_bytes=len(content), **pins)


@contextlib.contextmanager
def serving(folder, behave=None):
    """Serves a folder over HTTP on the loopback interface; yields its URL, which ends in a slash.

    `behave(handler)`, if given, answers in the server's place, unless it returns False.
    """

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if behave is None or behave(self) is False:
                with contextlib.suppress(ConnectionError):  # a client that gives up
                    super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
