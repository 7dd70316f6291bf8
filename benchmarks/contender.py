"""What the driver asks of a contender."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to compute the metagradient of a problem, ready to run.

    Attributes:
      plain: trains once and differentiates nothing; returns when the final parameters are there.
      metagradient: the gradient by the pixels, [m, height, width, channels].
      warm_up: compiles all that `metagradient` needs, and runs as little of it as can be.
      states_held: training states that are held at a time at most; None where the library does not say.
    """

    plain: Callable[[], None]
    metagradient: Callable[[], np.ndarray]
    warm_up: Callable[[], object]
    states_held: int | None
