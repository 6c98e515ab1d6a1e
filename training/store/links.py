"""Links: pairs of crops that an operator confirmed to show the same person, or two persons.

`links.parquet` is stored next to a store's index (docs/crop-store.md). Confirmed pairs are must-links, rejected pairs
cannot-links (Wagstaff et al., ICML 2001) of the clustering (`clustering.dbscan`); the judge uses them as labelled
pairs.

Letters: N crops, L links, G groups.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import breadth_first_order, connected_components

from resight.arrays import Ints
from resight.errors import StoreError
from resight.training.store.crops import CropStore, check_path, read_table, write_table

log = logging.getLogger(__name__)

LINKS_FILE = "links.parquet"
SCHEMA = pa.schema(
    [
        pa.field("path_a", pa.string(), nullable=False),
        pa.field("path_b", pa.string(), nullable=False),
        pa.field("same", pa.bool_(), nullable=False),
    ],
    metadata={b"resight.links.schema_version": b"1"},
)


class LinkPair(NamedTuple):
    """Two crops of a store, by path, and whether they show one person."""

    path_a: str
    path_b: str
    same: bool


@dataclass(frozen=True, eq=False)
class Links:
    """Links between rows of a store.

    Attributes:
        rows: int64 (L, 2).
        same: bool (L,), True for must-links, False for cannot-links; no chain of must-links joins two crops with a
            cannot-link.
        absent: number of pairs omitted because one of their crops is not among the rows.
        refuted: number of confirmed pairs omitted because a rejected pair contradicts them.
    """

    rows: Ints
    same: NDArray[np.bool_]
    absent: int = 0
    refuted: int = 0

    def __post_init__(self) -> None:
        assert self.rows.shape == (len(self.same), 2), (self.rows.shape, self.same.shape)

    def __len__(self) -> int:
        return len(self.same)

    @property
    def digest(self) -> str:
        """sha256 of the links in their order."""
        return hashlib.sha256(np.ascontiguousarray(self.rows, "<i8").tobytes() + self.same.tobytes()).hexdigest()

    def groups(self, count: int) -> Ints:
        """The groups of crops of one person: the transitive closure of the must-links.

        Args:
            count: N.

        Returns:
            int64 (N,), 0..G-1; a crop without must-links is a group of its own.
        """
        return _components(self.rows[self.same], count)


def write_links(root: Path, pairs: Iterable[tuple[str, str, bool]]) -> None:
    """Write the links of a store, replacing earlier ones atomically; duplicates are written once.

    Args:
        root: folder of the store.
        pairs: two paths relative to ``root``, and whether they show one person.

    Raises:
        StoreError: a path leaves the store, a crop is linked with itself, or a pair is both confirmed and rejected.
    """
    columns = list(zip(*_distinct(pairs, root / LINKS_FILE), strict=True)) or [(), (), ()]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    write_table(root / LINKS_FILE, pa.Table.from_arrays(arrays, schema=SCHEMA))


def read_links(root: Path) -> list[LinkPair]:
    """All links of a store, without duplicates, in the order written; empty if there is no file.

    Raises:
        StoreError: the file is damaged, of another version, or has pairs that `write_links` refuses.
    """
    path = root / LINKS_FILE
    try:
        table = read_table(path, SCHEMA, remedy="write the links again")
    except FileNotFoundError:
        return []
    return _distinct(zip(*(table.column(name).to_pylist() for name in SCHEMA.names), strict=True), path)


def _distinct(pairs: Iterable[tuple[str, str, bool]], path: Path) -> list[LinkPair]:
    """Each pair once, regardless of the order of its crops."""
    distinct: dict[tuple[str, str], LinkPair] = {}
    for one, other, same in pairs:
        check_path(one)
        check_path(other)
        if one == other:
            raise StoreError(f"{path} links {one} with itself: expected two different crops; remove the pair")
        pair = distinct.setdefault((min(one, other), max(one, other)), LinkPair(one, other, bool(same)))
        if pair.same != same:
            raise StoreError(
                f"{path} lists {one} and {other} both as one person and as two persons: expected one of them; "
                "keep the latest decision"
            )
    return list(distinct.values())


def links_of(store: CropStore) -> Links:
    """The links between the crops of a store or a subset of it, as row numbers.

    Pairs with other crops are omitted and counted. If a chain of confirmed pairs joins two rejected crops, at least
    one pair is wrong, but not known which: the shortest such chain is omitted, logged and counted, until no
    contradiction is left.

    Args:
        store: the links are read from its `root`.

    Raises:
        StoreError: see `read_links`.
    """
    number = {path: row for row, path in enumerate(store.paths)}
    pairs = read_links(store.root)
    known = [pair for pair in pairs if pair.path_a in number and pair.path_b in number]
    rows = np.array([(number[pair.path_a], number[pair.path_b]) for pair in known], np.int64).reshape(-1, 2)
    same = np.array([pair.same for pair in known], bool)
    consistent = _consistent(rows, same)
    if len(known) < len(pairs):
        log.info(
            "%d of %d linked pairs have crops that are not among these %d",
            len(pairs) - len(known),
            len(pairs),
            len(store),
        )
    if refuted := [known[index] for index in np.flatnonzero(~consistent)]:
        log.warning(
            "omitted %d confirmed pairs that contradict rejected ones, among them %s and %s: review them",
            len(refuted),
            *refuted[0][:2],
        )
    return Links(rows[consistent], same[consistent], len(pairs) - len(known), len(refuted))


def _consistent(rows: Ints, same: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which links are free of contradictions: bool (L,)."""
    crops, numbers = np.unique(rows, return_inverse=True)
    ends = numbers.reshape(rows.shape)  # (L, 2)
    used = np.ones(len(same), bool)
    while True:
        must = ends[same & used]
        component = _components(must, len(crops))
        violated = ends[~same & (component[ends[:, 0]] == component[ends[:, 1]])]
        if not len(violated):
            return used
        chains = _edges(_chains(must, violated, len(crops)), len(crops))
        used &= ~(same & np.isin(_edges(ends, len(crops)), chains))


def _components(pairs: Ints, count: int) -> Ints:
    graph = sparse.coo_matrix((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), (count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def _edges(pairs: Ints, count: int) -> Ints:
    """A key for each pair, independent of the order of its ends: (L,)."""
    return np.asarray(pairs.min(1) * count + pairs.max(1))


def _chains(must: Ints, violated: Ints, count: int) -> Ints:
    """The must-links of a shortest chain between the ends of each violated cannot-link: (E, 2)."""
    graph = sparse.coo_matrix((np.ones(len(must), np.int8), (must[:, 0], must[:, 1])), (count, count)).tocsr()
    found: list[Sequence[int]] = []
    for start in np.unique(violated[:, 0]):
        before = breadth_first_order(graph, start, directed=False)[1]
        for end in violated[violated[:, 0] == start, 1]:
            while end != start:
                found.append((end, before[end]))
                end = before[end]
    return np.array(found, np.int64)
