"""A copy of float16 rows on a GPU, scanned there; the CPU's rows stay, and take what the GPU cannot be trusted with.

faiss's GPU indexes are not thread-safe even for reading, so the thread that searches owns the resources. Only the
cuVS build looks at filters; whether this one does is tried when it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from resight.errors import StartupError
from resight.service.runtime import Feature
from resight.service.self_test import obeys_filter

log = logging.getLogger(__name__)

PIECE = 65_536  # rows sent at once: 128 MB of float32 at 512-d
TEMPORARY = 256 * 1024 * 1024  # for a scan; faiss takes 1.5 GB unless told
# Queries are rounded there as well as rows: 11 bits each, see `resight.service.index_half.ROUNDING`.
ROUNDING = 2 * (2.0**-11) + 3e-5

Device = Literal["auto", "cpu", "cuda"]


class GpuScan:
    """Scans rows that it follows.

    Args:
        codes: the rows on the CPU, only ever appended to.
        make: an empty GPU index of so many dimensions.
        filters: whether such an index looks at selectors.
    """

    rounding = ROUNDING

    def __init__(self, codes: faiss.IndexScalarQuantizer, make: Callable[[int], faiss.Index], *, filters: bool) -> None:
        self.codes, self.filters = codes, filters
        self._index = make(codes.d)

    def search(
        self, queries: Feature, fetch: int, *, params: faiss.SearchParameters
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """As faiss's: similarities and rows (Q, fetch), after the rows that came since have been sent."""
        while (there := self._index.ntotal) < self.codes.ntotal:
            self._index.add(self.codes.reconstruct_n(there, min(PIECE, self.codes.ntotal - there)))
        found: tuple[NDArray[np.float32], NDArray[np.int64]] = self._index.search(queries, fetch, params=params)
        return found


class Gpu:
    """The first GPU, for one searching thread."""

    def __init__(self) -> None:
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(TEMPORARY)
        self.filters = obeys_filter(self._make(8))
        log.info("searching on the GPU filters=%s", self.filters)

    def _make(self, dim: int) -> faiss.Index:
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        index: faiss.Index = faiss.GpuIndexFlatIP(self._resources, dim, config)
        return index

    def scan(self, codes: faiss.IndexScalarQuantizer) -> GpuScan:
        """A copy of these rows, sent when it is first searched."""
        return GpuScan(codes, self._make, filters=self.filters)


def open_gpu(device: Device) -> Gpu | None:
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
