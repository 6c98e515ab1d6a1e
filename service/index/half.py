"""Larger collections in half the memory: float16 rows scanned by faiss, ordered by the stored float32 features.

The rounding of a similarity has a bound, so candidates are fetched until nothing nearer can be missing:
this index is exact. A removed row stays as a tombstone until the index is built anew.

Float16 rows for many queries at once: a block is widened once and multiplied with all of them, on every core.

faiss's own scan of such rows widens each row for each query, so a batch gains nothing there; and widening by itself
it does number by number. Here a row's bits are moved to where a float32 has them, in three steps over whole blocks:
sign and fraction fit, and the exponent comes out too small by `BIAS`, which the queries make up for. That is exact, for
numbers below float16's normal ones and for zero too. 200,000 x 512 on one core: 24 ms, faiss's decoder 110 ms, and
one query's scan 10 ms.

A copy of float16 rows on a GPU, scanned there; the CPU's rows stay, and take what the GPU cannot be trusted with.

faiss's GPU indexes are not thread-safe even for reading, so the thread that searches owns the resources. Only the
cuVS build looks at filters; whether this one does is tried when it starts.
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
BLOCK_ROWS = 2048  # rows: 4 MB of float32 at 512-d; 1024 does as well
MAX_BLOCK_FETCH = 256  # of each block and query; above, the lists would outgrow the rows
BIAS = 127 - 15  # of the exponents of float32 and float16
SHIFT = 23 - 10  # bits of their fractions
KEPT_BITS = np.int32(~0x70000000)  # the sign, and what came after its copies

ScanResult = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Similarities and rows, (Q, fetch), best first."""


def blocks_are_faster(queries: int, fetch: int) -> bool:
    """Whether blocks are faster than faiss's own scan."""
    return queries >= MIN_BLOCK_QUERIES and fetch <= MAX_BLOCK_FETCH


def scan_blocks(
    codes: faiss.IndexScalarQuantizer, queries: Feature, fetch: int, rows: NDArray[np.int64] | None
) -> ScanResult:
    """The nearest rows of each query, as faiss answers them.

    Args:
        codes: of float16.
        queries: float32 (Q, D), of numbers in -1..1.
        fetch: rows of each query; there are at least so many.
        rows: only these; None = all.

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
    """The nearest of one part of the rows; where there are fewer than ``fetch``, -inf and -1 follow them."""
    room = np.empty((min(BLOCK_ROWS, len(part)), halves.shape[1]), np.int32)
    heap = faiss.ResultHeap(len(scaled), fetch, keep_max=True)
    for start in range(part.start, part.stop, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, part.stop))
        bits = room[: block.stop - block.start]
        np.copyto(bits, halves[block] if rows is None else halves[rows[block]])
        np.left_shift(bits, SHIFT, out=bits)
        np.bitwise_and(bits, KEPT_BITS, out=bits)
        wide = bits.view(np.float32)  # 2^BIAS times too small
        near, places = faiss.knn(scaled, wide, min(fetch, len(wide)), metric=faiss.METRIC_INNER_PRODUCT)
        heap.add_result(near, places + start if rows is None else rows[block][places])
    heap.finalize()
    return heap.D, heap.I


def _merge_parts(parts: Sequence[ScanResult], fetch: int) -> ScanResult:
    """The best of all parts."""
    similarities, rows = (np.hstack(one) for one in zip(*parts, strict=True))
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :fetch]
    return np.take_along_axis(similarities, order, 1), np.take_along_axis(rows, order, 1)


log = logging.getLogger(__name__)

GPU_CHUNK_ROWS = 65_536  # rows sent at once: 128 MB of float32 at 512-d
GPU_SCRATCH_BYTES = 256 * 1024 * 1024  # for a scan; faiss takes 1.5 GB unless told
# Queries are rounded there as well as rows: 11 bits each, see `resight.service.index.half.ROUNDING`.
GPU_ROUNDING = 2 * (2.0**-11) + 3e-5


class GpuScan:
    """Scans rows that it follows.

    Args:
        codes: the rows on the CPU, only ever appended to.
        make: an empty GPU index of so many dimensions.
        filters: whether such an index looks at selectors.
    """

    rounding = GPU_ROUNDING

    def __init__(self, codes: faiss.IndexScalarQuantizer, make: Callable[[int], faiss.Index], *, filters: bool) -> None:
        self.codes, self.filters = codes, filters
        self._index = make(codes.d)

    def search(
        self, queries: Feature, fetch: int, *, params: faiss.SearchParameters
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As faiss's: similarities and rows (Q, fetch), after the rows that came since have been sent."""
        while (there := self._index.ntotal) < self.codes.ntotal:
            self._index.add(self.codes.reconstruct_n(there, min(GPU_CHUNK_ROWS, self.codes.ntotal - there)))
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = self._index.search(queries, fetch, params=params)
        return found


class Gpu:
    """The first GPU, for one searching thread."""

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
        """A copy of these rows, sent when it is first searched."""
        return GpuScan(codes, self._make, filters=self.filters)


def open_gpu(device: IndexDevice) -> Gpu | None:
    """The GPU if there is one and it is wanted.

    Raises:
        StartupError: it is asked for and there is none, or this faiss has no GPU in it.
    """
    found = device != "cpu" and faiss.get_num_gpus() > 0
    if device == "cuda" and not found:
        raise StartupError(
            "index_device cuda needs a GPU and faiss built for it, this one sees none: install resight[gpu], or use "
            "RESIGHT_INDEX_DEVICE=cpu"
        )
    return Gpu() if found else None


# float16 keeps 11 bits, so a component is off by 2^-11 of itself at most and a product of unit vectors by as much
# (Cauchy-Schwarz); the rest is for numbers below 2^-14, which keep fewer bits, and for the sum's own rounding.
ROUNDING = 2.0**-11 + 3e-5


class Rows:
    """Which key stands in which row, and which rows are dead. Keys ascend, so a key is found by bisection."""

    def __init__(self) -> None:
        self._keys, self._dead = np.empty(1024, np.int64), np.zeros(1024, bool)
        self.filled = self.dead = 0

    @property
    def keys(self) -> Keys:
        """All keys, dead ones too: a view."""
        return self._keys[: self.filled]

    @property
    def live_mask(self) -> NDArray[np.bool_]:
        """Which rows are not dead."""
        return ~self._dead[: self.filled]

    @property
    def live_keys(self) -> Keys:
        """A copy of the keys that are not dead."""
        return self.keys[self.live_mask]

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self._keys.nbytes + self._dead.nbytes

    def append(self, keys: Keys) -> None:
        """Add rows; the room doubles, so that many small additions stay cheap."""
        needed = self.filled + len(keys)
        if needed > len(self._keys):
            room = max(needed, 2 * len(self._keys))
            self._keys, self._dead = np.resize(self._keys, room), np.resize(self._dead, room)
        self._keys[self.filled : needed], self._dead[self.filled : needed] = keys, False
        self.filled = needed

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The living rows of keys; those not held are left out."""
        rows = np.searchsorted(self.keys, keys)
        rows = rows[rows < self.filled]
        rows = rows[np.isin(self.keys[rows], keys)]
        return rows[~self._dead[rows]]

    def contains(self, keys: Keys) -> bool:
        """Whether each key has, or had, a row."""
        return bool(np.isin(keys, self.keys).all())

    def mark_deleted(self, rows: NDArray[np.int64]) -> None:
        """Bury rows that `find` gave."""
        rows = np.unique(rows)
        self._dead[rows] = True
        self.dead += len(rows)

    def selector(self, rows: NDArray[np.int64] | None) -> faiss.IDSelector | None:
        """One bit a row: these rows, or all that live; None when that is every row."""
        if rows is None and not self.dead:
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
        truth: the float32 features in the store.
        codes: rows to begin with, whose keys are told to `adopt`; None = empty.
    """

    kind, approximate, tail = "flat-fp16", False, 0

    def __init__(self, dim: int, truth: FeatureLookup, codes: faiss.IndexScalarQuantizer | None = None) -> None:
        self.codes = codes or faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self.rows = Rows()
        self.gpu: GpuScan | None = None
        self.revision = -1
        self._truth = truth

    def __len__(self) -> int:
        return self.rows.filled - self.rows.dead

    @property
    def tombstones(self) -> int:
        """Removed rows that still take room."""
        return self.rows.dead

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.rows.filled * 2 * self.codes.d + self.rows.nbytes

    def add(self, keys: Keys, features: Feature) -> bool:
        """Append features; see `resight.service.index.base.VectorIndex.add`."""
        new = keys > (self.rows.keys[-1] if self.rows.filled else -1)
        if not self.rows.contains(keys[~new]):
            return False
        if new.any():
            self.codes.add(np.ascontiguousarray(features[new]))
            self.rows.append(keys[new])
        return True

    def remove(self, keys: Keys) -> None:
        """Bury entries; keys not held are no error."""
        self.rows.mark_deleted(self.rows.find(keys))

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """From the store, whole."""
        return self._truth(keys)

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = True) -> list[Candidates]:
        """The k nearest of each query, always exactly; see `resight.service.index.base.VectorIndex.search`."""
        rows = None if among is None else self.rows.find(among)
        count = len(self) if rows is None else len(rows)
        if not count:
            return no_candidates(queries)
        fetch = min(k + SPARE_CANDIDATES, count)
        while True:
            rounded, found, rounding = self._scan(queries, fetch, rows)
            near = rescore_candidates(queries, [self.rows.keys[own[own >= 0]] for own in found], self._truth, k)
            if fetch >= min(count, max(MAX_FETCH, k)) or all(
                len(keys) == k and last + rounding < similarities[-1]
                for (keys, similarities), last in zip(near, rounded[:, -1], strict=True)
            ):
                return near
            fetch = min(fetch * 4, count)

    def _scan(
        self, queries: Feature, fetch: int, rows: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], float]:
        """Rounded similarities and rows (Q, fetch), on whatever is fastest, and how far off they may be."""
        selector = self.rows.selector(rows)
        parameters = faiss.SearchParameters()
        if selector is not None:
            parameters.sel = selector
        if self.gpu is not None and (selector is None or self.gpu.filters):
            return (*self.gpu.search(queries, fetch, params=parameters), self.gpu.rounding)
        if blocks_are_faster(len(queries), fetch):
            chosen = np.flatnonzero(self.rows.live_mask) if rows is None and self.rows.dead else rows
            return (*scan_blocks(self.codes, queries, fetch, chosen), ROUNDING)
        return (*self.codes.search(queries, fetch, params=parameters), ROUNDING)
