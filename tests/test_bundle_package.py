"""The list of a bundle's files, and their checksums."""

import json
import shutil
import subprocess

import pytest

from metacanary import bundle_layout, bundle_package

AUDIT = {"scores": ["negative_loss"], "game": "independent", "delta": 1e-5}
CELL = {"dataset": "digits", "canary": "random", "training": "sgd", "epsilon": "inf", "num_blocks": 1, "audit": AUDIT}


@pytest.fixture
def folder(tmp_path):
    """A folder with the names of a bundle's files, and checksums."""
    folder = tmp_path / "bundle"
    for name in (*bundle_layout.FILES, "csv/tan/digits/search0.csv"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}\n", encoding="utf-8")
    bundle_package.write_sums(folder)
    return folder


def write_package(folder, **changes):
    """Writes a datapackage.json with what reading needs."""
    own = {"layout": bundle_layout.VERSION, "version": "0.1.0", "cells": [CELL], "extras": [], "image_shapes": {}}
    text = json.dumps({"metacanary": own | changes})
    (folder / bundle_layout.PACKAGE).write_text(text, encoding="utf-8")


def test_sums_are_those_of_sha256sum(folder):
    bundle_package.check_sums(folder)
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == len(bundle_layout.FILES)  # one is the list itself, and one CSV file


def test_every_changed_or_missing_file_is_named(folder):
    for name in bundle_package.files(folder):
        if name == bundle_layout.SUMS:
            continue
        path, whole = folder / name, (folder / name).read_bytes()
        path.write_bytes(whole[:-1] + b"!")
        with pytest.raises(ValueError, match=f"file {name} in .* has the SHA-256"):
            bundle_package.check_sums(folder)
        path.unlink()
        with pytest.raises(ValueError, match=f"file {name} is missing"):
            bundle_package.check_sums(folder)
        path.write_bytes(whole)
    bundle_package.check_sums(folder)


def test_foreign_files_are_named_and_hidden_ones_ignored(folder):
    (folder / ".DS_Store").touch()
    bundle_package.check_sums(folder)
    (folder / "csv/more.csv").touch()
    with pytest.raises(ValueError, match=r"file csv/more.csv in .* is not listed in SHA256SUMS"):
        bundle_package.check_sums(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{digest}  ../outside\n", "expected a plain file name inside"),
        ("{digest}  /etc/hostname\n", "expected a plain file name inside"),
        ("{digest} scores.parquet\n", "expected a SHA-256, two spaces and a name"),
        ("{digest}  absent.csv\n", "file absent.csv is missing"),
    ],
)
def test_wrong_lines_are_refused(folder, line, message):
    (folder.parent / "outside").touch()
    with (folder / bundle_layout.SUMS).open("a", encoding="utf-8") as file:
        file.write(line.format(digest="0" * 64))
    with pytest.raises(ValueError, match=message):
        bundle_package.check_sums(folder)


def test_lists_that_leave_files_out_are_refused(folder):
    path = folder / bundle_layout.SUMS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "scores.parquet" not in line), encoding="utf-8")
    with pytest.raises(ValueError, match=r"does not list scores.parquet"):
        bundle_package.check_sums(folder)
    path.unlink()
    with pytest.raises(ValueError, match="has no file SHA256SUMS, expected a finished bundle"):
        bundle_package.check_sums(folder)


def test_read_gives_the_cells(folder):
    write_package(folder)
    _, (cell,) = bundle_package.read(folder)
    assert cell.path == "digits/random/sgd/epsinf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": 2, "version": "9.0"}, "layout is 2, written by metacanary 9.0; this one, .*, expects 1"),
        ({"cells": [CELL | {"canary": "../../x"}]}, "canary: got '../../x'"),
        ({"cells": [CELL | {"num_blocks": "2"}]}, "num_blocks: got '2'"),
        ({"cells": [{"dataset": "digits"}]}, "missing"),
        ({"cells": []}, r"cells: got \[\], expected one or more, each once"),
        ({"cells": [CELL, CELL | {"num_blocks": 2}]}, "cells: got .*, expected one or more, each once"),
        (
            {"cells": [CELL | {"audit": AUDIT | {"foo": 1}}]},
            "audit of digits/random/sgd/epsinf: .* keyword argument 'foo'",
        ),
        ({"cells": [CELL | {"audit": None}]}, "audit: got None, expected a mapping"),
        ({"extras": ["../../home/x.csv"]}, "expected a plain file name inside"),
        ({"image_shapes": {"/etc/canaries.npz": [1, 1, 1]}}, "expected a plain file name inside"),
        ({"extras": None}, "must be an iterable"),
        ({"image_shapes": []}, "has no attribute 'items'"),
        ({"image_shapes": {"canaries.npz": [8, 8]}}, r"image_shapes: got \[8, 8\] for canaries.npz, expected height"),
        ({"image_shapes": {"canaries.npz": ["8", 8, 1]}}, "image_shapes: got .*, expected height, width and channels"),
    ],
)
def test_read_refuses_what_is_no_bundle(folder, changes, message):
    write_package(folder, **changes)
    with pytest.raises(ValueError, match=message):
        bundle_package.read(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "not JSON", '{"metacanary": 1}'])
def test_read_refuses_other_json(folder, text):
    (folder / bundle_layout.PACKAGE).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"datapackage.json' is not that of a bundle"):
        bundle_package.read(folder)
