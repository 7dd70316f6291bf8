"""How figures look: the style sheet, the widths of a page, the look of canary kinds, intervals, saving.

The sheet is `paper.mplstyle`; `plt.style.use("metacanary.paper")` gives a plot of one's own the same style.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metacanary import store, tables

ONE_COLUMN = 3.25  # inches, as TWO_COLUMNS: the text widths of a two-column page
TWO_COLUMNS = 6.75
PNG_DPI = 200

STYLE = Path(__file__).with_name("paper.mplstyle")

GREY = "0.35"
_HALO: dict[str, Any] = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6}
DOTS = (0, (1, 1.5))
HOLLOW: dict[str, Any] = {
    "linestyle": DOTS,
    "linewidth": 0.8,
    "markerfacecolor": "white",
    "markeredgewidth": 0.8,
    "markersize": 5.2,
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES: tuple[Any, ...] = ((0, (4, 1.5)), (0, (4, 1.2, 1, 1.2)), "-", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
P = ParamSpec("P")
R = TypeVar("R")


def style() -> Any:
    """Returns a context in which matplotlib has the paper's style, whatever a matplotlibrc says."""
    # A backend that is named here would be loaded; figures with their own canvas need none.
    settings: dict[Any, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if "backend" not in k}
    return matplotlib.rc_context(settings | dict(_sheet()))


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function within `style`."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with style():
            return function(*args, **kwargs)

    return wrapper


def look(kinds: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Gives every canary kind a colour, a marker and a dash pattern.

    Guarantees:
      Kinds of `tables.KINDS` look the same in every figure; up to 63 kinds all look different.
    """
    others = [kind for kind in tables.canary_order(kinds) if kind not in tables.KINDS]
    colors = _sheet()["axes.prop_cycle"].by_key()["color"]
    return {
        kind: {
            "color": colors[place % len(colors)],
            "marker": _MARKERS[place % len(_MARKERS)],
            "linestyle": _DASHES[place % len(_DASHES)],
        }
        for place, kind in enumerate([*tables.KINDS, *others])
    }


@styled
def save(figure: Figure, *paths: store.PathLike) -> None:
    """Writes a figure to files, atomically, each in the format of its suffix: .pdf, or .png at 200 dpi.

    Raises:
      ValueError: For another suffix.

    Guarantees:
      A figure that is made again from the same data gives the same bytes, in whatever order it is saved: they
      hold no date and no path.
    """
    formats = {".pdf": {"CreationDate": None, "Creator": "metacanary"}, ".png": {"Software": "metacanary"}}
    for path in map(Path, paths):
        if path.suffix not in formats:
            raise ValueError(f"path={str(path)!r} has suffix {path.suffix!r}, expected .pdf or .png")
    _freeze_layout(figure)
    for path in map(Path, paths):
        with store.atomic(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=PNG_DPI, metadata=formats[path.suffix])


def remark(axis: Axes, text: str, *, at: tuple[float, float], offset: tuple[float, float], system: Any) -> None:
    """Writes small grey words at a place, by an offset in points, on a pale ground."""
    side = "right" if at[0] == 1 else "left"
    words: dict[str, Any] = {"ha": side, "va": "bottom", "fontsize": 6.5, "color": GREY, "bbox": _HALO}
    axis.annotate(text, at, offset, system, "offset points", **words)


def point(axis: Axes, x: float, mean: pd.Series, **appearance: Any) -> None:
    """Draws a mean over runs with its interval as a bar, if it has one."""
    if not np.isnan(mean["low"]):
        bar: dict[str, Any] = {"elinewidth": 0.9, "capsize": 2.5, "capthick": 0.9, "ecolor": appearance["color"]}
        axis.errorbar([x], [mean["mean"]], yerr=mean["high"] - mean["mean"], fmt="none", **bar)
    axis.plot([x], [mean["mean"]], **(appearance | {"linestyle": "none", "markeredgewidth": 0}))


def _freeze_layout(figure: Figure) -> None:
    """Lays a figure out once, so that a second file does not start from the layout of the first."""
    if figure.get_layout_engine() is not None:
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


@functools.cache
def _sheet() -> matplotlib.RcParams:
    """What the style sheet says."""
    return matplotlib.rc_params_from_file(STYLE, use_default_template=False)
