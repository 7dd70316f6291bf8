"""Builds the package's objects from the settings of a job."""

from typing import Any

import flax.linen as nn
import numpy as np

from metacanary import canaries, data, models, recipes, training

Settings = dict[str, Any]


def model(spec: Settings, num_classes: int) -> nn.Module:
    """A model from its name and options."""
    return models.build(spec["name"], num_classes=num_classes, **spec["options"])


def recipe_options(options: Settings) -> Settings:
    """Options of a training recipe, their schedule built."""
    return {**options, "schedule": recipes.Schedule(**options["schedule"])}


def images(dataset: data.Dataset, split: str, image_size: int | None) -> np.ndarray:
    """Images of a split as bytes [n, h, w, c], enlarged if so wished."""
    if image_size is None:
        return getattr(dataset, f"{split}_images")
    return np.rint(dataset.floats(split, image_size) * 255).astype(np.uint8)


def family(name: str, settings: Settings, dataset: data.Dataset) -> canaries.Canaries:
    """The canaries of a family that needs no optimisation; all families share their source images."""
    return canaries.make(
        name,
        images(dataset, "train", settings["image_size"]),
        dataset.train_labels,
        num_canaries=settings["num_canaries"],
        num_classes=len(dataset.class_names),
        seed=settings["seed"],
    )


def pool(settings: Settings, dataset: data.Dataset, chosen: canaries.Canaries) -> training.Pool:
    """The training images that are no canary's source."""
    pixels = images(dataset, "train", settings["image_size"])
    return training.Pool.make(pixels, dataset.train_labels, chosen.source_index, chosen.label)
