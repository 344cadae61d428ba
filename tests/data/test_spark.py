"""The plan's SQL says the same on Spark as on DuckDB: equal content, facts and summaries, on a real local Spark."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from s3rec_dist.data.append import append
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareError, PrepareSettings, prepare, summary

pytest.importorskip("pyspark", reason="needs pyspark: pip install 's3rec-dist[spark]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One small Spark, which the engine joins; it is gone after the tests, and all that it may leave in a folder."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    folder = tmp_path_factory.mktemp("spark")
    before, os.environ["SPARK_LOCAL_IP"] = os.getcwd(), "127.0.0.1"
    os.chdir(folder)
    options = {
        "spark.driver.memory": "1g",
        "spark.local.dir": str(tmp_path_factory.mktemp("spill")),
        "spark.log.level": "OFF",  # failing tasks print their stack
        "spark.pyspark.python": sys.executable,
        "spark.sql.shuffle.partitions": "3",
        "spark.sql.warehouse.dir": str(tmp_path_factory.mktemp("warehouse")),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
    }
    session = SparkSession.builder.master("local[2]").config(map=options).getOrCreate()
    yield
    gateway: Any = SparkContext._gateway
    session.stop()
    gateway.shutdown()
    SparkContext._gateway = SparkContext._jvm = None
    gateway.proc.stdin.close()
    gateway.proc.wait(60)
    os.chdir(before)
    assert os.listdir(folder) == []


def both(folder: Path, **given: Any) -> Dataset:
    """Prepares on both engines and compares; returns Spark's dataset."""
    made = []
    for engine in ("duckdb", "spark"):
        output = str(folder / engine)
        prepare(PrepareSettings(output=output, engine=engine, overwrite=True, **given))
        made.append(Dataset.open(output))
    expected, found = (dataset.manifest for dataset in made)
    assert found.preparation == expected.preparation
    assert (found.content, found.catalogue, found.attributes) == (
        expected.content,
        expected.catalogue,
        expected.attributes,
    )
    assert users(made[1]) == users(made[0])
    same = dataclasses.replace(found, shards=expected.shards)
    assert summary(same, "OUT", 0.0) == summary(expected, "OUT", 0.0)
    leftovers = [pq.read_table(folder / engine / "leftover.parquet") for engine in ("duckdb", "spark")]
    assert leftovers[0].equals(leftovers[1])
    made[1].verify()
    assert sorted(os.listdir(folder / "spark")) == sorted(os.listdir(folder / "duckdb"))
    return made[1]


def users(dataset: Dataset) -> list[str]:
    """Raw ids in the order of rows."""
    return [user for index in range(len(dataset.index)) for user in dataset.read_row_group(index).users.to_pylist()]


def lake(folder: Path, rows: int = 20_000, *, texts: bool = False, seed: int = 0) -> Path:
    """Three Parquet files with names that a pattern or a URL would take apart, and a few bad rows."""
    rng = np.random.default_rng(seed)
    user, item = rng.zipf(1.3, rows) % 900, rng.zipf(1.4, rows) % 700
    when = rng.integers(0, 500, rows)
    moments = pa.array(when * 1_000_001 - 250_000_000, pa.int64()).cast(pa.timestamp("us"))
    columns = {
        "who is": pa.array([f"u{u}" for u in user]) if texts else pa.array(user, pa.uint32()),
        "item": pa.array([f"é{i}" for i in item]).dictionary_encode() if texts else pa.array(item, pa.uint64()),
        "at": moments.cast(pa.timestamp("ns", tz="UTC")) if texts else moments,
        "stars": pa.array(rng.integers(0, 11, rows) / 2, pa.float32()),
    }
    table = pa.table(columns)
    table = pa.concat_tables([table, table.slice(0, 1).set_column(3, "stars", pa.array([float("nan")], pa.float32()))])
    target = folder / "lake [1] 50%"
    target.mkdir()
    for number, name in enumerate(("b {x}.parquet", "a#1.parquet", "c.parquet")):
        part = table.slice(number * (rows // 3), rows // 3 if number < 2 else None)
        pq.write_table(part, target / name, row_group_size=2_000, compression="none", write_page_checksum=True)
    return target


LAKE: dict[str, Any] = {
    "source": "table",
    "user_column": "who is",
    "item_column": "item",
    "time_column": "at",
    "rating_column": "stars",
    "on_bad_row": "skip",
    "rows_per_group": 64,
    "groups_per_shard": 2,
}


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ({"min_rating": 1.5, "duplicates": "drop_consecutive", "min_user_count": 4, "min_item_count": 5}, True),
        ({"duplicates": "drop_repeats", "format": "webdataset"}, False),
        ({"max_history": 20, "time_column": ""}, False),
    ],
)
def test_a_lake(tmp_path: Path, given: dict[str, Any], texts: bool) -> None:
    dataset = both(tmp_path, input=str(lake(tmp_path, texts=texts)), **{**LAKE, **given})
    facts = dataset.manifest.preparation
    assert dataset.n_rows > 100 and facts["rows_read"] == 20_001
    assert len(dataset.manifest.shards) > 1
    if "min_rating" in given:
        assert facts["bad_row_examples"] == ['c.parquet:6669: rating "nan" is not a finite number']
        assert min(facts["users_dropped_by_core"], facts["below_min_rating"], facts["duplicates_dropped"]) > 0
    if "max_history" in given:
        assert facts["users_truncated"] > 0 and dataset.index.lengths.max() == 20


def test_movielens_100k_with_attributes(ml100k: Path, tmp_path: Path) -> None:
    dataset = both(
        tmp_path, source="recbole", input=str(ml100k), attribute_fields=("class", "release_year"), rows_per_group=100
    )
    assert (dataset.n_rows, dataset.n_items, dataset.manifest.interactions) == (943, 1_682, 100_000)


def test_a_pair_with_kept_ids_and_second_lines(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lines = [f"u{i % 190} {' '.join(map(str, rng.integers(1, 60, rng.integers(1, 9))))}" for i in range(200)]
    (tmp_path / "toy.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "toy_item2attributes.json").write_text(json.dumps({str(i): [i % 5 + 1, 9] for i in range(1, 80)}))
    dataset = both(
        tmp_path,
        source="s3rec",
        input=str(tmp_path / "toy.txt"),
        ids="keep",
        on_bad_row="skip",
        work_dir=str(tmp_path / "work [1] {50%} #"),
    )
    facts = dataset.manifest.preparation
    assert facts["bad_rows"] == 10 and facts["short_users"] > 0
    assert (facts["ids"], facts["attribute_ids"]) == ("keep", "keep")


MOMENTS = [
    "2024-02-29",
    "2024-02-29 23:59",
    "2024-02-29T23:59:59.123456789",
    "2024-02-29T23:59:59+02",
    "2024-02-29 23:59:59.5-0130",
    "1969-12-31T23:59:59.999999Z",
    "0001-01-01",
    "9999-12-31 00:00:00+14:00",
    "2023-02-29",
    "2024-02-29 24:00:00",
    "2024-2-29",
    "29.02.2024",
    "2024-02-29T23:59:61",
    "2024-02-29 10:11Z",
    "epoch",
    "",
]
FLOATS = [
    "1.5", "1", " 2 ", "-.5", "5.", "+1e3", "1E-3", "1e400", "0.1000000000000000055511151231257827", "9007199254740993",
    "nan", "inf", "1d", "0x10", "1_000", "1,5", "--1", "", "1e", ".",
]  # fmt: skip


@pytest.mark.parametrize("texts", [MOMENTS, FLOATS], ids=["dates", "floats"])
def test_text_is_read_alike(tmp_path: Path, texts: list[str]) -> None:
    """Each text and five that all engines read, whose order tells what it was read as."""
    lines = ["u,i,t"]
    for number, text in enumerate(texts):
        lines += [f'u{number},{number}-{k},"{t}"' for k, t in enumerate([*texts[:5], text])]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    dataset = both(
        tmp_path,
        source="table",
        input=str(tmp_path / "events.csv"),
        user_column="u",
        item_column="i",
        time_column="t",
        on_bad_row="skip",
    )
    facts = dataset.manifest.preparation
    assert facts["time_kind"] == ("date" if texts is MOMENTS else "float")
    assert facts["bad_rows"] == (8 if texts is MOMENTS else 11)


def test_moments_before_1970_and_dates_in_parquet(tmp_path: Path) -> None:
    moments = [datetime.datetime(1969, 12, 31, 23, 59, 59, us) for us in (999_999, 1, 2, 999_998, 5)]
    for name, kind in (("ns", pa.timestamp("ns")), ("date", pa.date32())):
        when = pa.array(moments, pa.timestamp("us")).cast(kind, safe=False)
        table = pa.table({"user_id": [1] * 5, "item_id": [5, 4, 3, 2, 1], "timestamp": when})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        both(tmp_path, source="table", input=str(tmp_path / f"{name}.parquet"))


def test_one_user_with_most_of_the_events(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    size = 300_000
    table = pa.table(
        {
            "user_id": np.where(rng.random(size) < 0.9, 7, rng.integers(0, 2_000, size)),
            "item_id": rng.integers(0, 300, size),
            "timestamp": rng.integers(0, 100, size),
        }
    )
    pq.write_table(table, tmp_path / "events.parquet")
    dataset = both(tmp_path, source="table", input=str(tmp_path / "events.parquet"), max_history=1_000)
    facts = dataset.manifest.preparation
    assert facts["users_truncated"] == 1 and facts["interactions_truncated"] > 250_000
    assert dataset.index.lengths.max() == 1_000
    assert sum(dataset.items_table().column("count").to_pylist()) == dataset.manifest.interactions


def test_appending(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    columns = {"user_id": rng.zipf(1.3, 6_000) % 400, "item_id": rng.zipf(1.3, 6_000) % 90}
    table = pa.table({**columns, "timestamp": np.sort(rng.random(6_000))})
    for part, bounds in enumerate(((0, 4_000), (4_000, 6_000))):
        pq.write_table(table.slice(bounds[0], bounds[1] - bounds[0]), tmp_path / f"{part}.parquet")
    given: dict[str, Any] = {"min_item_count": 6, "duplicates": "drop_repeats", "rows_per_group": 50}
    both(tmp_path, source="table", input=str(tmp_path / "0.parquet"), **given)
    made = []
    for engine in ("duckdb", "spark"):
        output = str(tmp_path / engine)
        made.append(append({"input": str(tmp_path / "1.parquet"), "output": output, "engine": engine}))
        Dataset.open(output).verify()
    assert made[1].preparation == made[0].preparation and made[0].preparation["duplicates_dropped"] > 0
    assert (made[1].content, made[1].catalogue) == (made[0].content, made[0].catalogue)
    assert users(Dataset.open(str(tmp_path / "spark"))) == users(Dataset.open(str(tmp_path / "duckdb")))
    tables = [pq.read_table(tmp_path / engine / "v2" / "leftover.parquet") for engine in ("duckdb", "spark")]
    assert tables[0].equals(tables[1]) and len(tables[0]) > 0


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = lake(tmp_path)
    path = folder / "a#1.parquet"
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start + column.total_compressed_size - 3] ^= 1
    path.write_bytes(data)
    for engine, message in (("duckdb", "a#1.parquet: .*CRC"), ("spark", "error while reading file .*a%231.parquet")):
        with pytest.raises(PrepareError, match=message):
            prepare(PrepareSettings(input=str(folder), output=str(tmp_path / "out"), engine=engine, **LAKE))
        assert not (tmp_path / "out").exists()


def test_the_command_starts_a_spark_of_its_own_and_leaves_nothing_but_the_dataset(ml100k: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "s3rec_dist", "prepare", "--source", "recbole", "--input", str(ml100k)]
    command += ["--attributes", "none", "--engine", "spark", "--master", "local[1]", "--memory-limit", "800MB"]
    home = tmp_path / "home"
    home.mkdir()
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], cwd=home, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert "users                  943" in done.stdout
    assert os.listdir(home) == [] and sorted(os.listdir(tmp_path)) == ["home", "out"]
    prepare(PrepareSettings(source="recbole", input=str(ml100k), attributes="none", output=str(tmp_path / "duckdb")))
    expected, found = (Dataset.open(str(tmp_path / name)).manifest for name in ("duckdb", "out"))
    assert (found.content, found.preparation) == (expected.content, expected.preparation)
