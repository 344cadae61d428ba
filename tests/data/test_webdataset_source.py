"""Tars that others wrote: histories come out whole and in order, nothing in them is ever run, followed or unpickled."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import re
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from s3rec_dist.data import tars
from s3rec_dist.data.dataset import Dataset
from s3rec_dist.data.prepare import PrepareError, PrepareSettings, prepare
from s3rec_dist.data.sources import Columns, SourceError, WebDatasetTars

COLUMNS = Columns(user="user_id", item="item_id", rating="", time="timestamp")

Member = tuple[str, bytes] | tarfile.TarInfo


def tar(path: Path, *members: Member, format: int = tarfile.PAX_FORMAT) -> Path:
    """Writes a tar of (name, data) members, and of bare headers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                file.addfile(header, io.BytesIO(member[1]))
    return path


def header(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def npy(values: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values, **options))
    return file.getvalue()


def read(path: Path | str) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """((user, items) of each sample, 'FILE: sample N: reason' of each that is left out)."""
    source = WebDatasetTars(str(path), "none", COLUMNS, (), "")
    bad: list[str] = []
    found: dict[tuple[int, str], list[str]] = {}
    positions: list[int] = []
    for batch in source.events(lambda position, reason: bad.append(f"{source.place(position)}: {reason}")):
        for row in batch.to_pylist():
            found.setdefault((row["position"] >> 24, row["user"]), []).append(row["item"])
            positions.append(row["position"])
    assert positions == sorted(set(positions))
    return [(user, items) for (_, user), items in found.items()], [re.sub(r"^\S*/", "", line) for line in bad]


def dataset(folder: Path, source: str, path: Path, **options: Any) -> Dataset:
    output = folder / f"dataset-{source}"
    prepare(PrepareSettings(source=source, input=str(path), output=str(output), overwrite=True, **options))
    return Dataset.open(str(output))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


class TestHistories:
    @pytest.mark.parametrize(
        "member",
        [
            ("u1.npy", npy([30, 10, 20])),
            ("u1.npy", npy([30, 10, 20], dtype=np.uint8)),
            ("u1.npy", npy([30, 10, 20], dtype=">i8")),
            ("u1.npy", npy(["30", "10", "20"])),
            ("u1.npy", npy([b"30", b"10", b"20"])),
            ("u1.json", b"[30, 10, 20]"),
            ("u1.json", b'\xef\xbb\xbf["30", "10", 20]'),
            ("x9.json", b'{"user": "u1", "items": [30, 10, 20], "age": 7}'),
            ("u1.txt", b"30 10\n20\n"),
            ("u1.txt", b"\xef\xbb\xbf30\t10 \r\n 20"),
            ("U1.history.TXT".replace("U1", "u1"), b"30 10 20"),
            ("./u1.txt", b"30 10 20"),
        ],
    )
    def test_a_sample_is_a_users_items_in_order(self, member: Member, tmp_path: Path) -> None:
        assert read(tar(tmp_path / "a.tar", member)) == ([("u1", ["30", "10", "20"])], [])

    def test_the_key_is_the_user_folders_included_and_a_json_may_name_another(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", ("de/7.txt", b"a"), ("fr/7.txt", b"b"), ("8.json", b'{"user": 9, "items": [1]}'))
        assert read(path) == ([("de/7", ["a"]), ("fr/7", ["b"]), ("9", ["1"])], [])

    def test_other_members_and_names_without_extension_are_skipped(self, tmp_path: Path) -> None:
        path = tar(
            tmp_path / "a.tar",
            ("README", b"hello"),
            header("users", tarfile.DIRTYPE),
            ("._u1.txt", b"resource fork"),
            ("u1.cls", b"3"),
            ("u1.txt", b"1 2"),
            ("u1.jpg", b"\xff\xd8"),
        )
        assert read(path) == ([("u1", ["1", "2"])], [])

    def test_what_webdataset_writes_is_read(self, tmp_path: Path) -> None:
        with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
            for user in range(300):
                writer.write({"__key__": f"user{user}", "items.npy": np.arange(user + 1), "country.txt.gz": b"x"})
        assert read(tmp_path / "a.tar")[0] == [(f"user{n}", [str(i) for i in range(n + 1)]) for n in range(300)]

    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_every_format_of_tar_and_long_names(self, format: int, tmp_path: Path) -> None:
        key = "f" * 90 + "/" + "k" * 90
        path = tar(tmp_path / "a.tar", (f"{key}.txt", b"1 2"), ("last.txt", b"3"), format=format)
        assert read(path) == ([(key, ["1", "2"]), ("last", ["3"])], [])

    @pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
    def test_gzipped_tars(self, name: str, tmp_path: Path) -> None:
        plain = tar(tmp_path / "plain.tar", ("u1.txt", b"1 2"))
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
        assert read(tmp_path / name) == ([("u1", ["1", "2"])], [])

    def test_a_folder_or_pattern_is_read_by_name_and_places_count_in_each_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("s3rec_dist.data.sources.LINES_PER_BATCH", 2)
        tar(tmp_path / "logs" / "b.tar", ("u4.txt", b""), ("u5.txt", b"5"), ("u6.txt", b""))
        tar(tmp_path / "logs" / "a.tar", ("u1.txt", b"1"), ("u2.txt", b"2 2 2"), ("u3.txt", b""))
        (tmp_path / "logs" / "notes.md").write_text("hello")
        expected = (
            [("u1", ["1"]), ("u2", ["2", "2", "2"]), ("u5", ["5"])],
            [
                f"{place}: sample {key!r}: .txt: 0 items, expected 1 to 16,777,215"
                for place, key in (("a.tar: sample 3", "u3"), ("b.tar: sample 1", "u4"), ("b.tar: sample 3", "u6"))
            ],
        )
        assert read(tmp_path / "logs") == expected
        assert read(tmp_path / "logs" / "?.tar") == expected

    def test_any_allowed_storage(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", ("u1.txt", b"1 2"))
        filesystem = fsspec.filesystem("memory")
        try:
            filesystem.pipe_file("/tars/a.tar", path.read_bytes())
            assert read("memory://tars/*.tar") == ([("u1", ["1", "2"])], [])
            assert read("memory://tars") == ([("u1", ["1", "2"])], [])
        finally:
            filesystem.rm("/tars", recursive=True)


def shaped(header_text: str, data: bytes) -> bytes:
    """A .npy file with a header of one's own."""
    text = header_text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


class TestRefusals:
    @pytest.mark.parametrize(
        ("member", "reason"),
        [
            (("u1.npy", npy([1, "a", None], dtype=object)), ".npy: 1-D array of object, expected 1-D of integers or"),
            (("u1.npy", npy([1.5])), ".npy: 1-D array of float64, expected"),
            (("u1.npy", npy([[1, 2]])), ".npy: 2-D array of int64, expected"),
            (("u1.npy", npy(7)), ".npy: 0-D array of int64, expected"),
            (("u1.npy", npy([(1, 2)], dtype="i4,i4")), ".npy: 1-D array of "),
            (("u1.npy", npy([True])), ".npy: 1-D array of bool, expected"),
            (("u1.npy", b"PK\x03\x04"), ".npy: not a readable header (EOF: reading magic string"),
            (("u1.npy", b""), ".npy: not a readable header (EOF: reading magic string"),
            (("u1.npy", npy([1, 2, 3])[:-1]), ".npy: 23 bytes of data, expected 3 of int64"),
            (("u1.npy", npy([1, 2, 3]) + b"x"), ".npy: 25 bytes of data, expected 3 of int64"),
            (
                ("u1.npy", shaped("{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,), }", b"")),
                ".npy: 0 bytes of data, expected 1,000,000,000,000 of <U0",
            ),
            (
                ("u1.npy", shaped("{'descr': '<i8', 'fortran_order': False, 'shape': (-1,), }", b"12345678")),
                ".npy: 8 bytes of data, expected -1 of int64",
            ),
            (("u1.npy", shaped("__import__('os').mkdir('x')", b"")), ".npy: not a readable header (malformed node"),
            (("u1.npy", shaped("{[]: 1}", b"")), ".npy: not a readable header (unhashable type"),
            (("u1.npy", shaped("-" * 100 + "1", b"")), ".npy: not a readable header ("),
            (("u1.npy", npy([b"\xff\xfe"])), ".npy is not UTF-8 text"),
            (("u1.npy", npy(["a", ""])), ".npy: '' is no id, expected integers or strings that are not empty"),
            (("u1.json", b"[1, 2"), ".json: not valid JSON: Expecting ',' delimiter at line 1, column 6"),
            (("u1.json", b"[" * 100_000), ".json: "),
            (("u1.json", b"[" + b"9" * 5000 + b"]"), ".json: Exceeds the limit"),
            (("u1.json", b"7"), '.json: expected a list of ids, or {"user": id, "items": [id, ...]}'),
            (("u1.json", b'{"user": "u1"}'), '.json: expected a list of ids, or {"user": id, "items": [id, ...]}'),
            (("u1.json", b'{"user": null, "items": [1]}'), ".json: 'None' is no id, expected integers or strings"),
            (("u1.json", b"[1, 2.5]"), ".json: '2.5' is no id, expected integers or strings that are not empty"),
            (("u1.json", b"[1, true]"), ".json: 'True' is no id"),
            (("u1.json", b"[1, [2]]"), ".json: '[2]' is no id"),
            (("u1.json", b'["\\ud800"]'), ".json is not UTF-8 text"),
            (("u1.json", b"[]"), ".json: 0 items, expected 1 to 16,777,215"),
            (("u1.json", b"\xff[1]"), ".json is not UTF-8 text (invalid start byte)"),
            (("u1.txt", b"1 \xff"), ".txt is not UTF-8 text (invalid start byte)"),
            (("u1.txt", b" \n"), ".txt: 0 items, expected 1 to 16,777,215"),
            (("u1.jpg", b"1 2"), "expected one member of .npy, .json, .txt; found .jpg"),
            (("u1.pkl", b"1 2"), "expected one member of .npy, .json, .txt; found .pkl; pickles, as .pkl, are never"),
        ],
    )
    def test_a_malformed_sample_is_told_and_left_out(self, member: Member, reason: str, tmp_path: Path) -> None:
        found, bad = read(tar(tmp_path / "a.tar", ("u0.txt", b"1"), member, ("u2.txt", b"2")))
        assert found == [("u0", ["1"]), ("u2", ["2"])]
        assert len(bad) == 1 and bad[0].startswith(f"a.tar: sample 2: sample 'u1': {reason}")

    def test_a_sample_that_holds_two_histories_is_told_and_left_out(self, tmp_path: Path) -> None:
        path = tar(
            tmp_path / "a.tar", ("u1.txt", b"1"), ("u1.json", b"[1]"), ("u1.meta.json", b"[1]"), ("u2.txt", b"2")
        )
        assert read(path) == (
            [("u2", ["2"])],
            ["a.tar: sample 1: sample 'u1': expected one member of .npy, .json, .txt; found .txt, .json, .meta.json"],
        )

    @pytest.mark.parametrize("name", ["u1.txt", "u1.TXT", "u1.cls"])
    def test_a_member_that_appears_twice_spoils_its_sample(self, name: str, tmp_path: Path) -> None:
        twice = (name.lower(), b"1"), (name, b"2")
        path = tar(tmp_path / "a.tar", ("u0.txt", b"0"), *twice, ("u2.txt", b"2"))
        assert read(path) == (
            [("u0", ["0"]), ("u2", ["2"])],
            ["a.tar: sample 2: sample 'u1': a member appears twice"],
        )

    @pytest.mark.parametrize(
        ("member", "reason"),
        [
            (("../u1.txt", b"1"), "'../u1.txt': a path that leads out of the tar"),
            (("a/../../u1.txt", b"1"), "'a/../../u1.txt': a path that leads out of the tar"),
            (("/etc/u1.txt", b"1"), "'/etc/u1.txt': a path that leads out of the tar"),
            (
                header("u1.txt", tarfile.SYMTYPE, "/etc/hosts"),
                "'u1.txt': a link, to '/etc/hosts', which is not followed",
            ),
            (header("u1.txt", tarfile.LNKTYPE, "u0.txt"), "'u1.txt': a link, to 'u0.txt', which is not followed"),
            (header("link", tarfile.SYMTYPE, "/etc"), "'link': a link, to '/etc', which is not followed"),
            (("\udcff.txt", b"1"), "'\\udcff.txt': a name that is not UTF-8 text"),
            (header("u1.txt", tarfile.CHRTYPE), "'u1.txt': neither a plain file nor a folder"),
            (header("u1.txt", tarfile.FIFOTYPE), "'u1.txt': neither a plain file nor a folder"),
            (header("u1.txt", b"Z"), "'u1.txt': neither a plain file nor a folder"),
        ],
    )
    def test_links_devices_and_paths_that_lead_out_are_told_and_left_out(
        self, member: Member, reason: str, tmp_path: Path
    ) -> None:
        found, bad = read(tar(tmp_path / "a.tar", ("u0.txt", b"0"), member, ("u2.txt", b"2")))
        assert found == [("u0", ["0"]), ("u2", ["2"])]
        assert len(bad) == 1 and bad[0].endswith(f"member {reason}")

    def test_a_member_beyond_the_limit_is_never_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tars, "LARGEST_MEMBER", 100)
        read_sizes: list[int] = []
        content = tars._content
        monkeypatch.setattr(
            tars, "_content", lambda file, member: read_sizes.append(member.size) or content(file, member)
        )
        path = tar(tmp_path / "a.tar", ("u1.txt", b"1 " * 51), ("u2.jpg", b"x" * 1000), ("u2.txt", b"1 " * 50))
        found, bad = read(path)
        assert [user for user, _ in found] == ["u2"] and read_sizes == [100]
        assert bad == ["a.tar: sample 1: member 'u1.txt': 102 bytes, expected at most 100"]

    def test_only_one_member_of_a_sample_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        names: list[str] = []
        content = tars._content
        monkeypatch.setattr(tars, "_content", lambda file, member: names.append(member.name) or content(file, member))
        read(tar(tmp_path / "a.tar", *((f"u1.{n}.txt", b"1") for n in range(20)), ("u2.txt", b"2")))
        assert names == ["u1.0.txt", "u2.txt"]


class TestDamage:
    def test_a_tar_that_was_cut_short_anywhere_is_an_error(self, tmp_path: Path) -> None:
        whole = tar(tmp_path / "whole.tar", ("u1.txt", b"1 2 3"), ("u2.npy", npy(range(500)))).read_bytes()
        end = whole.rindex(npy(range(500))[-8:]) + 8
        for size in {0, 100, 512, 515, 1024, 1500, 2000, end, -(-end // 512) * 512}:
            (tmp_path / "cut.tar").write_bytes(whole[:size])
            with pytest.raises(SourceError, match=r"cut\.tar: cannot be read: "):
                read(tmp_path / "cut.tar")
        zipped = gzip.compress(whole)
        for size in (0, 5, len(zipped) // 2, len(zipped) - 20):
            (tmp_path / "cut.tgz").write_bytes(zipped[:size])
            with pytest.raises(SourceError, match=r"cut\.tgz: cannot be read: "):
                read(tmp_path / "cut.tgz")

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_bytes_changed_anywhere_give_other_rows_or_an_error_that_names_the_file(self, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = tar(Path(folder) / "a.tar", ("u1.txt", b"1 2 3"), ("u2.npy", npy([1, 2])), ("u3.json", b"[1, 2]"))
            content = bytearray(path.read_bytes()[: 512 * 8])
            for _ in range(data.draw(st.integers(1, 3))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            for start in range(0, len(content), 1024):  # headers that are damaged but add up
                chksum = sum(content[start : start + 148]) + 8 * 32 + sum(content[start + 156 : start + 512])
                content[start + 148 : start + 156] = b"%06o\0 " % chksum
            path.write_bytes(content)
            with contextlib.suppress(SourceError):
                read(path)

    def test_a_damaged_header_is_an_error_not_the_end(self, tmp_path: Path) -> None:
        data = bytearray(tar(tmp_path / "a.tar", ("u1.txt", b"1"), ("u2.txt", b"2")).read_bytes())
        data[1024 + 3] ^= 1
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(SourceError, match="a member's header is damaged, or this is no tar"):
            read(tmp_path / "a.tar")

    @pytest.mark.parametrize(
        "content",
        [b"user item item\n" * 100, b"PK\x03\x04" * 300, gzip.compress(b"x" * 9999)],
        ids=["text", "zip", "gzip"],  # gzip writes the time: workers that collect in two seconds would differ
    )
    def test_what_is_no_tar_is_said(self, content: bytes, tmp_path: Path) -> None:
        for name in ("a.tar", "a.tar.gz"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(SourceError, match=f"{name}: cannot be read: "):
                read(tmp_path / name)

    @pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
    def test_headers_that_claim_to_be_huge_are_not_read(self, kind: bytes, tmp_path: Path) -> None:
        huge = header("pax", kind)
        huge.size = 1 << 33
        (tmp_path / "a.tar").write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 12))
        with pytest.raises(SourceError, match="a header of 8,589,934,592 bytes, expected 0 to 1,048,576"):
            read(tmp_path / "a.tar")

    def test_pax_records_that_turn_sizes_negative_or_nest_forever_are_errors(self, tmp_path: Path) -> None:
        backwards = tarfile.TarInfo("u1.txt")
        backwards.pax_headers = {"size": "-1024"}
        (tmp_path / "a.tar").write_bytes(backwards.tobuf(tarfile.PAX_FORMAT) + bytes(1 << 12))
        with pytest.raises(SourceError, match="cannot be read"):
            read(tmp_path / "a.tar")
        (tmp_path / "b.tar").write_bytes(header("x", tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT) * 5000)
        with pytest.raises(SourceError, match="cannot be read"):
            read(tmp_path / "b.tar")


class TestInput:
    @pytest.mark.parametrize(
        "path", ["pipe:touch marker", "pipe:touch marker;.tar", "simplecache::memory://a.tar", "ftp://host/a.tar"]
    )
    def test_pipes_chained_urls_and_unknown_protocols_are_refused(
        self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SourceError):
            read(path)
        assert os.listdir(tmp_path) == []

    def test_no_input_and_other_names_are_said(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"missing-\*\.tar: no input there; expected a file, folder or pattern"):
            read(tmp_path / "missing-*.tar")
        (tmp_path / "a.zip").write_bytes(b"")
        with pytest.raises(SourceError, match=r"a\.zip: expected a name that ends in \.tar, \.tar\.gz, \.tgz"):
            read(tmp_path / "a.zip")


class TestPrepare:
    def test_the_dataset_equals_that_of_the_same_events_as_jsonl(self, tmp_path: Path) -> None:
        random = np.random.default_rng(0)
        histories = {f"user-{n}": random.integers(1, 40, random.integers(3, 12)).tolist() for n in range(200)}
        with (tmp_path / "events.jsonl").open("w") as file:
            for user, items in histories.items():
                for place, item in enumerate(items):
                    print(json.dumps({"user_id": user, "item_id": item, "timestamp": place}), file=file)
        with (tmp_path / "items.jsonl").open("w") as file:
            for item in range(1, 40):
                print(json.dumps({"item_id": item, "tags": [f"t{item % 5}", f"s{item % 3}"]}), file=file)
        writers: list[Callable[[str, list[int]], Member]] = [
            lambda user, items: (f"{user}.npy", npy(items)),
            lambda user, items: (f"{user}.json", json.dumps(items).encode()),
            lambda user, items: (f"{user}.txt", " ".join(map(str, items)).encode()),
        ]
        members = [writers[n % 3](*history) for n, history in enumerate(histories.items())]
        tar(tmp_path / "tars" / "shard-000.tar", *members[:90])
        tar(tmp_path / "tars" / "shard-001.tar", *members[90:])
        options: dict[str, Any] = {
            "attributes": str(tmp_path / "items.jsonl"), "attribute_fields": ("tags",), "min_item_count": 20,
        }  # fmt: skip
        ours = dataset(tmp_path, "webdataset", tmp_path / "tars", **options)
        theirs = dataset(tmp_path, "table", tmp_path / "events.jsonl", **options)
        assert ours.manifest.content == theirs.manifest.content
        assert ours.manifest.rows_content == theirs.manifest.rows_content
        assert ours.n_rows == 200 and ours.n_attributes == 8

    def test_a_second_sample_of_a_user_is_a_bad_row_in_another_tar_too(self, tmp_path: Path) -> None:
        tar(tmp_path / "tars" / "a.tar", ("u1.txt", b"1 2 3"), ("u2.txt", b"1 2 3"), ("u1.json", b"[4, 5, 6]"))
        tar(tmp_path / "tars" / "b.tar", ("u3.txt", b"1 2 3"), ("u2.txt", b"4 5 6"))
        with pytest.raises(PrepareError, match=r"a\.tar: sample 3: user 'u1' has a sample already; mend the input, or"):
            dataset(tmp_path, "webdataset", tmp_path / "tars")
        made = dataset(tmp_path, "webdataset", tmp_path / "tars", on_bad_row="skip")
        assert made.n_rows == 3 and made.n_items == 3
        assert made.manifest.preparation["bad_row_examples"] == [
            "a.tar: sample 3: user 'u1' has a sample already",
            "b.tar: sample 2: user 'u2' has a sample already",
        ]

    def test_bad_samples_stop_or_are_counted(self, tmp_path: Path) -> None:
        path = tar(
            tmp_path / "a.tar", ("u1.txt", b"1 2 3"), ("../u2.txt", b"1"), ("u3.json", b"{}"), ("u4.txt", b"3 2 1")
        )
        with pytest.raises(PrepareError, match=r"a\.tar: sample 2: member '\.\./u2\.txt': a path that leads out"):
            dataset(tmp_path, "webdataset", path)
        made = dataset(tmp_path, "webdataset", path, on_bad_row="skip")
        assert made.n_rows == 2 and made.manifest.preparation["bad_rows"] == 2

    @pytest.mark.parametrize("name", ["u1.pkl", "u1.pickle", "u1.pyd", "u1.pth", "u1.npy", "u1.json", "u1.txt"])
    def test_a_pickle_is_never_run_whatever_its_name(self, name: str, tmp_path: Path) -> None:
        marker = tmp_path / "marker"
        array = np.empty(1, object)
        array[0] = Bomb(marker)
        for number, content in enumerate((pickle.dumps(Bomb(marker)), npy(array))):
            path = tar(tmp_path / f"{number}.tar", ("u0.txt", b"1 2 3"), ("u0.pkl", content), (name, content))
            made = dataset(tmp_path, "webdataset", path, on_bad_row="skip")
            assert made.n_rows == 1 and made.manifest.preparation["bad_rows"] == 1
            with pytest.raises(PrepareError, match="sample 2"):
                dataset(tmp_path, "webdataset", path)
        assert not marker.exists()
        pickle.loads(pickle.dumps(Bomb(marker)))
        assert marker.exists()

    def test_a_damaged_tar_stops_even_where_bad_rows_are_skipped(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", ("u1.txt", b"1 2 3"))
        path.write_bytes(path.read_bytes()[:1024])
        with pytest.raises(PrepareError, match=r"a\.tar: cannot be read: it ends without the mark that ends a tar"):
            dataset(tmp_path, "webdataset", path, on_bad_row="skip")

    def test_ratings_are_refused_because_there_are_none(self, tmp_path: Path) -> None:
        path = tar(tmp_path / "a.tar", ("u1.txt", b"1 2 3"))
        with pytest.raises(PrepareError, match="min_rating: source webdataset holds no ratings"):
            dataset(tmp_path, "webdataset", path, min_rating=3.0)
