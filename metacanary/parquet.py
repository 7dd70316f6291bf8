"""Tables as Parquet files, the same bytes for the same rows: the one place that knows pyarrow."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from metacanary import store

TYPES = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "numbers": pa.list_(pa.float64()),
    "pixels": pa.list_(pa.float32()),
}
"""Types of columns by name."""

_LEVEL = 19  # of zstd; a megabyte takes a tenth of a second


def write(
    path: store.PathLike, frames: Iterable[pd.DataFrame], columns: Mapping[str, str], *, dense: Collection[str] = ()
) -> int:
    """Writes frames one below the other as one compressed file, atomically.

    Args:
      path: The file to write.
      frames: Each becomes row groups of its own, so that one cell of many is read without the others.
      columns: Type of each column, of `TYPES`; other columns of the frames are left out.
      dense: Columns of floats that hardly repeat. Their bytes are stored by significance, which compresses better.

    Returns:
      The number of rows.

    Raises:
      ValueError: If a frame lacks a column, or one does not fit its type exactly.

    Guarantees:
      Bits of floats are kept, but that a missing value and a NaN are the same.
      The bytes are a function of the arguments and of pyarrow's version, which stands in the file.
    """
    schema, num_rows = _schema(columns), 0
    leaves = [_leaf(name, columns[name]) for name in columns]
    split = [_leaf(name, columns[name]) for name in dense]
    options = {
        "compression": "zstd",
        "compression_level": _LEVEL,
        "use_dictionary": [leaf for leaf in leaves if leaf not in split],
        "use_byte_stream_split": split,
        "store_schema": False,  # nothing but what any reader of Parquet knows
    }
    with store.atomic(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
        for frame in frames:
            if missing := sorted(columns.keys() - set(frame.columns)):
                raise ValueError(f"path={str(path)!r}: the table lacks columns {missing}, expected {list(columns)}")
            try:
                table = pa.Table.from_pandas(frame[list(columns)], schema=schema, preserve_index=False)
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise ValueError(f"path={str(path)!r}: {error}") from None
            writer.write_table(table.replace_schema_metadata(None))
            num_rows += len(frame)
    return num_rows


def check(path: store.PathLike, columns: Mapping[str, str]) -> None:
    """Checks the columns of a file.

    Args:
      path: The file.
      columns: As written.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is no Parquet file, or has other columns.
    """
    with _explained(path):
        found = pq.read_schema(Path(path)).remove_metadata()
    if not found.equals(expected := _schema(columns)):
        raise ValueError(f"path={str(path)!r} has columns {_text(found)}, expected {_text(expected)}")


def read(path: store.PathLike, columns: Mapping[str, str], **where: str | float) -> pd.DataFrame:
    """Reads what `write` wrote.

    Args:
      path: The file.
      columns: As written.
      **where: Values of columns; other rows are left out, and as far as possible not read.

    Returns:
      The rows in their order, with a new index.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is damaged, no Parquet file, or has other columns.
    """
    check(path, columns)
    filters = [(name, "==", value) for name, value in where.items()]
    with _explained(path):
        # No partitioning: a folder called "a=b" is no column.
        return pq.read_table(Path(path), filters=filters or None, partitioning=None).to_pandas()


@contextlib.contextmanager
def _explained(path: store.PathLike) -> Iterator[None]:
    """Raises ValueError with the path where pyarrow cannot read a file."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"path={str(path)!r} is damaged or no Parquet file: {error}") from error


def _schema(columns: Mapping[str, str]) -> pa.Schema:
    """pyarrow's form of columns."""
    return pa.schema([(name, TYPES[kind]) for name, kind in columns.items()])


def _leaf(name: str, kind: str) -> str:
    """What Parquet calls the values of a column."""
    return f"{name}.list.element" if pa.types.is_list(TYPES[kind]) else name


def _text(schema: pa.Schema) -> str:
    """The columns on one line."""
    return ", ".join(f"{field.name} ({field.type})" for field in schema)
