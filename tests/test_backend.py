"""XLA's settings."""

import os
import re
import subprocess
import sys
import warnings

import pytest

from metacanary import backend


@pytest.fixture(autouse=True)
def begun(monkeypatch):
    """Says whether JAX has begun to compute, which depends on what ran before; here it has not, if not told so."""
    monkeypatch.setattr(backend, "_has_begun", lambda: False)
    return lambda: monkeypatch.setattr(backend, "_has_begun", lambda: True)


def test_configure_keeps_the_users_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    monkeypatch.setenv("NPROC", "7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    backend.configure(threads=1)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_cpu_multi_thread_eigen=false", "--xla_gpu_deterministic_ops=false"]
    assert os.environ["NPROC"] == "1"
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"


@pytest.mark.parametrize("threads", [None, 2])
def test_configure_sets_threads_only_when_told_to(monkeypatch, threads):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("NPROC", "")  # so that what is set here is undone
    monkeypatch.delenv("NPROC")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    backend.configure(threads=threads)
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert os.environ.get("NPROC") == (None if threads is None else "2")


def unset(monkeypatch):
    """Takes what `configure` sets out of the environment; what is set in a test is undone."""
    for name in ("XLA_FLAGS", "NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def settings():
    return {name: os.environ.get(name) for name in ("XLA_FLAGS", "NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE")}


def test_configure_twice_sets_each_flag_once(monkeypatch, begun):
    """And the second time nothing, so that it may come when JAX has begun to compute."""
    unset(monkeypatch)
    monkeypatch.setenv("XLA_FLAGS", " --xla_dump_to=a  --xla_cpu_enable_fast_math=false")  # as somebody may type it
    backend.configure()
    backend.configure(threads=1)
    once = settings()
    assert once == {
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false --xla_gpu_deterministic_ops=true "
        "--xla_dump_to=a --xla_cpu_enable_fast_math=false",
        "NPROC": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    begun()
    with warnings.catch_warnings(action="error"):
        backend.configure(threads=1)
        backend.configure()
    assert settings() == once


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "XLA_FLAGS='--xla_gpu_deterministic_ops=true' NPROC='2' XLA_PYTHON_CLIENT_PREALLOCATE='false': expected"),
        ({"NPROC": "2", "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "XLA_FLAGS='--xla_gpu_deterministic_ops=true':"),
        (
            {"NPROC": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_FLAGS": "--xla_gpu_deterministic_ops=false"},
            "NPROC='2': expected backend.configure() to be called before",
        ),
    ],
)
def test_configure_warns_if_it_comes_too_late(monkeypatch, begun, given, missing):
    """And leaves the environment as XLA has read it."""
    unset(monkeypatch)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    begun()
    before = settings()
    with pytest.warns(RuntimeWarning, match=re.escape(f"JAX has begun to compute without {missing}")):
        backend.configure(threads=2)
    assert settings() == before


@pytest.mark.parametrize(("first", "warned"), [("", 0), ("import jax; ", 0), ("import jax; jax.devices(); ", 1)])
def test_configure_sees_whether_jax_has_begun_to_compute(first, warned):
    """In a process of its own."""
    code = f"{first}from metacanary import backend; backend.configure(threads=1)"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "NPROC"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("RuntimeWarning: JAX has begun to compute without XLA_FLAGS=") == warned


def test_tests_run_with_the_flags_that_configure_sets(root):
    """Or the test of determinism on a GPU would run without the flag that it needs; configure finds nothing to add."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    code = "import conftest, os; given = os.environ['XLA_FLAGS']; from metacanary import backend; "
    code += "backend.configure(threads=1); assert os.environ['XLA_FLAGS'] == given, os.environ['XLA_FLAGS']"
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'tests'}"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


# In a process of its own: how many programs it compiled, and the bits of what they computed.
COMPILED = """
import sys
from pathlib import Path
from metacanary import backend
if {imported_before}:
    import jax
backend.configure(threads=1, compiled={folder})
import jax, jax.numpy as jnp
missed = []
jax.monitoring.register_event_listener(lambda name, **_: missed.append(name))
x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
w = jax.random.normal(jax.random.key(1), (3, 3, 3, 8))
layout = ("NHWC", "HWIO", "NHWC")
f = jax.jit(jax.grad(lambda w: jnp.tanh(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", None, None, layout)).sum()))
for _ in range(3):
    w = w - 0.01 * f(w)
print(sum(name.endswith("cache_hits") for name in missed), bytes(w.tobytes()).hex())
"""


@pytest.mark.parametrize("imported_before", [False, True])
def test_compiled_programs_are_shared_and_change_no_bit(tmp_path, imported_before):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "NPROC"))}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def run(folder):
        code = COMPILED.format(imported_before=imported_before, folder=folder)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        hits, bits = done.stdout.split()
        return int(hits), bits

    shared = f"Path({str(tmp_path)!r})"
    (none, plain), (cold, first), (warm, second) = run(None), run(shared), run(shared)
    assert (none, cold) == (0, 0)
    assert warm > 0
    assert plain == first == second
    assert [path.name for path in tmp_path.iterdir()] == [backend.cpu_digest()]


def test_configure_leaves_the_users_cache_alone(monkeypatch, tmp_path):
    for name in ("XLA_FLAGS", "NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/theirs")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "9")
    backend.configure(compiled=tmp_path)
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/theirs"
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "9"
