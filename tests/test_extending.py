"""Tests of docs/extending.md: its blocks, put where they say, make a repository whose checks and workflow pass."""

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml

from metacanary import data, store

FOLDERS = ("config", "envs", "metacanary", "profiles", "tests", "workflow")
FILES = ("Snakefile", "pyproject.toml", "requirements.txt")
CONFIG = "config/mine.yaml"

FENCE = re.compile(r"^```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WAYS = "a new file|appended|inserted above|inserted below|in place of|these keys changed"
FIRST_LINE = re.compile(rf"# (?P<path>\S+), (?P<way>{WAYS})(?:: (?P<line>.+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A block of code of the document.

    Attributes:
      path: The file that it belongs to.
      way: One of WAYS.
      line: How the line of the file begins that the way refers to, if it does.
      text: What goes there.
    """

    path: str
    way: str
    line: str | None
    text: str


def blocks(root):
    """Lists the blocks of the document."""
    text = (root / "docs/extending.md").read_text(encoding="utf-8")
    parts = [block.partition("\n") for block in FENCE.findall(text)]
    return [Block(**FIRST_LINE.fullmatch(first).groupdict(), text=rest) for first, _, rest in parts]


def put(block, folder):
    """Puts a block into a file of the folder, as it says."""
    file = folder / block.path
    assert file.exists() == (block.way != "a new file"), block.path
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if block.way == "these keys changed":
        after = yaml.safe_dump(merged(yaml.safe_load(before), yaml.safe_load(block.text)))
    elif block.line is None:
        after = before + block.text
    else:
        after = beside(before, block)
    file.write_text(after, encoding="utf-8")


def beside(before, block):
    """Puts a block above, below or in place of the line that it names."""
    lines = before.splitlines(keepends=True)
    named = [number for number, line in enumerate(lines) if line.strip().startswith(block.line)]
    assert len(named) == 1, f"{block.path} has {len(named)} lines that begin with {block.line}"
    above, below = {"inserted above": (0, 0), "inserted below": (1, 1), "in place of": (0, 1)}[block.way]
    return "".join([*lines[: named[0] + above], block.text, *lines[named[0] + below :]])


def merged(old, new):
    """The mapping `old` with the values of `new`; mappings in them are merged in turn."""
    return old | {
        key: merged(old[key], value) if isinstance(value, dict) and key in old else value for key, value in new.items()
    }


def small_config(root):
    """The tiny config, with a single training of a single run."""
    config = yaml.safe_load((root / "tests/tiny.yaml").read_text(encoding="utf-8"))
    sgd = config["trainings"]["sgd"] | {"num_runs": 1, "snapshots": [4]}
    return config | {"trainings": {"sgd": sgd}}


def touched(root, *suffixes):
    """Lists the files of some kinds that blocks belong to."""
    return sorted({block.path for block in blocks(root) if block.path.endswith(suffixes)})


def call(folder, *command):
    """Runs a Python module in a folder, to success."""
    # Not for Snakemake: the second makes it slow to start, the others are this process's.
    dropped = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "XLA_FLAGS", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run([sys.executable, "-m", *command], **options, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


def module(folder, name):
    """Imports a module of the copy under another name."""
    spec = importlib.util.spec_from_file_location(f"extended_{name}", folder / "metacanary" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look it up
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def extended(root, tmp_path_factory):
    """A copy of the repository with all blocks put into it, formatted."""
    folder = tmp_path_factory.mktemp("extended")
    for name in FOLDERS:
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(root / name, folder / name)
    (folder / CONFIG).write_text(yaml.safe_dump(small_config(root)), encoding="utf-8")
    for block in blocks(root):
        put(block, folder)
    call(folder, "ruff", "format", "--quiet", *touched(root, ".py"))
    call(folder, "snakefmt", *touched(root, ".smk"))
    return folder


def test_document_is_short(root):
    text = (root / "docs/extending.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200


def test_extended_repository_passes_its_checks(root, extended):
    """Those of the style of code, and that schema, package and config files agree."""
    call(extended, "ruff", "check", "--quiet", *touched(root, ".py"))
    call(extended, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_config.py", "-k", "schema or config_files")


def test_extended_workflow_runs(extended, monkeypatch):
    """A new canary kind, on a new data set, in a new figure."""
    call(extended, "snakemake", "--cores", "2", "--configfile", CONFIG, "--", "figure3")
    results = extended / "results/mine"

    monkeypatch.setitem(data.SOURCES, "photo_patches", module(extended, "registry").SOURCES["photo_patches"])
    dataset = data.load("photo_patches", extended / "results/data")
    assert dataset.train_images.shape == (1664, 16, 16, 3)
    assert dataset.test_images.shape == (416, 16, 16, 3)
    assert np.bincount(dataset.train_labels).tolist() == [832, 832]

    made, _ = store.read_npz(results / "canaries/photo_patches/inverted/canaries.npz")
    sources = dataset.train_images[made["source_index"]] / np.float32(255)
    np.testing.assert_array_equal(made["source_images"], sources)
    np.testing.assert_array_equal(made["images"], 1 - sources)
    np.testing.assert_array_equal(made["label"], dataset.train_labels[made["source_index"]])

    summary = store.read_csv(results / "summary/epsilon.csv")
    assert set(summary["dataset"]) == {"photo_patches"}
    assert set(summary["canary"]) == {"inverted"}

    assert (results / "figures/figure3.png").read_bytes().startswith(b"\x89PNG")
    assert (results / "figures/figure3.pdf").read_bytes().startswith(b"%PDF")
    assert store.read_provenance(results / "figures/figure3.pdf")["settings"]["score"] == "negative_loss"

    two_kinds = pd.concat([summary, summary.assign(canary="random")])
    (axis,) = module(extended, "figures").figure3(two_kinds, score="logit_margin").axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["random", "inverted"]
