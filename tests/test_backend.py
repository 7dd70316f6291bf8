"""XLA's flags."""

import os

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
