"""Tests of the benchmarks, with the contenders that need no other packages than the project's."""

import sys

import jax
import numpy as np
import pandas as pd
import pytest

from benchmarks import jax_contenders, measure, metagradient, paper_cost, plot_metagradient, problem, step_vjp, tables

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
    with pytest.raises(ValueError, match="setting: got 'imagenet', expected one of digits, resnet9"):
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
    assert "| jax_scan | 0.50 | memory |" in tables.markdown(tables.by_num_steps(table, "metagradient_seconds", 2))


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


def test_readme_holds_the_committed_results():
    paths = [module.RESULTS for module in (metagradient, paper_cost, step_vjp)]
    for path in paths:
        assert path.exists(), f"{path} is not there: run `make bench-metagradient`"
    generated = tables.sections(*map(pd.read_csv, paths))
    readme = tables.README.read_text(encoding="utf-8")
    assert tables.filled(readme, generated) == readme, "run `python -m benchmarks.tables`"
    guide = tables.GUIDE.read_text(encoding="utf-8")
    assert tables.filled(guide, {"cost": tables.cost(pd.read_csv(paths[0]))}) == guide


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
    assert tables.modes(described).count("\n| convnet widths (2,) | 4 |") == 2


def test_metagradients_cost_what_was_aimed_at():
    """Of the committed sweep: seconds per metagradient over seconds of plain training, states on the device."""
    sweep = pd.read_csv(metagradient.RESULTS)
    done = sweep[(sweep["status"] == "ok") & (sweep["setting"] == "digits") & (sweep["device"] == "cpu")]
    ratio = done.pivot(index="contender", columns="num_steps", values="ratio")
    assert (ratio.loc["metacanary_sqrt"] <= 4.5).all()
    assert (ratio.loc["metacanary_tree8"] <= 6.0).all()
