"""Tests of metacanary.store."""

import concurrent.futures
import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pandas as pd
import pytest

import metacanary
from metacanary import store

ARRAYS = {
    "params/conv/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "file": np.array([True, False]),
    "label": np.array(3, np.int8),
    "empty": np.zeros((0, 4)),
    "transposed": np.arange(6).reshape(2, 3).T,
    "name": np.array(["a", "longer"]),
}
FRAME = pd.DataFrame(
    {"value": [0.1, np.inf, np.nan, 5e-324], "method": ["NA", "None", "x,y", "ε"], "included": [1, 0, 1, 0]}
)
# Each writes far more than 64 KiB to the path it is given.
WRITERS = {
    "npz": lambda path: store.write_npz(path, {"x": np.zeros(100_000)}, {}),
    "csv": lambda path: store.write_csv(path, pd.DataFrame({"x": np.arange(100_000)}), {}),
    "text": lambda path: store.write_text(path, "x" * 500_000),
    "json": lambda path: store.write_json(path, list(range(100_000))),
    "tree": lambda path: store.write_tree(path, {"x": jnp.zeros(100_000)}, {}),
}


@contextlib.contextmanager
def full_disk():
    """Lets every file end at 64 KiB, as a full disk would."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def assert_same_trees(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if isinstance(b, jax.Array) and jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert type(a) is type(b) or isinstance(b, np.generic)
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("before", [None, b"old content"])
def test_atomic_full_disk_changes_nothing(tmp_path, writer, before):
    path = tmp_path / "result.npz"
    if before is not None:
        path.write_bytes(before)
    with full_disk(), pytest.raises(OSError, match="too large"):
        WRITERS[writer](path)
    assert (path.read_bytes() if path.exists() else None) == before
    assert not list(tmp_path.glob(".*"))


def test_atomic_error_in_block_leaves_nothing(tmp_path):
    def interrupted():
        with store.atomic(tmp_path / "a" / "b.txt") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list((tmp_path / "a").iterdir())


def test_atomic_reader_sees_whole_files_of_two_writers(tmp_path):
    path = tmp_path / "x.txt"
    contents = ["a" * 200_000, "b" * 300_000]
    store.write_text(path, contents[0])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(lambda c=c: [store.write_text(path, c) for _ in range(20)]) for c in contents]
        while not all(writer.done() for writer in writers):
            assert path.read_text() in contents
        for writer in writers:
            writer.result()
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_atomic_permissions_follow_umask(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    store.write_text(tmp_path / "x", "")
    assert (tmp_path / "x").stat().st_mode == plain.stat().st_mode


def test_write_npz_round_trip(tmp_path):
    path = tmp_path / "new" / "x.npz"
    store.write_npz(path, ARRAYS, {"seed": np.int64(3), "epsilon": float("inf")})
    arrays, provenance = store.read_npz(path)
    assert provenance == store.read_provenance(path) == {"seed": 3, "epsilon": float("inf")}
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)
    with np.load(path, allow_pickle=False) as file:  # and NumPy alone reads it
        np.testing.assert_array_equal(file["file"], ARRAYS["file"])


def test_write_npz_bytes_depend_on_arguments_alone(tmp_path, monkeypatch):
    store.write_npz(tmp_path / "a.npz", ARRAYS, {"x": 1, "y": 2})
    monkeypatch.setattr("time.time", lambda: 2e9)
    store.write_npz(tmp_path / "b.npz", ARRAYS, {"y": 2, "x": 1})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize(
    ("arrays", "match"),
    [({"provenance": np.zeros(1)}, "reserved"), ({"x": np.array([{}])}, r"arrays\['x'\] has dtype object")],
)
def test_write_npz_refuses(tmp_path, arrays, match):
    with pytest.raises(ValueError, match=match):
        store.write_npz(tmp_path / "x.npz", arrays, {})
    assert not list(tmp_path.iterdir())


def damaged(path, kind):
    """Damages an npz file."""
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped":
        at = content.index(ARRAYS["params/conv/kernel"].tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif kind == "pickled":
        np.savez(path, x=np.array([{}]), allow_pickle=True)
    elif kind == "foreign":
        np.savez(path, x=np.zeros(1))
    else:
        np.save(path.with_suffix(".npy"), np.zeros(1))
        path.with_suffix(".npy").rename(path)


@pytest.mark.parametrize("kind", ["cut", "empty", "flipped", "pickled", "foreign", "npy"])
def test_read_npz_refuses_damaged(tmp_path, kind):
    path = tmp_path / "x.npz"
    store.write_npz(path, ARRAYS, {})
    damaged(path, kind)
    with pytest.raises(ValueError, match=r"x\.npz' is damaged or no result file"):
        store.read_npz(path)


def test_read_npz_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        store.read_npz(tmp_path / "x.npz")


def test_write_csv_round_trip(tmp_path):
    store.write_csv(tmp_path / "x.csv", FRAME, {"seed": 1})
    pd.testing.assert_frame_equal(store.read_csv(tmp_path / "x.csv"), FRAME, check_exact=True)
    assert store.read_provenance(tmp_path / "x.csv") == {"seed": 1}
    assert store.read_json(tmp_path / "x.provenance.json") == {"seed": 1}


def test_write_csv_floats_are_exact(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**64, 10_000, np.uint64).view(np.float64)
    frame = pd.DataFrame({"x": bits[np.isfinite(bits)]})
    store.write_csv(tmp_path / "x.csv", frame, {})
    np.testing.assert_array_equal(store.read_csv(tmp_path / "x.csv")["x"].to_numpy(), frame["x"].to_numpy())


def test_write_csv_bytes_depend_on_frame_alone(tmp_path):
    store.write_csv(tmp_path / "a.csv", FRAME, {"wall_seconds": 1.0})
    store.write_csv(tmp_path / "b.csv", FRAME.set_index(pd.Index([3, 1, 2, 0])), {"wall_seconds": 2.0})
    expected = 'value,method,included\n0.1,NA,1\ninf,None,0\n,"x,y",1\n5e-324,ε,0\n'
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == expected
    assert (tmp_path / "b.csv").read_text(encoding="utf-8") == expected


def test_write_csv_refuses_duplicate_columns(tmp_path):
    with pytest.raises(ValueError, match="distinct"):
        store.write_csv(tmp_path / "x.csv", pd.DataFrame([[1, 2]], columns=["a", "a"]), {})


# What a training state may hold.
TREE = {
    "params": {"kernel": jnp.ones((2, 3), jnp.bfloat16), "a/b": jnp.arange(3)},
    "a": [np.arange(3.0), np.float32(2)],
    "key": jax.random.key(3),
    "rbg": jax.random.split(jax.random.key(1, impl="rbg"), 2),
    "step": 7,
    "rate": 0.1,
    "done": True,
    "none": None,
    "tuple": (jnp.zeros((), jnp.uint32),),
}


def test_write_tree_round_trip(tmp_path):
    store.write_tree(tmp_path / "x.npz", TREE, {"seed": 1})
    assert_same_trees(store.read_tree(tmp_path / "x.npz", TREE), TREE)
    assert store.read_provenance(tmp_path / "x.npz") == {"seed": 1}


def test_read_tree_accepts_abstract_tree(tmp_path):
    tree = {"params": TREE["params"], "key": TREE["key"], "rbg": TREE["rbg"]}
    store.write_tree(tmp_path / "x.npz", tree, {})
    assert_same_trees(store.read_tree(tmp_path / "x.npz", jax.eval_shape(lambda: tree)), tree)


@pytest.mark.parametrize(
    ("like", "match"),
    [
        (
            {"x": jnp.zeros(3), "y": 1},
            r"holds \['float32', \[2\]\] at \"\['x'\]\", expected \['float32', \[3\]\]",
        ),
        ({"x": jnp.zeros(2, jnp.int32), "y": 1}, "int32"),
        ({"x": jnp.zeros(2), "y": True}, "bool"),
        ({"x": jnp.zeros(2)}, "expected None"),
        ({"x": jnp.zeros(2), "y": 1, "z": 1}, "holds None"),
    ],
)
def test_read_tree_refuses_other_structure(tmp_path, like, match):
    store.write_tree(tmp_path / "x.npz", {"x": jnp.zeros(2), "y": 1}, {})
    with pytest.raises(ValueError, match=match):
        store.read_tree(tmp_path / "x.npz", like)


def test_read_tree_refuses_other_npz(tmp_path):
    store.write_npz(tmp_path / "x.npz", {"x": np.zeros(2)}, {})
    with pytest.raises(ValueError, match="holds None"):
        store.read_tree(tmp_path / "x.npz", {"x": np.zeros(2)})


def test_provenance_names_versions_and_device(tmp_path):
    made = store.provenance(config_digest="a", code_digest="b", seed=1, wall_seconds=2.5, dataset="digits")
    assert made["versions"]["metacanary"] == metacanary.__version__
    assert made["versions"]["jax"] == jax.__version__
    assert made["versions"]["jaxlib"] == jaxlib.__version__
    assert made["device"]["count"] == jax.device_count()
    assert made["device"]["cores"] == os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "model name" in cpuinfo.read_text(encoding="utf-8"):
        assert re.search(rf"^model name\s*: {re.escape(made['device']['cpu'])}$", cpuinfo.read_text(), re.MULTILINE)
    assert (made["config_digest"], made["code_digest"], made["seed"], made["dataset"]) == (
        "a",
        "b",
        1,
        "digits",
    )
    store.write_json(tmp_path / "x.json", made)
    assert store.read_json(tmp_path / "x.json") == made
    again = store.provenance(config_digest="a", code_digest="b", seed=1, wall_seconds=2.5, dataset="digits")
    assert again == made


def test_require_config_refuses_other_digest():
    store.require_config("x.npz", {"config_digest": "a"}, "a")
    with pytest.raises(ValueError, match=r"'x\.npz' was made with another config \(digest a, expected b\)"):
        store.require_config("x.npz", {"config_digest": "a"}, "b")
    with pytest.raises(ValueError, match="digest None"):
        store.require_config("x.npz", {}, "b")


def test_digest_ignores_order_and_number_types():
    expected = store.digest({"a": [1, 2.5], "b": {"c": None, "d": float("inf")}})
    assert len(expected) == 16
    assert expected == store.digest({"b": {"d": np.float64("inf"), "c": None}, "a": (np.int32(1), np.float32(2.5))})


@pytest.mark.parametrize("other", [{"a": 2}, {"a": 1.5}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None}, {}])
def test_digest_tells_values_apart(other):
    assert store.digest({"a": 1}) != store.digest(other)


def test_digest_refuses_what_is_not_plain():
    with pytest.raises(TypeError, match="object"):
        store.digest({"a": object()})


SOURCE = '''"""Module."""

def f(x, y=1):
    """Doc."""
    return x + y


class C:
    """Doc."""
'''


@pytest.mark.parametrize(
    "edited",
    [
        SOURCE.replace("Doc.", "Another."),
        SOURCE.replace('    """Doc."""\n    return', "    return"),
        SOURCE.replace("return x + y", "return (x +\n        y)  # why"),
        "# licence\n\n" + SOURCE,
    ],
)
def test_code_digest_ignores_comments_and_docstrings(tmp_path, edited):
    (tmp_path / "m.py").write_text(SOURCE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "m.py").write_text(edited)
    assert store.code_digest([tmp_path / "m.py"]) == store.code_digest([tmp_path / "other" / "m.py"])


@pytest.mark.parametrize(
    ("old", "new"),
    [("y=1", "y=2"), ("y=1", "y=None"), ("x + y", "x - y"), ("f(", "g("), ("return x + y", "return 'x + y'")],
)
def test_code_digest_sees_changes(tmp_path, old, new):
    (tmp_path / "m.py").write_text(SOURCE)
    before = store.code_digest([tmp_path / "m.py"])
    (tmp_path / "m.py").write_text(SOURCE.replace(old, new))
    assert store.code_digest([tmp_path / "m.py"]) != before


def test_code_digest_is_the_same_on_all_pythons(tmp_path):
    """A golden number, the same on Python 3.11.7, 3.12.1 and 3.13.0."""
    (tmp_path / "m.py").write_text(SOURCE)
    (tmp_path / "n.py").write_text("async def g(*a, b: int = 0, **c):\n    return f'{a!r:>4}', 1.0, b'x', ...\n")
    files = [tmp_path / "n.py", tmp_path / "m.py"]
    assert store.code_digest(files) == store.code_digest(files[::-1]) == "26c0365c9cc1521a"


def test_store_imports_without_jax(root):
    """A workflow imports it at each parse; jax would add most of a second."""
    code = "import sys, metacanary.store; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
