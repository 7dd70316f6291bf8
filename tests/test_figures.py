"""Tests of metacanary.figures."""

import dataclasses
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from docutils.core import publish_parts
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from metacanary import figures, tables
from metacanary.canaries import Canaries

CHOICE = {"score": "negative_loss", "auditor": "steinke", "protocol": "corrected"}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def make_frame(
    kinds=("metagradient", "random"), steps=(20, 40, 80, 160), num_runs=4, pooled=True, scale=1.0, **changes
):
    """Rows of summary/epsilon.csv whose bounds grow along training."""
    rng = np.random.default_rng(0)
    runs = [*map(str, range(num_runs))] + ["pooled"] * pooled
    rows = []
    for (place, kind), (time, step), run in product(enumerate(kinds), enumerate(steps), runs):
        value = scale * (place + 1) * (time + 1 + rng.uniform(-0.3, 0.3)) / len(steps)
        rows.append({"canary": kind, "step": step, "run": run, "epsilon_lower": value, "auroc": 0.5 + value / 9})
    shared = {
        "dataset": "digits",
        "training": "sgd",
        "epsilon": np.inf,
        "accountant": "pld",
        "game": "independent",
        "epsilon_accounted": np.inf,
        "epsilon_accounted_rdp": np.inf,
        "epsilon_heuristic": np.inf,
        "assumption": "worst_case",
        "adjacency": "add_remove",
        "num_canaries": 100,
        "num_guesses": 100,
        "num_guesses_in": 50,
        "num_correct": 70,
        "test_accuracy": 0.9,
        **CHOICE,
    }
    frame = pd.DataFrame(rows).assign(**shared)
    return frame.assign(ceiling=np.where(frame["run"] == "pooled", 5.25, 3.5)).assign(**changes)


def make_canaries(num=30, channels=3, seed=0):
    """Canaries of 10 classes, half of them mislabelled, in an order of ids of their own."""
    rng = np.random.default_rng(seed)
    sources = rng.uniform(size=(num, 8, 8, channels)).astype(np.float32)
    images = np.clip(sources + rng.uniform(-0.3, 0.3, sources.shape), 0, 1).astype(np.float32)
    labels = rng.integers(0, 10, num)
    source_labels = np.where(rng.random(num) < 0.5, labels, (labels + 1) % 10)
    shared = {"id": rng.permutation(num), "label": labels, "source_labels": source_labels}
    return Canaries(images=images, source_images=sources, source_index=np.arange(num), **shared)


def labels_of(axis):
    """The labels of the lines of an axis, in drawing order."""
    return [line.get_label() for line in axis.lines]


def line_of(axis, label):
    """The line of a label."""
    (line,) = [line for line in axis.lines if line.get_label() == label]
    return line


def remarks_of(axis):
    """The texts within an axis."""
    return [text.get_text() for text in axis.texts]


def overflow(figure):
    """How far, in inches, anything drawn sticks out of the page."""
    FigureCanvasAgg(figure)
    with figures.style():
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    return max(-box.x0, -box.y0, box.x1 - width, box.y1 - height)


@pytest.mark.slow
def test_figures_needs_neither_pyplot_nor_jax():
    code = "import sys, metacanary.figures; print({'matplotlib.pyplot', 'jax'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_style_leaves_no_trace():
    before = dict(matplotlib.rcParams)
    figures.figure2(make_frame(), **CHOICE)
    with figures.style():
        assert matplotlib.rcParams["font.size"] == 8
        assert matplotlib.rcParams["pdf.fonttype"] == 42
    assert dict(matplotlib.rcParams) == before


def test_look_tells_63_kinds_apart():
    looks = figures.look([f"kind{number:02d}" for number in range(57)])
    assert len(looks) == 63
    assert len({(kind["color"], kind["marker"]) for kind in looks.values()}) == 63


def test_look_is_the_same_in_every_figure():
    alone, together = figures.look(["metagradient"]), figures.look(["clipbkd", "random", "metagradient"])
    assert alone["metagradient"] == together["metagradient"]


def lightness(color):
    """CIE L* of an sRGB colour, 0 to 100."""
    rgb = np.array(to_rgba(color)[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16


def test_look_differs_in_lightness_marker_and_dashes():
    looks = [figures.look([])[kind] for kind in ("random", "mislabeled", "metagradient")]
    grey = np.sort([lightness(kind["color"]) for kind in looks])
    assert np.diff(grey).min() > 10  # about 2 is just noticeable
    assert len({kind["marker"] for kind in looks}) == len({str(kind["linestyle"]) for kind in looks}) == 3


@pytest.mark.parametrize(
    ("labels", "ids", "num_shown", "expected"),
    [
        ([2, 2, 1, 0], [0, 1, 2, 3], 3, [3, 2, 0]),  # one of each label
        ([2, 2, 1, 0], [0, 1, 2, 3], 2, [2, 0]),  # lowest ids first
        ([1, 1, 1], [5, 3, 4], 2, [1, 2]),  # too few labels: the next ids
        ([0, 1, 1], [0, 1, 2], 9, [0, 1, 2]),  # never more than there are
    ],
)
def test_shown_follows_the_rule(labels, ids, num_shown, expected):
    assert figures.shown(np.array(labels), np.array(ids), num_shown).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_shown_takes_the_lowest_id_of_each_label(seed):
    rng = np.random.default_rng(seed)
    labels, ids = rng.integers(0, 10, 200), rng.permutation(200)
    chosen = figures.shown(labels, ids, 8)
    assert len(set(labels[chosen])) == 8
    assert all(ids[place] == ids[labels == labels[place]].min() for place in chosen)
    left_out = set(labels) - set(labels[chosen])
    assert all(ids[labels == label].min() > ids[chosen].max() for label in left_out)


@pytest.mark.parametrize("channels", [1, 3])
def test_figure1_shows_the_arrays(channels):
    canaries = make_canaries(channels=channels)
    figure = figures.figure1(canaries, class_names=CLASSES, num_shown=6)
    chosen = figures.shown(canaries.label, canaries.id, 6)
    assert len(figure.axes) == 3 * 6 + 1  # and the colour bar
    drawn = [axis.images[0] for axis in figure.axes[:18]]
    for column, place in enumerate(chosen):
        before, after, change = (np.squeeze(drawn[6 * row + column].get_array()) for row in range(3))
        np.testing.assert_array_equal(before, np.squeeze(canaries.source_images[place]))
        np.testing.assert_array_equal(after, np.squeeze(canaries.images[place]))
        difference = canaries.images[place] - canaries.source_images[place]
        np.testing.assert_array_equal(np.abs(change), np.abs(difference).max(axis=-1))
        assert np.isin(change, difference).all()


def test_figure1_has_one_symmetric_scale():
    canaries = make_canaries()
    images = np.clip(canaries.source_images + np.linspace(-0.4, 0.1, 30)[:, None, None, None], 0, 1)
    canaries = dataclasses.replace(canaries, images=images)
    figure = figures.figure1(canaries, class_names=CLASSES)
    limits = {axis.images[0].get_clim() for axis in figure.axes[20:30]}
    chosen = figures.shown(canaries.label, canaries.id, 10)
    largest = np.abs(canaries.images - canaries.source_images)[chosen].max()
    assert limits == {(-largest, largest)}
    assert [axis.images[0].get_clim() for axis in figure.axes[:20]] == [(0, 1)] * 20


def test_figure1_names_labels_sources_and_ids():
    canaries = make_canaries()
    figure = figures.figure1(canaries, class_names=CLASSES)
    for column, place in enumerate(figures.shown(canaries.label, canaries.id, 10)):
        given, source = CLASSES[canaries.label[place]], CLASSES[canaries.source_labels[place]]
        expected = ["" if given == source else source, given]
        if column == 0:
            expected = [expected[0], "was", expected[1], "label"]
        assert sorted(remarks_of(figure.axes[column])) == sorted(expected)
        assert figure.axes[20 + column].get_xlabel() == f"#{canaries.id[place]}"
    assert [figure.axes[10 * row].get_ylabel() for row in range(3)] == ["before", "after", "difference"]


def test_figure1_shows_one_of_each_class_by_default():
    canaries = make_canaries(num=200)
    figure = figures.figure1(canaries, class_names=CLASSES)
    names = [max(axis.texts, key=lambda text: text.xyann[1]).get_text() for axis in figure.axes[1:10]]
    assert names == list(CLASSES[1:])


def test_figure1_of_unchanged_canaries_has_a_blank_difference_and_one_line_of_names():
    canaries = make_canaries()
    canaries = dataclasses.replace(canaries, images=canaries.source_images, source_labels=canaries.label)
    figure = figures.figure1(canaries, class_names=CLASSES)
    assert all((axis.images[0].get_array() == 0).all() for axis in figure.axes[20:30])
    assert all(len(axis.texts) == 1 for axis in figure.axes[1:10])
    assert "was" not in remarks_of(figure.axes[0])


@pytest.mark.parametrize("num_shown", [1, 2, 8, 10, 16])
def test_figure1_fits_the_page(num_shown):
    figure = figures.figure1(make_canaries(channels=1), class_names=CLASSES, num_shown=num_shown)
    assert figure.get_figwidth() <= figures.TWO_COLUMNS + 1e-9
    assert overflow(figure) <= 0
    boxes = [text.get_window_extent() for axis in figure.axes[:num_shown] for text in axis.texts if text.get_text()]
    level = [(a, b) for a in boxes for b in boxes if a.x0 < b.x0 and abs(a.y0 - b.y0) < 3]
    assert all(a.x1 < b.x0 + 1 for a, b in level)  # names do not run into each other, to a pixel
    sizes = [text.get_fontsize() for axis in figure.axes[:num_shown] for text in axis.texts]
    assert num_shown > 10 or min(sizes) > 6.4  # points: ten of CIFAR's names are readable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shown": 0}, "num_shown=0, expected at least 1"),
        ({"channels": 2}, r"canaries.images has shape \(30, 8, 8, 2\), expected \[m,h,w,1\] or \[m,h,w,3\]"),
    ],
)
def test_figure1_names_what_is_wrong(changes, message):
    canaries = make_canaries(channels=changes.pop("channels", 3))
    with pytest.raises(ValueError, match=message):
        figures.figure1(canaries, class_names=CLASSES, **changes)


@pytest.mark.parametrize("num_kinds", [1, 3, 9])
def test_figure2_has_a_line_per_kind_in_order(num_kinds):
    kinds = ["zeta", "metagradient", "alpha", "random", "b", "c", "d", "mislabeled", "e"][:num_kinds]
    left, right = figures.figure2(make_frame(kinds, pooled=False), **CHOICE).axes
    expected = tables.canary_order(kinds)
    assert [name for name in labels_of(left) if "ceiling" not in name] == expected
    assert labels_of(right) == [*expected, "chance"]
    assert len(left.collections) == len(right.collections) == num_kinds  # bands


@pytest.mark.parametrize(("panel", "column"), [(0, "epsilon_lower"), (1, "auroc")])
def test_figure2_shows_means_and_t_intervals(panel, column):
    frame = make_frame()
    axis = figures.figure2(frame.sample(frac=1, random_state=0), **CHOICE).axes[panel]
    single = frame[(frame["canary"] == "metagradient") & (frame["run"] != "pooled")]
    line = line_of(axis, "metagradient")
    groups = single.groupby("step")[column]
    np.testing.assert_array_equal(line.get_xdata(), [20, 40, 80, 160])
    np.testing.assert_allclose(line.get_ydata(), groups.mean(), rtol=1e-12)
    low, high = scipy.stats.t.interval(0.95, df=3, loc=groups.mean(), scale=groups.sem())
    band = axis.collections[1].get_paths()[0].vertices  # random is drawn first
    assert {f"{y:.9f}" for y in [*low, *high]} <= {f"{y:.9f}" for y in band[:, 1]}


def test_figure2_of_one_step_has_a_column_for_each_kind_with_its_interval():
    """Lines and bands over one step would have no width."""
    frame = make_frame()
    frame = frame[frame["step"] == 160]
    left, right = figures.figure2(frame, **CHOICE).axes
    for axis, column in ((left, "epsilon_lower"), (right, "auroc")):
        assert [text.get_text() for text in axis.get_xticklabels()] == ["random", "metagradient"]
        assert axis.get_xlabel() == "canaries, after 160 training steps"
        segments = [bar.get_segments()[0] for bar in axis.collections]
        for place, kind in enumerate(["random", "metagradient"]):
            single = frame[(frame["canary"] == kind) & (frame["run"] != "pooled")][column]
            np.testing.assert_allclose(line_of(axis, kind).get_xydata(), [[place, single.mean()]], rtol=1e-12)
            low, high = scipy.stats.t.interval(0.95, df=3, loc=single.mean(), scale=single.sem())
            np.testing.assert_allclose(segments[place], [(place, low), (place, high)], rtol=1e-9)
    pooled = frame[(frame["canary"] == "random") & (frame["run"] == "pooled")]["epsilon_lower"]
    ((x, y),) = line_of(left, "random, pooled").get_xydata()
    assert 0 < x < 0.5  # beside the mean
    assert y == pooled.item()


def test_figure2_of_one_step_shows_references_all_over():
    frame = make_frame(steps=(160,), epsilon=1.0, epsilon_accounted=0.98)
    left = figures.figure2(frame, **CHOICE).axes[0]
    assert list(line_of(left, "accounted ε 0.98").get_xdata()) == [0, 1]  # of the width of the panel
    many = figures.figure2(make_frame([f"kind{i}_of_many" for i in range(6)], steps=(160,)), **CHOICE)
    assert {text.get_rotation() for text in many.axes[0].get_xticklabels()} == {25}
    assert overflow(many) <= 0


def test_figure2_has_a_row_for_each_training():
    frame = pd.concat([make_frame(), make_frame(training="other", scale=2.0, num_runs=3)])
    figure = figures.figure2(frame, **CHOICE, training=["other", "sgd"])
    assert [axis.get_title().split("\n") for axis in figure.axes] == [
        ["(a) empirical ε, 95% lower bound", "other"],
        ["(b) membership AUROC", "other"],
        ["(c) empirical ε, 95% lower bound", "sgd"],
        ["(d) membership AUROC", "sgd"],
    ]
    for row, training in ((0, "other"), (2, "sgd")):
        (alone, _) = figures.figure2(frame, **CHOICE, training=training).axes
        for name in ("random", "metagradient", "random, pooled", "ceiling 3.50 (one run)"):
            if name in labels_of(alone):
                drawn = line_of(figure.axes[row], name).get_xydata()
                np.testing.assert_array_equal(drawn, line_of(alone, name).get_xydata())
    assert "ceiling 3.50 (one run)" in labels_of(figure.axes[0])
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["random (3 to 4 runs)", "metagradient (3 to 4 runs)", "all runs pooled"]
    title = figure.legends[0].get_title().get_text()
    assert title == "digits, no DP, independent game\nSteinke auditor, corrected protocol, score: negative loss"
    assert overflow(figure) <= 0


def test_figure2_shows_pooled_bounds_apart():
    frame = make_frame()
    left, right = figures.figure2(frame, **CHOICE).axes
    pooled = frame[(frame["canary"] == "random") & (frame["run"] == "pooled")]
    line = line_of(left, "random, pooled")
    np.testing.assert_array_equal(line.get_ydata(), pooled["epsilon_lower"])
    assert line.get_markerfacecolor() == "white"
    assert line.get_color() == line_of(left, "random").get_color()
    assert not any("pooled" in name for name in labels_of(right))
    assert not any("pooled" in name for name in labels_of(figures.figure2(make_frame(pooled=False), **CHOICE).axes[0]))


def test_figure2_draws_a_near_ceiling():
    left, _ = figures.figure2(make_frame(scale=1.5, pooled=False), **CHOICE).axes
    assert set(line_of(left, "ceiling 3.50").get_ydata()) == {3.5}
    assert left.get_ylim()[1] > 3.5


def test_figure2_names_a_far_ceiling_and_keeps_the_data_readable():
    left, _ = figures.figure2(make_frame(scale=0.2), **CHOICE).axes
    assert remarks_of(left) == ["↑ ceiling 3.50 (one run)", "↑ ceiling 5.25 (pooled)"]
    assert not any("ceiling" in name for name in labels_of(left))
    assert left.dataLim.y1 > 0.6 * left.get_ylim()[1]


def test_figure2_names_a_range_of_ceilings_and_draws_none():
    frame = make_frame(scale=1.5)
    frame.loc[frame["canary"] == "random", "ceiling"] -= 1
    left, _ = figures.figure2(frame, **CHOICE).axes
    assert remarks_of(left) == ["ceiling 2.50 to 3.50 (one run)", "ceiling 4.25 to 5.25 (pooled)"]
    assert not any("ceiling" in name for name in labels_of(left))


def test_figure2_shows_a_finite_accounted_epsilon():
    near = figures.figure2(make_frame(epsilon=1.0, epsilon_accounted=0.98), **CHOICE).axes[0]
    far = figures.figure2(make_frame(epsilon=8.0, epsilon_accounted=7.9), **CHOICE).axes[0]
    assert set(line_of(near, "accounted ε 0.98").get_ydata()) == {0.98}
    assert "↑ accounted ε 7.90" in remarks_of(far)
    assert "accounted" not in " ".join(remarks_of(figures.figure2(make_frame(), **CHOICE).axes[0]))


def by_step(frame, values):
    """The frame with an accounted epsilon for each step."""
    return frame.assign(
        epsilon=8.0, epsilon_accounted=frame["step"].map(dict(zip((20, 40, 80, 160), values, strict=True)))
    )


def test_figure2_shows_the_accounted_epsilon_of_each_step():
    left = figures.figure2(by_step(make_frame(), (0.5, 0.9, 1.6, 2.4)), **CHOICE).axes[0]
    line = line_of(left, "accounted ε by step, 0.50 to 2.40")
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(20, 0.5), (40, 0.9), (80, 1.6), (160, 2.4)]
    assert left.get_ylim()[1] > 2.4
    assert "accounted ε by step, 0.50 to 2.40" in remarks_of(left)


def test_figure2_shows_the_near_part_of_the_accounted_epsilon():
    """The rest leaves at the upper edge, and the edge says so."""
    left = figures.figure2(by_step(make_frame(), (1.0, 2.5, 5.0, 8.0)), **CHOICE).axes[0]
    name = "accounted ε by step, 1.00 to 8.00"
    assert list(line_of(left, name).get_ydata()) == [1.0, 2.5, 5.0, 8.0]
    assert 2.5 < left.get_ylim()[1] < 5.0
    assert f"↑ {name}" in remarks_of(left)


def test_figure2_says_what_it_is():
    figure = figures.figure2(make_frame(), **CHOICE, significance=0.1)
    left, right = figure.axes
    assert all(word in left.get_title() for word in ("90% lower bound", "Steinke", "corrected"))
    assert "negative loss" in right.get_title()
    assert left.get_xlabel() == right.get_xlabel() == "training step"
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["random (4 runs)", "metagradient (4 runs)", "all runs pooled"]
    assert figure.legends[0].get_title().get_text() == "digits, sgd, no DP, independent game"


def test_figure2_calls_the_paper_protocol_no_bound():
    frame = make_frame(protocol="paper", assumption="none")
    title = figures.figure2(frame, **CHOICE | {"protocol": "paper"}).axes[0].get_title()
    assert "not a bound" in title
    assert "lower bound" not in title


def test_figure2_of_one_run_has_no_band():
    left, right = figures.figure2(make_frame(num_runs=1, pooled=False), **CHOICE).axes
    assert not left.collections
    assert not right.collections


def test_figure2_chance_can_be_left_out():
    right = figures.figure2(make_frame(), **CHOICE, random_line=False).axes[1]
    assert "chance" not in [*labels_of(right), *remarks_of(right)]


@pytest.mark.parametrize(
    ("steps", "scale"),
    [
        ((20, 40, 80, 160), "log"),
        ((1, 10, 100, 1000, 10000), "log"),
        (range(0, 10001, 1000), "linear"),
        ((100, 200, 300), "linear"),
        ((0, 1, 10, 100), "linear"),
    ],
)
def test_figure2_spreads_the_steps(steps, scale):
    left, right = figures.figure2(make_frame(steps=steps), **CHOICE).axes
    assert left.get_xscale() == right.get_xscale() == scale
    assert left.get_xlabel() == right.get_xlabel() == "training step"
    if len(steps) <= 7:
        assert list(left.get_xticks()) == list(steps)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0])
def test_figure2_fits_the_page(scale):
    figure = figures.figure2(make_frame(tables.KINDS, scale=scale, epsilon=8.0, epsilon_accounted=7.9), **CHOICE)
    assert overflow(figure) <= 0


@pytest.mark.parametrize("epsilon", ["inf", np.inf])
def test_figure2_takes_the_wanted_cell(epsilon):
    other = make_frame(training="dpsgd", epsilon=8.0, scale=9.0)
    wanted = {"training": "sgd", "epsilon": epsilon}
    left, _ = figures.figure2(pd.concat([make_frame(), other]), **CHOICE, **wanted).axes
    alone, _ = figures.figure2(make_frame(), **CHOICE).axes
    np.testing.assert_array_equal(line_of(left, "random").get_ydata(), line_of(alone, "random").get_ydata())


@pytest.mark.parametrize(
    ("frame", "changes", "message"),
    [
        (make_frame().drop(columns="auroc"), {}, r"frame lacks the columns \['auroc'\]"),
        (
            make_frame(),
            {"score": "loss"},
            r"score='loss' is not in frame, expected one of \['negative_loss'\]",
        ),
        (make_frame(), {"epsilon": 8}, r"epsilon=8 is not in frame, expected one of \[inf\]"),
        (
            pd.concat([make_frame(), make_frame(training="b")]),
            {},
            r"training \['b', 'sgd'\], expected one: name it by",
        ),
        (pd.concat([make_frame(), make_frame()]), {}, "several rows for .*, expected one per run"),
    ],
)
def test_figure2_names_what_is_wrong(frame, changes, message):
    with pytest.raises(ValueError, match=message):
        figures.figure2(frame, **CHOICE | changes)


def draw(which):
    """Makes one of the figures anew."""
    if which == "figure1":
        return figures.figure1(make_canaries(), class_names=CLASSES)
    return figures.figure2(make_frame(), **CHOICE)


@pytest.mark.parametrize("which", ["figure1", "figure2"])
def test_save_gives_the_same_bytes_again(which, tmp_path):
    pdf, png = (tmp_path / f"a.{suffix}" for suffix in ("pdf", "png"))
    figures.save(draw(which), pdf, png)
    figure = draw(which)
    figures.save(figure, tmp_path / "b.png")  # the other way round, in two calls, under another matplotlibrc
    with matplotlib.rc_context({"font.size": 20, "pdf.fonttype": 3, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        figures.save(figure, tmp_path / "b.pdf")
        figures.save(draw(which), tmp_path / "c.pdf")
    assert pdf.read_bytes() == (tmp_path / "b.pdf").read_bytes() == (tmp_path / "c.pdf").read_bytes()
    assert png.read_bytes() == (tmp_path / "b.png").read_bytes()


def test_save_embeds_fonts_and_no_date(tmp_path):
    figures.save(draw("figure2"), tmp_path / "figure2.pdf")
    content = (tmp_path / "figure2.pdf").read_bytes()
    assert b"/FontFile2" in content
    assert b"/Type3" not in content
    assert b"CreationDate" not in content


def test_save_png_has_200_dots_per_inch(tmp_path):
    figure = draw("figure2")
    figures.save(figure, tmp_path / "figure2.png")
    height, width = imread(tmp_path / "figure2.png").shape[:2]
    assert (width, height) == tuple(np.floor(200 * figure.get_size_inches()))


def test_save_refuses_other_formats_before_it_writes(tmp_path):
    with pytest.raises(ValueError, match=re.escape("suffix '.svg', expected .pdf or .png")):
        figures.save(draw("figure2"), tmp_path / "figure2.pdf", tmp_path / "figure2.svg")
    assert list(tmp_path.iterdir()) == []


CAPTIONS = sorted((Path(__file__).parent.parent / "workflow" / "report").glob("*.rst"))
CONFIGS = [
    {"start": "mislabeled", "objective": {"name": "smooth_auroc"}, "protocol": "corrected", "epsilon": "inf"},
    {"start": "random", "objective": {"name": "loss_gap"}, "protocol": "paper", "epsilon": 8},
]
CONFIGS = [choice | {"comparison": by} for choice, by in product(CONFIGS, ("start", "num_canaries", "model", "cost"))]


def make_config(*, start, objective, protocol, epsilon, comparison):
    """The keys of a config that captions name."""
    optimized = {"family": "metagradient", "start": start, "objective": objective, "num_metasteps": 40}
    private = {"algorithm": "dpsgd", "epsilons": [8, 1], "num_runs": 5, "game": "paired", "pretraining": "public"}
    figure2 = {"dataset": "digits", "training": "sgd", "score": "negative_loss", "auditor": "steinke"}
    figure2 |= {"protocol": protocol, "epsilon": epsilon}
    return {
        "experiment": "a",
        "delta": 1e-5,
        "significance": 0.05,
        "canaries": {
            "num_canaries": 100,
            "kinds": {
                "random": {"family": "random"},
                "mislabeled": {"family": "mislabeled"},
                "metagradient": optimized | {"num_splits": 2},
            },
        },
        "trainings": {
            "sgd": {"algorithm": "sgd", "num_runs": 8, "game": "independent", "pretraining": None},
            "dpsgd": private,
        },
        "figures": {"figure1_dataset": "digits", "figure1_canary": "metagradient"}
        | {f"figure2_{name}": value for name, value in figure2.items()},
        "metasmoothness": {"canaries": ["metagradient"], "num_directions": 5, "step": 0.05, "num_averaged": 3},
        "tan": {"training": "dpsgd", "batch_size": 32, "num_validation": 100, "num_runs": 4},
        "tables": {"protocol": "corrected", "score": "negative_loss"},
        "accuracy": {"trainings": ["sgd", "dpsgd"], "canary": "random"},
        "ledger": {"trainings": ["dpsgd"], "auditor": "fdp_gaussian", "canaries": None},
        "comparisons": {comparison: {"canaries": ["random", "metagradient"], "by": comparison, "auditor": "steinke"}},
    }


@pytest.mark.parametrize("choice", CONFIGS)
@pytest.mark.parametrize("path", CAPTIONS, ids=lambda path: path.name)
def test_captions_render(path, choice):
    wildcards = SimpleNamespace(dataset="digits", canary="metagradient", comparison=choice["comparison"])
    settings = {"protocol": "corrected", "figure": {"protocol": choice["protocol"]}}
    settings["page"] = {"auditor": "steinke", "protocol": "corrected"}
    params = SimpleNamespace(settings=settings)
    snakemake = SimpleNamespace(config=make_config(**choice), wildcards=wildcards, params=params)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(path.read_text(encoding="utf-8"))  # in the environment that Snakemake uses
    text = template.render(snakemake=snakemake)
    strict = {"halt_level": 2, "report_level": 2, "input_encoding": "unicode"}  # warnings stop it
    body = publish_parts(text, writer="html5", settings_overrides=strict)["body"]
    assert ("not bounds" in body) == (path.stem == "figure2" and choice["protocol"] == "paper")
    if path.stem == "workflow":
        assert body.count("<li>") == 5


def test_caption_of_norms_says_what_was_optimised(root):
    config = {"canaries": {"kinds": {"norm": {"family": "gradient_max"}}}}
    snakemake = SimpleNamespace(config=config, wildcards=SimpleNamespace(dataset="digits", canary="norm"))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = (root / "workflow/report/history.rst").read_text(encoding="utf-8")
    text = environment.from_string(template).render(snakemake=snakemake)
    assert "norms of the canaries' own gradients" in text
    assert "metastep" not in text


def test_captions_are_all_there():
    assert {path.stem for path in CAPTIONS} == {
        "workflow",
        "figure1",
        "figure2",
        "table1",
        "table2",
        "bounds",
        "reproduction",
        "history",
        "metasmoothness",
        "tan",
        "comparison",
        "audits",
        "accuracy",
        "ledger",
    }
