"""Synchronising a growing store with the crops of a service's collection.

The caller reads the entries from the service; this module has no connection to it. A collection's crops are stored in
the folder ``gallery/COLLECTION``, each under the id of its entry. Crops of entries that no longer exist (deleted,
erased, expired) are removed, so that people the service has deleted are not used for training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from typing import Any
from urllib.parse import quote

from resight.errors import ImageError
from resight.image import decode
from resight.training.store.growing import GrowingStore, NewCrop, NewTrack
from resight.training.store.links import read_links, write_links

UNKNOWN_CAMERA = "gallery"  # camera of entries without one
BATCH = 256  # entries between two commits
MAX_NAME_BYTES = 200  # length of a file name before number and suffix; file systems allow 255
_TrackKey = tuple[str, str]
"""Camera and name of the track."""
IMAGE_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}


@dataclass(frozen=True)
class EntryCrops:
    """An entry with its crops as enrolled; empty names and None mean unknown."""

    entry_id: str
    camera: str
    track: str
    time_s: float | None
    images: Sequence[bytes] = field(repr=False)


@dataclass
class GallerySyncCounts:
    """Counts of a synchronisation: entries, crops, crops added, changed, removed and refused as invalid, and links."""

    entries: int = 0
    crops: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    refused: int = 0
    confirmed: int = 0
    rejected: int = 0

    def to_json(self) -> dict[str, Any]:
        """All counts as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _StoredCrop:
    """Metadata of a crop in the store."""

    camera: str
    time_s: float | None
    track: int | None


def collection_folder(collection: str) -> str:
    """Folder of a collection's crops in a store."""
    return f"gallery/{_file_name(collection)}"


def forget_gallery(store: GrowingStore, collection: str) -> int:
    """Remove all crops and links of a collection; returns the number of crops.

    Raises:
        StoreError: the store is damaged.
        StorageFullError: no space for the new index.
    """
    with store.exclusive(_lock_key(collection)):
        removed = store.remove(lambda path: path.startswith(f"{collection_folder(collection)}/"))
        store.sweep(collection_folder(collection))
        _replace_links(store, collection, [])
        return removed


def sync_gallery(
    store: GrowingStore, collection: str, entries: Iterable[EntryCrops], feedback: Iterable[tuple[str, str, bool]]
) -> GallerySyncCounts:
    """Make the crops of a collection in a store equal to those of the service.

    If it is interrupted, nothing has been removed, and the next call continues.

    Args:
        store: the store to change, split "train".
        collection: name of the collection.
        entries: all entries of the collection.
        feedback: pairs of entry ids, and whether they show one person; they become links.

    Raises:
        StoreError: the store or its links are damaged, or another process synchronises the same collection.
        StorageFullError: no space; crops added before are kept.
    """
    with store.exclusive(_lock_key(collection)):
        sync = _Sync(store, collection_folder(collection))
        remaining = iter(entries)
        while batch := list(islice(remaining, BATCH)):
            sync.add(batch)
        sync.remove_missing()
        pairs = [(sync.first[a], sync.first[b], same) for a, b, same in feedback if {a, b} <= sync.first.keys()]
        _replace_links(store, collection, pairs)
        counts = sync.counts
        counts.confirmed, counts.rejected = sum(same for *_, same in pairs), sum(not same for *_, same in pairs)
        return counts


class _Sync:
    """One synchronisation of a collection; ``first`` maps each entry to the path of its first crop."""

    def __init__(self, store: GrowingStore, folder: str) -> None:
        store.sweep(folder)
        self._store, self._folder = store, folder
        self._stored = {
            row["path"]: _StoredCrop(row["camera"], row["time_s"], row["track"]) for row in store.rows(folder)
        }
        self._numbers: dict[_TrackKey, int] = {}  # of the tracks so far
        self._current: set[str] = set()
        self.first: dict[str, str] = {}
        self.counts = GallerySyncCounts()

    def add(self, entries: Sequence[EntryCrops]) -> None:
        """Add the new crops of some entries and replace changed ones."""
        new: dict[_TrackKey, list[NewCrop]] = {}
        outdated: set[str] = set()
        for entry in entries:
            self.counts.entries += 1
            owner = (entry.camera or UNKNOWN_CAMERA, entry.track)
            for shot, data in enumerate(entry.images):
                path = f"{self._folder}/{_file_name(entry.entry_id)}_{shot:02d}{IMAGE_SUFFIXES.get(data[:2], '')}"
                unchanged = self._unchanged(path, entry, owner, data)
                if not unchanged and not _is_image(data):
                    self.counts.refused += 1
                    continue
                self.counts.crops += 1
                self._current.add(path)
                self.first.setdefault(entry.entry_id, path)
                if unchanged:
                    continue
                if path in self._stored:
                    outdated.add(path)
                new.setdefault(owner, []).append(NewCrop(path, data, entry.time_s))
        self.counts.changed += len(outdated)
        self.counts.added += sum(map(len, new.values())) - len(outdated)
        if outdated:
            self._store.remove(outdated.__contains__)
        if new:
            self._write(new)

    def _unchanged(self, path: str, entry: EntryCrops, owner: _TrackKey, data: bytes) -> bool:
        """Whether the store has the same crop and metadata as the service; also records the number of its track."""
        row = self._stored.get(path)
        if row is None or (row.camera, row.time_s) != (owner[0], entry.time_s):
            return False
        if (row.track is not None) != bool(entry.track):
            return False
        if row.track is not None and self._numbers.setdefault(owner, row.track) != row.track:
            return False
        file = self._store.root / path
        return file.is_file() and file.read_bytes() == data

    def _write(self, new: dict[_TrackKey, list[NewCrop]]) -> None:
        tracks = [
            NewTrack(owner[0], crops, numbered=bool(owner[1]), number=self._numbers.get(owner))
            for owner, crops in new.items()
        ]
        for owner, number in zip(new, self._store.add(tracks), strict=True):
            if owner[1] and number is not None:
                self._numbers[owner] = number

    def remove_missing(self) -> None:
        """Remove the crops that the service no longer has."""
        self.counts.removed = self._store.remove((self._stored.keys() - self._current).__contains__)
        self._store.sweep(self._folder)


def _is_image(data: bytes) -> bool:
    """Whether the data, which comes from the network, is an image that the store accepts."""
    try:
        decode(data)
    except ImageError:
        return False
    return True


def _replace_links(store: GrowingStore, collection: str, pairs: Iterable[tuple[str, str, bool]]) -> None:
    """Replace the links between crops of a collection; links of other crops are unchanged."""
    own = f"{collection_folder(collection)}/"
    before = read_links(store.root)
    others = [pair for pair in before if not (pair.path_a.startswith(own) or pair.path_b.startswith(own))]
    after = [*others, *pairs]
    if after or before:
        write_links(store.root, after)


def _file_name(name: str) -> str:
    """An id as a file name: percent-encoded, without a leading dot, hashed if it is too long."""
    safe = quote(name, safe=" ").replace(".", "%2E", 1) if name.startswith(".") else quote(name, safe=" ")
    return safe if len(safe) <= MAX_NAME_BYTES else f"sha256-{sha256(name.encode(errors='surrogatepass')).hexdigest()}"


def _lock_key(collection: str) -> str:
    return f"gallery-{_file_name(collection)}"
