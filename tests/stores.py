"""Real gallery databases in a test's folder, and entries to enrol in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from resight.files import files_below
from resight.service.records import Collection, Enrolment, EntryRecord, Filter, Space
from resight.service.storage import reads, writes
from resight.service.storage.store import Store

DIM = 16
SPACE = Space("ab" * 16, "tiny", DIM)
OTHER = Space("cd" * 16, "small", DIM)


@contextmanager
def open_gallery(folder: Path) -> Iterator[Store]:
    store = Store(folder / "gallery.sqlite3", dim=DIM)
    try:
        yield store
    finally:
        store.close()


def feature(seed: int) -> np.ndarray:
    row = np.random.default_rng(seed).normal(size=DIM).astype(np.float32)
    return row / np.linalg.norm(row)


def enrolment(number: int, **more) -> Enrolment:
    entry_fields = {name: more.pop(name) for name in list(more) if name in EntryRecord.__dataclass_fields__}
    return Enrolment(EntryRecord(**{"entry_id": f"e{number}", **entry_fields}), feature(number), **more)


async def create_collection(store: Store, name: str = "lobby", **more) -> Collection:
    return await store.write(writes.create_collection, Collection(name, SPACE, **more))


async def count_entries(store: Store, name: str = "lobby") -> int:
    found = await store.read(reads.collection, name)
    return await store.read(reads.count, found.key, Filter())


def files_with(folder: Path, secret: bytes) -> list[str]:
    """Names of the files below a folder that contain the bytes; one that a server removes meanwhile is left out."""
    found = []
    for file in files_below(folder):
        with suppress(FileNotFoundError):
            if secret in file.read_bytes():
                found.append(file.name)
    return found
