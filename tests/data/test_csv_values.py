"""Fields of .csv and Excel files as numbers: types follow from all rows, what is missing is NaN, and every format says the same."""

import bz2
import gzip
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from perceiver.config import DataConfig, UserError
from perceiver.data.csv_values import csv_tables, csv_types, csv_value
from perceiver.data.files import InputFile
from perceiver.data.read_arrays import read_arrays
from perceiver.data.rows import ArrayRows, Column
from perceiver.data.sources import resolve
from perceiver.data.spans import Problems, Span
from perceiver.data.table_schema import TableSchema

ROWS = ArrayRows(a=((), "float32"), past=((2,), "float32"), n=((), "int64"), name=((), "string")).missing(["a", "past"])
TABLE = [
    {"a": 1, "past": [0.5, 2.0], "n": 3, "name": "low"},
    {"a": None, "past": [1.0, -2.5], "n": 0, "name": "12"},
    {"a": 2.5, "past": [3.0, 4.0], "n": 7, "name": "high, or so"},
]


def file_of(path) -> InputFile:
    return resolve(DataConfig(source=str(path)), "arrays").files[0]


def write(folder, name):
    """The table in a format."""
    path = folder / name
    csv = "a,past,n,name\n" + "".join(f'{"" if r["a"] is None else r["a"]},"{r["past"]}",{r["n"]},"{r["name"]}"\n' for r in TABLE)
    plain = {
        "csv": csv,
        "tsv": csv.replace(",past,n,", "\tpast\tn\t"),
        "json": json.dumps(TABLE),
        "jsonl": "\n".join(map(json.dumps, TABLE)),
    }
    table = pa.Table.from_pylist(TABLE)
    if name.endswith(".xlsx"):
        book = pytest.importorskip("openpyxl").Workbook()
        for row in (list(TABLE[0]), *([r["a"], str(r["past"]), r["n"], r["name"]] for r in TABLE)):
            book.active.append(row)
        book.save(path)
    elif name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name.endswith(".feather"):
        feather.write_feather(table, path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(plain[name.split(".")[1]].encode()))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(plain[name.split(".")[1]].encode()))
    else:
        path.write_text(plain[name.split(".")[1]])
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.xlsx", "x.parquet", "x.feather", "x.json", "x.jsonl", "x.jsonl.bz2"])
def test_every_format_has_the_same_numbers_and_the_same_types(tmp_path, name):
    file = file_of(write(tmp_path, name))
    found = [example for example, _ in read_arrays(Span(file, 0, 1 << 40), ROWS, Problems(skip=False))]
    assert [row["n"] for row in found] == [3, 0, 7] and [row["name"] for row in found] == ["low", "12", "high, or so"]
    assert found[0]["a"] == 1 and math.isnan(found[1]["a"]) and found[2]["a"] == 2.5
    np.testing.assert_array_equal([row["past"] for row in found], [row["past"] for row in TABLE])
    schema = TableSchema(DataConfig(source=str(tmp_path / name)))
    assert schema.is_numeric("a") and not schema.is_whole("a") and schema.is_whole("n") and schema.is_text("name")
    assert schema.shape("past", "x") == (2,) and schema.distinct("n") == [0, 3, 7]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ("1 2", pa.int64()), ("1 2.5 -3e4 .5", pa.float64()), ("1 NA", pa.int64()), ("True FALSE", pa.bool_()), ("1 two", pa.string()),
        ("1 true", pa.string()), ("1_000 2", pa.string()), ("inf 2", pa.string()), ("9" * 20, pa.float64()),
        ("NA null", pa.null()),
    ],
)  # fmt: skip
def test_the_type_of_a_column_is_that_of_all_its_fields(tmp_path, fields, kind):
    (tmp_path / "x.csv").write_text("a\n" + fields.replace(" ", "\n"))
    assert csv_types(file_of(tmp_path / "x.csv")) == {"a": kind}
    values = [value for table in csv_tables(file_of(tmp_path / "x.csv"), ["a"]) for value in table["a"].to_pylist()]
    assert len(values) == len(fields.split()) and [value is None for value in values] == [word in ("NA", "null") for word in fields.split()]


def test_a_field_is_what_its_column_wants():
    number, text = Column((), "float32"), Column((), "string")
    assert [csv_value(field, number) for field in ("1", " 2.5 ", "NaN", "", "true", "[1, 2]", "1,5")] == [
        1,
        2.5,
        None,
        None,
        1,
        [1, 2],
        "1,5",
    ]
    assert [csv_value(field, text) for field in ("12", "", "none")] == ["12", None, "none"]


def test_a_text_among_numbers_is_named_with_its_line(tmp_path):
    (tmp_path / "x.csv").write_text("a,n\n1,2\nabout 3,4\n")
    rows = ArrayRows(a=((), "float32"), n=((), "int64"))
    with pytest.raises(UserError, match=r"x.csv line 3: a cannot be read as float32: 'about 3'"):
        list(read_arrays(Span(file_of(tmp_path / "x.csv"), 0, 0), rows, Problems(skip=False)))
    with pytest.raises(UserError, match=r"names 'a', which holds string \(such as '1'\) in x.csv and must hold numbers"):
        TableSchema(DataConfig(source=str(tmp_path / "x.csv"))).shape("a", "--task.targets")


def test_a_number_that_must_be_there_is_missed(tmp_path):
    (tmp_path / "x.csv").write_text("a,n\n1,2\n3,\n")
    rows = ArrayRows(a=((), "float32"), n=((), "int64")).missing(["a"])
    with pytest.raises(UserError, match=r"x.csv line 3: it has no n"):
        list(read_arrays(Span(file_of(tmp_path / "x.csv"), 0, 0), rows, Problems(skip=False)))


def test_what_is_no_excel_file_is_named(tmp_path):
    pytest.importorskip("openpyxl")
    (tmp_path / "x.xlsx").write_text("a,b")
    with pytest.raises(UserError, match="x.xlsx is no readable Excel file"):
        TableSchema(DataConfig(source=str(tmp_path / "x.xlsx")))


def test_text_that_is_not_utf_8_is_named_and_read_by_its_encoding(tmp_path):
    (tmp_path / "x.csv").write_bytes("a,name\n1,rot\n2,gr\u00fcn\n".encode("latin-1"))
    rows = ArrayRows(a=((), "float32"), name=((), "string"))
    with pytest.raises(UserError, match=r"x.csv line 3 is not UTF-8: byte 0xfc \(--data.encoding names another"):
        list(read_arrays(Span(file_of(tmp_path / "x.csv"), 0, 0), rows, Problems(skip=False)))
    with pytest.raises(UserError, match="x.csv is not UTF-8: byte 0xfc"):
        TableSchema(DataConfig(source=str(tmp_path / "x.csv"))).distinct("name")
    latin = TableSchema(DataConfig(source=str(tmp_path / "x.csv"), encoding="latin-1"))
    assert latin.distinct("name") == ["gr\u00fcn", "rot"]
