"""The crop store: a folder of JPEG files with an index table, and the Parquet tables of a store in general.

`index.parquet` has the columns `path, camera, time_s, track, person, split`; docs/crop-store.md defines the format.
Row i of the index is sample i in everything derived from the store. Training never reads `person`. Tables are replaced
atomically and read with a schema check; the schema version is part of their metadata.

Letters: N crops, C cameras.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from resight.errors import ImageError, SiteError, StoreError
from resight.files import write_atomic
from resight.image import MAX_BYTES, decode


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table with page checksums, replacing an earlier one atomically."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    write_atomic(path, buffer.getvalue())


def read_table(path: Path, schema: pa.Schema, *, remedy: str) -> pa.Table:
    """Read the columns of a schema; the file may have others.

    Args:
        path: the file.
        schema: names, types and nullability of the columns; its only metadata entry is the version.
        remedy: what the user can do if the file cannot be read, for the error message.

    Raises:
        FileNotFoundError: the file does not exist.
        StoreError: it is damaged, has another version, or its columns do not match the schema.
    """
    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        table.validate(full=True)  # invalid UTF-8 among others
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}): {remedy}") from error
    ((key, expected),) = schema.metadata.items()
    version = (table.schema.metadata or {}).get(key, b"none").decode(errors="replace")
    if version != expected.decode():
        raise StoreError(
            f"{path} has schema version {version}, this program reads {expected.decode()}: use the resight that wrote "
            f"it, or {remedy} as docs/crop-store.md says"
        )
    missing = [name for name in schema.names if name not in table.schema.names]
    if missing:
        raise StoreError(f"{path} lacks the columns {', '.join(missing)}: {remedy}, as docs/crop-store.md says")
    for field in schema:
        column = table.column(field.name)
        if column.type != field.type or (column.null_count and not field.nullable):
            raise StoreError(
                f"{path}: column {field.name} must be {field.type}{'' if field.nullable else ' without nulls'}, found "
                f"{column.type} with {column.null_count} nulls: {remedy}, as docs/crop-store.md says"
            )
    return table.select(schema.names)


log = logging.getLogger(__name__)

INDEX_FILE = "index.parquet"
SCHEMA_VERSION = 1
VERSION_KEY = b"resight.crop_store.schema_version"
UNKNOWN = -1
SPLITS = ("train", "query", "gallery")
COLUMNS = ("cameras", "times_s", "tracks", "persons")  # of a `CropStore`, besides its paths
SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("camera", pa.string(), nullable=False),
        pa.field("time_s", pa.float64()),
        pa.field("track", pa.int64()),
        pa.field("person", pa.int64()),
        pa.field("split", pa.string(), nullable=False),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)


@dataclass(frozen=True, eq=False)  # comparing arrays gives arrays
class CropStore:
    """Crops in a fixed order.

    Attributes:
        root: folder the paths are relative to.
        paths: N relative POSIX paths.
        cameras: int64 (N,), 0..C-1, into `camera_names`.
        camera_names: C names; all splits of a site share them.
        times_s: float64 (N,), seconds on the site's clock, NaN where unknown.
        tracks: int64 (N,), -1 where unknown.
        persons: int64 (N,), -1 where unknown, 0 for persons that match no query (Market-1501's distractors).

    Raises:
        StoreError: lengths differ, a camera has no name, a number is out of range, or a path leaves the root.
    """

    root: Path
    paths: tuple[str, ...]
    cameras: NDArray[np.int64]
    camera_names: tuple[str, ...]
    times_s: NDArray[np.float64]
    tracks: NDArray[np.int64]
    persons: NDArray[np.int64]

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in COLUMNS}
        if any(length != len(self.paths) for length in lengths.values()):
            raise StoreError(f"a crop store needs one value per crop, found {len(self.paths)} paths and {lengths}")
        if len(self.paths) and not 0 <= self.cameras.min() <= self.cameras.max() < len(self.camera_names):
            raise StoreError(f"cameras must index the {len(self.camera_names)} camera names, found others")
        if min(self.tracks.min(initial=0), self.persons.min(initial=0)) < UNKNOWN or np.isinf(self.times_s).any():
            raise StoreError(
                f"tracks and persons must be at least 0, or {UNKNOWN} if unknown, and times finite, or NaN if unknown: "
                "found other values"
            )
        for path in self.paths:
            check_path(path)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> bytes:
        """The encoded bytes of one crop; of a file over 2 MiB only the first part, which `decode` refuses as too large.

        Raises:
            StoreError: the file is missing, not a regular file, or a link that leaves the store.
        """
        try:
            with self.file(row).open("rb") as file:
                return file.read(MAX_BYTES + 1)
        except OSError as error:
            raise _unreadable(self.root / self.paths[row], error) from error

    def file(self, row: int) -> Path:
        """The file of one crop, with links resolved.

        Raises:
            StoreError: see `read`.
        """
        path = self.root / self.paths[row]
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise _unreadable(path, error) from error
        if not real.is_relative_to(self.root.resolve()):
            raise StoreError(f"{path} is a link that leaves the store: copy the crop into the store")
        if not real.is_file():  # opening a pipe would block
            raise StoreError(f"{path} is not a regular file: expected a JPEG, PNG or WebP file")
        return real

    def subset(self, rows: ArrayLike) -> CropStore:
        """The given rows, in that order; cameras keep their numbers."""
        chosen = np.asarray(rows, np.int64)
        columns: dict[str, Any] = {name: getattr(self, name)[chosen] for name in COLUMNS}
        return replace(self, paths=tuple(self.paths[row] for row in chosen), **columns)

    @property
    def has_persons(self) -> bool:
        """Whether the person of every crop is known."""
        return len(self) > 0 and bool((self.persons != UNKNOWN).all())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the rows and the crops' bytes: equal stores have equal fingerprints in any folder.

        Raises:
            StoreError: a crop cannot be read.
        """
        digest = hashlib.sha256()
        for row, path in enumerate(self.paths):
            camera, time_s = self.camera_names[self.cameras[row]], float(self.times_s[row])
            crop = hashlib.sha256(self.read(row)).hexdigest()
            digest.update(repr((path, camera, time_s, int(self.tracks[row]), int(self.persons[row]), crop)).encode())
        return digest.hexdigest()


def check_path(path: str) -> None:
    """Check that a path is relative and inside the store's folder.

    Raises:
        StoreError: it is not, or it is not UTF-8.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in parts or not parts:
        raise StoreError(f"path {path!r} leaves the store: expected one relative to its folder, without '..'")
    if not path.isascii():
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise StoreError(f"path {path!r} is not UTF-8: rename the file") from error


def _unreadable(path: Path, error: Exception) -> StoreError:
    reason = getattr(error, "strerror", None) or error
    return StoreError(f"crop {path} cannot be read ({reason}): restore it or rebuild the index")


def camera_order(name: str) -> tuple[Sequence[str | int], str]:
    """Sort key of camera names that orders c2 before c10; equal only for equal names."""
    parts = re.split(r"(\d+)", name)  # text and numbers alternate, so that equal types are compared
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def write_store(root: Path, store: CropStore, splits: Sequence[str]) -> None:
    """Write the index of crops that already exist under ``root``, replacing an earlier index atomically.

    Args:
        root: folder of the store.
        store: its rows, with paths relative to ``root``.
        splits: "train", "query" or "gallery" for each row.

    Raises:
        StoreError: an unknown split, a wrong number of splits, or a crop listed twice.
    """
    if len(splits) != len(store) or not set(splits) <= set(SPLITS):
        found = f"{len(splits)}: {', '.join(sorted(set(splits)))}"
        raise StoreError(f"expected one of {', '.join(SPLITS)} for each of {len(store)} crops, found {found}")
    _refuse_repeats(store, root)
    table = pa.table(
        {
            "path": list(store.paths),
            "camera": [store.camera_names[camera] for camera in store.cameras],
            "time_s": pa.array(store.times_s, from_pandas=True),
            "track": pa.array(store.tracks, mask=store.tracks == UNKNOWN),
            "person": pa.array(store.persons, mask=store.persons == UNKNOWN),
            "split": list(splits),
        },
        schema=SCHEMA,
    )
    write_table(root / INDEX_FILE, table)


def is_store(root: Path) -> bool:
    """Whether a folder has an index."""
    return (root / INDEX_FILE).is_file()


def open_store(root: Path) -> dict[str, CropStore]:
    """Read a crop store: one `CropStore` per split that has rows, all with the same camera names.

    Raises:
        StoreError: the index is missing, damaged or of another schema version, or it has invalid rows.
    """
    table = _read_index(root)
    columns = {name: table.column(name) for name in SCHEMA.names}
    names = columns["camera"].to_pylist()
    camera_names = sorted(set(names), key=camera_order)
    number = {name: index for index, name in enumerate(camera_names)}
    store = CropStore(
        root,
        tuple(columns["path"].to_pylist()),
        np.array([number[name] for name in names], np.int64),
        tuple(camera_names),
        columns["time_s"].fill_null(np.nan).to_numpy(),
        columns["track"].fill_null(UNKNOWN).to_numpy(),
        columns["person"].fill_null(UNKNOWN).to_numpy(),
    )
    _refuse_repeats(store, root)
    splits = np.asarray(columns["split"].to_pylist(), dtype=str)
    unknown = set(splits) - set(SPLITS)
    if unknown:
        raise StoreError(f"{root / INDEX_FILE} has splits {sorted(unknown)}: expected {', '.join(SPLITS)}")
    return {split: store.subset(np.flatnonzero(splits == split)) for split in SPLITS if (splits == split).any()}


def _refuse_repeats(store: CropStore, root: Path) -> None:
    """Refuse a crop listed twice: in two splits it could be its own match."""
    seen: set[str] = set()
    for path in store.paths:
        if path in seen:
            raise StoreError(f"{root / INDEX_FILE} lists {path} twice: expected each crop in one row")
        seen.add(path)


def _read_index(root: Path) -> pa.Table:
    """Read the index with a schema check."""
    try:
        return read_table(root / INDEX_FILE, SCHEMA, remedy="rebuild the index")
    except FileNotFoundError as error:
        raise StoreError(f"{root} is not a crop store: {INDEX_FILE} is missing") from error


def check_crops(store: CropStore, *, progress: Callable[[int], None] = lambda done: None) -> Mapping[int, str]:
    """Decode every crop once and report those that cannot be used.

    Returns:
        row -> reason, in the order of the rows; empty if all crops are usable.
    """

    def problem(row: int) -> str:
        try:
            decode(store.read(row))
        except (ImageError, StoreError) as error:
            return str(error)
        finally:
            progress(1)
        return ""

    with ThreadPoolExecutor(thread_name_prefix="check") as pool:
        return {row: reason for row, reason in enumerate(pool.map(problem, range(len(store)))) if reason}


def usable_crops(store: CropStore, *, progress: Callable[[int], None] = lambda done: None) -> CropStore:
    """The store without the crops that cannot be decoded; each is logged with the reason.

    Raises:
        SiteError: no crop can be decoded.
    """
    unreadable = check_crops(store, progress=progress)
    for row, reason in unreadable.items():
        log.warning("skipped %s: %s", store.paths[row], reason)
    if len(unreadable) == len(store):
        raise SiteError(
            f"none of the {len(store)} crops under {store.root} can be decoded: expected JPEG, PNG or WebP files"
        )
    return store.subset([row for row in range(len(store)) if row not in unreadable])
