"""Tests of the benchmarks, with the contenders that need no other packages than the project's."""

import dataclasses
import functools
import importlib.util
import math
import sys
import warnings

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import integrate, special, stats

from benchmarks import (
    audit_peers,
    audit_speed,
    audit_tables,
    calibration,
    channels,
    dirac_bounds,
    dpsgd,
    dpsgd_contenders,
    dpsgd_measure,
    dpsgd_problem,
    dpsgd_tables,
    ghost_norms,
    jax_contenders,
    measure,
    metagradient,
    metagradient_tables,
    paper_cost,
    plot_metagradient,
    problem,
    runs_together,
    step_vjp,
    tables,
)
from metacanary import accounting, bounds_fdp, dirac, models
from metacanary.guesses import make_games

NEEDS_NO_PEER = [name for name in jax_contenders.CONTENDERS if not name.startswith("equinox")]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The digits problem at T = 5, read from a file as the contenders' processes do."""
    folder = tmp_path_factory.mktemp("problem")
    problem.save(folder / "problem.npz", problem.make("digits", 5, folder / "data"))
    return problem.load(folder / "problem.npz", "digits", 5)


@pytest.fixture(scope="module")
def reference(small):
    """The gradient with all states held."""
    return jax_contenders.CONTENDERS[metagradient.REFERENCE](small).metagradient()


@pytest.mark.parametrize("name", NEEDS_NO_PEER)
def test_contenders_differentiate_the_same(small, reference, name):
    contender = jax_contenders.CONTENDERS[name](small)
    contender.plain()
    contender.warm_up()
    gradient = contender.metagradient()
    assert gradient.shape == small.pixels.shape
    assert np.linalg.norm(gradient) > 0
    np.testing.assert_allclose(gradient, reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    assert 1 <= contender.states_held <= 2 * small.num_steps


def test_load_inverts_save(tmp_path):
    made = problem.make("digits", 3, tmp_path)
    problem.save(tmp_path / "problem.npz", made)
    loaded = problem.load(tmp_path / "problem.npz", "digits", 3)
    jax.tree.map(np.testing.assert_array_equal, (loaded.state, loaded.pixels), (made.state, made.pixels))


def test_make_refuses_unknown_setting(tmp_path):
    with pytest.raises(ValueError, match="setting: got 'imagenet', expected one of digits, digits_lax, resnet9"):
        problem.make("imagenet", 3, tmp_path)


def test_scan_nested_takes_every_step_once():
    for num_steps in (1, 2, 3, 4, 7, 10, 16):
        visited = jax_contenders.scan_nested(lambda c, t: 3 * c + t, jax.numpy.int32(1), num_steps)
        expected = 1
        for t in range(num_steps):
            expected = 3 * expected + t
        assert int(visited) == expected


@pytest.mark.slow
def test_main_writes_every_row(tmp_path):
    output, wanted = tmp_path / "sweep.csv", ["metacanary_sqrt", "jax_scan_checkpoint"]
    arguments = ["--num-steps", "4", "--repeats", "1", "--data-dir", str(tmp_path), "--output", str(output)]
    assert metagradient.main([*arguments, "--contenders", *wanted]) == 0
    assert metagradient.main([*arguments, "--contenders", wanted[0]]) == 0  # rows of the same key are replaced
    table = pd.read_csv(output)
    assert list(table.columns) == metagradient.COLUMNS
    assert sorted(table["contender"]) == sorted([metagradient.REFERENCE, *wanted])
    assert (table["status"] == "ok").all()
    assert (table["relative_error"] < 1e-5).all()
    assert (table[["metagradient_seconds", "plain_seconds", "ratio", "memory_mib", "compile_seconds"]] > 0).all(
        axis=None
    )


PHASE = 'import time; print(\'{"phase": "metagradient"}\', flush=True); '


@pytest.mark.parametrize(
    ("code", "status", "note"),
    [
        (PHASE + "time.sleep(60)", "time", "more than 1 s in phase metagradient"),
        (PHASE + "x = bytearray(b'1' * 2**28); time.sleep(60)", "memory", "more than 0.125 GiB in phase"),
        (PHASE + "raise ValueError('no such thing')", "error", "ValueError: no such thing"),
        (PHASE + 'print(\'{"row": {"seconds": 3}}\')', "ok", None),
    ],
)
def test_watched_stops_what_takes_too_much(code, status, note):
    got, result = metagradient.watched([sys.executable, "-c", code], {}, 2**27, 1.0)
    assert got == status
    assert result == {"seconds": 3} if note is None else note in result


def test_measured_does_not_try_again_what_was_stopped(tmp_path):
    limits = {"repeats": 1, "repeat_below": 1, "limit_bytes": 1, "limit_seconds": 1}
    sweep = metagradient.Sweep(setting="digits", device="cpu", data_dir=tmp_path, folder=tmp_path, **limits)
    sweep.stopped["jax_scan"] = ("memory", "not tried: at T = 50 more than 8 GiB")
    assert sweep._measured("jax_scan", 100) == {"status": "memory", "note": "not tried: at T = 50 more than 8 GiB"}


@pytest.mark.skipif(not measure.STATUS.exists(), reason="peak memory is read from Linux's /proc")
def test_memory_peak_sees_what_was_freed():
    with measure.freed_at_once():
        before = measure.memory_before()
        np.ones(2**23).sum()  # 64 MiB
        assert 60 < (measure.memory_peak() - before) / measure.MIB < 80


@pytest.fixture(scope="module")
def table():
    """A made-up sweep: one contender stopped at the larger T."""
    rows = [
        {"contender": name, "num_steps": steps, "status": "ok", "ratio": 4.0, "metagradient_seconds": steps / 100}
        | {"memory_mib": 10.0, "relative_error": 1e-7, "versions": "jax 0", "processor": "none", "seed": 1, "date": "1"}
        for name in ("metacanary_sqrt", "jax_scan", "equinox_log", "bergson_sqrt", "torch_unrolled")
        for steps in (50, 100)
    ]
    made = pd.DataFrame(rows, columns=metagradient.COLUMNS).assign(setting="digits", device="cpu")
    stopped = (made["contender"] == "jax_scan") & (made["num_steps"] == 100)
    made.loc[stopped, "status"] = "memory"
    made.loc[stopped, ["metagradient_seconds", "ratio", "memory_mib", "relative_error"]] = np.nan
    return made


def test_by_num_steps_names_the_reason(table):
    assert "| jax_scan | 0.50 | memory |" in tables.markdown(
        metagradient_tables.by_num_steps(table, "metagradient_seconds", 2)
    )
    left_out = table[(table["contender"] != "equinox_log") | (table["num_steps"] == 50)]
    cells = tables.markdown(metagradient_tables.by_num_steps(left_out, "metagradient_seconds", 2))
    assert "| equinox_log | 0.50 | not run |" in cells


def test_filled_replaces_only_the_generated_part():
    begin, end = "<!-- a: made by benchmarks.tables -->", "<!-- end of a -->"
    assert tables.filled(f"x\n{begin}\nold\n{end}\ny", {"a": "new \\1"}) == f"x\n{begin}\nnew \\1\n{end}\ny"
    with pytest.raises(ValueError, match="README: got no section 'b'"):
        tables.filled("", {"b": "new"})


def test_figure_shows_every_contender(table):
    axes = plot_metagradient.figure(table).axes
    assert len(axes) == 3
    for ax in axes:
        lines = {line.get_label(): len(line.get_xdata()) for line in ax.lines if not line.get_label().startswith("_")}
        assert lines == {name: 1 if name == "jax_scan" else 2 for name in table["contender"].unique()}


def test_figure_draws_what_the_first_schedule_keeps_to(table):
    """The same schedules as `test_metagradients_cost_what_was_aimed_at`."""
    _, axes, _ = plot_metagradient.figure(table).axes
    assert [text.get_text() for text in axes.texts] == ["4.5\nsqrt", "6\ntree8"]
    assert [text.xy[1] for text in axes.texts] == [*metagradient.TARGETS]


def test_readme_holds_the_committed_results():
    paths = [module.RESULTS for module in (metagradient, paper_cost, step_vjp)]
    for path in paths:
        assert path.exists(), f"{path} is not there: run `make bench-metagradient`"
    generated = metagradient_tables.sections(*map(pd.read_csv, paths))
    readme = tables.README.read_text(encoding="utf-8")
    assert tables.filled(readme, generated) == readme, "run `python -m benchmarks.tables`"
    guide = tables.GUIDE.read_text(encoding="utf-8")
    filled = tables.filled(guide, metagradient_tables.guide_sections(*map(pd.read_csv, paths[:2])))
    assert filled == guide, "run `python -m benchmarks.tables`"


def test_readme_says_what_was_not_run():
    """Every contender at every T is in the CSV or `not run` in each table of the README."""
    sweep = metagradient_tables.on_cpu(pd.read_csv(metagradient.RESULTS))
    contenders = [metagradient.REFERENCE, *metagradient.OURS, *metagradient.JAX, *metagradient.PEERS]
    assert set(contenders) <= set(sweep["contender"])
    assert set(sweep["num_steps"]) == set(metagradient.NUM_STEPS)
    there = set(zip(sweep["contender"], sweep["num_steps"], strict=True))
    missing = {(name, steps) for name in contenders for steps in metagradient.NUM_STEPS} - there
    text = tables.README.read_text(encoding="utf-8")
    text = text[text.index("### digits on cpu") : text.index("### digits_lax on cpu")]
    for name in contenders:
        printed = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith(f"| {name} |")]
        in_columns = [cells for cells in printed if len(cells) == len(metagradient.NUM_STEPS)]
        assert len(in_columns) == 3
        for cells in in_columns:
            not_run = [cell.strip(" |") == "not run" for cell in cells]
            assert not_run == [(name, steps) in missing for steps in metagradient.NUM_STEPS], name
    assert {steps for _, steps in missing} == {2000}
    assert len(missing) == 6
    assert "six contenders were left out at T = 2000" in tables.README.read_text(encoding="utf-8")


def test_against_others_compares_within_the_allowance():
    rows = [
        ("metacanary_sqrt", 1.0, 20.0),
        ("metacanary_all", 0.5, 40.0),
        ("jax_scan", 0.4, 61.0),  # more than 1.5 times anyone's
        ("jax_scan_checkpoint", 0.6, 30.0),
        ("jax_scan_nested", 0.9, 19.0),  # less than any of ours, but for 5%
        ("jax_scan_nested_mixed", 0.1, 20.0),  # half ours
        ("torch_unrolled", None, None),
    ]
    sweep = pd.DataFrame(rows, columns=["contender", "metagradient_seconds", "memory_mib"])
    sweep["status"] = np.where(sweep["memory_mib"].isna(), "memory", "ok")
    sweep = sweep.assign(num_steps=50, setting="digits", device="cpu", repeats=3)
    sweep = sweep.assign(metagradient_min=sweep["metagradient_seconds"], metagradient_max=sweep["metagradient_seconds"])
    compared = metagradient_tables.against_others(sweep).set_index("contender")
    assert compared["other"].to_dict() == dict.fromkeys(("metacanary_all", "metacanary_sqrt"), "jax_scan_checkpoint")
    assert compared["ratio"].to_dict() == pytest.approx({"metacanary_all": 0.5 / 0.6, "metacanary_sqrt": 1 / 0.6})
    others = metagradient_tables.within_memory(sweep).set_index("contender")
    given = {"jax_scan": "metacanary_all", "jax_scan_checkpoint": "metacanary_sqrt", "jax_scan_nested": ""}
    assert others["other"].to_dict() == given
    assert others["ratio"].dropna().to_dict() == pytest.approx({"jax_scan": 0.4 / 0.5, "jax_scan_checkpoint": 0.6})
    text = metagradient_tables.fastest(sweep)
    assert "That holds of `metacanary_all` at T = 50, and of no other schedule at any T." in text
    assert "is faster than none at every T, and is not faster than `jax_scan` at T = 50;" in text
    assert "| metacanary_all | 0.83 `jax_scan_checkpoint` |" in text
    assert "| metacanary_sqrt | 1.67 `jax_scan_checkpoint` |" in text
    assert "| jax_scan | 0.80 `metacanary_all` |" in text
    assert "| jax_scan_nested | — |" in text


def test_documents_say_where_ours_is_the_fastest():
    """Counted from the CSV anew, without `tables`."""
    sweep = pd.read_csv(metagradient.RESULTS)
    done = sweep[(sweep["status"] == "ok") & (sweep["setting"] == "digits") & (sweep["device"] == "cpu")]
    done = done[done["contender"] != "jax_scan_nested_mixed"]  # with metacanary's step
    is_ours = done["contender"].str.startswith("metacanary_")
    won, slower = {}, {}
    for _, row in done.sort_values("num_steps").iterrows():
        same = done["num_steps"] == row["num_steps"]
        own = row["contender"].startswith("metacanary_")
        near = done[same & (is_ours != own) & (done["memory_mib"] <= (1.5 if own else 1.05) * row["memory_mib"])]
        is_fastest = not (near["metagradient_seconds"] < row["metagradient_seconds"]).any()
        if is_fastest:
            (won if own else slower).setdefault(row["contender"], []).append(str(row["num_steps"]))
    assert {"metacanary_all", "metacanary_sqrt"} <= set(won)
    for path in (tables.README, tables.GUIDE):
        text = path.read_text(encoding="utf-8")
        first, second = text[text.index("That holds of `metacanary_all`") :].split("The other way round", 1)
        for name, steps in won.items():
            assert f"`{name}` at T = {', '.join(steps)}" in first
        for name, steps in slower.items():
            assert f"`{name}` at T = {', '.join(steps)}" in second.split("is not faster than")[1]
    # Of the README's reasons: what is needed beside the states, and up to which T a scan that holds all of them fits.
    memory = done.pivot(index="contender", columns="num_steps", values="memory_mib")
    assert memory.loc["metacanary_tree2", 50].round() == 13
    fits = memory.loc["jax_scan_checkpoint"] <= 1.5 * memory.loc["metacanary_sqrt"]
    assert fits.index[fits].tolist() == [50, 100, 200, 500]


def test_documents_say_what_flax_convolutions_cost_in_a_loop():
    sweep = pd.read_csv(metagradient.RESULTS).query("setting == 'digits_lax' and num_steps == 100")
    seconds = sweep.set_index("contender")["metagradient_seconds"]
    least = seconds[~seconds.index.str.startswith("metacanary_")].min()
    for path in (tables.README, tables.GUIDE):
        text = path.read_text(encoding="utf-8")
        for name in ("metacanary_all", "metacanary_sqrt"):
            assert f"{least / seconds[name]:.1f} times as long as `{name}`" in text


def test_committed_gradients_agree():
    assert metagradient.RESULTS.exists(), "run `make bench-metagradient`"
    sweep = pd.read_csv(metagradient.RESULTS)
    assert set(sweep["status"]) <= {"ok", "memory", "time"}
    assert (sweep.loc[sweep["status"] == "ok", "relative_error"] < 1e-3).all()


def test_paper_is_the_config():
    setting = paper_cost.paper()
    assert (setting.recipe.num_steps, setting.recipe.batch_size, setting.model.width) == (588, 1000, 2.5)
    assert (setting.num_canaries, setting.num_metagradients) == (1000, 50)
    state, pixels = paper_cost.shapes(setting)
    assert pixels.shape == (1000, 32, 32, 3)
    assert paper_cost.num_bytes(state["params"]) == 4 * sum(x.size for x in jax.tree.leaves(state["params"]))


@pytest.fixture(scope="module")
def compiled_once():
    """`paper_cost.compiled`, once for each setting."""
    return functools.cache(paper_cost.compiled)


@pytest.fixture
def small_cost(monkeypatch, compiled_once):
    """A small setting of the projection, whose seconds are the microbatch's, and the settings that were timed."""
    timed = []
    monkeypatch.setattr(paper_cost, "compiled", compiled_once)
    monkeypatch.setattr(paper_cost, "NUM_IMAGES", 64)
    monkeypatch.setattr(
        paper_cost, "measured", lambda setting, repeats: timed.append(setting) or (setting.microbatch, 0.0)
    )
    recipe = dataclasses.replace(paper_cost.paper().recipe, num_steps=12, batch_size=8)
    model = models.build("convnet", num_classes=10, widths=(2,))
    return paper_cost.Setting(model=model, recipe=recipe, num_canaries=4, num_metagradients=3600), timed


def test_projection_counts_and_times_microbatches_as_such(small_cost, monkeypatch):
    setting, timed = small_cost
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    table = pd.DataFrame(paper_cost.rows(setting, measured_rows=2, repeats=1, microbatch=4))
    assert [(part.microbatch, part.recipe.batch_size) for part in timed] == [(8, 8), (4, 8)]
    is_measured = table["basis"].str.contains(": measured")
    hours = table[is_measured & (table["branching"] == 12)].set_index("microbatch")["hours"]
    assert hours.to_dict() == {8: 12 * 8, 4: 12 * 4}
    counted = table.drop_duplicates("microbatch").set_index("microbatch")
    # Half, if a loop's body were counted once. Of so few rows not quite the same: XLA's programs differ.
    for column in ("step_tflop", "vjp_tflop"):
        assert counted[column][4] == pytest.approx(counted[column][8], rel=0.2)
    assert counted["working_gib"][4] < counted["working_gib"][8]


def test_projection_times_no_microbatch_by_scaled_rows(small_cost):
    """On a CPU, where few rows stand for the whole batch."""
    setting, timed = small_cost
    table = pd.DataFrame(paper_cost.rows(setting, measured_rows=2, repeats=1, microbatch=4))
    assert [(part.microbatch, part.recipe.batch_size) for part in timed] == [(2, 2)]
    scaled = table[table["basis"].str.contains("2 of 8 rows, scaled by 4")]
    assert (scaled["microbatch"] == 8).all()
    assert scaled["step_seconds"].tolist() == [8] * 3
    assert table.groupby("microbatch").size().to_dict() == {8: 9, 4: 6}


def test_projection_is_made_under_deterministic_operations(small_cost, monkeypatch, tmp_path):
    """The flags are set before the first row; with --counts-only nothing is timed and what was measured stays."""
    setting, timed = small_cost
    called, rows, output = [], paper_cost.rows, tmp_path / "cost.csv"
    monkeypatch.setattr(paper_cost.backend, "configure", lambda: called.append("configure"))
    monkeypatch.setattr(paper_cost, "paper", lambda: setting)
    monkeypatch.setattr(paper_cost, "rows", lambda *args: called.append("rows") or rows(*args))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    arguments = ["--measured-rows", "2", "--microbatch", "4", "--output", str(output)]
    paper_cost.main(arguments)
    assert called == ["configure", "rows"]
    before = pd.read_csv(output)
    as_once = before[before["basis"].str.contains("scaled")].assign(microbatch=4)  # whole batches passed off as such
    pd.concat([before, as_once]).to_csv(output, index=False)
    paper_cost.main([*arguments, "--counts-only"])
    assert len(timed) == 1
    pd.testing.assert_frame_equal(pd.read_csv(output), before)


def test_committed_projection_counts_microbatches_alike():
    """As the README says: hours of microbatches within 1%, and none of them measured."""
    table = pd.read_csv(paper_cost.RESULTS)
    counted = table[table["basis"].str.contains("counted FLOPs")]
    hours = counted.pivot(index=["basis", "branching"], columns="microbatch", values="hours")
    np.testing.assert_allclose(hours[250], hours[1000], rtol=0.01)
    assert not hours[250].equals(hours[1000])
    assert (table.loc[table["basis"].str.contains(": measured"), "microbatch"] == 1000).all()
    readme = tables.README.read_text(encoding="utf-8")
    assert "Open: hours on an H100 or H200 from measured steps" in readme
    assert not table["basis"].str.contains("H100|H200|NVIDIA").where(table["basis"].str.contains(": measured")).any()


def test_requirements_are_pinned(root):
    lines = (root / "benchmarks" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in lines if line and not line.startswith("#"))


@pytest.mark.slow
def test_step_vjp_measures_every_alternative(monkeypatch):
    setting = ("convnet", {"widths": (2,)}, (4, 4, 1), [(4, None), (4, 2)])
    monkeypatch.setattr(step_vjp, "SETTINGS", [setting])
    measured = step_vjp.measure(turns=1)
    assert len(measured) == 2 * 2 * 2
    assert (measured[["gradient_ms", "pull_back_ms", "temporaries_mib"]] > 0).all(axis=None)
    described = measured.assign(turns=1, processor="a CPU", jax="1", date="today")
    assert metagradient_tables.modes(described).count("\n| convnet widths (2,) | 4 |") == 2


def test_metagradients_cost_what_was_aimed_at():
    """Of the committed sweep: seconds per metagradient over seconds of plain training; who does not is named."""
    sweep = pd.read_csv(metagradient.RESULTS)
    done = sweep[(sweep["status"] == "ok") & (sweep["setting"] == "digits") & (sweep["device"] == "cpu")]
    ratio = done.pivot(index="contender", columns="num_steps", values="ratio")
    assert metagradient.TARGETS.keys() == {4.5, 6.0}
    for limit, (keeps, *_) in metagradient.TARGETS.items():
        assert (ratio.loc[keeps] <= limit).all()
    said = metagradient_tables.targets(sweep)
    assert "Kept at every T by `metacanary_sqrt` (at most 4.17), `metacanary_tree8` (at most 5.56);" in said
    for name, limit in (("metacanary_sqrt_host", 4.5), ("metacanary_sqrt_disk", 4.5), ("metacanary_tree2", 6.0)):
        above = ratio.loc[name][ratio.loc[name] > limit]
        assert f"`{name}` at T = {', '.join(map(str, above.index))} (up to {above.max():.2f})" in said


@pytest.fixture(scope="module")
def small_step():
    """The batch at which contenders of DP-SGD are compared, in float32, and its examples' gradients."""
    made = dpsgd_problem.Problem(setting="digits", batch=32, copies=4, microbatch=8).check
    made = dataclasses.replace(made, dtype=np.float32)
    return made, dpsgd_problem.naive_gradients(made)


@pytest.mark.parametrize("apart", [False, True])
def test_naive_sum_clips_some_and_not_others(small_step, apart):
    problem, gradients = small_step
    norms = [np.linalg.norm(np.concatenate(parts)) for parts in gradients]
    assert min(norms) < problem.clip_norm < max(norms)
    total = dpsgd_problem.naive_sum(gradients, problem.clip_norm, per_layer=apart)
    whole = dpsgd_problem.naive_sum(gradients, 1e6, per_layer=apart)
    np.testing.assert_allclose(whole, sum(np.concatenate(parts) for parts in gradients), rtol=1e-5, atol=1e-6)
    directions = dpsgd_problem.naive_sum(gradients, 1e-3, per_layer=apart) / 1e-3
    for other in (whole, problem.clip_norm * directions):
        assert np.linalg.norm(total - other) > 1e-3 * np.linalg.norm(total)


@pytest.mark.parametrize("name", [name for name in dpsgd.CONTENDERS if name in dpsgd.NAIVE])
def test_private_contenders_clip_the_same(small_step, name):
    """To float32's rounding of parameters of size 1; Opacus adds 1e-6 to norms of size 3."""
    if name.startswith("opacus") and not importlib.util.find_spec("opacus"):
        pytest.skip("opacus is not installed: benchmarks/requirements.txt")
    problem, gradients = small_step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        contender = dpsgd_measure.build(name, problem)
        before = contender.vector()
        assert dpsgd_measure.seconds_of_steps(contender, 1) > 0
    apart = dpsgd_measure.NAIVE[dpsgd.NAIVE[name]]
    expected = dpsgd_problem.naive_sum(gradients, problem.clip_norm, per_layer=apart)
    assert np.linalg.norm(before - contender.vector() - expected) < 3e-6 * np.linalg.norm(expected)


def test_private_contenders_are_those_of_the_driver():
    of_jax = {name for name in dpsgd.CONTENDERS if not name.startswith("opacus")}
    assert of_jax == set(dpsgd_contenders.CONTENDERS)
    assert set(dpsgd.NAIVE.values()) == set(dpsgd_measure.NAIVE)
    if importlib.util.find_spec("opacus"):
        from benchmarks import dpsgd_opacus

        assert of_jax | set(dpsgd_opacus.CONTENDERS) == set(dpsgd.CONTENDERS)


def test_the_same_layers_are_a_contender_where_they_differ():
    """The demo's network has convolutions of its own; the wide one has Flax's."""
    assert dpsgd.contenders("digits", dpsgd.CONTENDERS) == list(dpsgd.CONTENDERS)
    assert dpsgd.contenders("wrn16_4", dpsgd.CONTENDERS) == [n for n in dpsgd.CONTENDERS if n != dpsgd.SAME_LAYERS]
    problem = dpsgd_problem.Problem(setting="digits", batch=1, copies=1, microbatch=1)
    assert (problem.model.as_matmul, problem.flax_model.as_matmul) == (True, False)


def test_every_case_has_microbatches_that_divide_it():
    for device, listed in dpsgd.CASES.items():
        for setting, batch, copies in listed:
            sizes = dpsgd.microbatches(setting, device, batch, copies)
            assert len(sizes) >= 3
            assert all(batch % size == 0 for size in sizes)
            assert copies in dpsgd_problem.SETTINGS[setting].typical_norm


@pytest.mark.parametrize(
    ("code", "status", "note"),
    [
        ("import time; time.sleep(60)", "time", "more than 1 s"),
        ("import time; x = bytearray(b'1' * 2**28); time.sleep(60)", "memory", "more than 0.125 GiB"),
        ("raise ValueError('no such thing')", "error", "ValueError: no such thing"),
    ],
)
def test_worker_stops_what_takes_too_much(code, status, note):
    worker = dpsgd.Worker([sys.executable, "-c", code], {}, 2**27, 1.0)
    with pytest.raises(dpsgd.Stopped, match=note) as stopped:
        worker.answer()
    assert stopped.value.status == status


def test_worker_answers_in_turn():
    code = "import json\nwhile True: print(json.dumps({'step_seconds': 2 * int(input())}), flush=True)"
    worker = dpsgd.Worker([sys.executable, "-c", code], {}, 2**30, 30.0)
    assert [worker.ask(3), worker.ask(5)] == [6, 10]
    worker.close()
    assert worker.process.returncode is not None


def step_rows(seconds, **case):
    """A made-up case: seconds of a step by contender, None for one that was stopped."""
    shared = {"setting": "wrn16_4", "device": "gpu", "batch": 4096, "copies": 16, "seed": 1, "rounds": 3, **case}
    shared |= {"processor": "a GPU", "versions": "jax 1", "date": "today"}
    return [
        {**shared, "contender": name, "status": "memory"}
        if value is None
        else {**shared, "contender": name, "status": "ok", "step_seconds": value, "step_min": value, "step_max": value}
        | {"examples_per_second": 4096 / value, "memory_mib": 100 * value, "over_sgd": value, "microbatch": 64}
        for name, value in seconds.items()
    ]


def test_step_tables_tell_ratios_and_hours():
    seconds = {"sgd": 1.0, "metacanary_flat": 2.0, "metacanary_per_layer": 1.25, "jax_privacy": 3.0}
    rows = step_rows(seconds | {"opacus_hooks": None})
    text = dpsgd_tables.steps(pd.DataFrame(rows, columns=dpsgd.COLUMNS))
    assert "metacanary's convolutions" not in text
    same = step_rows(seconds | {"jax_privacy_same_layers": 2.5})
    of_same = dpsgd_tables.steps(pd.DataFrame(same, columns=dpsgd.COLUMNS))
    assert "takes 1.50 times as many examples per second as `jax_privacy`" in of_same
    assert "1.25 times is left when `jax_privacy_same_layers` is given metacanary's convolutions" in of_same
    assert "takes 1.50 times as many examples per second as `jax_privacy`" in text
    assert "per-layer clipping costs 1.25 times a step without privacy" in text
    assert "| `opacus_hooks` | memory |" in text
    assert "| `metacanary_flat` | 1.39 | 0.47 |" in text  # 2,500 and 850 steps of 2 s
    other = dpsgd_tables.steps(pd.DataFrame(step_rows({"sgd": 1.0}, copies=1), columns=dpsgd.COLUMNS))
    assert "hours" not in other
    assert "fastest peer" not in other


def test_merged_replaces_a_case_as_a_whole(tmp_path):
    path = tmp_path / "dpsgd.csv"
    for rows in (
        step_rows({"sgd": 1.0, "jax_privacy": 3.0}),
        step_rows({"sgd": 2.0}, copies=1),
        step_rows({"sgd": 5.0}),
    ):
        dpsgd.merged(path, rows).to_csv(path, index=False)
    table = pd.read_csv(path)
    assert list(table.columns) == dpsgd.COLUMNS
    assert sorted(zip(table["copies"], table["contender"], table["step_seconds"], strict=True)) == [
        (1, "sgd", 2.0),
        (16, "sgd", 5.0),
    ]


@pytest.mark.slow
@pytest.mark.skipif(not measure.STATUS.exists(), reason="peak memory is read from Linux's /proc")
def test_dpsgd_main_measures_in_turns(tmp_path):
    output = tmp_path / "dpsgd.csv"
    arguments = ["--quick", "--min-seconds", "0.01", "--output", str(output)]
    assert dpsgd.main([*arguments, "--contenders", "sgd", "metacanary_flat", "jax_privacy"]) == 0
    table = pd.read_csv(output).set_index("contender")
    assert (table["status"] == "ok").all()
    assert (table["rounds"] == 2).all()
    assert (table.loc[["metacanary_flat", "jax_privacy"], "relative_error"] < 1e-12).all()
    assert table.loc["sgd", "over_sgd"] == 1
    assert (table["step_min"] <= table["step_seconds"]).all()
    assert np.allclose(table["examples_per_second"] * table["step_seconds"], 32, rtol=1e-5)
    assert (table[["memory_mib", "compile_seconds"]] > 0).all(axis=None)


@pytest.fixture(scope="module")
def private_steps():
    """The committed steps of DP-SGD."""
    assert dpsgd.RESULTS.exists(), f"{dpsgd.RESULTS} is not there: run `make bench-dpsgd`"
    return pd.read_csv(dpsgd.RESULTS)


def test_readme_holds_the_committed_steps(private_steps):
    readme = tables.README.read_text(encoding="utf-8")
    generated = {"dpsgd": dpsgd_tables.steps(private_steps)}
    assert tables.filled(readme, generated) == readme, "run `python -m benchmarks.tables`"


def test_committed_sums_of_clipped_gradients_agree(private_steps):
    """In float64; metacanary's thresholds of layers are float32, and Opacus adds 1e-6 to norms."""
    done = private_steps[(private_steps["status"] == "ok") & private_steps["contender"].isin(dpsgd.NAIVE)]
    assert done["relative_error"].notna().all()
    assert (done["relative_error"] < 1e-6).all()


@pytest.mark.parametrize("channel", channels.CHANNELS, ids=lambda channel: channel.name)
def test_channels_flip_fair_coins(channel):
    scores, included = channel.draw(np.random.default_rng(1), 50, 200)
    again, _ = channel.draw(np.random.default_rng(1), 50, 200)
    assert scores.shape == included.shape == (50, 400 if channel.paired else 200)
    assert included.dtype == bool
    np.testing.assert_array_equal(scores, again)
    values = make_games(scores, included, channel.pairs(200)).values
    assert len(np.unique(np.abs(values))) == values.size  # no ties
    first = included[:, ::2] if channel.paired else included
    assert abs(first.mean() - 0.5) < 4 * 0.5 / math.sqrt(first.size)
    assert abs(np.corrcoef(first[:, :-1].ravel(), first[:, 1:].ravel())[0, 1]) < 4 / math.sqrt(first.size)
    pairs = channel.pairs(200)
    if channel.paired:
        assert all((included[:, pairs == pair].sum(axis=1) == 1).all() for pair in range(200))
    else:
        assert pairs is None


def told_right(scores, included):
    """Of told bits, the share of runs' coins that are told truly, [R]."""
    return ((scores > 0.5) == included).mean(axis=1)


@pytest.mark.parametrize("mu", [0.0, 0.5, 2.0])
def test_gaussian_channel_separates_scores_by_mu(mu):
    scores, included = channels.gaussian(np.random.default_rng(2), 100, 1000, mu=mu)
    for coin, mean in ((True, mu), (False, 0.0)):
        assert stats.kstest(scores[included == coin], "norm", args=(mean, 1)).pvalue > 1e-3


def test_paired_gaussian_channel_is_sqrt_two_mu_gdp():
    """Gaps have mean +-mu and deviation sqrt 2: sqrt(2) mu apart in units of it."""
    scores, included = channels.paired_gaussian(np.random.default_rng(3), 100, 1000, mu=1.0)
    gaps, first = scores[:, ::2] - scores[:, 1::2], included[:, ::2]
    apart = (gaps[first].mean() - gaps[~first].mean()) / gaps[first].std()
    assert apart == pytest.approx(math.sqrt(2), abs=4 * 2 / math.sqrt(gaps.size))
    assert channels.BY_NAME["paired_gaussian_1"].epsilon == accounting.gaussian_epsilon(math.sqrt(2), channels.DELTA)


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_randomised_response_tells_the_truth_as_often_as_it_may(epsilon):
    right = told_right(*channels.randomised_response(np.random.default_rng(4), 100, 1000, epsilon=epsilon)).mean()
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    assert abs(right - truth) < 4 * math.sqrt(truth * (1 - truth) / 1e5)
    at_delta = channels.randomised_response_epsilon(epsilon, 1e-5)
    assert truth - math.exp(at_delta) * (1 - truth) == pytest.approx(1e-5, rel=1e-6)


def test_shared_level_channel_is_exactly_gdp_in_each_coin():
    """Its hockey-stick divergence at the claimed epsilon, integrated over the level, is delta."""
    epsilon = channels.BY_NAME["shared_level_1"].epsilon

    def excess(level):
        truly = special.expit(level)
        density = stats.norm.pdf(level - 0.5) + stats.norm.pdf(level + 0.5)
        return density * max(0.0, truly - math.exp(epsilon) * (1 - truly))

    divergence, _ = integrate.quad(excess, epsilon, 20, epsabs=1e-14)
    assert divergence == pytest.approx(channels.DELTA, rel=1e-8)
    right = told_right(*channels.shared_level(np.random.default_rng(5), 20_000, 50, mu=1.0))
    assert right.mean() == pytest.approx(stats.norm.cdf(0.5), abs=4 * right.std() / math.sqrt(len(right)))
    assert right.std() > 1.5 * math.sqrt(right.mean() * (1 - right.mean()) / 50)  # coins of a run go together


def test_mixture_tells_all_or_nothing():
    right = told_right(*channels.mixture(np.random.default_rng(6), 4000, 100, leak=0.162))
    told = right == 1.0
    assert told.mean() == pytest.approx(0.162, abs=4 * math.sqrt(0.162 * 0.838 / 4000))
    assert right[~told].mean() == pytest.approx(0.5, abs=4 * 0.05 / math.sqrt((~told).sum()))
    assert channels.BY_NAME["mixture"].delta == 0.162


def pairs_told(scores, included):
    """Of pairs, the size of the gap and whether its sign tells the coin, both [R, m]."""
    gaps = scores[:, ::2] - scores[:, 1::2]
    return np.abs(gaps), (gaps > 0) == included[:, ::2]


@pytest.mark.parametrize(("told", "delta"), [(25, 0.01), (100, 0.05)])
def test_partial_leak_tells_some_or_none(told, delta):
    rng = np.random.default_rng(8)
    sure, right = pairs_told(*channels.partial_leak(rng, 4000, 100, epsilon=1.0, told=told, delta=delta))
    leaked = sure > 1.5
    assert set(leaked.sum(axis=1)) <= {0, told}
    assert right[leaked].all()
    leaks, chance = leaked.any(axis=1).mean(), delta * 100 / told
    assert abs(leaks - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)
    assert leaked.mean() == pytest.approx(delta, rel=0.4)
    truth = math.e / (1 + math.e)
    assert right[~leaked].mean() == pytest.approx(truth, abs=4 * math.sqrt(truth * (1 - truth) / 3e5))


def test_leaks_are_audited_where_their_bound_just_rejects():
    """As many right guesses as are told reject epsilon 1 at the channel's delta, and not at one that is 20% larger."""
    for size in (100, 1000, 5000):
        for name, coins, told in (
            ("quarter_leak", size, size // 4),
            ("announced_leak", size // 2, channels.announced_guesses(size)),
        ):
            delta = channels.BY_NAME[name].delta_at(size)
            assert bounds_fdp.fdp_epsilon_delta(coins, told, told, delta=delta) > 1.0
            assert bounds_fdp.fdp_epsilon_delta(coins, told, told, delta=1.2 * delta) < 1.0
    assert [channels.announced_guesses(size) for size in (100, 1000, 5000)] == [13, 16, 20]
    assert channels.BY_NAME["partial_leak"].delta_at(1000) == pytest.approx(9.49e-4, rel=1e-3)


def test_announced_leak_speaks_to_the_halves_of_holdout():
    """The law of each part, by which it is (1, delta)-DP: what is told, turned, noise, randomised response."""
    size, few = 1000, 16
    scores, included = channels.announced_leak(np.random.default_rng(9), 4000, size, epsilon=1.0)
    sure, right = pairs_told(scores, included)
    ranks = make_games(np.zeros(size), np.zeros(size)).split(0)  # its halves, in the order of `ties`
    order = np.random.default_rng(0).permutation(size)
    first, second = order[: size // 2], order[size // 2 :]
    for half, part in zip((first, second), ranks, strict=True):
        np.testing.assert_array_equal(part.ties, make_games(np.zeros(size), np.zeros(size)).ties[half])
    told = sure > 2.5
    leaks = told.any(axis=1)
    chance = channels.announced_delta(size) * 500 / few
    assert leaks.mean() == pytest.approx(chance, abs=4 * math.sqrt(chance / 4000))
    for half in (first, second):
        assert (told[leaks][:, half].sum(axis=1) == few).all()
        assert told[:, half].mean() == pytest.approx(channels.announced_delta(size), rel=0.4)
    assert right[told].all()
    truth = math.e / (1 + math.e)

    def share(runs, coins):
        chosen = ~told[runs][:, coins]
        return right[runs][:, coins][chosen].mean()

    assert share(leaks, first) == pytest.approx(1 - truth, abs=0.01)
    assert share(leaks, second) == pytest.approx(0.5, abs=0.01)
    assert share(~leaks, first[:125]) == pytest.approx(0.5, abs=0.01)
    assert share(~leaks, first[125:]) == pytest.approx(truth, abs=0.01)
    assert share(~leaks, second) == pytest.approx(truth, abs=0.01)
    assert (sure[~leaks][:, first[:125]].min(axis=1) > sure[~leaks][:, first[125:]].max(axis=1)).all()


def test_channels_satisfy_what_they_are():
    satisfied = {
        channel.name: [a for a in ("worst_case", "family", "product", "family+product") if channel.satisfies(a)]
        for channel in channels.CHANNELS
    }
    assert satisfied["gaussian_1"] == ["worst_case", "family", "product", "family+product"]
    assert satisfied["randomised_response_4"] == ["worst_case", "product"]
    assert satisfied["shared_level_1"] == ["worst_case", "family"]
    for name in ("mixture", "partial_leak", "quarter_leak", "announced_leak"):
        assert satisfied[name] == ["worst_case"]
    assert not any(channel.satisfies(a) for channel in channels.CHANNELS for a in ("none", "credible"))


def test_best_threshold_is_the_most_accurate():
    rng = np.random.default_rng(7)
    for size in (2, 5, 40):
        included = rng.random(size) < 0.5
        scores = rng.normal(size=size) + included
        found = audit_peers.best_threshold(scores, included)
        accuracy = [((scores >= value) == included).sum() for value in [*scores, found, np.inf]]
        assert accuracy[-2] >= max(accuracy[:-2])


def test_methods_are_labelled_by_what_they_assume():
    labels = {(m.package, m.method, m.protocol): m.assumption for m in audit_peers.METHODS}
    assert len(labels) == len(audit_peers.METHODS)
    assert (
        labels["metacanary", "fdp_gaussian", "corrected"] == labels["jax-privacy", "epsilon_one_run_fdp", "Bonferroni"]
    )
    assert labels["metacanary", "fdp_gaussian", "holdout"] == labels["jax-privacy", "epsilon_one_run_fdp", "Split"]
    assert (
        labels["metacanary", "steinke", "holdout"]
        == labels["jax-privacy", "epsilon_one_run", "MultiSplit"]
        == "product"
    )
    assert [key[2] for key in labels if key[1] == "gaussian_auroc"] == ["fixed"]


@pytest.fixture
def played():
    """A made-up calibration: two channels, three protocols, two auditors; 100 games each."""
    rows = [
        {"channel": channel, "num_canaries": 1000, "protocol": protocol, "auditor": auditor, "rate": rate}
        | {"assumption": assumption, "holds": holds, "keeps_level": rate < 0.1, "standard_error": 0.01, "games": 100}
        | {"played_again": False, "significance": 0.05, "true_epsilon": 1.0, "mean_share": 0.5}
        | {"seed": 0, "processor": "a CPU", "date": "today"}
        for channel, protocol, auditor, assumption, holds, rate in (
            ("ignore", "corrected", "steinke", "worst_case", True, 0.03),
            ("ignore", "fixed_quarter", "steinke", "worst_case", True, 0.04),
            ("ignore", "holdout", "steinke", "product", True, 0.06),
            ("ignore", "paper", "steinke", "none", False, 0.7),
            ("mixture", "corrected", "steinke", "worst_case", True, 0.02),
            ("mixture", "holdout", "steinke", "product", False, 0.2),
            ("mixture", "corrected", "order_statistic", "product", False, 0.3),
            ("mixture", "holdout", "order_statistic", "product", False, 0.4),
            ("ignore", "corrected", "order_statistic", "product", True, 0.01),
            ("gaussian_1", "corrected", "credible_rates", "credible", False, 0.5),
        )
    ]
    return pd.DataFrame(rows)


def test_tables_tell_levels_by_assumption(played):
    lines = audit_tables.highest_alarms(played).splitlines()
    assert "| `steinke` | fixed, corrected, surrogate | `worst_case` | 4.0 ± 1.0%, `ignore` |" in lines
    assert "| `steinke` | holdout, median | `product` | 6.0 ± 1.0%, `ignore` |" in lines
    assert not any("credible" in line for line in lines)
    assert "a CPU, seed 0, today; games: 100 at m = 1000" in lines[0]


def test_tables_tell_what_breaks(played):
    lines = audit_tables.broken(played).splitlines()
    assert "| `mixture` | not family, product | `order_statistic` 30, `steinke` 20 under `holdout` |" in lines
    assert "| `ignore` | protocol `paper` | `steinke` 70 |" in lines
    assert "| `gaussian_1`, m = 1000 | no level is claimed | `credible_rates` 50 |" in lines
    cells = audit_tables.alarms_by_channel(played)
    assert "| mixture | holdout, median | 20.0 * | 40.0 * |" in cells
    assert "| mixture | fixed, corrected, surrogate | 2.0 | 30.0 * |" in cells


def test_halves_part_the_canaries():
    first, second = audit_peers.halves(11, 3)
    assert (len(first), len(second)) == (5, 6)
    assert sorted([*first, *second]) == list(range(11))


@pytest.mark.parametrize("package", ["jax-privacy", "metacanary", "privacy-estimates", "opake-auditing"])
def test_peers_are_measured(package):
    chosen = [i for i, m in enumerate(audit_peers.METHODS) if m.package == package and audit_peers.num_games(m) > 400]
    if not importlib.util.find_spec(audit_peers.METHODS[chosen[0]].module):
        pytest.skip(f"{package} is not installed: benchmarks/requirements.txt")
    for index in chosen:
        row = audit_peers.measured((index, "gaussian_2", 2))
        assert set(row) == set(audit_peers.COLUMNS)
        assert row["games"] == 2
        assert row["mean_bound"] > 1.0
        assert row["seconds"] > 0


def test_jax_privacys_bounds_are_its_own():
    from jax_privacy import auditing

    (games, _), *_ = calibration.batches(channels.BY_NAME["gaussian_2"], 100, 1)
    scores, included = games.values[0], games.coins[0]
    auditor = auditing.CanaryScoreAuditor(scores[included], scores[~included])
    split = auditing.Split(seed=5)
    for method in ("epsilon_one_run", "epsilon_clopper_pearson"):
        expected = getattr(auditor, method)(0.05, 1e-5, threshold_strategy=split)
        assert audit_peers.jax_privacy(scores, included, 5, method=method, strategy="Split") == expected


@pytest.fixture(scope="module")
def audits():
    """The committed results about audits, in the order of `tables`."""
    paths = [module.RESULTS for module in (calibration, audit_peers, audit_speed)]
    for path in paths:
        assert path.exists(), f"{path} is not there: run `make bench-audits`"
    return [pd.read_csv(path) for path in paths]


def test_documents_hold_the_committed_audits(audits):
    for path, generated in (
        (tables.README, tables.audit_sections(*audits[:2])),
        (tables.AUDITING, tables.auditing_sections(*audits)),
    ):
        text = path.read_text(encoding="utf-8")
        assert tables.filled(text, generated) == text, "run `python -m benchmarks.tables`"


def test_committed_bounds_are_at_least_as_high_as_the_peers(audits):
    """Within each assumption the best of ours against the best of theirs, of those that keep their level on all
    channels; two standard errors are forgiven."""
    peers = audits[1]
    methods = {(method.package, method.method, method.protocol) for method in audit_peers.METHODS}
    assert len(peers) == len(methods) * len(audit_peers.CHANNELS)
    keeping = peers.groupby(audit_peers.KEY[:3])["keeps_level"].transform("all")
    assert keeping[(peers["package"] == audit_peers.OURS) & peers["holds"]].all()
    compared = peers[keeping & peers["holds"] & (peers["channel"] != "ignore")]
    for (assumption, channel), part in compared.groupby(["assumption", "channel"]):
        ours = part["package"] == audit_peers.OURS
        if ours.all():
            continue
        mine, theirs = (rows.loc[rows["mean_bound"].idxmax()] for rows in (part[ours], part[~ours]))
        error = math.hypot(mine["mean_error"], theirs["mean_error"])
        assert mine["mean_bound"] >= theirs["mean_bound"] - 2 * error, (assumption, channel, theirs["method"])


def test_committed_bounds_equal_the_peers_and_are_faster(audits):
    """To 1e-6, at which the peer's root finding stops."""
    counted = audits[2][audits[2]["ratio"].notna()]
    assert len(counted) == len(audit_speed.COUNTS)
    assert (counted["difference"] <= 1e-6).all()
    assert (counted["ratio"] > 1).all()
    assert (counted.loc[counted["task"] == "fdp_gaussian", "ratio"] > 10).all()


def test_speed_compares_the_same_bound():
    row = audit_speed.of_counts("fdp_gaussian", 100, 50, 40, turns=1)
    assert row["difference"] <= 1e-6
    assert row["epsilon_lower"] > 0.5
    assert row["ratio"] == row["peer_seconds"] / row["seconds"]


@pytest.mark.slow
def test_speed_measures_bounds_and_audits():
    table = audit_speed.measure(turns=1, size=60)
    assert list(table.columns) == audit_speed.COLUMNS
    assert len(table) == len(audit_speed.COUNTS) + 6
    assert (table["seconds"] > 0).all()
    assert audit_tables.faster(table).count("\n| audit, ") == 6


def test_ghost_norms_agree_and_the_committed_rule_chose_the_faster_way():
    settings = [("convnet", {"widths": (2, 32), "mean": (0.5,), "std": (0.5,)}, (4, 4, 1))]
    table = ghost_norms.measure(1, settings)
    assert table["chosen"].tolist() == ["gradient", "ghost"]
    assert (table[["gradient_us", "ghost_us"]] > 0).all(axis=None)
    committed = pd.read_csv(ghost_norms.RESULTS)
    clear = committed[(np.log(committed["gradient_us"] / committed["ghost_us"]).abs() > np.log(1.2))]
    assert len(clear) >= 6
    assert (clear["chosen"] == clear["faster"]).all()


def test_dirac_bounds_rise_with_coins_and_stay_below_the_accounted():
    measured = dirac_bounds.measure({60: 3, 600: 2}, seed=5)
    assert len(measured) == 4 * 2 * 2
    by = measured.set_index(["auditor", "num_coins", "observer"])["epsilon"]
    assert by.groupby("observer").sum()["all"] > by.groupby("observer").sum()["last"]
    for auditor in dirac_bounds.AUDITORS:
        assert 0 <= by[auditor, 60, "all"] < by[auditor, 600, "all"] < dirac_bounds.EPSILON
        assert by[auditor, 600, "last"] <= by[auditor, 600, "all"] + 0.5


def test_dirac_bounds_audit_no_game_with_its_own_coins(monkeypatch):
    """Guesses chosen on what they are then counted on would be the paper's protocol."""
    seen, audit = [], dirac_bounds.audits.audit
    monkeypatch.setattr(
        dirac_bounds.audits, "audit", lambda *game, **kw: seen.append((game, kw["surrogates"])) or audit(*game, **kw)
    )
    dirac_bounds.measure({60: 2}, seed=5)
    assert len(seen) == 4
    for (scores, coins), (other_scores, other_coins) in seen:
        assert not np.array_equal(coins, other_coins)
        assert not np.array_equal(scores, other_scores)
    alone, sigma = dirac_bounds.game(1, 4000, 1.9), {"noise_multiplier": 1.9, "sampling_prob": 0.2}
    observed = dirac.observations(1, alone[0], num_others=0, noise_multiplier=1.9, **dirac_bounds.MECHANISM)
    np.testing.assert_array_equal(alone[1]["all"], dirac.all_iterates(observed, **sigma))
    np.testing.assert_array_equal(alone[1]["last"], dirac.last_iterate(observed))


def test_dirac_bounds_in_the_guide_are_those_measured():
    committed = pd.read_csv(dirac_bounds.RESULTS)
    assert committed.groupby("num_coins")["games"].first().to_dict() == dirac_bounds.GAMES
    guide = tables.LEDGER.read_text(encoding="utf-8")
    assert tables.filled(guide, {"dirac_bounds": dirac_bounds.table(committed)}) == guide


def test_runs_together_are_measured_beside_series(tmp_path):
    """Two steps of SGD, one run after the other and two at once."""
    measured = runs_together.measure(tmp_path, num_steps=2, repeats=1, together=[2], algorithms=["sgd"])
    assert measured["together"].tolist() == [0, 2]
    assert (measured[["ms", "cpu_ms", "memory_mib"]] > 0).all(axis=None)
    assert (measured["ms_min"] <= measured["ms"]).all()
    assert measured["relative_error"][0] == 0
    assert measured["relative_error"][1] < 1e-5


def test_runs_together_refuse_a_run_that_is_not_that_of_series(tmp_path, monkeypatch):
    """As where the coins of others would reach it."""
    together = runs_together.training_together.initial_state

    def turned(recipe, model, pool, included, **options):
        return together(recipe, model, pool, ~included, **options)

    monkeypatch.setattr(runs_together.training_together, "initial_state", turned)
    with pytest.raises(ValueError, match="sgd, 2 at once: a run's parameters differ by"):
        runs_together.measure(tmp_path, num_steps=2, repeats=1, together=[2], algorithms=["sgd"])


def test_table_of_runs_together_compares_with_series_of_the_same_algorithm():
    rows = [("sgd", 0, 2.0), ("sgd", 4, 5.0), ("dpsgd", 0, 10.0), ("dpsgd", 4, 5.0)]
    measured = pd.DataFrame(rows, columns=["algorithm", "together", "cpu_ms"]).assign(
        ms=1.0, memory_mib=3.0, relative_error=2e-7, num_steps=8, repeats=3, processor="p", jax="j", date="d"
    )
    on_cpu = runs_together.table(measured.assign(device="cpu"))
    assert "| sgd | 4 at once | 5.00 | 2.50 | 3 |" in on_cpu
    assert "| dpsgd | 4 at once | 5.00 | 0.50 | 3 |" in on_cpu
    assert "| dpsgd | 4 at once | 1.00 | 1.00 | 3 |" in runs_together.table(measured.assign(device="gpu"))


def test_readme_holds_the_committed_runs_together():
    committed = pd.read_csv(runs_together.RESULTS)
    assert set(committed["together"]) == {0, *runs_together.TOGETHER}
    assert committed["relative_error"].max() < 1e-4
    readme = tables.README.read_text(encoding="utf-8")
    assert tables.filled(readme, {"runs_together": runs_together.table(committed)}) == readme
