"""Models that were trained without privacy on other images, and what a training on private images starts from.

    pretrained = Pretrained(params=params, class_names=("cat", "dog"))
    params = start(model, pretrained, class_names, key=runs.stream(seed, "init"), image_shape=(32, 32, 3))

Privacy is claimed for the images of the second training alone: those of the first are taken to be public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from metacanary import clipping, layer_gradients, models

Params = Any

_PREFIX = "params/"


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A trained model.

    Attributes:
      params: Its parameters.
      class_names: What its logits stand for.
    """

    params: Params
    class_names: tuple[str, ...]

    def arrays(self) -> dict[str, np.ndarray]:
        """As arrays for `store.write_npz`: params/<path>, class_names [k]."""
        flat = flatten_dict(self.params, sep="/")
        return {"class_names": np.array(self.class_names)} | {_PREFIX + p: np.asarray(leaf) for p, leaf in flat.items()}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Pretrained:
        """Undoes `arrays`; other arrays are not read."""
        flat = {name.removeprefix(_PREFIX): leaf for name, leaf in arrays.items() if name.startswith(_PREFIX)}
        return Pretrained(params=unflatten_dict(flat, sep="/"), class_names=tuple(map(str, arrays["class_names"])))


def start(
    model: nn.Module,
    pretrained: Pretrained | None,
    class_names: Sequence[str],
    *,
    key: jax.Array,
    image_shape: Sequence[int],
) -> Params:
    """The parameters that a training starts from.

    Args:
      model: The network that is to be trained.
      pretrained: The same network, trained before, of as many or other classes; None for a start from scratch.
      class_names: The classes of the training, in the order of its labels.
      key: Draws the parameters that are drawn.
      image_shape: [height, width, channels].

    Returns:
      From scratch, `models.init` of the key. Otherwise the pretrained parameters, but for the last layer where the
      classes are not the same ones in the same order: what its logits say has no meaning there, and it is that of
      `models.init`.

    Raises:
      ValueError: If the parameters are those of another network or of images of another size.
    """
    drawn = models.init(model, key, image_shape)
    if pretrained is None:
        return drawn
    params = pretrained.params
    if tuple(class_names) != pretrained.class_names:
        last = list(layer_gradients.layers(model, tuple(image_shape)))[-1:]
        params = clipping.merge(clipping.split(drawn, last)[0], clipping.split(params, last)[1])
    _require_same_shapes(params, drawn)
    return jax.tree.map(jax.numpy.asarray, params)


def _require_same_shapes(params: Params, expected: Params) -> None:
    """Refuses parameters that are not those of the network."""
    found, wanted = ({p: np.shape(leaf) for p, leaf in flatten_dict(t, sep="/").items()} for t in (params, expected))
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            raise ValueError(
                f"pretrained: got shape {found.get(path)} at {path!r}, expected {wanted.get(path)}: model and image "
                "size of both trainings must be the same"
            )
