"""Concurrent random calls on a real server, which is then killed; records acknowledged writes and those in flight.

Each caller owns its entries and the feedback on pairs of them, so their expected state follows from its own calls
alone. A new kind of call is one more method and its line in `ACTIONS`.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import grpc
from ledger import Ledger, State, Write
from serving import jpeg

from resight.client import Client, NewEntry, Where
from resight.errors import ReIDError

COLLECTION = "lobby"
CALLERS = 5
MAX_ENTRIES = 24  # per caller; above it, it deletes more than it enrols, so that checks do not grow with each round
SHORT_TTL_S = 0.4  # time to live of an entry that expires by itself
ENTRY_OF_PAIR = "|"  # separates the two entry ids in a pair's name


class ServerKilled(Exception):
    """The server was killed during this write, so it may or may not have been stored."""


class Storm:
    """One round: callers on threads, until the server is killed.

    Args:
        address: of the server.
        ledger: the expected states; acknowledged writes are added.
        seed: of this round.
        models: names of the models to migrate between.
    """

    def __init__(self, address: str, ledger: Ledger, seed: int, models: tuple[str, str]) -> None:
        self.client, self.ledger, self.seed, self.models = Client(address, timeout_s=20), ledger, seed, models
        self.stopping = threading.Event()
        self.in_flight: list[Write] = []
        self.answered, self.refused, self.failures = Counter[str](), Counter[str](), list[BaseException]()
        self.operations: list[str] = []
        self.erased: list[str] = []  # subjects whose erasure was reported as scrubbed
        self.searched_in: set[str] = {models[0], models[1]}  # models whose space may be active
        self.revision = 0  # the last one returned to a caller
        self._lock = threading.Lock()
        callers = [Caller(self, f"w{number}") for number in range(CALLERS)]
        works: list[Callable[[], None]] = [*(caller.run_one for caller in callers), self._migrate, self._operate]
        self._threads = [threading.Thread(target=self._until_over, args=(work,)) for work in works]

    def start(self) -> None:
        """Start the callers; returns after the first acknowledged call."""
        for thread in self._threads:
            thread.start()
        while not (self.answered or self.failures):
            time.sleep(0.005)

    def stop(self, kill: Callable[[], Any]) -> list[Write]:
        """Kill the server; returns the writes in flight, whose outcome is unknown."""
        self.stopping.set()
        kill()
        self.client.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        if self.failures:
            raise self.failures[0]
        return self.in_flight

    @contextmanager
    def writing(self, kind: str, expected: dict[str, State]) -> Iterator[None]:
        """Record a write as in flight, then as acknowledged or refused."""
        with self._lock:
            self.in_flight.append(expected)
        try:
            yield
        except ReIDError as error:
            if self.stopping.is_set():
                raise ServerKilled from error
            with self._lock:  # refused: nothing of it was stored
                self.refused[f"{kind} {type(error).__name__}"] += 1
                self.in_flight.remove(expected)
            return
        with self._lock:
            self.in_flight.remove(expected)
            self.ledger.acknowledge(expected)
            self.answered[kind] += 1

    def _until_over(self, work: Callable[[], None]) -> None:
        try:
            while not self.stopping.is_set():
                work()
        except ServerKilled:
            pass
        except (ReIDError, ValueError, grpc.RpcError) as error:  # a closed channel raises ValueError
            if not self.stopping.is_set():
                self.failures.append(error)
        except BaseException as error:
            self.failures.append(error)

    def _migrate(self) -> None:
        """Migrate to the other model; called repeatedly, so refused migrations are retried."""
        of = self.client.collection(COLLECTION)
        now, self.revision = of.model, of.revision
        target = next(name for name in self.models if name != now)
        try:
            self.searched_in = {now, target}
            begun = self.client.migrate(COLLECTION, target, auto_activate=True)
            self.operations.append(begun.operation_id)
            done = self.client.wait(begun)
            self.answered[f"migrate {done.state}"] += 1
            if done.error is not None:
                self.refused[f"migrate {type(done.error).__name__}: {done.error}"] += 1
            self.searched_in = {target if done.state == "succeeded" else now}
        except ReIDError as error:
            if self.stopping.is_set():
                raise ServerKilled from error
            self.refused[f"migrate {type(error).__name__}: {error}"] += 1
        time.sleep(0.02)

    def _operate(self) -> None:
        """An operator's calls: create a snapshot, rebuild the index, request an adaptation."""
        for begin in (self.client.create_snapshot, lambda: self.client.rebuild_index(COLLECTION)):
            begun = begin()
            self.operations.append(begun.operation_id)
            done = self.client.wait(begun)
            assert done.error is None, done
            self.answered[done.kind] += 1
        adaptation = self.client.start_adaptation("site")
        self.operations.append(adaptation.operation_id)
        self.answered["adapt"] += 1
        time.sleep(0.1)  # so that a round does not consist of copies only


class Caller:
    """One caller, with the entries it owns."""

    def __init__(self, storm: Storm, name: str) -> None:
        self.storm, self.client, self.name = storm, storm.client, name
        self.random = random.Random(f"{storm.seed} {name}")
        self.count = self.erasures = 0

    def run_one(self) -> None:
        own = len(self.entries())
        chances = [chance if own < MAX_ENTRIES or kind not in ENROLLING else 1 for chance, kind in ACTIONS]
        (action,) = self.random.choices([kind for _, kind in ACTIONS], chances)
        action(self)

    def own_states(self, *, pairs: bool) -> dict[str, dict[str, Any]]:
        return {
            name: state
            for name, state in list(self.storm.ledger.states.items())
            if state is not None and name.startswith(f"{self.name}-") and (ENTRY_OF_PAIR in name) == pairs
        }

    def entries(self) -> dict[str, dict[str, Any]]:
        """Its own entries that do not expire."""
        return {name: state for name, state in self.own_states(pairs=False).items() if state["ends"] is None}

    def random_entry(self) -> str | None:
        names = sorted(self.entries())
        return self.random.choice(names) if names else None

    def new_entry(self, *, ends: float | None = None) -> tuple[str, dict[str, Any], NewEntry]:
        """A new entry: its id, its expected state, and the entry to enrol."""
        self.count += 1
        entry_id = f"{self.name}-{self.storm.seed}-{self.count}"
        person = self.random.randrange(4)
        subject = f"subject-{self.name}-{person}-{self.storm.seed}-{self.erasures}"
        shot = self.storm.seed * 1000 + self.count
        crop = ("crop", int(self.name[1:]) * 10 + person, shot)
        state = {"subject": subject, "label": "new", "crop": crop, "ends": ends}
        expires = None if ends is None else datetime.fromtimestamp(ends, UTC)
        track = f"person-{crop[1]}"  # compared by a migration's gate
        entry = NewEntry(draw_crop(*crop[1:]), entry_id, subject, "", track, labels={"n": "new"}, expire_time=expires)
        return entry_id, state, entry

    def deletion(self, names: list[str]) -> dict[str, State]:
        """The states after a deletion of entries, including the pairs they are in."""
        pairs = [pair for pair in self.own_states(pairs=True) if set(pair.split(ENTRY_OF_PAIR)) & set(names)]
        return dict.fromkeys((*names, *pairs))

    def enrol(self) -> None:
        entry_id, state, entry = self.new_entry()
        with self.storm.writing("enrol", {entry_id: state}):
            self.client.enrol(COLLECTION, entry)

    def enrol_batch(self) -> None:
        new = [self.new_entry() for _ in range(self.random.randrange(2, 9))]
        with self.storm.writing("enrol_batch", {entry_id: state for entry_id, state, _ in new}):
            self.client.enrol_batch(COLLECTION, [entry for *_, entry in new], atomic=True)

    def enrol_short(self) -> None:
        """An entry that expires by itself, and is purged during the round."""
        entry_id, state, entry = self.new_entry(ends=time.time() + SHORT_TTL_S)
        with self.storm.writing("enrol_short", {entry_id: state}):
            self.client.enrol(COLLECTION, entry)

    def replace(self) -> None:
        entry_id = self.random_entry()
        if entry_id is not None:
            _, state, entry = self.new_entry()
            other = replace(entry, entry_id=entry_id, replace=True)
            with self.storm.writing("replace", self.deletion([entry_id]) | {entry_id: state}):
                self.client.enrol(COLLECTION, other)

    def update(self) -> None:
        entry_id = self.random_entry()
        if entry_id is not None:
            old = self.entries()[entry_id]
            new = old | {"label": f"changed {self.random.random()}", "subject": f"other-{self.name}-{old['crop'][1]}"}
            with self.storm.writing("update", {entry_id: new}):
                self.client.update_entry(COLLECTION, entry_id, subject_id=new["subject"], labels={"n": new["label"]})

    def delete(self) -> None:
        entry_id = self.random_entry()
        if entry_id is not None:
            with self.storm.writing("delete", self.deletion([entry_id])):
                self.client.delete_entry(COLLECTION, entry_id)

    def random_subject(self) -> tuple[str, list[str]]:
        own = self.entries()
        subject = own[self.random_entry() or next(iter(own))]["subject"] if own else "unknown"
        return subject, [name for name, state in own.items() if state["subject"] == subject]

    def delete_by_filter(self) -> None:
        subject, names = self.random_subject()
        with self.storm.writing("delete_by_filter", self.deletion(names)):
            self.client.delete_entries(COLLECTION, Where(subject_ids=[subject]))

    def erase(self) -> None:
        subject, names = self.random_subject()
        self.erasures += 1  # new entries never use an erased subject's name
        with self.storm.writing("erase", self.deletion(names)):
            if self.client.erase_subject(subject, reason="storm").storage_scrubbed and subject.startswith("subject"):
                self.storm.erased.append(subject)

    def give_feedback(self) -> None:
        """Give the correct verdict on a pair, so that verdicts are always consistent."""
        own = self.entries()
        if len(own) > 1:
            one, other = self.random.sample(sorted(own), 2)
            same = own[one]["crop"][1] == own[other]["crop"][1]
            name = ENTRY_OF_PAIR.join(sorted((one, other)))
            with self.storm.writing("feedback", {name: {"same": same}}):
                (self.client.confirm if same else self.client.reject)(COLLECTION, one, other)

    def remove_feedback(self) -> None:
        pairs = sorted(self.own_states(pairs=True))
        if pairs:
            pair = self.random.choice(pairs)
            with self.storm.writing("remove_feedback", {pair: None}):
                self.client.remove_feedback(COLLECTION, *pair.split(ENTRY_OF_PAIR))

    def search(self) -> None:
        """Search for an acknowledged entry: at any time and in any space its own crop finds it first."""
        entry_id = self.random_entry()
        if entry_id is not None:
            crop = self.entries()[entry_id]["crop"]
            (hit,) = self.client.search(COLLECTION, draw_crop(*crop[1:]), top_k=1, exact=True).hits
            assert (hit.entry.entry_id, hit.similarity > 0.9999) == (entry_id, True), (hit, entry_id)
            self.storm.answered["search"] += 1


@lru_cache(4096)
def draw_crop(person: int, shot: int) -> bytes:
    """A crop of one of the people; no two shots are equal."""
    return jpeg(person, shot)


# The calls with their relative frequencies.
ACTIONS: list[tuple[int, Callable[[Caller], None]]] = [
    (30, Caller.enrol),
    (6, Caller.enrol_batch),
    (4, Caller.enrol_short),
    (8, Caller.replace),
    (12, Caller.update),
    (12, Caller.delete),
    (2, Caller.delete_by_filter),
    (3, Caller.erase),
    (16, Caller.give_feedback),
    (4, Caller.remove_feedback),
    (10, Caller.search),
]
ENROLLING = (Caller.enrol, Caller.enrol_batch)


def after_expiry(states: Write) -> dict[str, State]:
    """The states once all entries with an expiry have expired."""
    return {name: state if state is None or state.get("ends") is None else None for name, state in states.items()}
