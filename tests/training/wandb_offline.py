"""Reads the file of an offline W&B run back."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run file: LevelDB's log framing, in blocks of 32 KiB."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, pieces = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if not (checksum or length or kind) or position + 7 + length > len(data):
            return
        body = data[position + 7 : position + 7 + length]
        position += 7 + length
        assert zlib.crc32(bytes([kind]) + body) == checksum
        pieces += body
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield pieces
            pieces = b""


def read_offline_run(folder: Path) -> dict[str, Any]:
    """History rows, config, summary, project and name of the one offline run under ``folder``, once it is written:
    W&B's own process may lag behind ``finish``, and is waited for only when the program ends."""
    deadline = time.monotonic() + 60
    while "exit" not in (run := _read(folder)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return run


def _read(folder: Path) -> dict[str, Any]:
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    run: dict[str, Any] = {"history": [], "config": {}, "summary": {}, "alerts": []}

    def key(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    for data in wandb_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            run["history"].append({key(i): json.loads(i.value_json) for i in record.history.item})
        if record.HasField("run"):
            run |= {"project": record.run.project, "name": record.run.display_name, "group": record.run.run_group}
            run["config"] |= {key(u): json.loads(u.value_json) for u in record.run.config.update}
        if record.HasField("summary"):
            run["summary"] |= {key(u): json.loads(u.value_json) for u in record.summary.update}
        if record.HasField("alert"):
            run["alerts"].append((record.alert.title, record.alert.text))
        if record.HasField("exit"):
            run["exit"] = record.exit.exit_code
    return run
