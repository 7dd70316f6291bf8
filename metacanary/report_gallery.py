"""The report page's gallery: which canaries it shows, and their pictures as PNG data addresses."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from metacanary.canaries import Canaries

MOST, LEAST = 18, 6
MAX_BYTES = 1_200_000  # of all pictures, before compression


@dataclass(frozen=True, kw_only=True)
class Card:
    """A canary of the gallery.

    Attributes:
      canary_id: Its number.
      after: Its picture, as a data address.
      before: That of its source image; empty if it is the same.
      label, source_label: Class names: what it is trained as, and what its source image is.
      source_index: Place of the source image in the training set.
      leak: Mean score when in minus that when out, missing if it was always the one; mean_in and mean_out are these.
      num_in, num_out: Runs with and without it.
      bar: The leak in percent of the gallery's largest, not below 0.
    """

    canary_id: int
    after: str
    before: str
    label: str
    source_label: str
    source_index: int
    leak: float
    mean_in: float
    mean_out: float
    num_in: int
    num_out: int
    bar: float


def limits(shape: Sequence[int], num_kinds: int) -> tuple[int, int]:
    """Says how many canaries of a kind are shown: those that leak most, and those that leak least.

    Args:
      shape: Of a picture.
      num_kinds: Kinds of canary on the page.

    Returns:
      MOST and LEAST, or as many fewer, in proportion, as MAX_BYTES asks for; at least 3 and 1.
    """
    fitting = MAX_BYTES / (2 * int(np.prod(shape)) * num_kinds)  # a picture before, and one after
    share = min(1.0, fitting / (MOST + LEAST))
    return max(3, int(MOST * share)), max(1, int(LEAST * share))


def chosen(leaks: pd.DataFrame, most: int, least: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Takes the canaries of a cell that leak most, and those that leak least.

    Args:
      leaks: Of `report_data.leaks`, one cell, the largest first.
      most, least: How many.

    Returns:
      Both in the order of `leaks`; if there are no more than these two numbers, all are in the first.
    """
    if len(leaks) <= most + least:
        return leaks, leaks.iloc[:0]
    return leaks.iloc[:most], leaks.iloc[-least:]


def cards(leaks: pd.DataFrame, canaries: Canaries, class_names: Sequence[str], largest: float) -> list[Card]:
    """Makes the cards of canaries.

    Args:
      leaks: Rows of `report_data.leaks`, of one cell.
      canaries: Of its kind.
      class_names: Names of the labels.
      largest: The leak whose bar is full.
    """
    place = {int(number): row for row, number in enumerate(canaries.id)}
    found = []
    for row in leaks.to_dict("records"):
        at = place[int(row["canary_id"])]
        image, source = canaries.images[at], canaries.source_images[at]
        found.append(
            Card(
                canary_id=int(row["canary_id"]),
                after=png(image),
                before="" if np.array_equal(image, source) else png(source),
                label=class_names[canaries.label[at]],
                source_label=class_names[canaries.source_labels[at]],
                source_index=int(canaries.source_index[at]),
                leak=float(row["leak"]),
                mean_in=float(row["mean_in"]),
                mean_out=float(row["mean_out"]),
                num_in=int(row["num_in"]),
                num_out=int(row["num_out"]),
                bar=100 * max(0.0, float(row["leak"])) / largest if largest > 0 and np.isfinite(row["leak"]) else 0.0,
            )
        )
    return found


def png(image: np.ndarray) -> str:
    """Writes a picture as a data address.

    Args:
      image: Pixels [h, w, 1 or 3] in [0, 1], rounded to 256 steps.

    Raises:
      ValueError: For another number of channels.
    """
    if image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f"image has shape {image.shape}, expected [h,w,1] or [h,w,3]")
    levels = np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
