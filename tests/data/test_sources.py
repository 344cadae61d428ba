"""Raw inputs: every kind gives the same flat rows, and what cannot be read says file, line and reason."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from s3rec_dist.data import sources
from s3rec_dist.data.sources import Columns, RecBole, S3RecPair, Source, SourceError, Table

COLUMNS = Columns(user="user_id", item="item_id", rating="", time="timestamp")


def events(source: Source) -> tuple[list[tuple[Any, ...]], list[str]]:
    """All events as (user, item[, rating][, time]) and all bad rows as 'place: reason'."""
    bad: list[str] = []
    rows = drain(source.events(lambda position, reason: bad.append(f"{source.place(position)}: {reason}")))
    return rows, [line.rpartition("/")[2] for line in bad]


def attributes(source: Source) -> tuple[list[tuple[Any, ...]], list[str]]:
    """All attributes as (item, field, value), in order, and all bad rows."""
    bad: list[str] = []
    rows = drain(
        source.attributes(lambda position, reason: bad.append(f"{source.attribute_place(position)}: {reason}"))
    )
    return rows, [line.rpartition("/")[2] for line in bad]


def drain(batches: Iterator[pa.RecordBatch]) -> list[tuple[Any, ...]]:
    rows = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]
    positions = [position for position, *_ in rows]
    assert positions == sorted(positions) or len({field for _, _, field, *_ in rows}) > 1
    return [tuple(row) for _, *row in rows]


def pair(folder: Path, text: str, described: Any = None) -> S3RecPair:
    (folder / "toy.txt").write_bytes(text.encode("latin-1"))
    if described is None:
        return S3RecPair(str(folder / "toy.txt"), "none")
    content = described if isinstance(described, str) else json.dumps(described)
    (folder / "toy_item2attributes.json").write_text(content)
    return S3RecPair(str(folder / "toy.txt"), "")


def recbole(folder: Path, inter: str, item: str | None = None, *fields: str, columns: Columns = COLUMNS) -> RecBole:
    (folder / "toy.inter").write_text(inter)
    if item is not None:
        (folder / "toy.item").write_text(item)
    return RecBole(str(folder), "" if item is not None else "none", columns, fields)


def table(path: Path, described: str = "", *fields: str, columns: Columns = COLUMNS, separator: str = "") -> Table:
    return Table(str(path), described, columns, fields, separator)


class TestPair:
    def test_lines_become_events_in_order(self, tmp_path: Path) -> None:
        assert events(pair(tmp_path, "u1 3 1 3\nu2 2 1\n")) == (
            [("u1", "3"), ("u1", "1"), ("u1", "3"), ("u2", "2"), ("u2", "1")],
            [],
        )

    def test_line_ends_tabs_double_spaces_and_a_missing_last_newline_do_not_matter(self, tmp_path: Path) -> None:
        assert events(pair(tmp_path, "\u00ef\u00bb\u00bfu1  3\t1 \r\nu2 2"))[0] == [
            ("u1", "3"),
            ("u1", "1"),
            ("u2", "2"),
        ]

    def test_bad_lines_are_told_and_left_out(self, tmp_path: Path) -> None:
        rows, bad = events(pair(tmp_path, "u1 3 1\n\nu2\nu3 4\n\xff 1 2\nu4 5\n"))
        assert rows == [("u1", "3"), ("u1", "1"), ("u3", "4"), ("u4", "5")]
        assert sorted(bad) == [
            "toy.txt:2: empty line, expected 'user item item ...'",
            "toy.txt:3: a user without items",
            "toy.txt:5: not UTF-8 text (invalid start byte at byte 0)",
        ]

    def test_many_lines_keep_their_numbers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "LINES_PER_BATCH", 3)
        source = pair(tmp_path, "".join(f"u{i} {i}\n" if i != 7 else "u7\n" for i in range(10)))
        rows, bad = events(source)
        assert rows == [(f"u{i}", str(i)) for i in range(10) if i != 7] and bad == ["toy.txt:8: a user without items"]

    def test_attribute_lists_are_flattened_as_they_are(self, tmp_path: Path) -> None:
        source = pair(tmp_path, "u 1\n", {"1": [2, 1, 2], "x": ["blue"], "3": []})
        assert attributes(source)[0] == [
            ("1", "attribute", "2"),
            ("1", "attribute", "1"),
            ("1", "attribute", "2"),
            ("x", "attribute", "blue"),
        ]

    @pytest.mark.parametrize(
        ("described", "message"),
        [
            ('{"1": [1,]}', r"toy_item2attributes\.json:1: not valid JSON: .* at column"),
            ("[1]", r"expected an object \{item: \[attribute, \.\.\.\]\}, got list"),
            ('{"1": 5}', "item '1': expected a list of attribute ids, got '5'"),
            ('{"1": [true]}', "item '1': expected a list"),
            ('{"1": [null]}', "item '1': expected a list"),
            ('{"1": [1], "1": [2]}', "'1' appears twice; merge its lists"),
            ("", "the file is empty"),
        ],
    )
    def test_a_malformed_attribute_file_is_an_error(self, tmp_path: Path, described: str, message: str) -> None:
        with pytest.raises(SourceError, match=message):
            attributes(pair(tmp_path, "u 1\n", described))

    def test_a_missing_attribute_file_is_an_error_with_both_remedies(self, tmp_path: Path) -> None:
        (tmp_path / "toy.txt").write_text("u 1\n")
        with pytest.raises(
            SourceError, match=r"toy_item2attributes\.json: no such .* --attributes, .* --attributes none"
        ):
            S3RecPair(str(tmp_path / "toy.txt"), "")

    def test_missing_and_empty_inputs(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"gone\.txt: no such input file"):
            S3RecPair(str(tmp_path / "gone.txt"), "none")
        with pytest.raises(SourceError, match=r"toy\.txt: the file is empty"):
            pair(tmp_path, "")
        (tmp_path / "other.txt").write_text("u 1\n")
        with pytest.raises(SourceError, match=r"expected one \*\.txt file .* found other\.txt, toy\.txt"):
            S3RecPair(str(tmp_path), "none")


class TestRecBole:
    INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    ITEM = "item_id:token\ttitle:token_seq\tyear:token\tclass:token_seq\tprice:float\n"

    def test_columns_are_found_by_name_without_their_type(self, tmp_path: Path) -> None:
        source = recbole(tmp_path, self.INTER + 'u1\ti1\t3\t5\nu1\ti"2\t4\t6.5\n')
        assert events(source) == ([("u1", "i1", "5"), ("u1", 'i"2', "6.5")], [])

    def test_a_path_a_prefix_and_a_folder_name_the_same_files(self, tmp_path: Path) -> None:
        recbole(tmp_path, self.INTER + "u\ti\t1\t1\n", self.ITEM)
        for name in ("", "toy", "toy.inter"):
            source = RecBole(str(tmp_path / name), "", COLUMNS, ())
            assert source.files == [str(tmp_path / "toy.inter"), str(tmp_path / "toy.item")]

    def test_wrong_column_counts_are_told_with_their_lines(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sources, "BLOCK_BYTES", 64)
        lines = [f"u{i}\ti\t1\t{i}\n" for i in range(40)]
        lines[3], lines[4], lines[30] = "u\ti\n", "u\ti\t1\t1\t1\n", "u\n"
        source = recbole(tmp_path, self.INTER + "".join(lines))
        rows, bad = events(source)
        assert rows == [(f"u{i}", "i", str(i)) for i in range(40) if i not in (3, 4, 30)]
        assert bad == [
            "toy.inter:5: 2 columns, expected 4",
            "toy.inter:6: 5 columns, expected 4",
            "toy.inter:32: 1 columns, expected 4",
        ]
        places = [
            source.place(position)
            for batch in source.events(lambda position, reason: None)
            for position in batch.column("position").to_pylist()
        ]
        assert places == [f"{tmp_path}/toy.inter:{i + 2}" for i in range(40) if i not in (3, 4, 30)]

    def test_text_that_is_not_utf8_is_told_with_its_line(self, tmp_path: Path) -> None:
        source = recbole(tmp_path, self.INTER + "u1\ti\t1\t1\nu2\tX\t1\t1\nu3\ti\t1\t1\n")
        path = tmp_path / "toy.inter"
        path.write_bytes(path.read_bytes().replace(b"X", b"\xff"))
        assert events(source) == (
            [("u1", "i", "1"), ("u3", "i", "1")],
            ["toy.inter:3: not UTF-8 text (invalid start byte)"],
        )

    def test_token_seq_fields_are_the_default_and_split_at_spaces(self, tmp_path: Path) -> None:
        source = recbole(tmp_path, self.INTER, self.ITEM + "1\tToy Story\t1995\tComedy  Drama\t3\n2\t\t\t\t\n")
        assert attributes(source)[0] == [
            ("1", "title", "Toy"),
            ("1", "title", "Story"),
            ("1", "class", "Comedy"),
            ("1", "class", "Drama"),
        ]

    def test_several_fields_keep_their_own_namespaces(self, tmp_path: Path) -> None:
        source = recbole(tmp_path, self.INTER, self.ITEM + "1\tA\t1995\tA B\t3\n", "class", "year")
        assert attributes(source)[0] == [("1", "class", "A"), ("1", "class", "B"), ("1", "year", "1995")]

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (("genre",), "attribute field 'genre' is not there; expected .* title, year, class"),
            (("price",), "attribute field 'price' is float"),
            (("item_id",), "attribute field 'item_id' is token"),
        ],
    )
    def test_fields_that_cannot_be_attributes(self, tmp_path: Path, fields: tuple[str, ...], message: str) -> None:
        with pytest.raises(SourceError, match=message):
            recbole(tmp_path, self.INTER, self.ITEM, *fields)

    def test_without_token_seq_a_field_must_be_named(self, tmp_path: Path) -> None:
        item = "item_id:token\tyear:token\n1\t1995\n"
        with pytest.raises(SourceError, match=r"no token_seq field .*--attribute-fields \(there are: year\)"):
            recbole(tmp_path, self.INTER, item)
        assert attributes(recbole(tmp_path, self.INTER, item, "year"))[0] == [("1", "year", "1995")]

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("user_id\titem_id\n", r"toy\.inter:1: expected a header of tab-separated field:type .*, got 'user_id'"),
            ("user_id:token,item_id:token\n", "got 'user_id:token,item_id:token'|no column"),
            ("user_id:token\titem_id:word\n", "got 'item_id:word'"),
            ("user_id:token\tuser_id:token\n", "field 'user_id' appears twice"),
            ("user_id:token\ttimestamp:float\n", "no column 'item_id' for the item; there are user_id, timestamp"),
            ("user_id:token\titem_id:token\n", "no column 'timestamp' .* Set --time-column; pass an empty name"),
        ],
    )
    def test_a_wrong_header_is_an_error(self, tmp_path: Path, header: str, message: str) -> None:
        with pytest.raises(SourceError, match=message):
            events(recbole(tmp_path, header + "a\tb\n"))

    def test_a_missing_item_file_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "toy.inter").write_text(self.INTER)
        with pytest.raises(SourceError, match=r"toy\.item: no such attribute file"):
            RecBole(str(tmp_path), "", COLUMNS, ())


class TestTable:
    ROWS = (("u1", "i1", 30), ("u2", 'i,"2', 10), ("u1", "i3", 20))

    def write(self, path: Path) -> Path:
        names = ["user_id", "item_id", "timestamp"]
        made = pa.table([pa.array(column) for column in zip(*self.ROWS, strict=True)], names=names)
        if path.suffix == ".parquet":
            pq.write_table(made, path)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in made.to_pylist()))
        else:
            options = pyarrow.csv.WriteOptions(delimiter="\t" if path.suffix == ".tsv" else ",")
            pyarrow.csv.write_csv(made, path, options)
        return path

    @pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl"])
    def test_every_kind_gives_the_same_events(self, tmp_path: Path, suffix: str) -> None:
        rows, bad = events(table(self.write(tmp_path / f"events.{suffix}")))
        assert [(user, item, int(time)) for user, item, time in rows] == list(self.ROWS) and not bad

    def test_compressed_text_is_read(self, tmp_path: Path) -> None:
        plain = self.write(tmp_path / "events.jsonl")
        (tmp_path / "events.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
        assert events(table(tmp_path / "events.jsonl.gz")) == events(table(plain))

    def test_folders_and_patterns_are_read_by_name(self, tmp_path: Path) -> None:
        for name in ("b.csv", "a.csv"):
            (tmp_path / name).write_text(f"user_id,item_id,timestamp\n{name},i,1\n")
        (tmp_path / "notes.md").write_text("not data")
        for path in (tmp_path, tmp_path / "*.csv"):
            source = table(path)
            assert [user for user, _, _ in events(source)[0]] == ["a.csv", "b.csv"]
        positions = [
            position for batch in source.events(lambda *_: None) for position in batch.column("position").to_pylist()
        ]
        assert [source.place(position) for position in positions] == [f"{tmp_path}/a.csv:2", f"{tmp_path}/b.csv:2"]

    def test_moments_dates_decimals_and_dictionaries_become_plain(self, tmp_path: Path) -> None:
        pq.write_table(
            pa.table(
                {
                    "user_id": pa.array(["a", "b"]).dictionary_encode(),
                    "item_id": pa.array([7, 8], pa.uint16()),
                    "timestamp": pa.array([datetime.datetime(1970, 1, 2), None], pa.timestamp("ns", tz="UTC")),
                }
            ),
            tmp_path / "events.parquet",
        )
        assert events(table(tmp_path / "events.parquet"))[0] == [("a", 7, 86_400_000_000), ("b", 8, None)]

    def test_parquet_alone_is_left_to_the_engine_with_its_types(self, tmp_path: Path) -> None:
        self.write(tmp_path / "b.parquet")
        self.write(tmp_path / "a.parquet")
        lake = table(tmp_path).lake()
        assert lake is not None and lake.rows == 6
        assert lake.paths == (str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet"))
        assert lake.kinds() == {"user": pa.string(), "item": pa.string(), "time": pa.int64()}
        self.write(tmp_path / "c.csv")
        assert table(tmp_path).lake() is None

    @pytest.mark.parametrize(
        "more",
        [
            {"file_row_number": pa.array([9, 9])},
            {"USER_ID": pa.array(["x", "y"])},
            {"timestamp": pa.array([1, 2], pa.float16())},
            {"item_id": pa.array([1, 2], pa.int16())},
        ],
        ids=[
            "an engine's own name",
            "a name but for case",
            "a type that some lack",
            "another type than the file before",
        ],
    )
    def test_parquet_that_engines_would_read_otherwise_is_read_here(self, tmp_path: Path, more: dict[str, Any]) -> None:
        columns = {"user_id": ["u", "v"], "item_id": [1, 2], "timestamp": [3, 4]}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        assert table(tmp_path).lake() is not None
        second = tmp_path / ("b.parquet" if "item_id" in more else "a.parquet")
        pq.write_table(pa.table(columns | more), second)
        assert table(tmp_path).lake() is None
        assert {row[:2] for row in events(table(tmp_path))[0]} == {("u", 1), ("v", 2)}

    @pytest.mark.parametrize(
        ("column", "values", "message"),
        [
            ("item_id", [1.5], r"column 'item_id' holds double; ids must be integers or strings"),
            ("item_id", [[1]], r"column 'item_id' holds list<.*>; expected integers"),
            ("timestamp", [{"a": 1}], r"column 'timestamp' holds struct"),
            ("user_id", [True], r"column 'user_id' holds bool"),
        ],
    )
    def test_columns_of_other_types_are_refused(
        self, tmp_path: Path, column: str, values: list[Any], message: str
    ) -> None:
        columns = {"user_id": ["u"], "item_id": ["i"], "timestamp": [1], column: values}
        pq.write_table(pa.table(columns), tmp_path / "events.parquet")
        with pytest.raises(SourceError, match=message):
            events(table(tmp_path / "events.parquet"))

    def test_bad_json_lines_are_told_and_left_out(self, tmp_path: Path) -> None:
        lines = [
            '{"user_id": "u", "item_id": 1, "timestamp": 2.5}',
            '{"user_id": "u"',
            "[1]",
            '{"user_id": "u", "item_id": 1.5, "timestamp": 1}',
            '{"user_id": "u", "item_id": 1, "timestamp": true}',
            "",
            '{"item_id": 1, "timestamp": 1}',
        ]
        (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
        rows, bad = events(table(tmp_path / "events.jsonl"))
        assert rows == [("u", "1", "2.5"), (None, "1", "1")]
        assert bad == [
            "events.jsonl:2: not valid JSON: Expecting ',' delimiter at column 16",
            "events.jsonl:3: expected a JSON object, got list",
            "events.jsonl:4: field 'item_id': expected an integer or a string, got 1.5",
            "events.jsonl:5: field 'timestamp': expected a number, got true",
            "events.jsonl:6: not valid JSON: Expecting value at column 1",
        ]

    def test_wrong_column_counts_in_csv_are_told(self, tmp_path: Path) -> None:
        (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\na,b\nc,d,1\n")
        assert events(table(tmp_path / "events.csv")) == (
            [("c", "d", "1")],
            ["events.csv:2: 2 columns, expected 3"],
        )

    @pytest.mark.parametrize("suffix", ["parquet", "csv"])
    def test_a_missing_column_lists_those_there_are(self, tmp_path: Path, suffix: str) -> None:
        path = self.write(tmp_path / f"events.{suffix}")
        columns = Columns(user="uid", item="item_id", rating="", time="")
        with pytest.raises(SourceError, match=r"no column 'uid' for the user; there are user_id, item_id, timestamp"):
            events(table(path, columns=columns))

    def test_inputs_that_are_not_there_or_of_no_known_kind(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"no input there; expected a file, folder or pattern of \.parquet"):
            table(tmp_path / "*.parquet")
        (tmp_path / "events.xls").write_text("x")
        with pytest.raises(SourceError, match=r"events\.xls: unknown kind of table"):
            table(tmp_path / "events.xls")
        (tmp_path / "events.parquet").write_text("not parquet")
        with pytest.raises(SourceError, match=r"events\.parquet: not a readable Parquet file"):
            events(table(tmp_path / "events.parquet"))

    @pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
    def test_attribute_columns_may_be_lists(self, tmp_path: Path, suffix: str) -> None:
        rows = [
            {"item_id": "i1", "brand": "A", "tags": ["x", "y"]},
            {"item_id": "i2", "brand": None, "tags": None},
            {"item_id": "i3", "brand": "", "tags": []},
        ]
        path = tmp_path / f"items.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = table(self.write(tmp_path / "events.csv"), str(path), "brand", "tags")
        assert attributes(source)[0] == [("i1", "brand", "A"), ("i1", "tags", "x"), ("i1", "tags", "y")]

    def test_text_attributes_split_at_the_separator(self, tmp_path: Path) -> None:
        (tmp_path / "items.csv").write_text("item_id,genres,year\n1,Comedy|Drama,1995\n")
        source = table(
            self.write(tmp_path / "events.csv"), str(tmp_path / "items.csv"), "genres", "year", separator="|"
        )
        assert attributes(source)[0] == [("1", "genres", "Comedy"), ("1", "genres", "Drama"), ("1", "year", "1995")]

    def test_attribute_columns_must_be_named(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "events.csv")
        with pytest.raises(SourceError, match="name the columns that hold attributes with --attribute-fields"):
            table(path, str(path))
