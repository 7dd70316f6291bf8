"""Seconds and memory of a data set: from its archive to npy files, then mapped; beside reading tensorflow-datasets.

    python -m benchmarks.data_loading ARCHIVE       # to results/data_loading.csv

ARCHIVE is that of the data set `--name`. Each task has a process of its own, so that its peak memory is its own;
imports are timed apart. Promised: at most 60 s and 1 GiB from the archive on two cores, and at most 0.2 s after that.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from metacanary import data, store

RESULTS = Path(__file__).resolve().parent / "results" / "data_loading.csv"
COLUMNS = [
    *("task", "name", "num_images", "seconds", "import_seconds", "peak_rss_mib"),
    *("promised_seconds", "promised_mib", "processor", "versions", "date"),
]
"""Of the CSV. seconds: of the call alone. peak_rss_mib: of the whole process, imports included."""


def load(name: str, data_dir: Path) -> int:
    """Load by metacanary; returns the number of images."""
    dataset = data.load(name, data_dir)
    return len(dataset.train_images) + len(dataset.test_images)


def load_and_read(name: str, data_dir: Path) -> int:
    """Load by metacanary and read every pixel once."""
    dataset = data.load(name, data_dir)
    return sum(len(images) for images in (dataset.train_images, dataset.test_images) if images.max() > 0)


def load_subset(name: str, data_dir: Path) -> int:
    """Load 5,000 training images."""
    return len(data.load(name, data_dir, num_train=5000).train_images)


def read_records(name: str, data_dir: Path) -> int:
    """Read all records by tensorflow-datasets alone into arrays, in their stored order."""
    import tensorflow_datasets as tfds

    (prepared,) = (data_dir / "tensorflow_datasets" / name).iterdir()
    total = 0
    for records in tfds.builder_from_directory(prepared).as_data_source().values():
        total += len(np.stack([record["image"] for record in records]))
    return total


TASKS: dict[str, tuple[Callable[[str, Path], int], float | None, float | None]] = {
    "archive to npy": (load, 60, 1024),
    "npy, mapped": (load, 0.2, None),
    "npy, mapped and read once": (load_and_read, None, None),
    "npy, subset of 5,000": (load_subset, 0.2, None),
    "tensorflow-datasets, prepared records": (read_records, None, None),
}
"""What is measured, in this order: the function, and promised seconds and MiB."""


def imports(task: str) -> None:
    """Import what a task needs."""
    if task in ("archive to npy", "tensorflow-datasets, prepared records"):
        from metacanary import tfds_builder  # noqa: F401


def measured(task: str, name: str, data_dir: Path) -> dict[str, Any]:
    """Run a task in this process."""
    began = time.perf_counter()
    imports(task)
    imported = time.perf_counter()
    num_images = TASKS[task][0](name, data_dir)
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "num_images": num_images,
        "seconds": ended - imported,
        "import_seconds": imported - began,
        "peak_rss_mib": peak,
    }


def measure(archive: Path, name: str) -> pd.DataFrame:
    """All rows, each from a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        manual = Path(folder) / "downloads" / "manual"
        manual.mkdir(parents=True)
        shutil.copy(archive, manual / data.SOURCES[name].archives[0].file_name)
        for task, (_, seconds, mib) in TASKS.items():
            command = [sys.executable, "-m", "benchmarks.data_loading", str(archive), "--name", name]
            call = [*command, "--task", task, "--data-dir", folder]
            done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
            promised = {"promised_seconds": seconds, "promised_mib": mib}
            rows.append({"task": task, "name": name, **json.loads(done.stdout.splitlines()[-1]), **promised})
    from benchmarks.measure import processor  # imports jax, which no task needs

    packages = ("tensorflow-datasets", "array-record", "numpy", "pillow")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    described = {"processor": processor(), "versions": versions, "date": date.today().isoformat()}
    return pd.DataFrame([row | described for row in rows], columns=COLUMNS)


def main() -> None:
    """Measure what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--name", default="cifar10_jpeg75", choices=[n for n, s in data.SOURCES.items() if s.archives])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--data-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measured(args.task, args.name, args.data_dir)))
        return
    table = measure(args.archive, args.name)
    store.write_text(args.output, table.to_csv(index=False, float_format="%.6g"))


if __name__ == "__main__":
    main()
