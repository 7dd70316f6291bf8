"""Tests that the files of the repository agree with one another."""

import ast
import importlib.metadata
import re
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import metacanary

LOCKS = {"requirements.txt": ["dev"], "requirements-cuda.txt": ["dev", "cuda"]}


@pytest.fixture(scope="module")
def project(root):
    """The table [project] of pyproject.toml."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def locked(root, lock):
    """Reads a lock file: requirement and number of hashes of each package, by name."""
    entries = {}
    for line in (root / lock).read_text(encoding="utf-8").splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            requirement = Requirement(line.rstrip("\\ "))
            name = canonicalize_name(requirement.name)
            entries[name] = [requirement, 0]
        elif re.match(r"    --hash=sha256:[0-9a-f]{64}\b", line):
            entries[name][1] += 1
    return entries


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_holds_every_dependency(root, project, lock):
    entries = locked(root, lock)
    texts = project["dependencies"] + [t for e in LOCKS[lock] for t in project["optional-dependencies"][e]]
    for wanted in map(Requirement, texts):
        name = canonicalize_name(wanted.name)
        assert name in entries, f"{lock} lacks {name}: run `make lock`"
        (pin,) = entries[name][0].specifier
        assert wanted.specifier.contains(pin.version), f"{lock} has {pin}, not {wanted}: run `make lock`"


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_and_hashes_everything(root, lock):
    for name, (requirement, num_hashes) in locked(root, lock).items():
        assert [pin.operator for pin in requirement.specifier] == ["=="], name
        assert num_hashes > 0, name


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_names_no_machine(root, lock):
    text = (root / lock).read_text(encoding="utf-8")
    assert not re.search(r"^--|file://|@ |/opt/|/home/|/root/|/work/|/tmp/", text, re.MULTILINE)


def test_locks_agree(root):
    plain, cuda = (locked(root, lock) for lock in LOCKS)
    for name, (requirement, _) in plain.items():
        assert requirement.specifier == cuda[name][0].specifier, name


def test_versions_agree(root, project):
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert metacanary.__version__ == project["version"] == citation["version"]
    assert project["license"] == citation["license"] == "Apache-2.0"
    assert "Apache License" in (root / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "num_lines"), [("README.md", 180), ("CONTRIBUTING.md", 100)])
def test_documents_stay_short(root, name, num_lines):
    assert len((root / name).read_text(encoding="utf-8").splitlines()) < num_lines


def sources(root, *folders):
    """Lists (path, text) of the Python files in folders."""
    files = [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]
    assert files
    return [(file.relative_to(root), file.read_text(encoding="utf-8")) for file in files]


def test_nothing_is_unpickled(root):
    forbidden = r"allow_pickle\s*=\s*True|(import|from)\s+_?(pickle|cPickle|cloudpickle|dill|joblib|shelve|marshal)\b"
    for path, text in sources(root, "metacanary", "workflow", "benchmarks"):
        assert not re.search(forbidden + r"|read_pickle|torch\.load", text), path
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        for call in [call for call in calls if ast.unparse(call.func) in ("np.load", "numpy.load")]:
            assert "allow_pickle=False" in ast.unparse(call), f"{path}:{call.lineno}"


def test_rules_run_no_shell_command(root):
    """So that no value of a config, and no name in it, reaches a shell."""
    for path in [root / "Snakefile", *(root / "workflow").rglob("*.smk")]:
        assert not re.search(
            r"^\s*(shell|run|wrapper|cwl|notebook):", path.read_text(encoding="utf-8"), re.MULTILINE
        ), path


def imports(text):
    """Names the top-level packages that a source imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_package_stands_alone(root):
    """It knows neither the workflow nor its config files, and no TensorFlow or PyTorch."""
    for path, text in sources(root, "metacanary"):
        assert {"snakemake", "yaml", "tensorflow", "torch"}.isdisjoint(imports(text)), path


def test_package_imports_are_declared(root, project):
    """jaxlib comes with jax."""
    providers = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    declared |= {"metacanary"}
    for path, text in sources(root, "metacanary"):
        for name in set(imports(text)) - sys.stdlib_module_names - {"metacanary"}:
            assert declared & {canonicalize_name(p) for p in providers[name]}, f"{path} imports {name}"


def test_every_module_has_tests(root):
    for path, _ in sources(root, "metacanary"):
        assert path.stem == "__init__" or (root / "tests" / f"test_{path.stem}.py").exists(), path


def test_makefile_lists_its_targets(root):
    text = (root / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert phony == re.findall(r"^([a-z-]+):.*  ## ", text, re.MULTILINE)
