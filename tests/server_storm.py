"""A storm of calls on a real server by many callers, who write down what they began and what was answered.

Each caller owns its entries and the verdicts on pairs of them, so what these must be follows from its own notes alone.
A new kind of call is one more method and its line in `ACTIONS`.
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
MOST = 24  # entries of one caller: above it deletes more than it enrols, so that a check takes no longer each round
SHORT_S = 0.4  # the life of an entry that expires by itself
ENTRY_OF_PAIR = "|"  # a pair's name is both its entries' ids


class Lost(Exception):
    """The server went away, as it was meant to: nobody knows whether this write was made."""


class Storm:
    """One round of it: callers on threads until the server is killed.

    Args:
        address: of the server.
        ledger: what is there when it begins; what is answered goes into it.
        seed: of this round.
        models: names of the models to migrate between.
    """

    def __init__(self, address: str, ledger: Ledger, seed: int, models: tuple[str, str]) -> None:
        self.client, self.ledger, self.seed, self.models = Client(address, timeout_s=20), ledger, seed, models
        self.over = threading.Event()
        self.began: list[Write] = []
        self.answered, self.refused, self.broken = Counter[str](), Counter[str](), list[BaseException]()
        self.operations: list[str] = []
        self.erased: list[str] = []  # subjects whose erasure was answered as scrubbed
        self.searched_in: set[str] = {models[0], models[1]}  # where the collection may be now
        self.revision = 0  # the last that somebody was told
        self._lock = threading.Lock()
        callers = [Caller(self, f"w{number}") for number in range(CALLERS)]
        works: list[Callable[[], None]] = [*(caller.work for caller in callers), self._migrate, self._operate]
        self._threads = [threading.Thread(target=self._until_over, args=(work,)) for work in works]

    def begin(self) -> None:
        """Let the callers begin; returns when the first of them was answered."""
        for thread in self._threads:
            thread.start()
        while not (self.answered or self.broken):
            time.sleep(0.005)

    def end(self, kill: Callable[[], Any]) -> list[Write]:
        """Kill the server; the writes whose end nobody knows."""
        self.over.set()
        kill()
        self.client.close()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        if self.broken:
            raise self.broken[0]
        return self.began

    @contextmanager
    def writing(self, kind: str, want: dict[str, State]) -> Iterator[None]:
        """Write down what is begun, and what was answered or refused."""
        with self._lock:
            self.began.append(want)
        try:
            yield
        except ReIDError as error:
            if self.over.is_set():
                raise Lost from error
            with self._lock:  # refused: nothing of it is there
                self.refused[f"{kind} {type(error).__name__}"] += 1
                self.began.remove(want)
            return
        with self._lock:
            self.began.remove(want)
            self.ledger.answered(want)
            self.answered[kind] += 1

    def _until_over(self, work: Callable[[], None]) -> None:
        try:
            while not self.over.is_set():
                work()
        except Lost:
            pass
        except (ReIDError, ValueError, grpc.RpcError) as error:  # a closed channel raises ValueError
            if not self.over.is_set():
                self.broken.append(error)
        except BaseException as error:
            self.broken.append(error)

    def _migrate(self) -> None:
        """To the other model, and back, and so on; what is refused is tried again."""
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
            if self.over.is_set():
                raise Lost from error
            self.refused[f"migrate {type(error).__name__}: {error}"] += 1
        time.sleep(0.02)

    def _operate(self) -> None:
        """What operators do: snapshots, indexes built anew, adaptations asked for."""
        for begin in (self.client.create_snapshot, lambda: self.client.rebuild_index(COLLECTION)):
            begun = begin()
            self.operations.append(begun.operation_id)
            done = self.client.wait(begun)
            assert done.error is None, done
            self.answered[done.kind] += 1
        asked = self.client.start_adaptation("site")
        self.operations.append(asked.operation_id)
        self.answered["adapt"] += 1
        time.sleep(0.1)  # so that a round does not drown in copies


class Caller:
    """One of the storm's callers, with the entries it owns."""

    def __init__(self, storm: Storm, name: str) -> None:
        self.storm, self.client, self.name = storm, storm.client, name
        self.random = random.Random(f"{storm.seed} {name}")
        self.count = self.erasures = 0

    def work(self) -> None:
        own = len(self.entries())
        chances = [chance if own < MOST or kind not in MAKING else 1 for chance, kind in ACTIONS]
        (action,) = self.random.choices([kind for _, kind in ACTIONS], chances)
        action(self)

    def own(self, *, pairs: bool) -> dict[str, dict[str, Any]]:
        return {
            name: state
            for name, state in list(self.storm.ledger.states.items())
            if state is not None and name.startswith(f"{self.name}-") and (ENTRY_OF_PAIR in name) == pairs
        }

    def entries(self) -> dict[str, dict[str, Any]]:
        """Its own that live for good."""
        return {name: state for name, state in self.own(pairs=False).items() if state["ends"] is None}

    def some(self) -> str | None:
        names = sorted(self.entries())
        return self.random.choice(names) if names else None

    def fresh(self, *, ends: float | None = None) -> tuple[str, dict[str, Any], NewEntry]:
        """A new entry: its id, what it must be, and how it is enrolled."""
        self.count += 1
        entry_id = f"{self.name}-{self.storm.seed}-{self.count}"
        person = self.random.randrange(4)
        subject = f"subject-{self.name}-{person}-{self.storm.seed}-{self.erasures}"
        shot = self.storm.seed * 1000 + self.count
        crop = ("crop", int(self.name[1:]) * 10 + person, shot)
        state = {"subject": subject, "label": "new", "crop": crop, "ends": ends}
        expires = None if ends is None else datetime.fromtimestamp(ends, UTC)
        track = f"person-{crop[1]}"  # what a migration's gate looks for
        entry = NewEntry(drawn(*crop[1:]), entry_id, subject, "", track, labels={"n": "new"}, expire_time=expires)
        return entry_id, state, entry

    def gone(self, names: list[str]) -> dict[str, State]:
        """What a deletion of entries makes of them, and of the pairs they are in."""
        pairs = [pair for pair in self.own(pairs=True) if set(pair.split(ENTRY_OF_PAIR)) & set(names)]
        return dict.fromkeys((*names, *pairs))

    def enrol(self) -> None:
        entry_id, state, entry = self.fresh()
        with self.storm.writing("enrol", {entry_id: state}):
            self.client.enrol(COLLECTION, entry)

    def enrol_batch(self) -> None:
        new = [self.fresh() for _ in range(self.random.randrange(2, 9))]
        with self.storm.writing("enrol_batch", {entry_id: state for entry_id, state, _ in new}):
            self.client.enrol_batch(COLLECTION, [entry for *_, entry in new], atomic=True)

    def enrol_short(self) -> None:
        """One that expires by itself, and is purged while the storm goes on."""
        entry_id, state, entry = self.fresh(ends=time.time() + SHORT_S)
        with self.storm.writing("enrol_short", {entry_id: state}):
            self.client.enrol(COLLECTION, entry)

    def replace(self) -> None:
        entry_id = self.some()
        if entry_id is not None:
            _, state, entry = self.fresh()
            other = replace(entry, entry_id=entry_id, replace=True)
            with self.storm.writing("replace", self.gone([entry_id]) | {entry_id: state}):
                self.client.enrol(COLLECTION, other)

    def update(self) -> None:
        entry_id = self.some()
        if entry_id is not None:
            old = self.entries()[entry_id]
            new = old | {"label": f"changed {self.random.random()}", "subject": f"other-{self.name}-{old['crop'][1]}"}
            with self.storm.writing("update", {entry_id: new}):
                self.client.update_entry(COLLECTION, entry_id, subject_id=new["subject"], labels={"n": new["label"]})

    def delete(self) -> None:
        entry_id = self.some()
        if entry_id is not None:
            with self.storm.writing("delete", self.gone([entry_id])):
                self.client.delete_entry(COLLECTION, entry_id)

    def of_subject(self) -> tuple[str, list[str]]:
        own = self.entries()
        subject = own[self.some() or next(iter(own))]["subject"] if own else "nobody"
        return subject, [name for name, state in own.items() if state["subject"] == subject]

    def delete_by_filter(self) -> None:
        subject, names = self.of_subject()
        with self.storm.writing("delete_by_filter", self.gone(names)):
            self.client.delete_entries(COLLECTION, Where(subject_ids=[subject]))

    def erase(self) -> None:
        subject, names = self.of_subject()
        self.erasures += 1  # no new entry takes a subject's name that is erased
        with self.storm.writing("erase", self.gone(names)):
            if self.client.erase_subject(subject, reason="storm").storage_scrubbed and subject.startswith("subject"):
                self.storm.erased.append(subject)

    def confirm_or_reject(self) -> None:
        """Verdicts that are true of the crops, so that none contradicts another."""
        own = self.entries()
        if len(own) > 1:
            one, other = self.random.sample(sorted(own), 2)
            same = own[one]["crop"][1] == own[other]["crop"][1]
            name = ENTRY_OF_PAIR.join(sorted((one, other)))
            with self.storm.writing("feedback", {name: {"same": same}}):
                (self.client.confirm if same else self.client.reject)(COLLECTION, one, other)

    def take_back(self) -> None:
        pairs = sorted(self.own(pairs=True))
        if pairs:
            pair = self.random.choice(pairs)
            with self.storm.writing("take_back", {pair: None}):
                self.client.remove_feedback(COLLECTION, *pair.split(ENTRY_OF_PAIR))

    def search(self) -> None:
        """At any moment, in whichever space: what was answered is found, and by its own crop first."""
        entry_id = self.some()
        if entry_id is not None:
            crop = self.entries()[entry_id]["crop"]
            (hit,) = self.client.search(COLLECTION, drawn(*crop[1:]), top_k=1, exact=True).hits
            assert (hit.entry.entry_id, hit.similarity > 0.9999) == (entry_id, True), (hit, entry_id)
            self.storm.answered["search"] += 1


@lru_cache(4096)
def drawn(person: int, shot: int) -> bytes:
    """A crop of one of the storm's people; no two shots are equal."""
    return jpeg(person, shot)


# What the storm is made of, and how often.
ACTIONS: list[tuple[int, Callable[[Caller], None]]] = [
    (30, Caller.enrol),
    (6, Caller.enrol_batch),
    (4, Caller.enrol_short),
    (8, Caller.replace),
    (12, Caller.update),
    (12, Caller.delete),
    (2, Caller.delete_by_filter),
    (3, Caller.erase),
    (16, Caller.confirm_or_reject),
    (4, Caller.take_back),
    (10, Caller.search),
]
MAKING = (Caller.enrol, Caller.enrol_batch)


def lasting(states: Write) -> dict[str, State]:
    """The states when everything that expires by itself has expired."""
    return {name: state if state is None or state.get("ends") is None else None for name, state in states.items()}
