"""The table of model variants: what is joined, averaged and printed, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from metacanary import metasmoothness, metasmoothness_table, store
from metacanary.metasmoothness_table import COLUMNS, collect, latex, markdown, note, printed, write

SMOOTHNESS = {"base": [0.9, 0.7, 0.8], "max_pool": [0.1, 0.3, -0.1]}
STEPS = np.arange(6.0)


def make_variant(canary, **options):
    """A variant as the workflow names it."""
    convnet = {"widths": [8, 16], "activation": "gelu", "logit_scale": 0.3, "group_norm": 0, "mean": [0.5]}
    model = {"name": "convnet", "options": convnet | {"norm_after_activation": False, "pool": "average"} | options}
    training = {"batch_size": 100, "num_steps": 200, "learning_rate": 0.3, "momentum": 0.0}
    objective = {"name": "smooth_auroc", "temperature": 2.0}
    names = {"dataset": "digits", "canary": canary, "algorithm": "sgd"}
    return {**names, "model": model, "training": training, "objective": objective}


def make_measured(values, **changes):
    """Rows of `of_canaries`."""
    rows = [
        {"direction": i, "seed": 70 + i, "step": 0.05, "metasmoothness": value, "relative_change": 0.1 * (i + 1)}
        for i, value in enumerate(values)
    ]
    assert tuple(rows[0]) == metasmoothness.COLUMNS
    return pd.DataFrame(rows).assign(**changes)


def make_history(slope, length=6):
    """A history whose objective falls and whose AUROC rises."""
    steps = STEPS[:length]
    return pd.DataFrame(
        {"metastep": steps + 1, "objective": -0.5 - slope * steps, "auroc": 0.6 + slope * steps, "seconds": 1.0}
    )


def make_table(**changes):
    """Two variants that differ in their pooling."""
    variants = [make_variant("base"), make_variant("max_pool", pool="max")]
    chosen = {
        "measured": [*map(make_measured, SMOOTHNESS.values())],
        "histories": [make_history(s) for s in (0.05, 0.01)],
    }
    return collect(variants, **{**chosen, "num_averaged": 2, **changes})


def test_collect_has_a_row_per_variant_in_the_order_given():
    table = make_table()
    assert tuple(table.columns) == COLUMNS
    assert table["canary"].tolist() == ["base", "max_pool"]
    assert table["pool"].tolist() == ["average", "max"]
    assert table["width"].tolist() == ["8-16", "8-16"]
    assert table["final_pool"].isna().all()


def test_collect_averages_over_directions():
    """Mean and standard deviation (n - 1) by hand; a single direction has none."""
    table = make_table()
    assert table["metasmoothness_mean"].tolist() == pytest.approx([0.8, 0.1], abs=1e-12)
    assert table["metasmoothness_std"].tolist() == pytest.approx([0.1, 0.2], abs=1e-12)
    assert table["relative_change"].tolist() == pytest.approx([0.2, 0.2], abs=1e-12)
    assert table["num_directions"].tolist() == [3, 3]
    alone = make_table(measured=[make_measured([0.9]), make_measured([0.1])])
    assert alone["metasmoothness_std"].isna().all()


def test_collect_averages_both_ends_of_a_history():
    """The first two of six metasteps against the last two: four metasteps apart."""
    row = make_table().iloc[0]
    assert row["objective_before"] == pytest.approx(-0.525, abs=1e-12)
    assert row["objective_after"] == pytest.approx(-0.725, abs=1e-12)
    assert row["objective_reduction"] == pytest.approx(0.2, abs=1e-12)
    assert (row["auroc_before"], row["auroc_after"]) == pytest.approx((0.625, 0.825), abs=1e-12)
    assert row["auroc_gain"] == pytest.approx(0.2, abs=1e-12)
    assert (row["num_metasteps"], row["num_averaged"]) == (6, 2)


def test_collect_reads_the_options_of_other_models():
    resnet = make_variant("base")
    resnet["model"] = {"name": "resnet9", "options": {"width": 2.5, "final_pool": "logsumexp", "group_norm": 8}}
    wide = make_variant("other")
    wide["model"] = {"name": "wrn16_4", "options": {"groups": 16, "logit_scale": 1.0}}
    private = {"sampling_prob": 0.1, "clip_norm": 1.0, "noise_multiplier": 2.5, "num_steps": 10, "learning_rate": 4.0}
    wide |= {"algorithm": "dpsgd", "training": private}
    table = collect([resnet, wide], [make_measured([0.5])] * 2, [make_history(0.1)] * 2, num_averaged=1)
    assert printed(table)["width"].tolist() == ["2.5", "—"]
    assert printed(table)["final\npool"].tolist() == ["logsumexp", "—"]
    assert printed(table)["algorithm"].tolist() == ["sgd", "dpsgd"]
    assert printed(table)["noise\nmultiplier"].tolist() == ["—", "2.5"]
    assert table[["width", "final_pool"]].isna().to_numpy().tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_averaged": 4}, "num_averaged: got 4, expected 1 to half of the 6 metasteps"),
        ({"num_averaged": 0}, "num_averaged: got 0, expected 1 to half"),
        ({"histories": []}, "got {'variants': 2, 'measured': 2, 'histories': 0} of them"),
        ({"measured": [make_measured([0.9, 0.1]), make_measured([0.9, 0.1], seed=3)]}, "measured: got other seeds"),
        ({"measured": [make_measured([0.9, 0.1]), make_measured([0.9, 0.1], step=0.1)]}, "measured: got other seeds"),
        ({"measured": [make_measured([0.9, 0.1]), make_measured([0.9])]}, "measured: got other seeds"),
    ],
)
def test_collect_rejects(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_table(**changes)


def test_printed_shows_what_differs_and_note_what_is_shared():
    table = make_table()
    cells = printed(table)
    assert cells.columns[:3].tolist() == ["variant", "pool", "metasmoothness"]
    assert cells["metasmoothness"].tolist() == ["0.800 ± 0.100", "0.100 ± 0.200"]
    assert cells["AUROC\ngain"].tolist() == ["0.200", "0.040"]
    for words in ("activation gelu", "norm after activation no", "num directions 3", "num averaged 2", "width 8-16"):
        assert words in note(table)
    assert "pool" not in note(table)
    assert printed(make_table(measured=[make_measured([0.9])] * 2))["metasmoothness"].tolist() == ["0.900", "0.900"]


def test_printed_is_the_same_after_a_round_trip(tmp_path):
    """Missing options and booleans too: the workflow's figure reads the CSV."""
    table = make_table()
    write(table, tmp_path / "t.csv", provenance={})
    assert markdown(store.read_csv(tmp_path / "t.csv")) == markdown(table)


def test_markdown_is_a_table():
    lines = markdown(make_table()).split("\n\n")[1].strip().splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert {len(line) for line in lines} == {len(lines[0])}


def test_latex_is_ascii_and_balanced():
    text = latex(make_table())
    assert text.isascii()
    assert "max\\_pool" in text
    assert text.count("\\begin{") == text.count("\\end{") == 2
    columns = re.search(r"begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", text)[1]
    row = next(line for line in text.splitlines() if line.startswith("base"))
    assert row.count(" & ") == len(columns) - 1


def test_write_makes_each_form_and_refuses_others_before_it_writes(tmp_path):
    write(make_table(), *(tmp_path / f"t.{suffix}" for suffix in ("csv", "md", "tex")), provenance={"seed": 1})
    assert store.read_provenance(tmp_path / "t.csv") == {"seed": 1}
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == markdown(make_table())
    assert (tmp_path / "t.tex").read_text(encoding="utf-8") == latex(make_table())
    with pytest.raises(ValueError, match=re.escape("suffix '.txt', expected .csv, .md or .tex")):
        write(make_table(), tmp_path / "u.csv", tmp_path / "u.txt", provenance={})
    assert not (tmp_path / "u.csv").exists()


@pytest.mark.slow
def test_table_needs_no_jax():
    code = "import sys, metacanary.metasmoothness_table; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("column", metasmoothness_table.COLUMNS)
def test_columns_are_explained_in_the_docs(column):
    text = (Path(__file__).parent.parent / "docs" / "output.md").read_text(encoding="utf-8")
    assert f"`{column}`" in text.split("## Columns of tables/metasmoothness.csv")[1]
