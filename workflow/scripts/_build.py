"""Builds the package's objects from the settings of a job."""

from typing import Any

import flax.linen as nn

from metacanary import canaries, data, images, models, recipes, training

Settings = dict[str, Any]


def model(spec: Settings, num_classes: int) -> nn.Module:
    """A model from its name and options."""
    return models.build(spec["name"], num_classes=num_classes, **spec["options"])


def recipe_options(options: Settings) -> Settings:
    """Options of a training recipe, their schedule built."""
    return {**options, "schedule": recipes.Schedule(**options["schedule"])}


def pool(settings: Settings, dataset: data.Dataset, chosen: canaries.Canaries) -> training.Pool:
    """The training images that are no canary's source."""
    pixels = images.enlarge(dataset.train_images, settings["image_size"])
    return training.Pool.make(pixels, dataset.train_labels, chosen.source_index, chosen.label)
