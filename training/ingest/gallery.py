"""What a service's collection keeps of people becomes rows of a growing store, and leaves it when it leaves there.

Whoever asks the service hands the entries in; nothing here speaks to it. A collection's crops stand in the folder
``gallery/COLLECTION``, each under the id of its entry. What is not among the entries any more (deleted, erased,
expired) is removed: nobody may be trained on whom the service has forgotten.
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

UNKNOWN_CAMERA = "gallery"  # the camera of entries that name none
BATCH = 256  # entries between two commits
MAX_NAME_BYTES = 200  # bytes of a file's name before its number and suffix: file systems end at 255
_TrackKey = tuple[str, str]
"""Camera, and name of the track."""
IMAGE_SUFFIXES = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}


@dataclass(frozen=True)
class EntryCrops:
    """An entry whose crops the service keeps: files as they were enrolled; empty names and None = unknown."""

    entry_id: str
    camera: str
    track: str
    time_s: float | None
    images: Sequence[bytes] = field(repr=False)


@dataclass
class GallerySyncCounts:
    """What became of a collection: entries and crops seen, crops added, changed, removed, and refused as no image."""

    entries: int = 0
    crops: int = 0
    added: int = 0
    changed: int = 0
    removed: int = 0
    refused: int = 0
    confirmed: int = 0
    rejected: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _StoredCrop:
    """A crop as the store has it."""

    camera: str
    time_s: float | None
    track: int | None


def collection_folder(collection: str) -> str:
    """Where a collection's crops stand in a store."""
    return f"gallery/{_file_name(collection)}"


def forget_gallery(store: GrowingStore, collection: str) -> int:
    """Remove all crops of a collection that is gone or keeps none any more, and its links; how many crops.

    Raises:
        StoreError: the store is damaged.
        StorageFullError: no room for the new index.
    """
    with store.exclusive(_lock_key(collection)):
        removed = store.remove(lambda path: path.startswith(f"{collection_folder(collection)}/"))
        store.sweep(collection_folder(collection))
        _replace_links(store, collection, [])
        return removed


def sync_gallery(
    store: GrowingStore, collection: str, entries: Iterable[EntryCrops], feedback: Iterable[tuple[str, str, bool]]
) -> GallerySyncCounts:
    """Make a store's rows of a collection those of the service. Interrupted, it removes nothing; run again, it goes on.

    Args:
        store: gets and loses crops; split "train".
        collection: its name.
        entries: all of it.
        feedback: pairs of entry ids, and whether they show one person; they become links.

    Raises:
        StoreError: the store or its links are damaged, or another process does the same.
        StorageFullError: no room; what was added stands.
    """
    with store.exclusive(_lock_key(collection)):
        sync = _Sync(store, collection_folder(collection))
        coming = iter(entries)
        while part := list(islice(coming, BATCH)):
            sync.add(part)
        sync.remove()
        pairs = [(sync.first[a], sync.first[b], same) for a, b, same in feedback if {a, b} <= sync.first.keys()]
        _replace_links(store, collection, pairs)
        counts = sync.counts
        counts.confirmed, counts.rejected = sum(same for *_, same in pairs), sum(not same for *_, same in pairs)
        return counts


class _Sync:
    """One pass over a collection; ``first`` tells the path of each entry's first crop."""

    def __init__(self, store: GrowingStore, folder: str) -> None:
        store.sweep(folder)
        self._store, self._folder = store, folder
        self._known = {
            row["path"]: _StoredCrop(row["camera"], row["time_s"], row["track"]) for row in store.rows(folder)
        }
        self._numbers: dict[_TrackKey, int] = {}  # of the tracks met so far
        self._wanted: set[str] = set()
        self.first: dict[str, str] = {}
        self.counts = GallerySyncCounts()

    def add(self, entries: Sequence[EntryCrops]) -> None:
        """Rows of some entries: those that are there as they are, new ones added, changed ones replaced."""
        new: dict[_TrackKey, list[NewCrop]] = {}
        outdated: set[str] = set()
        for entry in entries:
            self.counts.entries += 1
            owner = (entry.camera or UNKNOWN_CAMERA, entry.track)
            for shot, data in enumerate(entry.images):
                path = f"{self._folder}/{_file_name(entry.entry_id)}_{shot:02d}{IMAGE_SUFFIXES.get(data[:2], '')}"
                same = self._unchanged(path, entry, owner, data)
                if not same and not _usable(data):
                    self.counts.refused += 1
                    continue
                self.counts.crops += 1
                self._wanted.add(path)
                self.first.setdefault(entry.entry_id, path)
                if same:
                    continue
                if path in self._known:
                    outdated.add(path)
                new.setdefault(owner, []).append(NewCrop(path, data, entry.time_s))
        self.counts.changed += len(outdated)
        self.counts.added += sum(map(len, new.values())) - len(outdated)
        if outdated:
            self._store.remove(outdated.__contains__)
        if new:
            self._write(new)

    def _unchanged(self, path: str, entry: EntryCrops, owner: _TrackKey, data: bytes) -> bool:
        """Whether a crop stands in the store as the service has it; the number of its track is learned from it."""
        row = self._known.get(path)
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

    def remove(self) -> None:
        """Take out what the service does not have any more."""
        self.counts.removed = self._store.remove((self._known.keys() - self._wanted).__contains__)
        self._store.sweep(self._folder)


def _usable(data: bytes) -> bool:
    """Whether it is an image a store may hold: it came over a wire."""
    try:
        decode(data)
    except ImageError:
        return False
    return True


def _replace_links(store: GrowingStore, collection: str, pairs: Iterable[tuple[str, str, bool]]) -> None:
    """Replace the links between crops of a collection; those of other crops stay."""
    own = f"{collection_folder(collection)}/"
    before = read_links(store.root)
    others = [pair for pair in before if not (pair.path_a.startswith(own) or pair.path_b.startswith(own))]
    after = [*others, *pairs]
    if after or before:
        write_links(store.root, after)


def _file_name(name: str) -> str:
    """An id as a file's name: percent-encoded, no dot first, and no longer than file systems allow."""
    safe = quote(name, safe=" ").replace(".", "%2E", 1) if name.startswith(".") else quote(name, safe=" ")
    return safe if len(safe) <= MAX_NAME_BYTES else f"sha256-{sha256(name.encode(errors='surrogatepass')).hexdigest()}"


def _lock_key(collection: str) -> str:
    return f"gallery-{_file_name(collection)}"
