"""Plots benchmarks/results/metagradient.csv: time, relative time and peak memory against T.

python -m benchmarks.plot_metagradient
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks import metagradient

LOOKS = {
    # Okabe and Ito's colours by library; line and marker by what is held.
    "metacanary": ("#0072B2", "-"),
    "jax": ("#E69F00", "--"),
    "equinox": ("#009E73", "-."),
    "bergson": ("#D55E00", ":"),
    "torch": ("#CC79A7", ":"),
}
MARKERS = "osD^vPX"
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "legend.fontsize": 7,
}


def figure(table: pd.DataFrame) -> Figure:
    """Time, relative time and memory over T, with one legend; a contender that was stopped ends where it was."""
    table = table.assign(milliseconds_per_step=1000 * table["metagradient_seconds"] / table["num_steps"])
    with matplotlib.rc_context(STYLE):
        canvas = FigureCanvasAgg(Figure(figsize=(9.0, 3.3), layout="constrained"))
        axes = canvas.figure.subplots(1, 3)
        for ax, column, label, log in (
            (axes[0], "milliseconds_per_step", "milliseconds per metagradient and step", False),
            (axes[1], "ratio", "metagradient / plain training", False),
            (axes[2], "memory_mib", "peak memory [MiB]", True),
        ):
            panel(ax, table, column, log)
            ax.set(xlabel="training steps T", ylabel=label)
        for ax in axes[:2]:
            ax.set_ylim(bottom=0)
        for limit, (schedule, *_) in metagradient.TARGETS.items():
            axes[1].axhline(limit, color="0.5", linewidth=0.7, zorder=0)
            place = {"xycoords": ("axes fraction", "data"), "va": "center", "ha": "left"}
            # Named is the schedule that keeps to it: others of as many states do not.
            axes[1].annotate(f"{limit:g}\n{schedule.partition('_')[2]}", (1.01, limit), color="0.35", **place)
        handles, labels = axes[0].get_legend_handles_labels()
        canvas.figure.legend(handles, labels, loc="outside right upper", frameon=False, handlelength=3)
        return canvas.figure


def panel(ax: Axes, table: pd.DataFrame, column: str, log: bool) -> None:
    """A line for each contender."""
    counts: dict[str, int] = {}
    for name in table["contender"].unique():
        rows = table[(table["contender"] == name) & (table["status"] == "ok")].sort_values("num_steps")
        library = name.partition("_")[0]
        colour, line = LOOKS[library]
        marker = MARKERS[counts.get(library, 0) % len(MARKERS)]
        counts[library] = counts.get(library, 0) + 1
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": line,
            "marker": marker,
            "markersize": 4,
            "linewidth": 1.2,
        }
        ax.plot(rows["num_steps"], rows[column], label=name, markerfacecolor="white", **style)
    ax.set_xscale("log")
    ax.set_yscale("log" if log else "linear")
    ticks = sorted(table["num_steps"].unique())
    ax.set_xticks(ticks, [str(t) for t in ticks], rotation=45 if len(ticks) > 4 else 0)
    ax.xaxis.set_minor_locator(NullLocator())


def main() -> None:
    """Write PNG and PDF beside the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=metagradient.RESULTS)
    parser.add_argument("--setting", default="digits")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    table = pd.read_csv(args.table)
    chosen = table[(table["setting"] == args.setting) & (table["device"] == args.device)]
    if chosen.empty:
        parser.error(f"--setting, --device: got {args.setting}, {args.device}, expected one that {args.table} has")
    made = figure(chosen)
    suffix = "" if (args.setting, args.device) == ("digits", "cpu") else f"_{args.setting}_{args.device}"
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        made.savefig(args.table.with_name(f"{args.table.stem}{suffix}.{kind}"), dpi=200, metadata=metadata)


if __name__ == "__main__":
    main()
