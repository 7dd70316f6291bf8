"""Tables as Parquet files."""

import numpy as np
import pandas as pd
import pytest

from metacanary import parquet

COLUMNS = {"name": "string", "number": "integer", "value": "number", "pixels": "pixels", "values": "numbers"}


def frame():
    """Rows with floats that are easily lost."""
    return pd.DataFrame(
        {
            "name": ["a", "b", "a"],
            "number": [1, 2, 2**53 + 1],
            "value": [0.1 + 0.2, -0.0, 5e-324],
            "pixels": [np.array([0.1, 1 / 3], np.float32), np.zeros(0, np.float32), np.ones(1, np.float32)],
            "values": [np.array([np.inf, 1e-310]), np.zeros(0), np.array([2 / 3])],
            "left_out": ["x", "y", "z"],
        }
    )


def bits(values):
    """What an array is made of, which tells -0.0 from 0.0."""
    return [np.asarray(value).tobytes() for value in values]


@pytest.mark.parametrize("dense", [(), ("value", "values")])
def test_write_keeps_bits_and_order(tmp_path, dense):
    path = tmp_path / "t.parquet"
    assert parquet.write(path, [frame(), frame()[:1]], COLUMNS, dense=dense) == 4
    found, expected = parquet.read(path, COLUMNS), pd.concat([frame(), frame()[:1]], ignore_index=True)
    assert list(found.columns) == list(COLUMNS)
    for name in ("name", "number"):
        assert found[name].tolist() == expected[name].tolist()
    for name in ("value", "pixels", "values"):
        assert bits(found[name]) == bits(expected[name])
    assert (found["pixels"][0].dtype, found["values"][0].dtype) == (np.float32, np.float64)


def test_write_keeps_infinities_and_takes_nan_for_missing(tmp_path):
    values = pd.DataFrame({"value": [np.inf, -np.inf, np.nan]})
    parquet.write(tmp_path / "t.parquet", [values], {"value": "number"})
    pd.testing.assert_frame_equal(parquet.read(tmp_path / "t.parquet", {"value": "number"}), values)


def test_write_gives_the_same_bytes_again(tmp_path):
    for name in ("a", "b"):
        parquet.write(tmp_path / name, [frame()], COLUMNS, dense=["value"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_write_is_small_where_values_repeat(tmp_path):
    same = pd.concat([frame()] * 1000)
    parquet.write(tmp_path / "t.parquet", [same], COLUMNS)
    assert (tmp_path / "t.parquet").stat().st_size < 5000  # of some 200,000 bytes of values


def test_read_leaves_other_rows_out(tmp_path):
    path = tmp_path / "in=out" / "t.parquet"  # no partition
    rows = frame().assign(value=[np.inf, 8.0, np.inf])
    parquet.write(path, [rows[:2], rows[2:]], COLUMNS)
    assert parquet.read(path, COLUMNS, value=np.inf)["number"].tolist() == [1, 2**53 + 1]
    assert parquet.read(path, COLUMNS, value=8.0, name="b")["number"].tolist() == [2]
    assert len(parquet.read(path, COLUMNS, name="c")) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": [1.5, 2.0, 3.0]}, "truncated"),
        ({"value": ["a", "b", "c"]}, "Failed to parse string"),
    ],
)
def test_write_refuses_what_does_not_fit_and_leaves_no_file(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        parquet.write(tmp_path / "t.parquet", [frame().assign(**change)], COLUMNS)
    with pytest.raises(ValueError, match=r"lacks columns \['value'\]"):
        parquet.write(tmp_path / "t.parquet", [frame().drop(columns="value")], COLUMNS)
    assert list(tmp_path.iterdir()) == []


def test_read_refuses_other_columns(tmp_path):
    parquet.write(tmp_path / "t.parquet", [frame()], COLUMNS)
    with pytest.raises(
        ValueError, match=r"has columns name \(string\), .* expected name \(string\), number \(double\)"
    ):
        parquet.read(tmp_path / "t.parquet", COLUMNS | {"number": "number"})


def test_read_refuses_damaged_files(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write(path, [frame()], COLUMNS)
    whole = path.read_bytes()
    for damaged in (b"", b"no Parquet file at all", whole[:-20], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged or no Parquet file"):
            parquet.read(path, COLUMNS)
    with pytest.raises(FileNotFoundError):
        parquet.read(tmp_path / "absent.parquet", COLUMNS)
