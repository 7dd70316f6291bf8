"""The clusters of the tests marked `slurm`, and the tables that they fill."""

import csv
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cluster as slurm
from workflows import Workflow

# A shell's background job ignores Ctrl-C, and so would every Snakemake that is started from it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where to write what the tests saw."""
    parser.addoption("--tables", type=Path, help="folder for the tables of what the tests on a cluster measured")


@pytest.fixture(scope="session")
def make_cluster() -> Iterator[Callable[[], slurm.Cluster]]:
    """Makes clusters, one for each test that needs one; skips where there is no SLURM."""
    if missing := slurm.missing():
        pytest.skip(f"needs {', '.join(missing)}: `sudo make slurm-packages` installs them")
    folders = []

    def make() -> slurm.Cluster:
        folders.append(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp")))
        return slurm.Cluster(folders[-1])

    yield make
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    """A finished run on this machine, without SLURM."""
    run = Workflow(None, tmp_path_factory.mktemp("undisturbed")).start()
    assert run.finish() == 0, run.text()
    return run


@pytest.fixture(scope="session")
def fault_table(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows of the table of faults."""
    yield from table(request, "faults.csv")


@pytest.fixture(scope="session")
def load_table(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows of the table of what many jobs ask of the scheduler."""
    yield from table(request, "load.csv")


@pytest.fixture(scope="session")
def compiled_table(request: pytest.FixtureRequest) -> Iterator[list[dict[str, Any]]]:
    """Rows of the table of what shared programs are worth."""
    yield from table(request, "compiled.csv")


def table(request: pytest.FixtureRequest, name: str) -> Iterator[list[dict[str, Any]]]:
    """Yields the rows of a table, to be filled.

    At the end it is written, if a folder is named for it; a row replaces the one of the same fault and job, or of the
    same command, that an earlier run of some of the tests left there.
    """
    rows: list[dict[str, Any]] = []
    yield rows
    folder = request.config.getoption("--tables")
    if not (folder and rows):
        return
    folder.mkdir(parents=True, exist_ok=True)
    keys = [column for column in ("fault", "job", "command") if column in rows[0]]
    known = {}
    if (folder / name).exists():
        with (folder / name).open(encoding="utf-8", newline="") as file:
            known = {tuple(row[key] for key in keys): row for row in csv.DictReader(file)}
    known |= {tuple(row[key] for key in keys): row for row in rows}
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(known[key] for key in sorted(known))
