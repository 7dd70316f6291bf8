"""Settings and fixtures of all tests."""

import os
from pathlib import Path

# Before jax is imported: the tests run in several processes, which share the cores and the GPU's memory.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_gpu_deterministic_ops=true --xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0",
)
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """For the large private trainings on a machine with less memory than the GPU that their configs are written for."""
    parser.addoption("--microbatch", type=int, help="examples at once in tests/test_full_size.py, not the config's")
    parser.addoption("--copies", type=int, help="augmented copies of an example there, not the config's")


def pytest_configure(config: pytest.Config) -> None:
    """Lets tests run a job's main block in a process in which JAX has begun to compute; a job's own has not."""
    config.addinivalue_line("filterwarnings", "ignore:JAX has begun to compute without:RuntimeWarning")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' folder beside the repository, with material that is not part of it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the developers' folder ../shared is not here")
    return folder
