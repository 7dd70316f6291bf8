"""Builds the package's objects from the settings of a job."""

from pathlib import Path
from typing import Any

import flax.linen as nn

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


def pool(settings: Settings, dataset: data.Dataset, chosen: canaries.Canaries) -> runs.Pool:
    """The training images that are no canary's source."""
    pixels = images.resize(dataset.train_images, settings["image_size"])
    return runs.Pool.make(pixels, dataset.train_labels, chosen.source_index, chosen.label)
