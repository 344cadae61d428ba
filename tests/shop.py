"""A small shop's log and items, as a user would have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USERS, ITEMS = 60, 120


def write_shop(folder: Path) -> None:
    """Events and items with the columns that README names: 60 users, 120 items, 10 to 20 events each."""
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(USERS), draw.integers(10, 20, USERS))
    item = [f"sku-{number}" for number in draw.integers(0, ITEMS, len(user))]
    (folder / "events").mkdir()
    events = {"user": [f"u{number}" for number in user], "item": item, "ts": np.arange(len(user))}
    for part, rows in enumerate(np.array_split(np.arange(len(user)), 2)):
        pq.write_table(pa.table(events).take(pa.array(rows)), folder / f"events/{part}.parquet")
    numbers = range(ITEMS)
    items = {"item": [f"sku-{i}" for i in numbers]}
    items |= {"brand": [f"brand {i % 7}" for i in numbers], "category": [f"category {i % 3}" for i in numbers]}
    pq.write_table(pa.table(items), folder / "items.parquet")
