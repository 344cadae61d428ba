"""A synthetic event log of any size whose structure is known: ``s3rec synth --events 50_000_000 --output lake``.

    facts = write(SynthSettings(events=50_000_000, output="lake"))

writes ``events/part-00000.parquet`` and on (user_id, item_id, timestamp in ms; ordered by time through all files),
``items.parquet`` (item_id, category, tags) and ``synth.json`` (what was asked for), ready for ``s3rec prepare``.

The model. Items belong to categories of 8 styles. The items of a style have Zipf popularity: rank r is drawn with
weight 1/r. The log interleaves ``lanes``, each with its own share of the users, so that a user is in one place at a
time. A lane carries one session after another. After each event,

    START        .20   the session ends. Another starts: a user of the lane, the r-th busiest with density ~ r^-1/2;
                       with probability .8 in the user's home category, else in any one; any style; by popularity
    otherwise          the session goes on, from an item of some category and style to
    SUCCESSOR    .40   one of the item's own 4 successors, fixed items of the following style in the same category
    STYLE        .40   an item of the following style, by popularity
    DRIFT        .15   an item of any style of the category, by popularity
    JUMP         .05   an item of any category and style, by popularity

(styles follow each other in a circle; "any category" and home categories are skewed: the r-th has density ~ r^-1/2;
sessions also end every ``ROWS`` events of a lane, so .206 of all events start one).

What an oracle that knows the model scores. An event is among the 4 successors of the user's item before with
probability .794 x .4 = .32 plus what the other branches hit by chance (.08 for a million events), in the same category
with .794 x .95 = .75 plus chance, and in the following style with .794 x (.8 + .15/8) = .65 plus chance. An item's
successors must be learned from its own events; the style that follows is shared with all items of a style, rare ones
too, and told by attributes: ``category`` is the item's own, and ``tags`` are its style (with probability .9, else any
one) and a topic, which means nothing. Items have no tags with probability .05.

Every draw is a hash of the seed and its place in the log, so each million events is made on its own: equal settings
give equal bytes, whatever the threads.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import json
import math
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from s3rec_dist import __version__
from s3rec_dist.data.formats import parquet_writer, put_in_place, sync_file
from s3rec_dist.data.output import clean_up_on_sigterm, progress_on_stderr
from s3rec_dist.hashing import hash64, key_of, uniform_below

EVENTS_SCHEMA = pa.schema([("user_id", pa.int32()), ("item_id", pa.int32()), ("timestamp", pa.int64())])
ITEMS_SCHEMA = pa.schema([("item_id", pa.int32()), ("category", pa.string()), ("tags", pa.list_(pa.string()))])

START = 0.2
SUCCESSOR, STYLE, DRIFT, JUMP = 0.4, 0.4, 0.15, 0.05
HOME = 0.8
STYLES = 8
SUCCESSORS = 4
TAGLESS, RIGHT_TAG = 0.05, 0.9

ROWS = 128
"""Events of a lane in a block, the unit that is made on its own."""
MAX_LANES = 8192
USERS_PER_LANE = 64
"""At least, where there are that many users."""
GROUP_EVENTS = 1 << 20
"""Events in a row group: a whole number of blocks."""
PART_EVENTS = 1 << 22
"""Events in a file."""
ITEMS_PER_GROUP = 1 << 18

FIRST_MOMENT, DURATION = 1_700_000_000_000, 180 * 86_400_000
"""The log's first millisecond since 1970, and how many it lasts, whatever its size."""

MARK = "synth.json"
LARGEST_ID = (1 << 31) - 1

_STEP, _TURN, _SUCCESSOR, _HOME, _TAGS = 201, 202, 203, 204, 205  # what a key is for


class SynthError(ValueError):
    """Settings that no log can be made of, or an output that cannot be written."""


@dataclass(frozen=True, kw_only=True)
class SynthSettings:
    """One synthetic log."""

    events: int
    """Events, exactly."""
    output: str
    """Folder to write."""
    items: int = 0
    """Items in the catalogue; 0 is one per 100 events, from 1,000 to 1,000,000."""
    users: int = 0
    """Users that sessions are drawn from; 0 is one per 16 events. The idlest may have none."""
    seed: int = 42
    threads: int = 0
    """Files written at once; 0 is one per core."""
    overwrite: bool = False
    """Replace the output if it is a synthetic log already."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("events", 1, 1 << 40),
            ("items", 0, LARGEST_ID),
            ("users", 0, LARGEST_ID),
            ("threads", 0, 1024),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise SynthError(f"{name}={value:,}: expected {low:,} to {high:,}")
        if not self.output or "://" in self.output:
            raise SynthError(f"output={self.output!r}: expected a local folder")

    def n_items(self) -> int:
        """Items in the catalogue."""
        return self.items or min(max(self.events // 100, 1000), 1_000_000)

    def n_users(self) -> int:
        """Users that sessions are drawn from."""
        return self.users or min(max(self.events // 16, 1), LARGEST_ID)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was written, and how long it took."""

    events: int
    users: int
    items: int
    files: int
    seconds: float


class Structure:
    """The planted structure, as arrays. Here all numbers count from 0, in the files ids count from 1.

    A leaf is a style of a category, number category x styles + style. Item i has leaf i % leaves, rank i // leaves.
    """

    def __init__(self, users: int, items: int, seed: int) -> None:
        self.users, self.items, self.seed = users, items, seed
        self.lanes = 1 << (min(max(users // USERS_PER_LANE, 1), MAX_LANES).bit_length() - 1)
        self.categories = max(math.isqrt(items) // 4, 1)
        self.styles = min(STYLES, items)
        self.leaves = self.categories * self.styles
        leaf = np.arange(self.leaves)
        self.category_of = leaf // self.styles
        """Category of each leaf."""
        self.following = leaf - leaf % self.styles + (leaf % self.styles + 1) % self.styles
        """The leaf that follows each leaf."""
        self.ranks = zipf_ranks(-(-items // self.leaves))
        self._users_of_lane = -((np.arange(self.lanes) - users) // self.lanes)
        self._successor_key, self._home_key = key_of(seed, _SUCCESSOR), key_of(seed, _HOME)

    def successors(self, items: np.ndarray) -> np.ndarray:
        """The successors [n, SUCCESSORS] of ``items`` [n]; some may coincide."""
        slots = items[:, None] * SUCCESSORS + np.arange(SUCCESSORS)
        ranks = self.ranks[self._quantile(hash64(slots, self._successor_key))]
        return self._item(self.following[items % self.leaves][:, None], ranks)

    def home(self, users: np.ndarray) -> np.ndarray:
        """The home category of each user."""
        return skewed_below(hash64(users, self._home_key) & 0xFFFFFF, 24, self.categories)

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Users and items of the events in one block, both int32 [ROWS, lanes], in the log's order."""
        users, items = np.empty((2, ROWS, self.lanes), np.int32)
        lanes = np.arange(self.lanes)
        user, item, leaf = np.zeros((3, self.lanes), np.int64)
        for row in range(ROWS):
            place = number * ROWS + row
            bits = hash64(lanes, key_of(self.seed, _STEP, place))
            action = bits & 0xFFFF if row else np.full(self.lanes, 0xFFFF)
            leaf = self.following[leaf]
            turns = np.flatnonzero(action >= _DRIFT_FROM)
            user, leaf = self._turn(turns, action[turns], bits[turns], user, leaf, place)
            quantile = bits >> 16  # 20 bits of it
            moves = np.flatnonzero(action < _STYLE_FROM)
            slots = item[moves] * SUCCESSORS + (bits[moves] >> 56 & SUCCESSORS - 1)
            quantile[moves] = hash64(slots, self._successor_key)
            item = self._item(leaf, self.ranks[self._quantile(quantile)])
            users[row], items[row] = user, item
        return users, items

    def described(self, first: int, last: int) -> pa.Table:
        """Ids and attributes of items ``first`` to ``last`` (excluded)."""
        index = np.arange(first, last)
        leaf = index % self.leaves
        bits = hash64(index, key_of(self.seed, _TAGS, 0))
        draws = [uniform_below(hash64(index, key_of(self.seed, _TAGS, i)), self.leaves) for i in (1, 2)]
        is_right = (bits >> 16 & 0xFFFF) < _share(RIGHT_TAG)
        has_tags = (bits & 0xFFFF) >= _share(TAGLESS)
        tags = np.stack([np.where(is_right, leaf, draws[0]), self.leaves + draws[1]], axis=1)[has_tags]
        offsets = np.concatenate([[0], np.cumsum(has_tags * tags.shape[1])])
        names = pa.array([f"{kind}-{number}" for kind in ("style", "topic") for number in range(self.leaves)])
        categories = pa.array([f"category-{category}" for category in range(self.categories)])
        columns = [
            pa.array(index + 1, pa.int32()),
            categories.take(pa.array(self.category_of[leaf])),
            pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names.take(pa.array(tags.ravel()))),
        ]
        return pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)

    def _turn(
        self, lanes: np.ndarray, action: np.ndarray, bits: np.ndarray, user: np.ndarray, leaf: np.ndarray, place: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Users and leaves of all lanes, after ``lanes`` drifted, jumped or started a session."""
        more = hash64(lanes, key_of(self.seed, _TURN, place))
        anywhere = skewed_below(more >> 40 & 0xFFFFFF, 24, self.categories)
        category = np.where(action >= _JUMP_FROM, anywhere, self.category_of[leaf[lanes]])
        starts = np.flatnonzero(action >= _START_FROM)
        lane = lanes[starts]
        user[lane] = lane + self.lanes * skewed_below(more[starts] & LARGEST_ID, 31, self._users_of_lane[lane])
        is_home = (more[starts] >> 32 & 0xFF) < HOME * 256
        category[starts] = np.where(is_home, self.home(user[lane]), anywhere[starts])
        leaf[lanes] = category * self.styles + ((bits >> 40 & 0xFFFF) * self.styles >> 16)
        return user, leaf

    def _quantile(self, bits: np.ndarray) -> np.ndarray:
        return bits & len(self.ranks) - 1

    def _item(self, leaf: np.ndarray, rank: np.ndarray) -> np.ndarray:
        item = rank * self.leaves + leaf
        return item - self.leaves * (item >= self.items)  # a leaf without the last rank has one item less


def zipf_ranks(n: int) -> np.ndarray:
    """Ranks 0..n-1 at equal steps of their cumulative Zipf distribution, int64 [a power of two up to 2^20]."""
    size = min(1 << (128 * n - 1).bit_length(), 1 << 20)
    cumulative = np.cumsum(1.0 / np.arange(1, n + 1))  # no power or logarithm, which differ between machines
    return np.searchsorted(cumulative, (np.arange(size) + 0.5) * (cumulative[-1] / size))


def skewed_below(bits: np.ndarray, width: int, bound: np.ndarray | int) -> np.ndarray:
    """floor(bound x u^2) for u = ``bits`` / 2^``width``: integers below ``bound``, r with density ~ r^-1/2."""
    u = bits * 2.0**-width
    return (u * u * bound).astype(np.int64)


def moments(first: int, count: int, events: int) -> np.ndarray:
    """Milliseconds of ``count`` of the log's ``events``, from event ``first`` on: equal steps, rounded down."""
    whole, rest = divmod(first * DURATION, events)
    return FIRST_MOMENT + whole + (rest + np.arange(count) * DURATION) // events


def _share(probability: float) -> int:
    """Of the 2^16 values of 16 bits."""
    return round(probability * (1 << 16))


_STYLE_FROM = _share((1 - START) * SUCCESSOR)
_DRIFT_FROM = _share((1 - START) * (SUCCESSOR + STYLE))
_JUMP_FROM = _share((1 - START) * (SUCCESSOR + STYLE + DRIFT))
_START_FROM = _share(1 - START)

Progress = Callable[[str], None]


def write(settings: SynthSettings, progress: Progress = lambda line: None) -> Facts:
    """Writes the folder and returns its facts. Raises :class:`SynthError`, leaving the output as it was."""
    start = time.monotonic()
    structure = Structure(settings.n_users(), settings.n_items(), settings.seed)
    files = -(-settings.events // PART_EVENTS)
    with _output_folder(settings, progress) as folder:
        events = os.path.join(folder, "events")
        os.mkdir(events)
        _write_items(structure, os.path.join(folder, "items.parquet"))
        pool = ThreadPoolExecutor(settings.threads or os.cpu_count() or 1)
        try:
            paths = pool.map(lambda part: _write_part(structure, settings.events, part, events), range(files))
            for done, path in enumerate(paths, start=1):
                progress(f"{os.path.basename(path)}, {done} of {files}")
        finally:
            pool.shutdown(cancel_futures=True)
        _write_mark(settings, structure, folder)
        sync_file(events)
    return Facts(
        events=settings.events,
        users=structure.users,
        items=structure.items,
        files=files,
        seconds=time.monotonic() - start,
    )


def _write_part(structure: Structure, events: int, part: int, folder: str) -> str:
    path = os.path.join(folder, f"part-{part:05d}.parquet")
    first = part * PART_EVENTS
    last = min(first + PART_EVENTS, events)
    with parquet_writer(path, EVENTS_SCHEMA) as writer:
        for start in range(first, last, GROUP_EVENTS):
            writer.write_table(_events(structure, start, min(start + GROUP_EVENTS, last), events), GROUP_EVENTS)
    sync_file(path)
    return path


def _events(structure: Structure, first: int, last: int, events: int) -> pa.Table:
    """Events ``first`` to ``last`` (excluded) of the log; ``first`` begins a block."""
    size = ROWS * structure.lanes
    blocks = [structure.block(number) for number in range(first // size, -(-last // size))]
    users, items = (np.concatenate([column.ravel() for column in columns]) for columns in zip(*blocks, strict=True))
    count = last - first
    columns = [users[:count] + 1, items[:count] + 1, moments(first, count, events)]
    return pa.Table.from_arrays([pa.array(column) for column in columns], schema=EVENTS_SCHEMA)


def _write_items(structure: Structure, path: str) -> None:
    with parquet_writer(path, ITEMS_SCHEMA) as writer:
        for first in range(0, structure.items, ITEMS_PER_GROUP):
            writer.write_table(structure.described(first, min(first + ITEMS_PER_GROUP, structure.items)))
    sync_file(path)


def _write_mark(settings: SynthSettings, structure: Structure, folder: str) -> None:
    facts = {
        "events": settings.events,
        "users": structure.users,
        "items": structure.items,
        "categories": structure.categories,
        "styles": structure.leaves,
        "seed": settings.seed,
        "created_with": f"s3rec_dist {__version__}",
    }
    path = os.path.join(folder, MARK)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(facts, file, indent=2)
        file.write("\n")
    sync_file(path)
    sync_file(folder)


@contextlib.contextmanager
def _output_folder(settings: SynthSettings, progress: Progress) -> Iterator[str]:
    """A folder beside the output, which takes its place when the block ends well."""
    output = os.path.abspath(settings.output)
    if os.path.lexists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        if not settings.overwrite:
            raise SynthError(f"{output}: exists already; choose another output, or pass --overwrite to replace it")
        if not os.path.isfile(os.path.join(output, MARK)):
            raise SynthError(f"{output}: not a synthetic log, so --overwrite leaves it alone; choose another output")
    parent, name = os.path.split(output)
    os.makedirs(parent, exist_ok=True)
    for leftover in glob.glob(os.path.join(glob.escape(parent), f".{glob.escape(name)}.partial-*")):
        progress(f"{leftover}: left by a run that was killed or still runs; remove it if none does")
    partial = tempfile.mkdtemp(prefix=f".{name}.partial-", dir=parent)
    try:
        folder = os.path.join(partial, "log")
        os.mkdir(folder)
        yield folder
        put_in_place(folder, output, os.path.join(partial, "replaced"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``s3rec synth``."""
    parser.add_argument("--events", required=True, type=int, metavar="N", help="events, exactly, as in 50_000_000")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    for name, help in (
        ("items", "items in the catalogue (default: one per 100 events, from 1,000 to 1,000,000)"),
        ("users", "users that sessions are drawn from (default: one per 16 events)"),
        ("seed", "another seed gives another log (default: 42)"),
        ("threads", "files written at once (default: one per core)"),
    ):
        default = next(f.default for f in dataclasses.fields(SynthSettings) if f.name == name)
        parser.add_argument(f"--{name}", default=default, type=int, metavar="N", help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is a synthetic log already")


def run(args: argparse.Namespace) -> None:
    """``s3rec synth``: progress on stderr, a summary on stdout. Raises :class:`SynthError`."""
    settings = SynthSettings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(SynthSettings)})
    progress = progress_on_stderr()
    clean_up_on_sigterm()
    print(summary(write(settings, progress), settings.output))


def summary(facts: Facts, output: str) -> str:
    """What a person wants to know of a new log, and the command that reads it."""
    command = ["s3rec", "prepare", "--source", "table", "--input", f"{output}/events"]
    command += ["--attributes", f"{output}/items.parquet", "--attribute-fields", "category", "tags"]
    lines = [
        output,
        f"  events    {facts.events:>14,}",
        f"  users     {facts.users:>14,}",
        f"  items     {facts.items:>14,}",
        f"  files     {facts.files:>14,}",
        f"  events/s  {facts.events / facts.seconds:>14,.0f}",
        f"  seconds   {facts.seconds:>14.1f}",
        f"next: {shlex.join(command)} --output DATASET",
    ]
    return "\n".join(lines)
