"""The table of canaries: training images whose membership is to be guessed.

`families` builds canaries, `optimization` changes their pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """The table of canaries; scores are joined to it by id, never by position.

    Attributes:
      id: int32 [m], 0..m-1.
      source_index: int32 [m], index of the source image in the training set; no source serves twice.
      label: int32 [m], the label that the canary is trained with.
      images: float32 [m, height, width, channels] in [0, 1].
      source_images: as images, before any change.
      source_labels: int32 [m], the label of the source image.
    """

    id: np.ndarray
    source_index: np.ndarray
    label: np.ndarray
    images: np.ndarray
    source_images: np.ndarray
    source_labels: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        """The columns by name, for `store.write_npz`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Canaries:
        """The inverse of `arrays`."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})
