"""Makes the canaries of a family from the settings of a job."""

from typing import Any

import _build

from metacanary import canaries, data, families


def canaries_of(family: str, settings: dict[str, Any], dataset: data.Dataset) -> canaries.Canaries:
    """The canaries of a family that needs no optimisation; all families share their source images."""
    return families.make(
        family,
        _build.resized(settings, dataset.train_images),
        dataset.train_labels,
        num_canaries=settings["num_canaries"],
        num_classes=len(dataset.class_names),
        seed=settings["seed"],
    )
