"""Results on disk: arrays, tables, pytrees and JSON, each with its provenance.

Every file is written beside its final place and renamed into it, so that a reader finds the old file, the new
file or no file, never half of one. Nothing is pickled and nothing is unpickled.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

import metacanary

# jax takes most of a second to import and is imported where it is needed: a workflow asks this module for
# digests each time it is parsed.

PathLike = str | os.PathLike[str]

_PROVENANCE = "provenance"
_STRUCTURE = "structure"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "pandas")


@contextlib.contextmanager
def atomic(path: PathLike) -> Iterator[BinaryIO]:
    """Opens a binary file that takes the place of `path` when the block ends without an error.

    Args:
      path: Where the file shall be; missing folders are made.

    Yields:
      A file opened for writing, in the folder of `path` under a name of its own.

    Guarantees:
      Whatever happens in the block (an error, a full disk, a second writer), `path` holds the old file or one
      writer's file, each whole, and an error leaves no temporary file behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:  # not tempfile: its files are closed to the group
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: PathLike, text: str) -> None:
    """Writes a text file in UTF-8, atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: PathLike, obj: Any) -> None:
    """Writes an object as indented JSON with sorted keys, atomically; infinities stand as `Infinity`."""
    write_text(path, json.dumps(obj, indent=2, sort_keys=True, default=_plain) + "\n")


def read_json(path: PathLike) -> Any:
    """Reads a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_npz(path: PathLike, arrays: Mapping[str, np.ndarray], provenance: Mapping[str, Any]) -> None:
    """Writes named arrays and their provenance as one uncompressed npz file.

    Args:
      path: The file to write.
      arrays: Arrays by name; a name may hold slashes ("params/conv/kernel"). Anything `numpy.asarray` takes.
      provenance: Where the arrays come from, kept as JSON in the key "provenance".

    Raises:
      ValueError: For the reserved name "provenance" and for arrays that would have to be pickled.

    Guarantees:
      The bytes of the file are a function of the arguments.
    """
    if _PROVENANCE in arrays:
        raise ValueError(f"arrays: the name {_PROVENANCE!r} is reserved for the provenance")
    members = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in members.items():
        if array.dtype.kind in "OV":
            raise ValueError(f"arrays[{name!r}] has dtype {array.dtype}, expected numbers, booleans or strings")
    members[_PROVENANCE] = np.asarray(json.dumps(provenance, sort_keys=True, default=_plain))
    # Not numpy.savez: it takes the names as keyword arguments, so that an array named "file" breaks it.
    with atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, array in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def read_npz(path: PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads what `write_npz` wrote.

    Returns:
      The arrays by name, and the provenance.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is damaged (every array is checked by its CRC) or `write_npz` did not write it.
    """
    try:
        # Opened here, since numpy.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        return arrays, json.loads(str(arrays.pop(_PROVENANCE)))
    except (zipfile.BadZipFile, EOFError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"path={os.fspath(path)!r} is damaged or no result file: {error}") from error


def write_csv(path: PathLike, frame: pd.DataFrame, provenance: Mapping[str, Any]) -> None:
    """Writes a table as CSV, and its provenance beside it in `<stem>.provenance.json`.

    The index is not written; missing values are empty cells.

    Guarantees:
      The bytes of the CSV are a function of the frame alone, and its floats are read back exactly.
    """
    if not frame.columns.is_unique:
        raise ValueError(f"frame has columns {list(frame.columns)}, expected distinct names")
    # The provenance goes first: where the table is, its provenance is too.
    write_json(_sidecar(path), provenance)
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def read_csv(path: PathLike) -> pd.DataFrame:
    """Reads a table; only empty cells are missing values, so that a method may be called "NA"."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def read_provenance(path: PathLike) -> dict[str, Any]:
    """Reads the provenance of a result, from inside an npz file or from beside any other file."""
    if Path(path).suffix != ".npz":
        return read_json(_sidecar(path))
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file[_PROVENANCE]))


def write_tree(path: PathLike, tree: Any, provenance: Mapping[str, Any]) -> None:
    """Writes a pytree of arrays, as a checkpoint that `read_tree` restores.

    Args:
      path: The npz file to write.
      tree: A pytree whose leaves are arrays, typed PRNG keys or Python numbers.
      provenance: As in `write_npz`.
    """
    leaves = _leaves(tree)
    structure = {name: _signature(leaf) for name, leaf in leaves.items()}
    arrays = {f"leaf{name}": to_bits(leaf) for name, leaf in leaves.items()}
    write_npz(path, {_STRUCTURE: np.asarray(json.dumps(structure, sort_keys=True)), **arrays}, provenance)


def read_tree(path: PathLike, like: Any) -> Any:
    """Reads a pytree that `write_tree` wrote.

    Args:
      path: The npz file.
      like: A tree of the same structure; its leaves may be arrays, `jax.ShapeDtypeStruct` or Python numbers.

    Returns:
      The tree: NumPy arrays and Python numbers where `like` holds such, JAX arrays and PRNG keys otherwise.

    Raises:
      ValueError: If a leaf is missing, left over, or has another shape or dtype than in `like`.

    Guarantees:
      Every leaf has the bits that were written.
    """
    import jax

    arrays, _ = read_npz(path)
    stored = json.loads(str(arrays[_STRUCTURE])) if _STRUCTURE in arrays else {}
    expected = {name: _signature(leaf) for name, leaf in _leaves(like).items()}
    for name in sorted(stored.keys() | expected.keys()):
        found, wanted = stored.get(name), expected.get(name)
        if found != wanted:
            raise ValueError(f"path={os.fspath(path)!r} holds {found} at {name!r}, expected {wanted}")
    restored = [from_bits(arrays[f"leaf{name}"], leaf) for name, leaf in _leaves(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def to_bits(leaf: Any) -> np.ndarray:
    """Turns an array, a PRNG key or a number into an array that npz knows (key data, bfloat16 as integers)."""
    import jax

    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf))
    array = np.asarray(leaf)
    return array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array


def from_bits(bits: np.ndarray, like: Any) -> Any:
    """Undoes `to_bits`; `like` is an array, a `jax.ShapeDtypeStruct` or a number of the type wanted."""
    import jax

    if isinstance(like, bool | int | float):
        return bits.item()
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(jax.numpy.zeros((), like.dtype))
        return jax.random.wrap_key_data(jax.numpy.asarray(bits), impl=impl)
    array = bits if bits.dtype == like.dtype else bits.view(like.dtype)
    return array if isinstance(like, np.ndarray | np.generic) else jax.numpy.asarray(array)


def provenance(
    *,
    config_digest: str,
    code_digest: str,
    seed: int | None = None,
    wall_seconds: float | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Collects what a result must say about its making.

    Args:
      config_digest: `digest` of every setting that changes the result.
      code_digest: `code_digest` of the sources that made it.
      seed: The seed of the run, if it drew anything.
      wall_seconds: How long it took.
      **extra: More entries, plain data.

    Returns:
      These, the versions of the packages, and the device. No date, host or path: two runs of the same thing
      on one machine differ in wall_seconds alone.
    """
    made_by = {"config_digest": config_digest, "code_digest": code_digest, "versions": versions()}
    return {**extra, **made_by, "seed": seed, "wall_seconds": wall_seconds, "device": device()}


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of those that results are computed with."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {**found, "metacanary": metacanary.__version__, "python": platform.python_version()}


def device() -> dict[str, Any]:
    """The device that JAX computes on, and the CPU and its cores beside it."""
    import jax

    first = jax.devices()[0]
    made_on = {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}
    return {**made_on, "cpu": _cpu_model(), "cores": os.cpu_count()}


def _cpu_model() -> str:
    """The name of the CPU; outside Linux what Python knows of it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()


def require_config(path: PathLike, provenance: Mapping[str, Any], expected_digest: str) -> None:
    """Refuses a result that was made with another config.

    Raises:
      ValueError: If the provenance has another config digest than expected, or none.
    """
    found = provenance.get("config_digest")
    if found != expected_digest:
        raise ValueError(
            f"path={os.fspath(path)!r} was made with another config "
            f"(digest {found}, expected {expected_digest}): delete it, or give the new settings another name"
        )


def digest(obj: Any) -> str:
    """Digests plain data: the first 16 hex digits of the SHA-256 of its canonical JSON.

    Guarantees:
      The order of keys, tuples for lists, and NumPy numbers for Python's make no difference.
    """
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest(paths: Iterable[PathLike]) -> str:
    """Digests Python sources by what they do.

    Guarantees:
      Comments, docstrings, layout, the order of the paths and their folders make no difference.
    """
    sources = sorted((Path(path).name, Path(path).read_text(encoding="utf-8")) for path in paths)
    return digest([[name, _parsed(source)] for name, source in sources])


@functools.cache
def _parsed(source: str) -> Any:
    """The syntax tree of a source as plain data; kept, since a workflow's rules share most of their modules."""
    return _syntax(ast.parse(source))


def _syntax(node: Any) -> Any:
    """Turns a syntax tree into plain data, without empty fields, since Python versions differ in them."""
    if isinstance(node, list):
        return [_syntax(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        fields["body"] = node.body[ast.get_docstring(node, clean=False) is not None :]
    return [type(node).__name__, {k: _syntax(v) for k, v in fields.items() if v is not None and v != []}]


def _plain(value: Any) -> Any:
    """Turns NumPy and JAX numbers and arrays, paths and sets into what JSON can hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"value {value!r} of type {type(value).__name__}, expected plain data")


def _sidecar(path: PathLike) -> Path:
    """Names the provenance file of a table."""
    return Path(path).with_suffix(".provenance.json")


def _leaves(tree: Any) -> dict[str, Any]:
    """Lists the leaves of a pytree by their key path, in order."""
    import jax

    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _signature(leaf: Any) -> list[Any]:
    """Describes a leaf by dtype and shape."""
    if isinstance(leaf, bool | int | float):
        return [type(leaf).__name__, []]
    return [str(leaf.dtype), list(leaf.shape)]
