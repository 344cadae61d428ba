"""How the processes of a launcher meet, before they are a group: at a store on MASTER_ADDR, where each says who it is.

    meeting = Meeting(patience_s=25)
    facts = meeting.gather("facts", {"torch": "2.13.0"}, within_s=10)     # by rank; None of those that did not come

Whoever does not come is named, with its host where that is known. What is told is JSON, no pickle.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for each process."""

_NOTICE_S = 30.0
_GRACE_S = 10.0
"""Seconds that rank 0's answer may take once it has stopped waiting."""


class RendezvousError(ValueError):
    """Processes that did not come; the message names them."""


def is_launched() -> bool:
    """Whether a launcher (deepspeed, torchrun) has started this process."""
    return all(name in os.environ for name in VARIABLES)


class Meeting:
    """This process at the store. Raises :class:`RendezvousError` where rank 0, which has the store, is not there after
    ``patience_s`` seconds."""

    def __init__(self, patience_s: float) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        self._launched_on = _hosts_of_deepspeed()
        self.hosts = self._launched_on or [f"host {rank // self.local_size}" for rank in range(self.size)]
        """By rank; until a process has said where it is, what its launcher says, or a number."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        has_torchrun_s = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        has_store = self.rank == 0 and not has_torchrun_s
        if not has_store and not _answers(address, port, patience_s):
            raise RendezvousError(
                f"{self.hosts[0]} (rank 0) did not arrive: nothing answered {socket.gethostname()} (rank {self.rank}) "
                f"at {address}:{port} within {patience_s:.0f} s; is it running, and may the hosts reach that port?"
            )
        try:
            store = dist.TCPStore(
                address,
                port,
                is_master=has_store,
                timeout=timedelta(seconds=patience_s),
                wait_for_workers=False,
                multi_tenant=has_store,
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            doing = "listen" if has_store else "meet the others"
            raise RendezvousError(
                f"{socket.gethostname()} (rank {self.rank}) cannot {doing} at {address}:{port}: {reason}; set another "
                "MASTER_PORT"
            ) from error
        # Torchrun's own store outlives a restart. One of rank 0 does not; and hosts count restarts differently.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if has_torchrun_s else "0"
        self.store = dist.PrefixStore(f"s3rec/{attempt}", store)
        self._awaited = set(range(self.size))  # by rank 0

    def gather(self, topic: str, value: Any, within_s: float, *, notices: bool = False) -> list[Any]:
        """Every rank's ``value``, by rank, on every rank; None of those that have not given theirs in time, for which
        nobody waits again. With ``notices`` rank 0 says now and then whom all wait for. A topic serves once."""
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            found = self._collect(topic, within_s, notices)
            self.store.set(f"{topic}/all", json.dumps(found))
            return found
        self.store.wait([f"{topic}/all"], timedelta(seconds=within_s + _GRACE_S))
        return list(json.loads(self.store.get(f"{topic}/all")))

    def _collect(self, topic: str, within_s: float, notices: bool) -> list[Any]:
        def is_there(rank: int) -> bool:
            return self.store.check([f"{topic}/{rank}"])

        now = time.monotonic()
        deadline, notice = now + within_s, now + _NOTICE_S
        while not self.store.check([f"{topic}/{rank}" for rank in self._awaited]):  # its wait() warns when it ends
            if (now := time.monotonic()) > deadline:
                self._awaited = set(filter(is_there, self._awaited))
                break
            if notices and now > notice:
                notice = now + _NOTICE_S
                missing = [rank for rank in self._awaited if not is_there(rank)]
                print(f"s3rec: waiting for {self.names(missing)}", file=sys.stderr, flush=True)
            time.sleep(0.01)
        found = {rank: json.loads(self.store.get(f"{topic}/{rank}")) for rank in self._awaited}
        return [found.get(rank) for rank in range(self.size)]

    def arrive(self, value: Any, patience_s: float, *, notices: bool = False) -> list[Any]:
        """The first :meth:`gather`, which also tells where everyone is."""
        arrived = self.gather("arrival", [socket.gethostname(), value], patience_s, notices=notices)
        near = {rank // self.local_size: entry[0] for rank, entry in enumerate(arrived) if entry}
        for rank, entry in enumerate(arrived):
            if entry:
                self.hosts[rank] = entry[0]
            elif not self._launched_on:  # as many processes on each host, as torchrun has it
                self.hosts[rank] = near.get(rank // self.local_size, self.hosts[rank])
        return [entry and entry[1] for entry in arrived]

    def leave(self) -> None:
        """Rank 0, whose store goes with it, waits a moment for the others to have done this."""
        left = self.store.add("left", 1)
        deadline = time.monotonic() + 2
        while self.rank == 0 and left < len(self._awaited) and time.monotonic() < deadline:
            time.sleep(0.01)
            left = self.store.add("left", 0)

    def names(self, ranks: Sequence[int]) -> str:
        """See :func:`names`."""
        return names(self.hosts, ranks)


def names(hosts: Sequence[str], ranks: Sequence[int]) -> str:
    """Processes for people to read: 'node0 (rank 0), node1 (ranks 1, 2)'."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    return ", ".join(f"{h} (rank{'s' * (len(r) > 1)} {', '.join(r)})" for h, r in by_host.items())


def _answers(address: str, port: int, within_s: float) -> bool:
    """Whether somebody listens there before the time is over. The store's own attempts fill the terminal."""
    deadline = time.monotonic() + within_s
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=min(left, 5)):
            return True
        time.sleep(min(0.2, max(left, 0)))
    return False


def _hosts_of_deepspeed() -> list[str]:
    """Hosts by rank, where DeepSpeed's launcher has started this process: its command line has them."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except OSError:
        return []
    info = next((word.partition("=")[2] for word in words if word.startswith("--world_info=")), "")
    slots = json.loads(base64.urlsafe_b64decode(info)) if info else {}
    return [host for host, processes in slots.items() for _ in processes]
