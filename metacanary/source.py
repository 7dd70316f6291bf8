"""What a data set is known by: an entry of `registry.SOURCES`, and the checks against it."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archive:
    """A file that a data set is read from.

    Attributes:
      file_name: Its path in `<data_dir>/downloads/manual`, with a folder of its own where names clash.
      url: Where it can be downloaded; empty if it is only ever put there by hand.
      sha256: Its checksum; empty if what is read from it is pinned instead.
      md5: A checksum that catches accidents, not a forger; used where no SHA-256 is published.
      size_bytes: Its size; 0 if not known.
    """

    file_name: str
    url: str = ""
    sha256: str = ""
    md5: str = ""
    size_bytes: int = 0

    @property
    def checksums(self) -> dict[str, str]:
        """The pinned checksums in hexadecimal, by the name that hashlib knows their algorithm by."""
        pins = {"sha256": self.sha256, "md5": self.md5}
        return {algorithm: pin for algorithm, pin in pins.items() if pin}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set comes from and how it is known to be the right one.

    Attributes:
      name: The name to load it by.
      description: One line.
      licence: The terms it is given under.
      url: Its home page.
      class_names: The names of the classes.
      image_shape: Height, width, channels.
      num_train: Number of training images.
      num_test: Number of test images.
      digests: SHA-256 of the raw uint8 bytes of arrays, by name; "train_images[:1000]" is of the first 1,000.
      fetch: Called with the source and `data_dir`, returns the four arrays in the order of the source.
      archives: What it is read from, if it is no part of a package.
      copy_of: The data set whose images these are, altered but in the same order; empty if there is none.
    """

    name: str
    description: str
    licence: str
    url: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    num_train: int
    num_test: int
    digests: Mapping[str, str]
    fetch: Callable[["Source", Path], Arrays]
    archives: tuple[Archive, ...] = ()
    copy_of: str = ""

    def verify(self, arrays: Mapping[str, np.ndarray], where: str, known: Mapping[str, str] | None = None) -> None:
        """Checks that arrays are this data set.

        Args:
          arrays: The four of `ARRAYS`.
          where: What holds them, for messages.
          known: Digests of whole arrays, where they need not be computed.

        Raises:
          ValueError: For the first shape or digest that differs, with what was found and what was expected.
        """
        for split, count in (("train", self.num_train), ("test", self.num_test)):
            shape = arrays[f"{split}_images"].shape
            if shape != (count, *self.image_shape):
                raise ValueError(
                    f"name={self.name!r}: {where} holds {split} images of shape {shape}, "
                    f"expected {(count, *self.image_shape)}"
                )
        for pinned, expected in self.digests.items():
            array, _, stop = pinned.rstrip("]").partition("[:")
            found = (known or {}).get(pinned) or sha256(arrays[array][: int(stop) if stop else None])
            if found != expected:
                raise ValueError(
                    f"name={self.name!r}: {pinned} of {where} has sha256 {found}, expected {expected}: "
                    "it is another data set or a damaged one"
                )


def sha256(array: np.ndarray) -> str:
    """Digests the raw bytes of an array of images or labels as uint8, in C order."""
    return hashlib.sha256(np.ascontiguousarray(array, np.uint8).data).hexdigest()
