"""The exact index of larger collections in half the memory: a float16 scan, re-scored with the stored float32 features.

The rounding error of a similarity is bounded, so candidates are fetched until no nearer entry can be missing. A removed
row stays as a tombstone until the index is rebuilt. Three scans are available:

- faiss's own, for few queries. It converts each row for each query, so a batch gains nothing.
- `scan_blocks`, for batches: a block of rows is converted to float32 once and multiplied with all queries, on all
  cores. The bits of a float16 are moved to their places in a float32, in three steps over the whole block: sign and
  fraction fit, and the exponent comes out too small by `BIAS`, for which the queries are scaled. The conversion is
  exact, also for subnormal numbers and zero. 200,000 x 512 on one core: 24 ms, faiss's decoder 110 ms, a scan for
  one query 10 ms.
- `GpuScan`, on a copy of the rows on a GPU. The rows on the CPU are kept, for searches with filters if the GPU index
  ignores them: only faiss's cuVS build applies selectors, which is tested at the start. faiss's GPU indexes are not
  thread-safe even for reading, so the searching thread owns the resources.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
from numpy.typing import NDArray

from resight.arrays import Feature
from resight.errors import StartupError
from resight.machine import cores
from resight.service.index.base import (
    MAX_FETCH,
    SPARE_CANDIDATES,
    Candidates,
    FeatureLookup,
    IndexDevice,
    applies_filter,
    no_candidates,
    rescore_candidates,
)
from resight.service.storage.reads import Keys

MIN_BLOCK_QUERIES = 6  # 200,000 x 512, one core: 4 queries 51 ms, by faiss's scan 40; 6: 55 and 60; 32: 112 and 320
BLOCK_ROWS = 2048  # 4 MB of float32 at 512-d; 1024 is as fast
MAX_BLOCK_FETCH = 256  # per block and query; above, the result lists would be larger than the rows
BIAS = 127 - 15  # difference of the exponents' biases of float32 and float16
SHIFT = 23 - 10  # difference of the fractions' bits
KEPT_BITS = np.int32(~0x70000000)  # clears the copies of the sign bit that the sign extension makes

ScanResult = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Similarities float32 and rows int64, (Q, fetch), best first."""


def blocks_are_faster(queries: int, fetch: int) -> bool:
    """Whether `scan_blocks` is faster than faiss's own scan."""
    return queries >= MIN_BLOCK_QUERIES and fetch <= MAX_BLOCK_FETCH


def scan_blocks(
    codes: faiss.IndexScalarQuantizer, queries: Feature, fetch: int, rows: NDArray[np.int64] | None
) -> ScanResult:
    """The nearest rows of each query, in the form of a faiss search.

    Args:
        codes: float16 rows.
        queries: float32 (Q, D), values in -1..1.
        fetch: number of rows per query, at most as many as there are.
        rows: search only these; None = all.

    Returns:
        Similarities float32 and rows int64, (Q, fetch), best first.
    """
    count, width = codes.ntotal, codes.code_size
    raw = faiss.rev_swig_ptr(codes.codes.data(), count * width)  # a view, valid until an add
    halves = raw.view(np.int16).reshape(count, codes.d)
    scaled = np.ascontiguousarray(queries * np.float32(2.0**BIAS))
    total = count if rows is None else len(rows)
    parts = min(cores(), -(-total // BLOCK_ROWS))
    ends = [total * part // parts for part in range(parts + 1)]

    def scan(part: int) -> ScanResult:
        faiss.omp_set_num_threads(1)  # of this thread
        return _scan_part(halves, scaled, fetch, rows, range(ends[part], ends[part + 1]))

    with ThreadPoolExecutor(parts, thread_name_prefix="scan") as pool:
        return _merge_parts(list(pool.map(scan, range(parts))), fetch)


def _scan_part(
    halves: NDArray[np.int16], scaled: Feature, fetch: int, rows: NDArray[np.int64] | None, part: range
) -> ScanResult:
    """The nearest of one part of the rows; padded with -inf and -1 where there are fewer than ``fetch``."""
    room = np.empty((min(BLOCK_ROWS, len(part)), halves.shape[1]), np.int32)
    heap = faiss.ResultHeap(len(scaled), fetch, keep_max=True)
    for start in range(part.start, part.stop, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, part.stop))
        bits = room[: block.stop - block.start]
        np.copyto(bits, halves[block] if rows is None else halves[rows[block]])
        np.left_shift(bits, SHIFT, out=bits)
        np.bitwise_and(bits, KEPT_BITS, out=bits)
        wide = bits.view(np.float32)  # too small by a factor of 2^BIAS
        near, places = faiss.knn(scaled, wide, min(fetch, len(wide)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(near, places + start if rows is None else rows[block][places])
    heap.finalize()
    return heap.D, heap.I


def _merge_parts(parts: Sequence[ScanResult], fetch: int) -> ScanResult:
    """The best ``fetch`` rows of all parts."""
    similarities, rows = (np.hstack(one) for one in zip(*parts, strict=True))
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :fetch]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)


log = logging.getLogger(__name__)

GPU_CHUNK_ROWS = 65_536  # rows sent at once: 128 MB of float32 at 512-d
GPU_SCRATCH_BYTES = 256 * 1024 * 1024  # for a scan; faiss's default is 1.5 GB
# On the GPU queries are rounded as well as rows, to 11 bits each; see `ROUNDING`.
GPU_ROUNDING = 2 * (2.0**-11) + 3e-5


class GpuScan:
    """Scans a copy of rows on the GPU, which is updated before each search.

    Args:
        codes: the rows on the CPU, which are only appended to.
        make: creates an empty GPU index of the given dimension.
        filters: whether such an index applies selectors.
    """

    rounding = GPU_ROUNDING

    def __init__(self, codes: faiss.IndexScalarQuantizer, make: Callable[[int], faiss.Index], *, filters: bool) -> None:
        self.codes, self.filters = codes, filters
        self._index = make(codes.d)

    def search(
        self, queries: Feature, fetch: int, *, params: faiss.SearchParameters
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Send new rows to the GPU, then search as faiss does: similarities and rows (Q, fetch)."""
        while (sent := self._index.ntotal) < self.codes.ntotal:
            self._index.add(self.codes.reconstruct_n(sent, min(GPU_CHUNK_ROWS, self.codes.ntotal - sent)))
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = self._index.search(queries, fetch, params=params)
        return found


class Gpu:
    """The first GPU's resources, for one searching thread."""

    def __init__(self) -> None:
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(GPU_SCRATCH_BYTES)
        self.filters = applies_filter(self._make(8))
        log.info("searching on the GPU filters=%s", self.filters)

    def _make(self, dim: int) -> faiss.Index:
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        index: faiss.Index = faiss.GpuIndexFlatIP(self._resources, dim, config)
        return index

    def scan(self, codes: faiss.IndexScalarQuantizer) -> GpuScan:
        """A scan over a GPU copy of these rows, which is made at the first search."""
        return GpuScan(codes, self._make, filters=self.filters)


def open_gpu(device: IndexDevice) -> Gpu | None:
    """The GPU, if there is one and ``device`` allows it.

    Raises:
        StartupError: ``device`` is ``cuda``, and there is no GPU or this build of faiss has no GPU support.
    """
    found = device != "cpu" and faiss.get_num_gpus() > 0
    if device == "cuda" and not found:
        raise StartupError(
            "index_device cuda needs a GPU and faiss built for it, this one sees none: install resight[gpu], or use "
            "RESIGHT_INDEX_DEVICE=cpu"
        )
    return Gpu() if found else None


# float16 has 11 significant bits, so a component's relative error is at most 2^-11, and so is the error of the product
# of two unit vectors (Cauchy-Schwarz). The rest is for numbers below 2^-14, which have fewer bits, and for the rounding
# of the sum.
ROUNDING = 2.0**-11 + 3e-5


class Rows:
    """Maps rows to keys, and records which rows are deleted. Keys ascend, so a key is found by bisection.

    Attributes:
        filled: number of rows, including deleted ones.
        deleted: number of deleted rows.
    """

    def __init__(self) -> None:
        self._keys, self._deleted = np.empty(1024, np.int64), np.zeros(1024, bool)
        self.filled = self.deleted = 0

    @property
    def keys(self) -> Keys:
        """A view of all keys, including deleted ones."""
        return self._keys[: self.filled]

    @property
    def live_mask(self) -> NDArray[np.bool_]:
        """Bool (N,): which rows are not deleted."""
        return ~self._deleted[: self.filled]

    @property
    def live_keys(self) -> Keys:
        """A copy of the keys that are not deleted."""
        return self.keys[self.live_mask]

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self._keys.nbytes + self._deleted.nbytes

    def append(self, keys: Keys) -> None:
        """Add rows; the capacity doubles when exceeded, so that many small additions are cheap."""
        needed = self.filled + len(keys)
        if needed > len(self._keys):
            capacity = max(needed, 2 * len(self._keys))
            self._keys, self._deleted = np.resize(self._keys, capacity), np.resize(self._deleted, capacity)
        self._keys[self.filled : needed], self._deleted[self.filled : needed] = keys, False
        self.filled = needed

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The rows of keys that are not deleted; unknown keys are left out."""
        rows = np.searchsorted(self.keys, keys)
        rows = rows[rows < self.filled]
        rows = rows[np.isin(self.keys[rows], keys)]
        return rows[~self._deleted[rows]]

    def contains_all(self, keys: Keys) -> bool:
        """Whether each key has a row, deleted or not."""
        return bool(np.isin(keys, self.keys).all())

    def mark_deleted(self, rows: NDArray[np.int64]) -> None:
        """Mark rows returned by `find` as deleted."""
        rows = np.unique(rows)
        self._deleted[rows] = True
        self.deleted += len(rows)

    def selector(self, rows: NDArray[np.int64] | None) -> faiss.IDSelector | None:
        """A bitmap of these rows, or with None of all that are not deleted; returns None when none is deleted."""
        if rows is None and not self.deleted:
            return None
        chosen = np.zeros(self.filled, bool) if rows is not None else self.live_mask
        if rows is not None:
            chosen[rows] = True
        bits = np.packbits(chosen, bitorder="little")
        return faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg,arg-type]  # faiss types its C++ signature only


class HalfIndex:
    """A `resight.service.index.base.VectorIndex` of float16 rows.

    Args:
        dim: length of the features.
        lookup: reads the float32 features from the store.
        codes: existing rows, whose keys the caller appends to ``rows``; None = empty.
    """

    kind, approximate, tail = "flat-fp16", False, 0

    def __init__(self, dim: int, lookup: FeatureLookup, codes: faiss.IndexScalarQuantizer | None = None) -> None:
        self.codes = codes or faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self.rows = Rows()
        self.gpu: GpuScan | None = None
        self.revision = -1
        self._lookup = lookup

    def __len__(self) -> int:
        return self.rows.filled - self.rows.deleted

    @property
    def tombstones(self) -> int:
        """Number of removed rows that still use memory."""
        return self.rows.deleted

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.rows.filled * 2 * self.codes.d + self.rows.nbytes

    def add(self, keys: Keys, features: Feature) -> bool:
        """Append features; see `resight.service.index.base.VectorIndex.add`."""
        new = keys > (self.rows.keys[-1] if self.rows.filled else -1)
        if not self.rows.contains_all(keys[~new]):
            return False
        if new.any():
            self.codes.add(np.ascontiguousarray(features[new]))
            self.rows.append(keys[new])
        return True

    def remove(self, keys: Keys) -> None:
        """Turn entries into tombstones; unknown keys are no error."""
        self.rows.mark_deleted(self.rows.find(keys))

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """Those of ``keys`` that the store has, and their float32 features."""
        return self._lookup(keys)

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = True) -> list[Candidates]:
        """The k nearest entries of each query, always exact; see `resight.service.index.base.VectorIndex.search`."""
        rows = None if among is None else self.rows.find(among)
        count = len(self) if rows is None else len(rows)
        if not count:
            return no_candidates(queries)
        fetch = min(k + SPARE_CANDIDATES, count)
        while True:
            rounded, found, rounding = self._scan(queries, fetch, rows)
            near = rescore_candidates(queries, [self.rows.keys[own[own >= 0]] for own in found], self._lookup, k)
            if fetch >= min(count, max(MAX_FETCH, k)) or all(
                len(keys) == k and last + rounding < similarities[-1]
                for (keys, similarities), last in zip(near, rounded[:, -1], strict=True)
            ):
                return near
            fetch = min(fetch * 4, count)

    def _scan(
        self, queries: Feature, fetch: int, rows: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], float]:
        """Rounded similarities and rows (Q, fetch) by the fastest scan, and the bound of the rounding error."""
        selector = self.rows.selector(rows)
        parameters = faiss.SearchParameters()
        if selector is not None:
            parameters.sel = selector
        if self.gpu is not None and (selector is None or self.gpu.filters):
            return (*self.gpu.search(queries, fetch, params=parameters), self.gpu.rounding)
        if blocks_are_faster(len(queries), fetch):
            chosen = np.flatnonzero(self.rows.live_mask) if rows is None and self.rows.deleted else rows
            return (*scan_blocks(self.codes, queries, fetch, chosen), ROUNDING)
        return (*self.codes.search(queries, fetch, params=parameters), ROUNDING)
