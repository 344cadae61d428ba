"""Histories out of tars that others wrote, by WebDataset's convention, read as data and never run.

    for number, user, items in histories(file, bad): ...

Members ``KEY.EXTENSION`` that stand together and share KEY, folders included, are one sample: a user's history, oldest
item first. Exactly one member of a sample holds it, and its last extension says how:

    .npy    1-D array of integers or fixed-width strings; the user is KEY
    .json   a list of ids, or {"user": id, "items": [id, ...]}
    .txt    ids between white space

Other members are skipped unread: nothing is unpickled, no link followed, nothing extracted to a path, no URL opened.
The tar is read as a stream. The webdataset library names and groups the members; it does not get to read them, because
it would read a member before its size is known, skip links in silence and take a damaged header for the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

LARGEST_MEMBER = 64 << 20
"""Bytes of a member that holds a history."""
LARGEST_HEADER = 1 << 20
"""Bytes of a long name or of pax records, which are read before the member's size is known."""
LONGEST_HISTORY = (1 << 24) - 1

KINDS = ("npy", "json", "txt")
_PICKLES = ("pkl", "pickle", "pyd", "pth", "pt")
_HEADERS_ONLY = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)

Bad = Callable[[int, str], None]
"""Called with (sample's number from 1, reason) for a sample that is left out; may raise to stop."""


class TarError(ValueError):
    """A tar that cannot be read to its end."""


def histories(file: BinaryIO, bad: Bad) -> Iterator[tuple[int, str, pa.Array]]:
    """(sample's number, user, items as strings) for each sample of an open tar, read as a stream.

    Raises :class:`TarError` for what is no tar, is damaged or ends early.
    """
    from webdataset.tariterators import group_by_keys

    twice: list[Exception] = []  # of the sample that is being gathered

    def note(error: Exception) -> bool:
        twice.append(error)
        return True

    for number, sample in enumerate(group_by_keys(_members(file, bad), handler=note), start=1):
        key, *_ = sample.pop("__key__"), sample.pop("__url__")
        try:
            if twice:
                twice.clear()
                raise ValueError("a member appears twice")
            if None not in sample.values():  # else told already
                yield number, *_history(key, sample)
        except ValueError as error:
            bad(number, f"sample {key!r}: {error}")


def _members(file: BinaryIO, bad: Bad) -> Iterator[dict[str, Any]]:
    """{fname, data, __url__} of each member that belongs to a sample; ``data`` is empty where a member is not read, and
    None where it may not be, which has been told to ``bad``."""
    from webdataset.tariterators import base_plus_ext

    number, previous, is_read = 0, None, False
    with _damage_is_told():
        tar = tarfile.open(fileobj=file, mode="r|", tarinfo=_Header)  # noqa: SIM115 (file is the caller's)
    while True:
        with _damage_is_told():
            member = tar.next()
        if member is None:
            return
        tar.members.clear()  # type: ignore[attr-defined]  # which would grow with the file
        if member.isdir():
            continue
        name = member.name.removeprefix("./")
        key, extension = base_plus_ext(name)
        if key is not None and key != previous:
            number, previous, is_read = number + 1, key, False
        if refusal := _refusal(member):
            bad(max(number, 1), f"member {name!r}: {refusal}")
        if key is None:
            continue
        data: bytes | None = None if refusal else b""
        if not refusal and not is_read and _kind(extension) in KINDS:
            if member.size > LARGEST_MEMBER:
                bad(number, f"member {name!r}: {member.size:,} bytes, expected at most {LARGEST_MEMBER:,}")
                data = None
            else:
                with _damage_is_told():
                    data = _content(tar, member)
            is_read = True
        yield {"fname": name, "data": data, "__url__": ""}


def _refusal(member: tarfile.TarInfo) -> str:
    """Why a member may not be there, or ''."""
    if not _is_text(member.name):
        return "a name that is not UTF-8 text"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "a path that leads out of the tar"
    if member.issym() or member.islnk():
        return f"a link, to {member.linkname!r}, which is not followed"
    if not member.isreg() or member.issparse():
        return "neither a plain file nor a folder"
    return ""


def _is_text(name: str) -> bool:
    """Whether it can be encoded: tarfile decodes what is not UTF-8 to halves of characters."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Header(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a damaged or missing one for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) != tarfile.BLOCKSIZE:
            raise TarError("it ends without the mark that ends a tar; was it cut short?")
        if not any(buf):
            return super().frombuf(buf, encoding, errors)  # tells tarfile of the end
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise TarError(f"a member's header is damaged, or this is no tar ({error})") from error
        if header.size < 0 or (header.size > LARGEST_HEADER and header.type in _HEADERS_ONLY):
            raise TarError(f"a header of {header.size:,} bytes, expected 0 to {LARGEST_HEADER:,}")
        return header


@contextlib.contextmanager
def _damage_is_told() -> Iterator[None]:
    try:
        yield
    except TarError:
        raise
    except (tarfile.TarError, EOFError, OSError, OverflowError, RecursionError, ValueError, zlib.error) as error:
        raise TarError(f"it is damaged, or no tar ({error})") from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # as it is for plain files
    return file.read()


def _kind(extension: str) -> str:
    """The last of a member's extensions."""
    return extension.rpartition(".")[2].lower()


def _history(key: str, members: dict[str, bytes]) -> tuple[str, pa.Array]:
    """(user, items) of a sample. Raises ValueError with what is wrong with it."""
    holding = [extension for extension in members if _kind(extension) in KINDS]
    if len(holding) != 1:
        pickles = [extension for extension in members if _kind(extension) in _PICKLES]
        remedy = f"; pickles, as .{pickles[0]}, are never read" if pickles else ""
        found = ", ".join(f".{extension}" for extension in members)
        raise ValueError(f"expected one member of {', '.join(f'.{kind}' for kind in KINDS)}; found {found}{remedy}")
    data, kind = members[holding[0]], _kind(holding[0])
    user = key
    try:
        if kind == "npy":
            items = _from_npy(data)
        elif kind == "txt":
            items = pa.array(data.decode("utf-8-sig").split(), pa.string())
        else:
            user, items = _from_json(data, key)
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(f".{holding[0]} is not UTF-8 text ({error.reason})") from error
    except ValueError as error:
        raise ValueError(f".{holding[0]}: {error}") from error
    if not 0 < len(items) <= LONGEST_HISTORY:
        raise ValueError(f".{holding[0]}: {len(items):,} items, expected 1 to {LONGEST_HISTORY:,}")
    return user, items


def _from_npy(data: bytes) -> pa.Array:
    """A .npy file's ids. Its header is checked against the data before anything is made of it."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
    except Exception as error:  # a made-up header can raise anything
        raise ValueError(f"not a readable header ({error})") from error
    if dtype.kind not in "iuSU" or len(shape) != 1:
        raise ValueError(f"{len(shape)}-D array of {dtype}, expected 1-D of integers or fixed-width strings")
    if not dtype.itemsize or shape[0] * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"{len(data) - file.tell():,} bytes of data, expected {shape[0]:,} of {dtype}")
    values = np.frombuffer(data, dtype, offset=file.tell())
    if dtype.kind in "iu":
        return pa.array(values.astype(dtype.newbyteorder("="))).cast(pa.string())
    return _ids([value.decode() if isinstance(value, bytes) else value for value in values.tolist()])


def _from_json(data: bytes, key: str) -> tuple[str, pa.Array]:
    try:
        tree = json.loads(data.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    user = key
    if isinstance(tree, dict):
        if "user" in tree:
            user = _ids([tree["user"]])[0].as_py()
        tree = tree.get("items")
    if not isinstance(tree, list):
        raise ValueError('expected a list of ids, or {"user": id, "items": [id, ...]}')
    return user, _ids(tree)


def _ids(values: list[Any]) -> pa.Array:
    """Ids as strings. Raises ValueError for what is none."""
    for value in values:
        if not isinstance(value, (int, str)) or isinstance(value, bool) or value == "":
            raise ValueError(f"{str(value)[:80]!r} is no id, expected integers or strings that are not empty")
    return pa.array([str(value) for value in values], pa.string())
