"""Concurrent random writes to a gallery, in a process that is to be killed; it reports the start and end of each write.

Each worker owns its entries, so an entry's expected state follows from that worker's lines alone. A new kind of write
is one more function in `ACTIONS`.

Run as ``python storm.py FOLDER SEED``; ``FOLDER/states.json`` has the existing entries. It prints JSON lines:
``{"began": {id: state}, "number": n}`` before a write and ``{"answered": n, "revision": r}`` after it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ledger import State
from stores import DIM, SPACE, feature

from resight.errors import ReIDError
from resight.service.records import Collection, Enrolment, EntryRecord, Filter
from resight.service.search.searcher import Searcher
from resight.service.storage import reads, snapshots, writes
from resight.service.storage.audit import AuditEvent, AuditLog
from resight.service.storage.erasure import erase_subject
from resight.service.storage.store import Store

WORKERS = 6


def enrolment_of(state: dict[str, Any], *, replace: bool = False) -> Enrolment:
    crops = (b"%d" % state["seed"],) * state["crops"]
    labels = {"n": state["label"]}
    entry = EntryRecord(state["id"], subject_id=state["subject"], labels=labels)
    return Enrolment(entry, feature(state["seed"]), crops, replace)


class Worker:
    """One writer, with the entries it owns."""

    def __init__(self, store: Store, searcher: Searcher, collection: Collection, name: str, seed: int) -> None:
        self.store, self.searcher, self.collection, self.name = store, searcher, collection, name
        self.random = random.Random(f"{seed} {name}")
        self.audit = AuditLog(store)
        self.own: dict[str, State] = {}
        self.count = 0
        self.seed = seed

    def new_entry(self) -> dict[str, Any]:
        self.count += 1
        entry_id = f"{self.name}-{self.seed}-{self.count}"
        subject = f"{self.name}-s{self.random.randrange(4)}"
        seed = self.random.randrange(1 << 30)
        return {"id": entry_id, "subject": subject, "label": "new", "seed": seed, "crops": self.random.randrange(3)}

    def random_entry(self) -> str | None:
        existing = [entry_id for entry_id, state in self.own.items() if state is not None]
        return self.random.choice(existing) if existing else None

    async def perform(self, expected: dict[str, State], write: Callable[[], Awaitable[Any]]) -> None:
        """Report the start of a write, run it, and report that it was acknowledged."""
        number = next(numbers)
        report({"began": expected, "number": number})
        try:
            done = await write()
        except ReIDError as error:
            report({"refused": number, "why": str(error)})
            raise
        report({"answered": number, "revision": getattr(done, "revision", 0)})
        self.own |= expected
        self.searcher.schedule_update(self.collection)


numbers = itertools.count()


def report(line: dict[str, Any]) -> None:
    os.write(1, (json.dumps(line) + "\n").encode())  # unbuffered and atomic: shorter than a pipe's buffer


async def enrol(worker: Worker) -> None:
    new = worker.new_entry()
    await worker.perform(
        {new["id"]: new}, lambda: worker.store.write(writes.enrol, worker.collection, enrolment_of(new))
    )


async def enrol_batch(worker: Worker) -> None:
    new = [worker.new_entry() for _ in range(worker.random.randrange(2, 12))]
    expected = {one["id"]: one for one in new}
    made = [enrolment_of(one) for one in new]

    async def write() -> Any:
        return (await worker.store.write(writes.enrol_all, worker.collection, made))[-1]

    await worker.perform(expected, write)


async def replace(worker: Worker) -> None:
    entry_id = worker.random_entry()
    if entry_id is not None:
        new = worker.new_entry() | {"id": entry_id}
        made = enrolment_of(new, replace=True)
        await worker.perform({entry_id: new}, lambda: worker.store.write(writes.enrol, worker.collection, made))


async def update(worker: Worker) -> None:
    entry_id = worker.random_entry()
    state = worker.own.get(entry_id or "")
    if state is not None:
        new = state | {"label": f"changed {worker.random.random()}", "subject": f"{worker.name}-s0"}
        entry = EntryRecord(state["id"], subject_id=new["subject"], labels={"n": new["label"]})
        fields = ["subject_id", "labels"]
        await worker.perform(
            {state["id"]: new}, lambda: worker.store.erase(writes.update_entry, worker.collection, entry, fields)
        )


async def delete(worker: Worker) -> None:
    entry_id = worker.random_entry()
    if entry_id is not None:
        erase_write = worker.store.erase
        await worker.perform(
            {entry_id: None},
            lambda: erase_write(writes.delete_entry, worker.collection, entry_id, allow_missing=False),
        )


async def delete_by_filter(worker: Worker) -> None:
    subject = f"{worker.name}-s{worker.random.randrange(4)}"
    expected = {entry_id: None for entry_id, state in worker.own.items() if state and state["subject"] == subject}
    filters = Filter(subject_ids=(subject,))
    await worker.perform(
        dict(expected), lambda: worker.store.erase(writes.delete_entries, worker.collection, filters, cap=None)
    )


async def erase(worker: Worker) -> None:
    subject = f"{worker.name}-s{worker.random.randrange(4)}"
    expected: dict[str, State] = {i: None for i, state in worker.own.items() if state and state["subject"] == subject}
    deadline = time.monotonic() + 2
    await worker.perform(expected, lambda: erase_subject(worker.store, subject, principal="storm", deadline=deadline))


async def purge(worker: Worker) -> None:
    await worker.store.write_unchecked(writes.purge_requests, worker.searcher.revisions())
    worker.audit.add(AuditEvent("storm", "SearchService.Search"))
    await worker.audit.flush()


async def copy(worker: Worker) -> None:
    name = f"{worker.name}-{worker.count}"
    await asyncio.to_thread(snapshots.remove, worker.store.folder, name)
    await asyncio.to_thread(snapshots.create, worker.store.path, name)
    await asyncio.to_thread(snapshots.remove, worker.store.folder, name)


# The writes with their relative frequencies.
ACTIONS: list[tuple[int, Callable[[Worker], Awaitable[None]]]] = [
    (30, enrol),
    (8, enrol_batch),
    (10, replace),
    (15, update),
    (15, delete),
    (3, delete_by_filter),
    (3, erase),
    (4, purge),
    (1, copy),
]


async def storm(folder: Path, seed: int) -> None:
    store = Store(folder / "gallery.sqlite3", dim=DIM)
    if not await store.read(reads.collections, limit=1):
        await store.write(writes.create_collection, Collection("lobby", SPACE, keep_crops=True))
    collection = await store.read(reads.collection, "lobby")
    searcher = Searcher(store)
    await searcher.load()
    chances = [chance for chance, _ in ACTIONS]
    report({"ready": os.getpid()})

    async def work(worker: Worker) -> None:
        while True:
            (action,) = worker.random.choices([action for _, action in ACTIONS], chances)
            await action(worker)

    workers = [Worker(store, searcher, collection, f"w{number}", seed) for number in range(WORKERS)]
    for entry_id, state in json.loads((folder / "states.json").read_text()).items():
        workers[int(entry_id[1 : entry_id.index("-")])].own[entry_id] = state
    await asyncio.gather(*map(work, workers))


if __name__ == "__main__":
    asyncio.run(storm(Path(sys.argv[1]), int(sys.argv[2])))
