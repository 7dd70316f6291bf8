"""The style sheet of figures: found by matplotlib, told apart by everybody."""

import subprocess
import sys
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from metacanary import figure_style, tables

# Simulations by Machado, Oliveira and Fernandes (2009, IEEE TVCG 15(6), Table 1, severity 1), on linear RGB.
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
TRITANOPIA = [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
XYZ = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]


def seen(color, vision):
    """CIE L*a*b* of a colour as someone sees it, white of D65."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array(XYZ) @ np.clip(np.array(vision) @ linear, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(
    "vision", [np.eye(3), PROTANOPIA, DEUTERANOPIA, TRITANOPIA], ids=["all", "protan", "deutan", "tritan"]
)
def test_colors_differ_for_the_colour_blind(vision):
    """By CIE76, where about 2.3 is just noticeable; by more those of the kinds that the paper compares."""
    looks = figure_style.look([])
    colors = {kind: seen(look["color"], vision) for kind, look in looks.items()}
    distances = {pair: np.linalg.norm(colors[pair[0]] - colors[pair[1]]) for pair in combinations(colors, 2)}
    assert min(distances.values()) > 10
    compared = ("random", "mislabeled", "metagradient")
    assert min(distances[pair] for pair in combinations(compared, 2)) > 15


def test_kinds_differ_in_markers_too():
    looks = figure_style.look([])
    assert len({looks[kind]["marker"] for kind in tables.KINDS}) == len(tables.KINDS)


def test_style_is_the_sheet_whatever_a_matplotlibrc_says():
    with matplotlib.rc_context({"font.size": 20, "pdf.fonttype": 3}), figure_style.style():
        for name, value in matplotlib.rc_params_from_file(figure_style.STYLE, use_default_template=False).items():
            assert matplotlib.rcParams[name] == value
        assert matplotlib.rcParams["pdf.fonttype"] == 42  # TrueType


def test_sheet_is_found_by_its_name():
    """In an interpreter of its own: pyplot would stay."""
    code = (
        "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt; plt.style.use('metacanary.paper');"
        "print(plt.rcParams['font.size'], plt.subplots()[1].plot([0, 1])[0].get_color())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["8.0", figure_style.look([])["random"]["color"]], run.stderr


def test_widths_are_those_of_a_page():
    assert figure_style.ONE_COLUMN < figure_style.TWO_COLUMNS / 2  # a gutter is between two columns
    with figure_style.style():
        assert matplotlib.rcParams["figure.figsize"][0] == figure_style.ONE_COLUMN
