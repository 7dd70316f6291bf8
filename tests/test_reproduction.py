"""Published numbers beside ours: the rule, its level, and what is compared with what."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from test_tables import make_rows

from metacanary import reproduction

FACTS = {
    "dataset": "cifar10",
    "num_train": 50000,
    "image_size": 32,
    "model": "wrn16_4",
    "pretraining": None,
    "delta": 1e-5,
    "batch_size": 4096.1,
    "clip_norm": 1.0,
    "multiplicity": 16,
    "metamodel": "resnet9",
    "start": "random",
    "objective": "loss_gap",
}
CELL = {"dataset": "cifar10", "training": "private", "canary": "ours"}
MATCHES = {"dataset": "cifar10", "training": "dpsgd", "canary": "metagradient"}
NAMES = {"protocol": "corrected", "score": "negative_loss"}


@pytest.fixture(scope="module")
def published(root):
    """The published numbers of the repository."""
    return reproduction.read_published(root / "config/published.csv")


def one(published, **changes):
    """The number of metagradient canaries in DP-SGD from scratch, changed."""
    row = published[(published["training"] == "dpsgd") & (published["canary"] == "metagradient")]
    return row.assign(**changes)


def make_frame(values, *, paper=None, **changes):
    """Rows of a cell that is the counterpart of `one`: valid bounds, and those under the paper's protocol."""
    shared = {"canary": CELL["canary"], "training": CELL["training"], "dataset": "cifar10", "epsilon": "8"}
    shared |= {"game": "paired", "adjacency": "replace_one", "auditor": "fdp_gaussian", "num_canaries": 500}
    shared |= {"epsilon_accounted": 14.0} | changes
    paper = values if paper is None else paper
    frames = [make_rows(values, **shared), make_rows(paper, **shared | {"protocol": "paper", "assumption": "none"})]
    return pd.concat(frames, ignore_index=True)


def setup(**facts):
    """The setup of the cell with changed facts."""
    return [CELL | {"matches": MATCHES, "facts": FACTS | facts}]


def compare(frame, published, facts=None, **changes):
    """The one row of the cell."""
    (row,) = reproduction.compare(frame, published, setup(**facts or {}), **NAMES | changes).to_dict("records")
    return row


def test_published_numbers_are_those_of_the_paper(published):
    """ICLR's Table 2, from two accounts of it; each difference that the paper's text speaks of has its sign."""
    values = published.set_index(["dataset", "training", "canary"])["value"]
    assert len(values) == 15
    assert set(published["mark"]) == {"S"}
    assert values["cifar10", "dpsgd", "metagradient"] == 0.732
    assert values["fashion_mnist", "dpsgd_finetune", "random"] == 0.056
    by_kind = values.unstack("canary")
    assert (by_kind["metagradient"] > by_kind[["random", "mislabeled"]].max(axis=1)).all()


def test_compare_gives_the_paper_protocol_with_its_interval_and_the_bound_beside(published):
    frame = make_frame([0.1, 0.2, 0.3, 0.2, 0.1], paper=[0.6, 0.8, 0.7, 0.9, 0.75])
    row = compare(frame, one(published))
    assert (row["like_protocol"], row["protocol"]) == ("paper", "corrected")
    low, high = scipy.stats.t.interval(0.95, 4, np.mean([0.6, 0.8, 0.7, 0.9, 0.75]), 0.05)  # s / sqrt(5) = 0.05
    np.testing.assert_allclose([row["like_low"], row["like_high"]], [low, high], rtol=1e-9)
    np.testing.assert_allclose([row["epsilon_mean"], row["epsilon_median"]], [0.18, 0.2], rtol=1e-12)
    assert (row["num_runs"], row["ceiling"], row["epsilon_accounted"]) == (5, 3.5, 14.0)
    assert (row["theirs"], row["mark"], row["verdict"]) == (0.732, "S", "reproduced")


def test_accepted_interval_is_that_of_a_difference_of_means(published):
    values = np.array([0.6, 0.8, 0.7, 0.9, 0.75])
    row = compare(make_frame(values), one(published))
    half = scipy.stats.t.ppf(0.975, 4) * math.sqrt(2) * scipy.stats.sem(values)
    found = [row["accepted_low"], row["accepted_high"]]
    np.testing.assert_allclose(found, [values.mean() - half, values.mean() + half], rtol=1e-9)
    known = compare(make_frame(values), one(published, standard_error=0.01))
    half = scipy.stats.t.ppf(0.975, 4) * math.hypot(scipy.stats.sem(values), 0.01)
    np.testing.assert_allclose(known["accepted_high"], values.mean() + half, rtol=1e-9)
    for value, verdict in ((row["accepted_high"], "reproduced"), (row["accepted_high"] + 1e-6, "not reproduced")):
        assert compare(make_frame(values), one(published, value=value))["verdict"] == verdict


@pytest.mark.parametrize(("num_ours", "num_theirs"), [(5, 5), (8, 5), (16, 5), (16, math.nan)])
def test_equal_truths_are_found_reproduced_at_the_stated_level(published, num_ours, num_theirs):
    """4,000 pairs of means from one normal distribution, tolerance of four standard errors.

    With the error of as many runs as ours it would be 0.92 of (8, 5), and 0.84 of (16, 5).
    """
    rng, num_trials, num_found = np.random.default_rng(0), 4000, 0
    (number,) = one(published, num_runs=num_theirs).to_dict("records")
    own = {"num_runs": num_ours, "game": "paired", "num_canaries": 500, "score": "negative_loss"}
    for _ in range(num_trials):
        ours = rng.normal(1.0, 0.3, size=num_ours)
        theirs = rng.normal(1.0, 0.3, size=num_ours if math.isnan(num_theirs) else num_theirs)
        half = scipy.stats.t.ppf(0.975, num_ours - 1) * ours.std(ddof=1) / math.sqrt(num_ours)
        found = own | {"like_mean": ours.mean(), "like_high": ours.mean() + half}
        verdict = reproduction._judge(number | {"value": theirs.mean()}, {"facts": FACTS}, found)["verdict"]
        num_found += verdict == "reproduced"
    assert abs(num_found / num_trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / num_trials)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dataset": "cifar10_jpeg75"}, "data set cifar10_jpeg75 (theirs cifar10)"),
        ({"num_train": 5000}, "training images 5000 (theirs 50000)"),
        ({"image_size": 16}, "image size 16 (theirs 32)"),
        ({"model": "resnet9"}, "model resnet9 (theirs wrn16_4)"),
        ({"delta": 1e-6}, "delta 1e-06 (theirs 1e-05)"),
        ({"batch_size": 4000.0}, "batch 4000 (theirs 4096)"),
        ({"clip_norm": 0.5}, "clip norm 0.5 (theirs 1)"),
        ({"multiplicity": None}, "copies of an image none (theirs 16)"),
        ({"metamodel": "convnet"}, "metamodel convnet (theirs resnet9)"),
        ({"start": "mislabeled"}, "start of the canaries mislabeled (theirs random)"),
        ({"objective": "smooth_auroc"}, "objective of the canaries smooth_auroc (theirs loss_gap)"),
    ],
)
def test_another_fact_is_not_comparable_and_named(published, facts, reason):
    row = compare(make_frame([0.7] * 5), one(published), facts)
    assert (row["verdict"], row["reasons"]) == ("not comparable", reason)
    assert math.isnan(row["accepted_low"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_canaries": 100}, "canaries 200 (theirs 1000)"),
        ({"game": "independent", "num_canaries": 1000}, "game independent (theirs paired)"),
        ({"score": "logit_margin"}, "no audit of negative_loss under protocol paper by auditor fdp_gaussian"),
        ({"auditor": "steinke"}, "no audit of negative_loss under protocol paper by auditor fdp_gaussian"),
    ],
)
def test_another_audit_is_not_comparable_and_named(published, changes, reason):
    row = compare(make_frame([0.7, 0.8, 0.7, 0.8, 0.7], **changes), one(published))
    assert (row["verdict"], row["reasons"]) == ("not comparable", reason)


def test_protocols_are_not_mixed(published):
    frame = make_frame([0.7, 0.8, 0.7, 0.8, 0.7])
    row = compare(frame[frame["protocol"] != "paper"], one(published))
    assert row["verdict"] == "not comparable"
    assert math.isnan(row["like_mean"])
    assert row["epsilon_mean"] == pytest.approx(0.74, rel=1e-12)


def test_too_few_runs_are_not_comparable(published):
    row = compare(make_frame([0.7, 0.8, 0.7, 0.8]), one(published))
    assert row["reasons"] == "runs 4 (at least 5 needed)"
    alone = compare(make_frame([0.7]), one(published, num_runs=float("nan")))
    assert alone["reasons"] == "runs 1 (at least 2 needed)"


def test_facts_that_are_not_known_are_not_asked_for(published):
    unknown = one(published).assign(**dict.fromkeys(("model", "batch_size", "objective"), float("nan")))
    row = compare(make_frame([0.7, 0.8, 0.7, 0.8, 0.7]), unknown, {"model": "x", "batch_size": 1, "objective": "y"})
    assert row["verdict"] == "reproduced"


@pytest.mark.parametrize(
    "changes", [{"dataset": "mnist"}, {"training": "dpsgd_finetune"}, {"canary": "random"}, {"epsilon": 4.0}]
)
def test_a_number_without_a_cell_is_not_run_and_the_cell_without_a_number_stands_below(published, changes):
    """Whatever the names of the cell are."""
    table = reproduction.compare(make_frame([0.7] * 5), one(published, **changes), setup(), **NAMES)
    assert list(table["verdict"]) == ["not run", "no published number"]
    assert table["like_mean"].isna().tolist() == [True, False]
    assert list(table["canary"]) == [changes.get("canary", "metagradient"), "ours"]


def test_every_number_and_every_cell_has_a_row(published):
    frame = pd.concat([make_frame([0.7] * 5), make_frame([0.7] * 5, epsilon="2"), make_frame([0.1] * 5, canary="b")])
    cells = [*setup(), *setup()]
    cells[1] = cells[1] | {"canary": "b", "matches": MATCHES | {"canary": "clipbkd"}}
    table = reproduction.compare(frame, published, cells, **NAMES)
    assert tuple(table.columns) == reproduction.COLUMNS
    counts = table["verdict"].value_counts().to_dict()
    assert counts == {"not run": 14, "not reproduced": 1, "no published number": 2}


def test_several_counterparts_have_a_row_each(published):
    frame = pd.concat([make_frame([0.7, 0.8, 0.7, 0.8, 0.7]), make_frame([0.1, 0.2, 0.1, 0.2, 0.1], canary="b")])
    cells = [*setup(), setup()[0] | {"canary": "b"}]
    table = reproduction.compare(frame, one(published), cells, **NAMES)
    assert list(zip(table["own_canary"], table["verdict"], strict=True)) == [
        ("ours", "reproduced"),
        ("b", "not reproduced"),
    ]


def test_compare_refuses_what_is_no_bound_and_cells_without_setup(published):
    with pytest.raises(ValueError, match="protocol='paper' is no bound"):
        compare(make_frame([0.7] * 5), published, protocol="paper")
    with pytest.raises(ValueError, match="setup lacks the cell cifar10/private/ours"):
        reproduction.compare(make_frame([0.7] * 5), published, [], **NAMES)


def test_combine_takes_comparable_cells_else_the_nearest(published):
    values = [0.7, 0.8, 0.7, 0.8, 0.7]
    number = one(published)

    def table(frame, **facts):
        return reproduction.compare(frame, number, setup(**facts), **NAMES)

    far = table(make_frame(values), model="x", image_size=16)
    near = table(make_frame(values), model="x")
    exact = table(make_frame(values))
    absent = reproduction.compare(make_frame(values, epsilon="2"), number, setup(), **NAMES)

    def chosen(**named):
        found = reproduction.combine(named)
        return list(zip(found["experiment"].fillna("-"), found["verdict"], strict=True))

    assert chosen(a=far, b=near) == [("b", "not comparable")]
    assert chosen(a=far, b=exact, c=exact) == [("b", "reproduced"), ("c", "reproduced")]
    assert chosen(a=absent, b=far) == [("b", "not comparable"), ("a", "no published number")]
    assert chosen(a=absent) == [("-", "not run"), ("a", "no published number")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="model"), r"lacks the columns \['model'\]"),
        (lambda t: t.assign(modell=1), r"unknown ones \['modell'\]"),
        (lambda t: t.assign(value=t["value"].where(t.index != 1)), "value of line 3 is empty"),
        (lambda t: t.assign(mark="X"), "mark: got 'X', expected one of P, S, I, U"),
        (lambda t: pd.concat([t, t[:1]]), "twice, expected each number once"),
    ],
)
def test_read_published_names_what_is_wrong(root, tmp_path, change, message):
    change(pd.read_csv(root / "config/published.csv")).to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(ValueError, match=message):
        reproduction.read_published(tmp_path / "p.csv")
