"""An inquiry among the ranks of a job: a rank that waits too long, or has lost a connection, asks all others where they
are, and every rank that waits prints the same report, which names the ranks that hang or have ended.

The launcher of a node notices a process that ends, but none that hangs; at the time-out of a collective NCCL ends the
process without naming the rank that it waited for. Here the ranks speak through the store of the rendezvous:

- `place/R`: where rank R was a few seconds ago, for the case that it does not answer;
- `ask/N/R`: rank R is asked, in inquiry number N; `answer/N/R`: its answer (`whereabouts.account`);
- `report/N`: what the rank that asked first has made of the answers (who_waits.py);
- `failed/R`: the error with which rank R ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from hunyuan_pretrain.parallel import whereabouts
from hunyuan_pretrain.parallel.who_waits import Silent, describe

SECONDS_BETWEEN = 10.0
"""Between two notes of where a rank is; a short time-out makes them more frequent."""
SECONDS_TO_ANSWER = 5.0
SECONDS_TO_END = 2.0
"""How long a rank that ends takes at most to tell the others, or to ask them why."""


class Inquiry:
    """This rank's part in the inquiries of a job. Everything runs in threads, so a rank that computes, reads or writes
    for hours answers too; one that is stopped does not."""

    def __init__(self, store: dist.Store, limit_s: float) -> None:
        """limit_s: the time-out of collectives. A rank asks after half of it."""
        self._parent, self._limit_s = store, limit_s
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self._every_s = min(SECONDS_BETWEEN, limit_s / 10)
        self._machine = f"{socket.gethostname()}, process {os.getpid()}"
        self._name = f"rank {self._rank} ({self._machine})"
        self._end, self._lock = threading.Event(), threading.Lock()
        self._next = 0
        """Number of the inquiry that this rank answers next."""
        self._report, self._is_first = list[str](), False
        """Of the inquiry that is under way."""
        self._notes = self._store()
        self._note()
        self._threads = [
            threading.Thread(target=work, name="inquiry", daemon=True) for work in (self._look, self._answer)
        ]
        for thread in self._threads:
            thread.start()
        # a thread that returns from the store during interpreter shutdown would abort the process
        atexit.register(self.end)

    def end(self) -> None:
        """Answer and ask no more."""
        if self._end.is_set():
            return
        self._end.set()
        _within(1.0, lambda: self._store().set(f"ask/{self._next}/{self._rank}", ""))  # wakes `_answer`
        for thread in self._threads:
            thread.join(timeout=1.0)

    def failed(self, reason: str) -> None:
        """Tell the others why this rank ends."""
        _within(SECONDS_TO_END, lambda: self._store().set(f"failed/{self._rank}", f"{reason}, on {self._machine}"))

    def last_seen(self, ranks: Iterable[int]) -> list[str]:
        """Where ranks were when they last gave notice, a line each; those that are known."""
        found: list[str] = []

        def read() -> None:
            store = self._store()
            for rank in ranks:
                if (text := _value(store, f"place/{rank}")) is not None:
                    found.append(f"rank {rank} was last seen {text}")

        _within(SECONDS_TO_END, read)
        return found

    def ask(self, seconds: float = SECONDS_TO_ANSWER) -> list[str]:
        """The lines of the report on what the ranks do; [] if the store does not answer.

        Takes about `seconds` if a rank does not answer. Once per hang: later calls return the report that was made.
        """
        with self._lock:
            if not self._report:
                _within(3 * seconds + 1, lambda: self._report.extend(self._ask(seconds)))
            return [*self._report]

    def _ask(self, seconds: float) -> list[str]:
        store = self._store()
        number = int(store.add("number", 0))
        self._is_first = store.add(f"asked/{number}", 1) == 1
        patient_until = time.monotonic() + 2 * seconds
        while not self._is_first and time.monotonic() < patient_until:  # then the rank that was first has ended
            if (report := _value(store, f"report/{number}")) is not None:
                return report.splitlines()
            time.sleep(0.05)
        for rank in range(self._ranks):
            store.set(f"ask/{number}/{rank}", "")
        accounts: dict[int, dict[str, Any]] = {self._rank: self._account()}
        deadline = time.monotonic() + seconds
        while len(accounts) < self._ranks and time.monotonic() < deadline:
            for rank in set(range(self._ranks)) - accounts.keys():
                if (told := _value(store, f"answer/{number}/{rank}")) is not None:
                    accounts[rank] = json.loads(told)
            time.sleep(0.02)
        silent = dict[int, Silent]()
        for rank in range(self._ranks):
            failure = _value(store, f"failed/{rank}")
            if rank not in accounts or (failure is not None and rank != self._rank):
                accounts.pop(rank, None)
                silent[rank] = Silent(_value(store, f"place/{rank}"), failure)
        lines = describe(accounts, silent)
        store.set(f"report/{number}", "\n".join(lines))
        return lines

    def _account(self) -> dict[str, Any]:
        try:
            return {"name": self._name, **whereabouts.account()}
        except Exception as error:  # such as another format of torch's record: this rank does answer
            problem = f"its collectives cannot be read: {error!r}"
            place = str(whereabouts.place())
            return {"name": self._name, "place": place, "at": problem, "is_in_exchange": False, "groups": {}}

    def _answer(self) -> None:
        """Answer each inquiry once."""
        with contextlib.suppress(RuntimeError):  # the store has ended
            store = self._store()
            while not self._end.is_set():
                store.wait([f"ask/{self._next}/{self._rank}"], timedelta(days=365))
                if not self._end.is_set():
                    store.set(f"answer/{self._next}/{self._rank}", json.dumps(self._account()))
                    self._next += 1

    def _look(self) -> None:
        """Note where this rank is, and ask the others if it waits for long."""
        noting, pause_s, told = None, 0.0, None
        while not self._end.wait(self._every_s):
            if noting is None or not noting.is_alive():
                noting = _within(self._every_s / 2, self._note)
            place = whereabouts.place()
            if told is not None and place is not told:
                self._goes_on()
                told = None
            pause_s -= self._every_s
            if told is None and pause_s <= 0 and whereabouts.is_quiet(self._limit_s):
                pause_s = self._limit_s / 8
                try:
                    waits = whereabouts.waits()
                except Exception as error:  # such as another format
                    _print(
                        f"{self._name}: cannot read torch's record of collectives, so hangs are not named: {error!r}"
                    )
                    return
                if waits is not None:
                    told = place
                    self._say(waits)

    def _note(self) -> None:
        clock = time.strftime("%H:%M:%S", time.gmtime())
        text = f"in {whereabouts.place()}, at {clock} UTC, on {self._machine}"
        self._notes.set(f"place/{self._rank}", text)

    def _goes_on(self) -> None:
        """The wait has ended: the next one is another hang."""
        with self._lock:
            if self._is_first:
                _within(SECONDS_TO_END, lambda: self._store().add("number", 1))
            self._is_first, self._report = False, []
        _print(f"{self._name} goes on")

    def _say(self, waits: str) -> None:
        seconds = min(SECONDS_TO_ANSWER, self._limit_s / 4)
        lines = self.ask(seconds) or ["the store of the rendezvous does not answer: its node may be gone (MASTER_ADDR)"]
        head = (
            f"{self._name} has waited for more than {self._limit_s / 2:g} s in {waits}; the limit is "
            f"{self._limit_s:g} s (runtime.distributed_timeout_s)"
        )
        _print("\n  ".join([head, *lines]))

    def _store(self) -> dist.Store:
        """A connection of its own: the job's may be waiting for a key."""
        # a launcher that starts the ranks again may keep its store
        name = f"inquiry/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return dist.PrefixStore(name, self._parent.clone())  # type: ignore[attr-defined]  # missing in the stubs


def _value(store: dist.Store, key: str) -> str | None:
    return store.get(key).decode() if store.check([key]) else None


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is gone
        os.write(2, f"{text}\n".encode())  # in one write, because several ranks share the output


def _within(seconds: float, action: Callable[[], object]) -> threading.Thread:
    """Do `action` if the store answers, and wait for it at most that long: a store on a lost machine never answers."""

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            action()

    thread = threading.Thread(target=run, name="inquiry", daemon=True)
    thread.start()
    thread.join(seconds)
    return thread


def start(limit_s: float) -> None:
    """Take part in the inquiries of the job that this process has joined. limit_s: time-out of its collectives."""
    global _inquiry
    stop()
    _inquiry = Inquiry(_get_default_store(), limit_s)


def stop() -> None:
    """Leave the inquiries of the job."""
    global _inquiry
    if _inquiry is not None:
        _inquiry.end()
        _inquiry = None


def current() -> Inquiry | None:
    """This process's, if it is one of several ranks."""
    return _inquiry


_inquiry: Inquiry | None = None
