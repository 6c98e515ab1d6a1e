"""Graphs kept on disk, so that a restart does not build them anew: private cache files, never the truth.

A file holds keys and links, no features: those stand in the database alone, where a deletion erases them.
Whatever is odd about a file, it is deleted and the graph is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np

from resight.errors import FormatError
from resight.service.entries import Collection, Space
from resight.service.reads import Keys

log = logging.getLogger(__name__)

FOLDER = "index"
MAGIC, FORMAT = b"RSGTSEG\n", 1
MAX_HEADER = 4096  # bytes; a real one takes 400


class Segment(NamedTuple):
    """A graph without its rows, the keys of those rows in their order, and the revision they were read at."""

    keys: Keys
    graph: faiss.IndexHNSWSQ
    revision: int


class SegmentFiles:
    """The files of one gallery, in a folder of their own beside its database; made at the first writing."""

    def __init__(self, beside: Path) -> None:
        self._folder = beside / FOLDER

    def _path(self, collection: Collection, space: Space) -> Path:
        name = hashlib.sha256(space.space_id.encode()).hexdigest()[:16]  # a space id is not ours to name files with
        return self._folder / f"{collection.key}-{name}.graph"

    def save(self, collection: Collection, space: Space, segment: Segment) -> None:
        """Write a graph: a temporary file, flushed, renamed. A full disk costs only the next start's time."""
        writer = faiss.VectorIOWriter()
        faiss.write_index(segment.graph, writer, faiss.IO_FLAG_SKIP_STORAGE)
        body = segment.keys.astype("<i8").tobytes() + faiss.vector_to_array(writer.data).tobytes()
        header = json.dumps(_told(collection, space, segment.keys, segment.revision) | {"sha256": _digest(body)})
        path = self._path(collection, space)
        temporary = path.with_suffix(".tmp")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(MAGIC + len(header).to_bytes(4, "little") + header.encode() + body)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            log.warning("the graph of %s is not kept (%s); the next start builds it again", collection.name, error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    def load(self, collection: Collection, space: Space) -> Segment | None:
        """The graph of a collection's space, if there is one beyond doubt; a doubtful file is deleted."""
        path = self._path(collection, space)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as file:
                return _read(file.read(), collection, space)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, FormatError) as error:
            log.warning("the kept graph of %s is deleted and built again: %s", collection.name, error)
            self.delete(collection, space)
            return None

    def delete(self, collection: Collection, space: Space | None = None) -> None:
        """Remove a collection's graph in one space, or in all."""
        found = [self._path(collection, space)] if space else list(self._folder.glob(f"{collection.key}-*.graph"))
        for path in found:
            with contextlib.suppress(OSError):
                path.unlink()


def sound(path: Path) -> bool:
    """Whether a kept graph's bytes are those that were written; for who only looks."""
    try:
        data = path.read_bytes()
        start = len(MAGIC) + 4
        length = int.from_bytes(data[len(MAGIC) : start], "little")
        header = json.loads(data[start : start + length])
        return data[: len(MAGIC)] == MAGIC and bool(header["sha256"] == _digest(data[start + length :]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _told(collection: Collection, space: Space, keys: Keys, revision: int) -> dict[str, object]:
    """What a header says, but for the digest of the body."""
    return {
        "format": FORMAT,
        "collection": collection.key,
        "space_id": space.space_id,
        "dim": space.dim,
        "max_rev": revision,
        "count": len(keys),
        "ids_sha256": _digest(keys.astype("<i8").tobytes()),
        "faiss": faiss.__version__,
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(data: bytes, collection: Collection, space: Space) -> Segment:
    """A file's bytes to a segment.

    Raises:
        FormatError: they do not say what they should.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise FormatError(f"it does not begin with {MAGIC!r}")
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    if not 0 < length <= MAX_HEADER:
        raise FormatError(f"a header of {length} bytes, at most {MAX_HEADER} expected")
    header, body = json.loads(data[start : start + length]), data[start + length :]
    if header.pop("sha256") != _digest(body):  # before faiss reads a byte of it
        raise FormatError("its bytes changed since it was written")
    count, revision = int(header["count"]), int(header["max_rev"])
    keys = np.frombuffer(body, "<i8", count).astype(np.int64)
    if header != _told(collection, space, keys, revision):
        raise FormatError(f"it tells {header}, this is not what is served here")
    graph = faiss.deserialize_index(np.frombuffer(body, np.uint8, offset=8 * count))
    if not isinstance(graph, faiss.IndexHNSWSQ) or graph.d != space.dim or graph.ntotal != count:
        raise FormatError(f"it holds a {type(graph).__name__}, expected a graph of {count} rows of {space.dim}")
    if count and not bool((np.diff(keys) > 0).all()):
        raise FormatError("its keys do not ascend")
    return Segment(keys, graph, revision)
