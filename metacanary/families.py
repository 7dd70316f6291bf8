"""Families of canaries that need no optimisation: which images they are and which labels they get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from metacanary import clipbkd
from metacanary.canaries import Canaries


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """What a family may know beside its source images.

    Attributes:
      images: uint8 [n, height, width, channels], the sources of canaries among them.
      labels: int [n].
      num_classes: number of labels.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int


Family = Callable[[Canaries, TrainingSet, np.random.Generator], Canaries]


def _random(canaries: Canaries, training: TrainingSet, rng: np.random.Generator) -> Canaries:
    """Training images as they are."""
    return canaries


def _mislabeled(canaries: Canaries, training: TrainingSet, rng: np.random.Generator) -> Canaries:
    """Training images, each with a wrong label drawn uniformly from the other classes."""
    shift = rng.integers(1, training.num_classes, size=len(canaries.label))
    return replace(canaries, label=((canaries.label + shift) % training.num_classes).astype(np.int32))


def _noise(canaries: Canaries, training: TrainingSet, rng: np.random.Generator) -> Canaries:
    """Pixels drawn uniformly from [0, 1), with the labels of the source images."""
    return replace(canaries, images=rng.random(canaries.images.shape, dtype=np.float32))


def _clipbkd(canaries: Canaries, training: TrainingSet, rng: np.random.Generator) -> Canaries:
    """Images along the directions in which training images vary least, with the least likely labels (`clipbkd`)."""
    images, labels = clipbkd.make(
        training.images, training.labels, num_canaries=len(canaries.id), num_classes=training.num_classes, rng=rng
    )
    return replace(canaries, images=images, label=labels)


FAMILIES: dict[str, Family] = {
    "random": _random,
    "mislabeled": _mislabeled,
    "noise": _noise,
    "clipbkd": _clipbkd,
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
    return FAMILIES[family](table, TrainingSet(images=images, labels=labels, num_classes=num_classes), rng)
