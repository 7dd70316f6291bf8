"""XLA's settings."""

import os
import subprocess
import sys

import pytest

from metacanary import backend


def test_configure_keeps_the_users_flags_last(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    monkeypatch.setenv("NPROC", "7")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    backend.configure(threads=1)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == [
        "--xla_gpu_deterministic_ops=true",
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_gpu_deterministic_ops=false",
    ]
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
