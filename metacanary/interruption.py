"""Long computations that are asked to end early, as by SLURM before its time limit or when it takes a node back.

They take `should_stop`, a function that they call between two steps; on True they write their checkpoint and raise
`Stopped`, so that whoever called them can end and be started again:

    train(..., checkpoint=path, should_stop=lambda: time.monotonic() > deadline)
"""

from collections.abc import Callable

ShouldStop = Callable[[], bool]
"""Called after each step that the next checkpoint keeps; True asks to stop."""


class Stopped(RuntimeError):
    """A computation ended early because it was asked to; its checkpoint is written, and a call like it goes on."""
