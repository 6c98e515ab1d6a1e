"""What a searcher needs of an index: it names candidates, and the store has the last word on each.

An index may hold rounded features, walk a graph or live on another machine; the similarity that is
answered is always computed here, from the float32 feature in the store, so all kinds agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from resight.service.reads import Keys
from resight.service.runtime import Feature

Near = tuple[Keys, NDArray[np.float32]]
"""Keys int64 and cosine similarities float32 of one query, best first, equal ones by key."""

Truth = Callable[[Keys], tuple[Keys, Feature]]
"""The stored features, float32 (N, D), of those of the asked keys that the store still holds; ascending."""

SPARE = 8  # rows fetched beyond k, to settle ties in the first try
MAX_FETCH = 4096  # so many rows as near as the last one are copies of one crop; any of them will do


class VectorIndex(Protocol):
    """Features of one collection in one space, found by nearness. One thread uses it at a time.

    Attributes:
        kind: ``flat``, ``flat-fp16``, ``hnsw`` or ``milvus``.
        approximate: a search that is not told to be exact may miss some.
        revision: the last write of the store it has taken in; -1 = none yet.
        tail: entries searched one by one beside a graph.
    """

    kind: str
    approximate: bool
    revision: int

    def __len__(self) -> int:
        """Entries that can be found."""
        ...

    @property
    def tail(self) -> int: ...  # noqa: D102  # told above

    @property
    def tombstones(self) -> int:
        """Removed entries that still take room, never found."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        ...

    def add(self, keys: Keys, features: Feature) -> bool:
        """Take in features, float32 (N, D) unit rows, in ascending order of keys; those held are left alone.

        Returns:
            False when a key came that is lower than one held, and nothing was added: build it anew.
        """
        ...

    def remove(self, keys: Keys) -> None:
        """Take entries out; keys not held are no error."""
        ...

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = False) -> list[Near]:
        """The k nearest of each query.

        Args:
            queries: float32 (Q, D), unit rows.
            k: at least 1.
            among: only these keys, ascending, and then exactly; None = all.
            exact: miss none, whatever it takes.
        """
        ...

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """Features, float32 (N, D), of those of ``keys`` still held; ascending."""
        ...


def nothing(queries: Feature) -> list[Near]:
    """The answer of an empty index."""
    return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]


def best(query: Feature, keys: Keys, features: Feature, k: int) -> Near:
    """The k best of some candidates by a similarity summed row by row, which does not depend on its neighbours.

    Args:
        query: float32 (D,), unit length.
        keys: of the candidates, ascending.
        features: of the candidates, float32 (N, D), unit rows.
        k: at most so many are returned.
    """
    similarities = np.clip((features * query).sum(axis=1), -1.0, 1.0)
    order = np.argsort(-similarities, kind="stable")[:k]
    return keys[order], similarities[order]


def scored(queries: Feature, candidates: Sequence[Keys], truth: Truth, k: int) -> list[Near]:
    """The k best of each query's own candidates, by the features in the store; those it lost are left out."""
    wanted = np.unique(np.concatenate(candidates))
    keys, features = truth(wanted)
    if not len(keys):
        return nothing(queries)
    found = []
    for query, own in zip(queries, candidates, strict=True):
        own = np.sort(own)
        rows = np.searchsorted(keys, own)
        rows = rows[rows < len(keys)]
        rows = rows[np.isin(keys[rows], own)]
        found.append(best(query, keys[rows], features[rows], k))
    return found


def merged(parts: Sequence[list[Near]], k: int) -> list[Near]:
    """The k best of answers to the same queries over disjoint sets of entries."""
    out = []
    for answers in zip(*parts, strict=True):
        keys = np.concatenate([keys for keys, _ in answers])
        similarities = np.concatenate([similarities for _, similarities in answers])
        order = np.lexsort((keys, -similarities))[:k]
        out.append((keys[order], similarities[order]))
    return out
