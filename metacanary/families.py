"""Families of canaries that need no optimisation: which images they are and which labels they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from metacanary.canaries import Canaries


def _random(canaries: Canaries, rng: np.random.Generator, num_classes: int) -> Canaries:
    """Training images as they are."""
    return canaries


def _mislabeled(canaries: Canaries, rng: np.random.Generator, num_classes: int) -> Canaries:
    """Training images, each with a wrong label drawn uniformly from the other classes."""
    shift = rng.integers(1, num_classes, size=len(canaries.label))
    return replace(canaries, label=((canaries.label + shift) % num_classes).astype(np.int32))


FAMILIES: dict[str, Callable[[Canaries, np.random.Generator, int], Canaries]] = {
    "random": _random,
    "mislabeled": _mislabeled,
}
"""Families without optimisation; a new one is one function and one entry (docs/extending.md)."""


def make(
    family: str, images: np.ndarray, labels: np.ndarray, *, num_canaries: int, num_classes: int, seed: int
) -> Canaries:
    """Choose source images and make the canaries of a family from them.

    Args:
      family: a key of `FAMILIES`.
      images: uint8 [n, height, width, channels], the training set.
      labels: int [n].
      num_canaries: m.
      num_classes: number of labels.
      seed: of the choice; families of one seed share their source images.

    Returns:
      Canaries with ids 0..m-1.

    Raises:
      ValueError: unknown family, or more canaries than training images.
    """
    if family not in FAMILIES:
        raise ValueError(f"canary family: got {family!r}, expected one of {', '.join(sorted(FAMILIES))}")
    if not 1 <= num_canaries <= len(images):
        raise ValueError(f"num_canaries: got {num_canaries}, expected 1 to {len(images)}, the training images")
    rng = np.random.default_rng(seed)
    index = rng.choice(len(images), size=num_canaries, replace=False).astype(np.int32)
    pixels = images[index].astype(np.float32) / np.float32(255)
    label = np.asarray(labels)[index].astype(np.int32)
    table = Canaries(
        id=np.arange(num_canaries, dtype=np.int32),
        source_index=index,
        label=label,
        images=pixels,
        source_images=pixels,
        source_labels=label,
    )
    return FAMILIES[family](table, rng, num_classes)
