"""Builds the package's objects from the settings of a job."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from metacanary import canaries, data, images, models, recipes, runs

Settings = dict[str, Any]


def dataset(settings: Settings, provenance: str) -> data.Dataset:
    """The data set, or the subset of it, that a job is about; `provenance` is its provenance.json in data_dir."""
    chosen = {"num_train": settings.get("num_train"), "without": settings.get("without")}
    return data.load(settings["dataset"], Path(provenance).parent.parent, **chosen)


def model(spec: Settings, num_classes: int) -> nn.Module:
    """A model from its name and options."""
    return models.build(spec["name"], num_classes=num_classes, **spec["options"])


def recipe(algorithm: str, options: Settings) -> recipes.SGD | recipes.DPSGD:
    """The recipe of an algorithm, sgd or dpsgd, from its options."""
    parts: dict[str, Any] = {
        "augmentation": recipes.Augmentation,
        "clipping": recipes.Clipping,
        "ema": recipes.EMA,
        "optimizer": recipes.Optimizer,
        "schedule": recipes.Schedule,
        "target": recipes.Target,
    }
    built = {name: parts[name](**value) if name in parts else value for name, value in options.items()}
    return {"sgd": recipes.SGD, "dpsgd": recipes.DPSGD}[algorithm](**built)


def resized(settings: Settings, pixels: np.ndarray) -> np.ndarray:
    """Images of a data set in the size and with the channels that a job is about."""
    return images.recolour(images.resize(pixels, settings["image_size"]), settings.get("channels"))


def pool(settings: Settings, dataset: data.Dataset, chosen: canaries.Canaries) -> runs.Pool:
    """The training images that are no canary's source."""
    pixels = resized(settings, dataset.train_images)
    return runs.Pool.make(pixels, dataset.train_labels, chosen.source_index, chosen.label)
