"""Half a second at start: how this machine's faiss scans fastest, instead of numbers from another one.

faiss >= 1.14.2 splits a lone query over OpenMP threads and turns to matrix products late; both were chosen
on many-core servers. On few cores splitting took 3.5-8 times the CPU time, and products won from 4-8 queries
on (100 k x 512, 64 queries: 8.1 -> 1.3 ms each).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import faiss
import numpy as np

from resight.service.runtime import Feature

log = logging.getLogger(__name__)

BUDGET_S = 0.5
ROWS = 8192  # 16 MB at 512-d: more than the cores' own caches hold, as a real gallery is
QUERIES = (2, 3, 4, 6, 8, 12, 16, 24)
NEVER = 2**31 - 1  # faiss's threshold is a C int
# A split query must be this much faster to be worth it: requests beside it want the other cores too.
SPLIT_GAIN = 0.6


@dataclass(frozen=True)
class Tuning:
    """What was found: OpenMP threads of a search, and from how many queries on matrix products win."""

    threads: int = 1
    blas_queries: int = 6  # in the middle of what was measured on 2 to 8 cores; for who does not tune

    def apply(self, dim: int) -> None:
        """Set faiss up for the calling thread. The threshold is the process's, so one thread searches."""
        faiss.omp_set_num_threads(self.threads)
        faiss.cvar.distance_compute_blas_threshold = self.blas_queries * dim


@cache
def tune(dim: int, *, budget_s: float = BUDGET_S) -> Tuning:
    """Time exact searches both ways on random rows, once in a process; `Tuning.apply` is for each thread.

    Args:
        dim: length of the features to be searched.
        budget_s: about how long it may take.
    """
    started = time.perf_counter()
    rows = np.random.default_rng(0).standard_normal((ROWS, dim), np.float32)
    index = faiss.IndexFlatIP(dim)
    index.add(rows)
    share_s = budget_s / (2 + len(QUERIES))

    def lone(threads: int) -> float:
        faiss.omp_set_num_threads(threads)
        faiss.cvar.distance_compute_blas_threshold = NEVER
        return _best_s(lambda: index.search(rows[:1], 10), share_s)

    cores = faiss.omp_get_max_threads()
    threads = cores if cores > 1 and lone(cores) < SPLIT_GAIN * lone(1) else 1
    faiss.omp_set_num_threads(threads)
    found = Tuning(threads, next((count for count in QUERIES if _products_win(index, rows[:count], share_s)), 32))
    found.apply(dim)
    log.info(
        "search tuned omp_threads=%d blas_queries=%d dim=%d seconds=%.2f",
        found.threads,
        found.blas_queries,
        dim,
        time.perf_counter() - started,
    )
    return found


def _products_win(index: faiss.IndexFlatIP, queries: Feature, limit_s: float) -> bool:
    times = []
    for threshold in (NEVER, 0):
        faiss.cvar.distance_compute_blas_threshold = threshold
        times.append(_best_s(lambda: index.search(queries, 10), limit_s / 2))
    return times[1] < times[0]


def _best_s(run: Callable[[], object], limit_s: float) -> float:
    """The shortest of the runs that fit into a time, of at least two: the first one warms up."""
    best, stop = float("inf"), time.perf_counter() + limit_s
    done = 0
    while done < 2 or time.perf_counter() < stop:
        started = time.perf_counter()
        run()
        best, done = min(best, time.perf_counter() - started), done + 1
    return best
