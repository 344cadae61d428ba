"""A table whose rows lie on the ranks that own them, and whose steps cost what the rows cost that they touch.

    table = ShardedTable(TableSpec(rows=10_000_001, features=64), rank=rank, world_size=size)
    rows = table.fetch(ids)          # [U, E], a leaf: a backward pass leaves its gradient there
    loss(rows).backward()
    gradient = table.collect()       # the gradients of this rank's rows, summed over the ranks
    table.update(gradient, Settings(learning_rate=1e-3, step=1))

Rank r of W owns the ids i with i % W = r. A rank asks for distinct ids; two all-to-alls bring their rows, one takes
the gradients back. A row is allotted when it is first asked for, in the order of asking, so that memory grows with the
rows touched, and its first value is a function of (seed, id) alone. With a capacity, rows that were asked for least
recently make room, and are as new if they are asked for again.

Nothing here is a parameter of a module: DeepSpeed neither sees, reduces nor saves it. All ranks call every method but
those that say otherwise, in the same order. Sums over ranks are made in their order, so that a run repeats to the bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from s3rec_dist.hashing import hash64, key_of
from s3rec_dist.tables.optimizers import OPTIMIZERS, Settings

_INITIAL_KEY, _ROUNDING_KEY = 0x17AB, 0x0D17
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TableError(ValueError):
    """A table that cannot be used so; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What a table is on any number of ranks."""

    rows: int
    """Ids are 0..rows - 1."""
    features: int
    optimizer: str = "lazy_adam"
    """One of ``OPTIMIZERS``."""
    seed: int = 0
    initial_std: float = 0.02
    """Of a new row's values, which are normal."""
    dtype: str = "fp32"
    """Of the rows; their optimizer's state is fp32."""
    capacity: int = 0
    """Rows that are held at most, over all ranks; 0 is all."""


@dataclass(frozen=True)
class Gradient:
    """What a step found for the rows of a rank."""

    slots: torch.Tensor
    """int64 [R], distinct."""
    values: torch.Tensor
    """fp32 [R, E]."""

    def squared_norm(self) -> torch.Tensor:
        """Not finite where a value is not."""
        return self.values.square().sum()


@dataclass(frozen=True)
class _Lent:
    """Rows that were handed out, and what takes their gradient home."""

    leaf: torch.Tensor
    """[U, E]."""
    order: torch.Tensor
    """int64 [U]: of the leaf's rows, by owner."""
    asked: list[int]
    """Rows asked of each rank."""
    given: list[int]
    """Rows given to each rank."""
    slots: torch.Tensor
    """int64 [G]: those given, rank by rank."""


class ShardedTable:
    """This rank's part. ``device`` is where its rows lie, ``compute_device`` where they are asked for. ``timed`` wraps
    every collective."""

    def __init__(
        self,
        spec: TableSpec,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        compute_device: torch.device | str | None = None,
        timed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.spec, self.rank, self.world_size, self.timed = spec, rank, world_size, timed
        self.device = torch.device(device)
        self.compute_device = torch.device(compute_device or device)
        self.owned = len(range(rank, spec.rows, world_size))
        self.capacity = min(self.owned, -(-spec.capacity // world_size)) if spec.capacity else self.owned
        self._optimizer = OPTIMIZERS[spec.optimizer]
        # Memory that was never written to is none, on a host.
        shape = (self.capacity, spec.features)
        try:
            self._rows = torch.empty(shape, dtype=_DTYPES[spec.dtype], device=self.device)
            self._state = {
                name: torch.empty(shape if is_wide else (self.capacity, 1), device=self.device)
                for name, is_wide in self._optimizer.state.items()
            }
            self._ids = torch.empty(self.capacity, dtype=torch.int64, device=self.device)
            self._slot_of = torch.full((self.owned,), -1, dtype=torch.int32, device=self.device)
        except RuntimeError as error:  # of torch's allocators
            raise TableError(
                f"{self.capacity:,} rows of {spec.features} features with the state of {spec.optimizer} do not fit "
                f"into the memory of {self.device} ({str(error).splitlines()[0]}); take more processes, "
                "model.item_capacity, model.item_dtype=bf16, model.item_device=cpu or item_optimizer=rowwise_adagrad"
            ) from error
        self._used_at = torch.empty(self.capacity if self._is_bounded else 0, dtype=torch.int32, device=self.device)
        self._oldest = torch.empty(0, dtype=torch.int64, device=self.device)
        """Slots by when they were used last, the lowest first among equals; those that were used since are no more."""
        self._oldest_at = torch.empty(0, dtype=torch.int32, device=self.device)
        self.used = 0
        """Rows that are allotted."""
        self.steps = 0
        """Updates that were made."""
        self.evicted = 0
        """Rows that have made room."""
        self.bytes_sent = 0
        """To other ranks, rows, gradients and ids."""
        self._lent: list[_Lent] = []

    @classmethod
    def among_ranks(
        cls, spec: TableSpec, *, device: torch.device | str, compute_device: torch.device | str | None = None
    ) -> ShardedTable:
        """This process's part, over all that torch.distributed knows."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return cls(spec, rank=rank, world_size=size, device=device, compute_device=compute_device)

    @property
    def _is_bounded(self) -> bool:
        return self.capacity < self.owned

    def fetch(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of distinct ``ids`` int64 [U], fp32 [U, E] on the compute device. Where gradients are wanted they
        are a leaf, which :meth:`collect` looks at, and new rows are allotted."""
        owner = ids % self.world_size
        order = owner.argsort(stable=True)
        asked = torch.bincount(owner, minlength=self.world_size)
        counts = self._exchange(asked, [1] * self.world_size, [1] * self.world_size)
        asked_of, given_to = asked.tolist(), counts.tolist()
        wanted = self._exchange(ids[order], asked_of, given_to).to(self.device)
        slots = self._allot(wanted) if torch.is_grad_enabled() else None
        values = self.peek(wanted) if slots is None else self._rows.index_select(0, slots).float()
        rows = self._exchange(values.to(self.compute_device), given_to, asked_of)
        leaf = torch.empty_like(rows)
        leaf[order] = rows
        if slots is not None:
            leaf.requires_grad_()
            self._lent.append(_Lent(leaf, order, asked_of, given_to, slots))
        return leaf

    def peek(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [K, E] fp32 of ``ids`` [K] of this rank, as they are or would be at first. No collective."""
        slots = self._slot_of[ids // self.world_size]
        rows = self._rows[slots.clamp(min=0).long()].float() if self.used else initial_rows(self.spec, ids)
        new = (slots < 0).nonzero().squeeze(1)
        if len(new) and self.used:
            rows[new] = initial_rows(self.spec, ids[new])
        return rows

    def owns(self, ids: torch.Tensor) -> torch.Tensor:
        """bool [K]: which of ``ids`` are this rank's. No collective."""
        return ids % self.world_size == self.rank

    def collect(self) -> Gradient:
        """The gradients of all that was fetched since the last time, summed over all ranks, for this rank's rows."""
        lent, self._lent = self._lent, []
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for each in lent:
            grad = each.leaf.grad if each.leaf.grad is not None else torch.zeros_like(each.leaf)
            home = self._exchange(grad[each.order], each.asked, each.given).to(self.device)
            parts += zip(each.slots.split(each.given), home.split(each.given), strict=True)
        if not parts:
            empty = torch.empty(0, dtype=torch.int64, device=self.device)
            return Gradient(empty, torch.empty(0, self.spec.features, device=self.device))
        if len(parts) == 1:
            return Gradient(*parts[0])
        slots, place = torch.cat([part for part, _ in parts]).unique(return_inverse=True)
        values = torch.zeros(len(slots), self.spec.features, device=self.device)
        for at, (_, grad) in zip(place.split([len(part) for part, _ in parts]), parts, strict=True):
            values.index_add_(0, at, grad)  # no slot twice in a part: the order of sums is that of the parts
        return Gradient(slots, values)

    def update(self, gradient: Gradient, settings: Settings, *, weight_decay: float = 0.0) -> None:
        """Lets the optimizer change the rows that have a gradient. No collective."""
        self.steps += 1
        slots, grads = gradient.slots, gradient.values
        rows = self._rows.index_select(0, slots).float()
        if weight_decay:
            grads = grads.add(rows, alpha=weight_decay)
        state = {name: values.index_select(0, slots) for name, values in self._state.items()}
        rows -= self._optimizer.update(grads, state, settings)
        for name, values in state.items():
            self._state[name].index_copy_(0, slots, values)
        if self._rows.dtype != torch.float32:
            rows = self._rounded(rows, self._ids[slots])
        self._rows.index_copy_(0, slots, rows)
        if self._is_bounded:
            self._used_at[slots] = self.steps

    def whole(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(ids [K], rows fp32 [K, E]) of all that this rank owns, in parts. No collective."""
        for begin in range(0, self.owned, _PART):
            places = torch.arange(begin, min(begin + _PART, self.owned), device=self.device)
            ids = places * self.world_size + self.rank
            yield ids, self.peek(ids)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What of this rank's rows a checkpoint holds: ``ids`` int64 [K], ``rows`` [K, E], the optimizer's state by
        name and, with a capacity, ``used_at`` int32 [K]. Views of what training goes on with. No collective."""
        held = {"ids": self._ids, "rows": self._rows, **self._state}
        if self._is_bounded:
            held["used_at"] = self._used_at
        return {name: values[: self.used] for name, values in held.items()}

    def memory(self) -> list[torch.Tensor]:
        """All that this rank's part lies in. No collective."""
        return [self._slot_of, self._ids, self._rows, self._used_at, *self._state.values()]

    def clear(self) -> None:
        """Forgets all rows. No collective."""
        self._slot_of.fill_(-1)
        self.used = self.steps = 0
        self._forget_oldest()
        self._lent.clear()

    def forget_use(self) -> None:
        """Takes no row for used later than others. No collective."""
        self._used_at.zero_()
        self._forget_oldest()

    def put(self, ids: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes those of ``ids`` [K] that are this rank's, with what :meth:`tensors` has of them. Without the
        optimizer's state they begin anew with it. Of more than it may hold, which another number of ranks may have
        held, it keeps those used last. No collective."""
        own = self.owns(ids).nonzero().squeeze(1)
        if self._is_bounded and len(own) > self.capacity - self.used:
            if "used_at" not in tensors:
                raise TableError(
                    f"{self.used + len(own):,} rows are to be loaded on a rank that may hold {self.capacity:,}; raise "
                    "model.item_capacity"
                )
            used_at = torch.cat((self._used_at[: self.used], tensors["used_at"][own].to(self.device)))
            kept = used_at.argsort(descending=True, stable=True)[: self.capacity]
            own = own[(kept[kept >= self.used] - self.used).sort().values.to(own.device)]
        slots = self._allot(ids[own].to(self.device))
        self._rows[slots] = tensors["rows"][own].to(self.device, self._rows.dtype)
        for name, values in self._state.items():
            if name in tensors:
                values[slots] = tensors[name][own].to(self.device)
        if self._is_bounded and "used_at" in tensors:
            self._used_at[slots] = tensors["used_at"][own].to(self.device)
            self._forget_oldest()

    def _allot(self, ids: torch.Tensor) -> torch.Tensor:
        """The slots [K] of this rank's ``ids`` [K], which may repeat; new ones get the next free ones."""
        places = ids // self.world_size
        slots = self._slot_of[places]
        new = ids[slots < 0]
        if len(new):
            new = _first_of_each(new)
            places_of_new = new // self.world_size
            free = torch.arange(self.used, min(self.used + len(new), self.capacity), device=self.device)
            if len(free) < len(new):
                self._used_at[slots[slots >= 0].long()] = self.steps
                free = torch.cat((free, self._evict(len(new) - len(free), slots)))
            self.used = min(self.used + len(new), self.capacity)
            self._slot_of[places_of_new] = free.int()
            self._ids[free] = new
            self._rows[free] = initial_rows(self.spec, new).to(self._rows.dtype)
            for values in self._state.values():
                values[free] = 0
            slots = self._slot_of[places]
        if self._is_bounded:
            self._used_at[slots.long()] = self.steps
        return slots.long()

    def _evict(self, count: int, needed: torch.Tensor) -> torch.Tensor:
        """``count`` slots that are made free: of rows that were used least recently, those of low slots first, but none
        that is ``needed`` [K] (-1: none) now or lent."""
        free = self._waiting()
        if len(free) < count:
            self._find_oldest(count)
            free = self._waiting()
        free = free[:count] if len(free) >= count else self._oldest_of_all(count, needed)
        self._slot_of[self._ids[free] // self.world_size] = -1
        self.evicted += count
        return free

    def _waiting(self) -> torch.Tensor:
        """What of the oldest slots was not used since."""
        is_unused = self._used_at[self._oldest] == self._oldest_at
        self._oldest, self._oldest_at = self._oldest[is_unused], self._oldest_at[is_unused]
        return self._oldest

    def _forget_oldest(self) -> None:
        self._oldest, self._oldest_at = self._oldest[:0], self._oldest_at[:0]

    def _find_oldest(self, count: int) -> None:
        """Sorts for many steps to come. Slots that were used since the last update, as all that are needed or lent, are
        left out: all that are used from now on come after the others then."""
        used_at = self._used_at[: self.used]
        oldest = used_at.argsort(stable=True)[: max(count, self.capacity // _SORTED)]
        self._oldest = oldest[used_at[oldest] < self.steps].clone()
        self._oldest_at = used_at[self._oldest]

    def _oldest_of_all(self, count: int, needed: torch.Tensor) -> torch.Tensor:
        """As :meth:`_evict`, also of slots that were used since the last update, as by a step that was skipped."""
        used_at = self._used_at[: self.used].clone()
        for kept in (needed[needed >= 0].long(), *(lent.slots for lent in self._lent)):
            used_at[kept] = torch.iinfo(torch.int32).max
        free = used_at.argsort(stable=True)[:count]
        if len(free) < count or bool((used_at[free] == torch.iinfo(torch.int32).max).any()):
            raise TableError(
                f"a step needs more rows than the {self.capacity:,} that a rank may hold; raise model.item_capacity or "
                "lower the batch size"
            )
        return free

    def _rounded(self, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """fp32 [R, E] as bf16, up or down at random by what is left: a function of (seed, update, id, feature)."""
        key = torch.full_like(ids, key_of(self.spec.seed, _ROUNDING_KEY, self.steps))
        words = hash64(hash64(key, ids)[:, None], torch.arange(-(-rows.shape[1] // 4), device=ids.device))
        noise = words.view(torch.int16)[:, : rows.shape[1]].int() & 0xFFFF
        return (rows.view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32).bfloat16()

    def _exchange(self, values: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """Sends ``sent[r]`` rows of ``values`` to each rank r, one after the other; what came, likewise."""
        if self.world_size == 1:
            return values
        self.bytes_sent += (len(values) - sent[self.rank]) * values[:1].nbytes
        result = values.new_empty(sum(received), *values.shape[1:])
        with self.timed():
            dist.all_to_all_single(result, values.contiguous(), list(received), list(sent))
        return result


_PART = 1 << 16
_SORTED = 64
"""Which part of a table's slots is kept in order of their last use."""


def initial_rows(spec: TableSpec, ids: torch.Tensor) -> torch.Tensor:
    """The first values of the rows ``ids`` [K], fp32 [K, E]: normal, by Box and Muller from two halves of a hash."""
    if not spec.initial_std:
        return torch.zeros(len(ids), spec.features, device=ids.device)
    keys = hash64(torch.full_like(ids, key_of(spec.seed, _INITIAL_KEY)), ids)
    words = hash64(keys[:, None], torch.arange(-(-spec.features // 2), device=ids.device))
    radius = ((words >> 40) & 0xFFFFFF).float().add_(1).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (words & 0xFFFFFF).float().mul_(2 * math.pi * 2.0**-24)
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), 2).flatten(1)
    return pairs[:, : spec.features].mul(spec.initial_std)


def _first_of_each(ids: torch.Tensor) -> torch.Tensor:
    """``ids`` [K] without repetitions, in the order in which they first come."""
    distinct, place = ids.unique(return_inverse=True)
    if len(distinct) == len(ids):
        return ids
    first = torch.full((len(distinct),), len(ids), dtype=torch.int64, device=ids.device)
    first.scatter_reduce_(0, place, torch.arange(len(ids), device=ids.device), "amin")
    return ids[first.sort().values]
